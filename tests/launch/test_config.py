"""The configuration: defaults, sources, and errors that name key, place and cure in one line."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.launch.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LaunchConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    load_config,
)
from moesaic.runtime import DebugConfig, MigrationConfig, RouterConfig, RuntimeConfig
from moesaic.runtime.moved_options import MOVED, MovedOptionWarning
from tests.helpers.configs import MOVED_VALUES, moved_config


def message_of(path: Path | None, *assignments: str) -> str:
    """The error of a wrong configuration."""
    with pytest.raises(ValueError) as caught:
        load_config(path, assignments)
    return str(caught.value)


def test_defaults_need_no_file() -> None:
    """And a value that is given leaves its section's other defaults, the demo's own included, as they were."""
    assert load_config() == Config()
    router = load_config(None, ["router.z_loss_coef=0.5"]).router
    assert router == dataclasses.replace(Config().router, z_loss_coef=0.5)


def test_later_sources_win(tmp_path: Path) -> None:
    """Defaults, then the file, then each --set in order."""
    path = tmp_path / "run.toml"
    path.write_text("[train]\nsteps = 7\nbatch_size = 4\n[data]\npath = 'a'\n")
    config = load_config(path, ["train.steps=8", "train.steps=9"])
    assert (config.train.steps, config.train.batch_size, config.data.path) == (9, 4, "a")
    assert config.model == ModelConfig()


@pytest.mark.parametrize(
    "assignment, section, key, value",
    [
        ("optim.lr=1e-4", "optim", "lr", 1e-4),
        ("optim.lr=1", "optim", "lr", 1.0),
        ("train.steps=1_000", "train", "steps", 1000),
        ("model.activation_checkpoint=true", "model", "activation_checkpoint", True),
        ("data.path=/texts/a=b c.txt", "data", "path", "/texts/a=b c.txt"),
        ('data.path="quoted"', "data", "path", "quoted"),
        ("data.path=", "data", "path", ""),
        ("runtime.policy=static", "runtime", "policy", "static"),
        ("router.aux_loss_coef=0", "router", "aux_loss_coef", 0.0),
        ("runtime.debug.overlap=false", "runtime", "debug", DebugConfig(overlap=False)),
        ("runtime.debug={overlap = false, split = 'exact'}", "runtime", "debug", DebugConfig(overlap=False)),
    ],
)
def test_set_reads_toml_values_else_text(assignment: str, section: str, key: str, value: object) -> None:
    assert getattr(getattr(load_config(None, [assignment]), section), key) == value


@pytest.mark.parametrize(
    "assignment, parts",
    [
        ("model.dimm=3", ["unknown key 'model.dimm'", "did you mean 'model.dim'?"]),
        ("mdoel.dim=3", ["unknown key 'mdoel.dim'", "did you mean 'model.dim'?"]),
        ("train.zzz=3", ["unknown key 'train.zzz'", "known: train.steps, train.batch_size"]),
        ("train.dim=3", ["unknown key 'train.dim'", "did you mean 'model.dim'?"]),
        ("zzz=3", ["unknown key 'zzz'", "known: run, model, router"]),
        ("train.steps", ["expected section.key=value"]),
        ("model.dim=0", ["model.dim = 0", "greater than or equal to 1"]),
        ("model.dim=3.5", ["model.dim = 3.5", "valid integer"]),
        ("model.dim=true", ["model.dim = True", "valid integer"]),
        ("model.dim=big", ["model.dim = 'big'", "valid integer"]),
        ("optim.beta2=1.0", ["optim.beta2 = 1.0", "less than 1"]),
        ("optim.lr=nan", ["optim.lr = nan", "finite"]),
        ("launch.device=cuds", ["launch.device = 'cuds'", "'auto', 'cpu' or 'cuda'", "did you mean 'cuda'?"]),
        ("data.val_fraction=1", ["data.val_fraction", "less than 1"]),
        ("model.dim=130", ["model.dim 130", "4 heads", "multiple of 8"]),
        ("model.top_k=9", ["model.top_k 9", "model.num_experts 8"]),
        ("model.capacity_factor=0", ["capacity_factor is 0", "more than 0, or inf"]),
        ("train.micro_batches=3", ["train.batch_size", "3 micro-batches"]),
        ("runtime.slots=-1", ["runtime.slots", "-1"]),
        ("runtime.debug.split=exactt", ["runtime.debug.split = 'exactt'", "did you mean 'exact'?"]),
        ("runtime.debug.overlap=1", ["runtime.debug.overlap = 1", "valid boolean"]),
        ("runtime.debug.calibrate=3", ["runtime.debug.calibrate = 3 should be 'auto', 'always' or 'never' (from --set"]),
        ("runtime.debug.calibrate=aut", ["runtime.debug.calibrate = 'aut'", "did you mean 'auto'?"]),
        ("runtime.debug.overlpa=true", ["unknown key 'runtime.debug.overlpa'", "did you mean 'runtime.debug.overlap'?"]),
        ("runtime.debgu.overlap=true", ["unknown key 'runtime.debgu.overlap'", "did you mean 'runtime.debug.overlap'?"]),
        ("runtime.overlpa=true", ["unknown key 'runtime.overlpa'", "did you mean 'runtime.debug.overlap'?"]),
        ("overlap=true", ["unknown key 'overlap'", "did you mean 'runtime.debug.overlap'?"]),
        ("runtime.debug.slots=3", ["unknown key 'runtime.debug.slots'", "did you mean 'runtime.slots'?"]),
        (
            "runtime.debug.migration_efort=3",
            ["unknown key 'runtime.debug.migration_efort'", "did you mean 'runtime.debug.migration_effort'?"],
        ),
        ("runtime.migration.evry=3", ["unknown key 'runtime.migration.evry'", "did you mean 'runtime.migration.every'?"]),
        (
            "migration.evry=3",
            ["unknown key 'runtime.migration.evry' in --set migration.evry=3", "did you mean 'runtime.migration.every'?"],
        ),
        (
            "migration.solver=mlip",
            ["runtime.migration.solver = 'mlip'", "did you mean 'milp'?", "(from --set migration.solver=mlip)"],
        ),
        ("migration.time_limit_s=-1.0", ["runtime.migration.time_limit_s is -1.0", "0 (by the interval) or more"]),
        ("runtime.debug.zzz=3", ["unknown key 'runtime.debug.zzz'", "known: runtime.debug.split, runtime.debug.predictor"]),
        ("runtime.debug=3", ["'runtime.debug' in --set runtime.debug=3 is a section; set one of runtime.debug.split, "]),
        ("model=3", ["'model' in --set model=3 is a section; set one of model.dim, "]),
        ("runtime.policy=quotas", ["quotas", "did you mean 'quota'?"]),
        ("router.aux_loss_coef=-1.0", ["router.aux_loss_coef", "-1.0"]),
        ("router.aux_loss_coef=nan", ["router.aux_loss_coef is nan", "0 or more, and finite"]),
        ("router.z_loss_coef=inf", ["router.z_loss_coef is inf", "0 or more, and finite"]),
        ("router.weight_scale=nan", ["router.weight_scale is nan", "more than 0, and finite"]),
        ("runtime.debug.migration_effort=nan", ["runtime.debug.migration_effort is nan", "more than 0, and finite"]),
        ("runtime.debug.overlap_s=nan", ["runtime.debug.overlap_s is nan", "0 or more seconds, and finite"]),
        ("runtime.timeout_s=nan", ["runtime.timeout_s is nan", "at most 1000000 seconds"]),
        ("runtime.timeout_s=1e30", ["runtime.timeout_s is 1e+30", "at most 1000000 seconds"]),
        ("launch.init_timeout_s=inf", ["launch.init_timeout_s = inf", "less than or equal to 1000000"]),
        ("launch.init_timeout_s=nan", ["launch.init_timeout_s = nan", "less than or equal to 1000000"]),
        ("launch.num_threads=100000000", ["launch.num_threads = 100000000", "less than or equal to 1024"]),
        ("launch.init_method=foo", ["launch.init_method is 'foo'", "give env:// or file:///PATH"]),
        ("launch.init_method=file://tmp/x", ["launch.init_method is 'file://tmp/x'", "give env:// or file:///PATH"]),
        ("launch.init_method=file:///", ["launch.init_method is 'file:///'", "give env:// or file:///PATH"]),
        ("run.seed=18446744073709551616", ["run.seed = 18446744073709551616", "less than 18446744073709551616"]),
        ("run.name=a/b", ["run.name is 'a/b'", "run.folder says where it goes"]),
        ("run.name=.", ["run.name is '.'", "not beginning with a dot"]),
        ("run.name=", ["run.name is ''", "the name of a folder"]),
        ("run.name=2024", ["run.name = 2024", "put it in quotes, as in --set 'run.name=\"2024\"'"]),
        ("data.pattern=", ["data.pattern is ''", "give a glob"]),
        ("data.pattern=.", ["data.pattern is '.'", "give a glob"]),
    ],
)
def test_wrong_set_names_key_place_and_cure(assignment: str, parts: list[str]) -> None:
    message = message_of(None, assignment)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_errors_of_one_value_name_their_source(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[model]\ndim = 0\n")
    assert message_of(path).endswith(f"(from {path})")
    assert message_of(None, "model.dim=0").endswith("(from --set model.dim=0)")
    assert message_of(None, "runtime.slots=-2").endswith("(from --set runtime.slots=-2)")


@pytest.mark.parametrize(
    "text, parts",
    [
        ("[modle]\ndim = 8\n", ["unknown section [modle]", "did you mean 'model'?"]),
        ("[model]\ndimm = 8\n", ["unknown key 'model.dimm'", "did you mean 'model.dim'?"]),
        ("steps = 8\n", ["'steps'", "outside a section"]),
        ("[runtime.debgu]\noverlap = true\n", ["unknown key 'runtime.debgu'", "did you mean 'runtime.debug'?"]),
        ("[runtime.debug]\noverlpa = true\n", ["unknown key 'runtime.debug.overlpa'", "did you mean 'runtime.debug.overlap'?"]),
        ("[runtime]\ndebug = true\n", ["'runtime.debug' in", "is a section; set one of runtime.debug.split, "]),
        ("[[runtime.debug]]\noverlap = true\n", ["'runtime.debug' in", "is a section; set one of runtime.debug.split, "]),
        ("[model\n", ["is not TOML", "line 1"]),
    ],
)
def test_wrong_file_names_key_and_file(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    message = message_of(path)
    assert "\n" not in message
    for part in (*parts, str(path)):
        assert part in message


def test_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / "none.toml")


def test_a_section_inside_a_section(tmp_path: Path) -> None:
    """In a table of its own or with dotted keys; a value that is given later leaves the others of the file as they were."""
    for text in ("[runtime]\nslots = 3\n[runtime.debug]\noverlap = false\n", "[runtime]\nslots = 3\ndebug.overlap = false\n"):
        path = tmp_path / "run.toml"
        path.write_text(text)
        config = load_config(path, ["runtime.debug.calibrate=never"])
        assert config.runtime == RuntimeConfig(slots=3, debug=DebugConfig(overlap=False, calibrate="never"))
        assert message_of(path, "runtime.debug.overlap_s=-1").endswith(f"(from {path}, --set runtime.debug.overlap_s=-1)")


@pytest.mark.parametrize("name,value", MOVED_VALUES.items(), ids=MOVED_VALUES)
def test_old_names_of_options_that_moved(tmp_path: Path, name: str, value: object) -> None:
    """In a file and on the command line: one warning that names the new one, and the same configuration."""
    path, line = tmp_path / "run.toml", f"{name} = {json.dumps(value)}"
    path.write_text(f"[runtime]\n{line}\n")
    expected, key = Config(runtime=moved_config(name, value)), MOVED[f"runtime.{name}"]
    for arguments in ((path,), (None, [f"runtime.{line}"]), (path, [f"runtime.{line}"])):
        with pytest.warns(MovedOptionWarning, match=rf"^runtime\.{name} is now {re.escape(key)};") as seen:
            assert load_config(*arguments) == expected
        assert [warning.filename for warning in seen] == [__file__]
    new = f"{key} = {json.dumps(value)}"
    for source, message in ((None, message_of(None, f"runtime.{line}", new)), (path, message_of(path, new))):
        sources = f"{source or f'--set runtime.{line}'}, --set {new}"
        assert message == f"runtime.{name} and {key} are both given; give {key} alone (from {sources})"


def test_migration_has_a_short_form(tmp_path: Path) -> None:
    """On the command line, over what a file says."""
    path = tmp_path / "run.toml"
    path.write_text("[runtime.migration]\nevery = 4\nsolver = 'joint'\n")
    migration = MigrationConfig(every=20, solver="milp", time_limit_s=2.5)
    short = ["migration.every=20", "migration.solver=milp", "migration.time_limit_s=2.5"]
    assert load_config(path, short).runtime == RuntimeConfig(migration=migration)
    assert load_config(path, [f"runtime.{value}" for value in short]).runtime == RuntimeConfig(migration=migration)


def test_two_old_names_of_one_option() -> None:
    message = message_of(None, "runtime.rehome_effort=2", "runtime.debug.rehome_effort=3")
    assert message.startswith(
        "runtime.rehome_effort and runtime.debug.rehome_effort are both given; give runtime.debug.migration_"
    )


@pytest.mark.parametrize("world_size, micro_batches, fits", [(1, 1, True), (4, 2, True), (3, 1, False), (8, 2, False)])
def test_batch_must_divide_over_ranks(world_size: int, micro_batches: int, fits: bool) -> None:
    config = Config(train=TrainConfig(batch_size=8, micro_batches=micro_batches))
    if fits:
        config.check_world_size(world_size)
    else:
        with pytest.raises(ValueError, match=rf"train.batch_size 8 .* {world_size} ranks x {micro_batches} micro-batches"):
            config.check_world_size(world_size)


def test_replicas_must_divide_the_ranks() -> None:
    config = Config(launch=LaunchConfig(data_parallel_replicate_degree=3))
    with pytest.raises(
        ValueError, match=r"^launch\.data_parallel_replicate_degree 3 does not divide 4 ranks: make it a divisor of 4$"
    ):
        config.check_world_size(4)
    assert config.ranks_per_replica(6) == 2


positive = st.floats(min_value=1e-12, max_value=1e12)
share = st.floats(min_value=0, max_value=1)
seconds = st.floats(min_value=1e-12, max_value=1e6)
seed = st.integers(0, 2**64 - 1)
count = st.integers(min_value=1, max_value=2**40)
text = st.text(st.characters(codec="utf-8"), max_size=20)
name = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), max_size=20).map("run".__add__)
configs = st.builds(
    Config,
    run=st.builds(RunConfig, name=name, folder=text, seed=seed),
    model=st.builds(
        ModelConfig,
        dim=st.integers(1, 64).map(lambda n: 8 * n),
        num_layers=count,
        ffn_dim=count,
        num_experts=st.integers(2, 512),
        rope_theta=positive,
        activation_checkpoint=st.booleans(),
    ),
    router=st.builds(RouterConfig, normalize_weights=st.booleans(), aux_loss_coef=share, z_loss_coef=share),
    runtime=st.builds(
        RuntimeConfig,
        slots=st.integers(0, 64),
        timeout_s=seconds,
        shard_dense=st.booleans(),
        debug=st.builds(DebugConfig, overlap=st.booleans(), overlap_s=share),
    ),
    data=st.builds(DataConfig, path=text, pattern=text.map("*".__add__), cache_folder=text, seq_len=count),
    optim=st.builds(OptimConfig, lr=positive, min_lr_share=share, weight_decay=positive),
    train=st.builds(TrainConfig, steps=count, batch_size=count, eval_every=st.integers(0, 9)),
    checkpoint=st.builds(CheckpointConfig, every=st.integers(0, 9), resume=text),
    launch=st.builds(LaunchConfig, init_method=text.map(lambda end: f"file:///a{end}b"), num_threads=st.integers(0, 9)),
)


@settings(max_examples=40)
@given(config=configs)
def test_toml_round_trip(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    """The config.toml of a run is the run's configuration, to the last bit."""
    path = tmp_path_factory.mktemp("toml") / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert load_config(path) == config


def test_every_value_is_documented() -> None:
    """A comment below each field says what it means."""
    import ast

    import moesaic.launch.config as module

    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config") and node.name != "Config":
            for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(statement, ast.AnnAssign):
                    assert isinstance(following, ast.Expr), f"{node.name}.{ast.unparse(statement.target)}"
    assert all(field.default_factory is not dataclasses.MISSING for field in dataclasses.fields(Config))


def test_an_option_that_is_gone_is_left_out_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[runtime]\nslots = 3\nreuse_copies = true\n")
    with pytest.warns(
        MovedOptionWarning, match=r"^runtime\.reuse_copies, runtime\.debug\.row_parts: no effect any more, leave it out"
    ):
        assert load_config(path, ["runtime.debug.row_parts=2"]) == Config(runtime=RuntimeConfig(slots=3))

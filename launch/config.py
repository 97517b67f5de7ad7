"""The whole configuration of a training run: nested frozen dataclasses, read from TOML and `--set section.key=value`.

The docstring of every field states its meaning and unit; the defaults are the demo's. A wrong key, type or bound is a
`ValueError` of one line with the key, its source and the cure.
"""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal
from urllib.parse import urlparse

import tomli_w
from pydantic import Field, TypeAdapter, ValidationError

from ..placement import get_solver, policy_solvers
from ..runtime import RouterConfig, RuntimeConfig
from ..runtime.config import MAX_SECONDS
from ..runtime.moved_options import GONE, MOVED, warn_of_gone, warn_of_moved
from ..runtime.routing.capacity import Capacity

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
# More threads than any machine has cores would exhaust it.
Threads = Annotated[int, Field(ge=0, le=1024)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
OpenShare = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """[run]: the name of the run, its files, and its seed."""

    name: str = "demo"
    """Name of the run's folder inside `folder`; if it exists, the next free of name-2, name-3, ... is taken."""
    folder: str = "runs"
    """Folder that holds the run folders."""
    seed: Seed = 1
    """Seed of the model's initial weights and of the order of the training text."""
    metrics: Literal["brief", "detailed"] = "brief"
    """brief: metrics.jsonl has the numbers of each step; detailed: also those of every MoE layer."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, into the run folder's tensorboard/ (needs moesaic[report])."""
    trace_every: CountOrZero = 1
    """Steps between routing loads in trace.npz; 0: none. Each takes 4 B per layer, rank and expert, compressed at the end."""
    profile_steps: CountOrZero = 0
    """The last steps of the run that every rank profiles, into profile-rank-N.json in the run's folder, for ui.perfetto.dev."""

    def __post_init__(self) -> None:
        if PurePosixPath(self.name).name != self.name or self.name.startswith(".") or "\0" in self.name or not self.name:
            raise ValueError(
                f"run.name is {self.name!r}; give the name of a folder, without / and not beginning with a dot: "
                "run.folder says where it goes"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """[model]: the transformer over bytes."""

    dim: Count = 128
    """Model dimension D."""
    num_layers: Count = 4
    """Transformer layers L, each with one MoE feed-forward."""
    num_heads: Count = 4
    """Attention heads; dim / num_heads must be even (rotary pairs)."""
    ffn_dim: Count = 256
    """Hidden dimension F of one expert."""
    num_experts: Count = 8
    """Experts E of one layer."""
    top_k: Count = 2
    """Experts K that each token is routed to."""
    capacity_factor: float = math.inf
    """An expert takes at most this many times the mean load from each rank's micro-batch; the rest is dropped. inf: no drops."""
    drop_policy: Literal["probs", "position"] = "probs"
    """Which assignments are dropped: those with the smallest gate weights, or those of the last tokens."""
    rope_theta: Positive = 10000.0
    """Base of the rotary frequencies."""
    activation_checkpoint: bool = False
    """Keep only each block's input and recompute the block in backward: less memory, about a third more compute."""

    def __post_init__(self) -> None:
        if self.dim % (2 * self.num_heads):
            raise ValueError(
                f"model.dim {self.dim} does not divide into {self.num_heads} heads of an even size: "
                f"make it a multiple of {2 * self.num_heads}"
            )
        if self.top_k > self.num_experts:
            raise ValueError(
                f"model.top_k {self.top_k} is more than model.num_experts {self.num_experts}: lower it or add experts"
            )
        Capacity(self.capacity_factor, self.drop_policy)


@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """[placement]: a placement solved offline, and the machine that placements are priced on."""

    file: str = ""
    """A plan of `moesaic place solve`, whose owners and copies hold for the whole run; empty: runtime.policy places copies."""
    machine: str = ""
    """A machine file of `moesaic calibrate`, by whose rates copies and tokens are priced; empty: the preset of the device."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """[data]: the text for training and validation."""

    path: str = ""
    """A text file, or a folder whose text files are joined; empty: the source of Python's standard library."""
    pattern: str = "*"
    """The files of a folder to take, as a glob on the file name."""
    cache_folder: str = ""
    """The folder of the joined text, which is memory-mapped; empty: $XDG_CACHE_HOME/moesaic, else ~/.cache/moesaic."""
    seq_len: Count = 256
    """Sequence length in bytes."""
    val_fraction: OpenShare = 0.05
    """Share of the text for validation, cut between documents where there are several."""

    def __post_init__(self) -> None:
        if not PurePosixPath(self.pattern).parts:
            raise ValueError(f"data.pattern is {self.pattern!r}, which no file matches; give a glob such as *.txt, or * for all")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """[optim]: the optimizer and its learning-rate schedule (linear warm-up, then cosine decay)."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon trains the matrices of experts and attention, scaled to take AdamW's learning rate; AdamW trains the rest."""
    lr: Positive = 3e-3
    """Peak learning rate."""
    min_lr_share: Share = 0.05
    """The last step's learning rate, as a share of the peak."""
    warmup_steps: CountOrZero = 20
    """Steps of linear warm-up."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay of matrices and expert weights; vectors have none."""
    clip_norm: NonNegative = 1.0
    """The global gradient norm is clipped to this; 0: no clipping."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """[train]: the length of the run and its batches."""

    steps: Count = 250
    """Optimizer steps."""
    batch_size: Count = 16
    """Windows of seq_len bytes per optimizer step, over all ranks and micro-batches."""
    micro_batches: Count = 1
    """Gradient accumulation: the batch is cut into this many forward and backward passes."""
    replay: str = ""
    """A routing trace whose loads the routers reproduce in training, step by step; empty: the routers choose."""
    eval_every: CountOrZero = 100
    """Steps between evaluations on the validation text; 0: only before the first step and after the last."""
    eval_batches: Count = 4
    """Micro-batches of one evaluation, the same windows each time."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """[checkpoint]: saving and resuming; any world size can load any checkpoint."""

    every: CountOrZero = 0
    """Steps between checkpoints; 0: none. With checkpoints on, a run that is stopped by a signal saves one more."""
    resume: str = ""
    """A checkpoint folder (runs/NAME/checkpoints/step-N) to resume from; empty: start from the beginning."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """[launch]: the processes and the device."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where torch sees one, else cpu."""
    data_parallel_replicate_degree: Count = 1
    """Number of replicas, groups of ranks that each hold the whole model: parameters are sharded inside a group, gradients
    averaged over the groups. A run's trace and balance are those of the first group."""
    init_method: str = "env://"
    """The rendezvous of the ranks: env:// (torchrun's variables) or file:///PATH, a new file on a disk that all ranks share."""
    init_timeout_s: Seconds = 300.0
    """Seconds that all ranks have to join the rendezvous; after these, those that joined end with a line that names the others.
    runtime.timeout_s limits every wait thereafter."""
    num_threads: Threads = 0
    """CPU threads per rank; 0: OMP_NUM_THREADS where the user set it, else cores / ranks on this machine."""
    reuse_memory: bool = True
    """Linux CPU: let malloc keep freed activations for the next step instead of returning their pages to the system."""
    progress: bool = True
    """Show a progress bar on rank 0."""

    def __post_init__(self) -> None:
        url = urlparse(self.init_method)
        is_file = url.scheme == "file" and not url.netloc and url.path.startswith("/") and not url.path.endswith("/")
        if self.init_method != "env://" and not is_file:
            raise ValueError(
                f"launch.init_method is {self.init_method!r}; "
                "give env:// or file:///PATH, a new file on a disk that all ranks share"
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training run. Field order is the order of the sections in the file."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    # A weak balancing loss keeps every expert in use; the runtime balances the ranks.
    router: RouterConfig = field(default_factory=lambda: RouterConfig(aux_loss_coef=0.001))
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        if self.train.batch_size % self.train.micro_batches:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} does not divide into {self.train.micro_batches} micro-batches: "
                f"make it a multiple of train.micro_batches"
            )
        for name in policy_solvers(self.runtime.policy):
            get_solver(name, keeps_owners=True)

    def check_world_size(self, world_size: int) -> None:
        """Raise `ValueError` unless `world_size` ranks divide into replicas, and every micro-batch divides over the ranks."""
        degree = self.launch.data_parallel_replicate_degree
        if world_size % degree:
            raise ValueError(
                f"launch.data_parallel_replicate_degree {degree} does not divide {world_size} ranks: "
                f"make it a divisor of {world_size}"
            )
        unit = world_size * self.train.micro_batches
        if self.train.batch_size % unit:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} does not divide over {world_size} ranks x "
                f"{self.train.micro_batches} micro-batches: make it a multiple of {unit}"
            )

    def ranks_per_replica(self, world_size: int) -> int:
        """Ranks among which the experts are shared."""
        return world_size // self.launch.data_parallel_replicate_degree

    def to_toml(self) -> str:
        """The configuration as TOML; `load_config` reads it back to an equal value."""
        return tomli_w.dumps(dataclasses.asdict(self))


@dataclass(frozen=True)
class _Given:
    """One value of the user, and its source."""

    value: Any
    source: str


def load_config(path: str | Path | None = None, assignments: Sequence[str] = ()) -> Config:
    """The defaults, overridden by the TOML file at `path`, then by each `section.key=value` of `assignments`.

    A value is read as TOML (`0.1`, `true`, `"text"`), else as text; `migration.key` is short for `runtime.migration.key`. Raises
    `ValueError` with the key, its source and the cure on one line; `OSError` if the file cannot be read.
    """
    given: dict[str, _Given] = {}
    if path is not None:
        given.update(_read_file(Path(path)))
    for assignment in assignments:
        given.update(_read_assignment(assignment))
    given = _renamed(given)
    for key, entry in given.items():
        _check_key(key, entry.source)

    defaults = Config()
    names = typing.get_type_hints(Config)
    return Config(**{name: _replace_values(name, getattr(defaults, name), given) for name in names})


def _read_file(path: Path) -> dict[str, _Given]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    given = {}
    for section, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"'{section}' in {path} stands outside a section: put it under one of {', '.join(_sections())}")
        if section not in _sections():
            raise ValueError(f"unknown section [{section}] in {path}{_nearest(section, _sections())}")
        given.update(_entries(section, table, str(path)))
    return given


def _entries(key: str, value: Any, source: str) -> dict[str, _Given]:
    """The values of a section and its subsections by key, or one value."""
    if key not in _sections() or not isinstance(value, dict):
        return {key: _Given(value, source)}
    inner = (_entries(f"{key}.{name}", entry, source) for name, entry in value.items())
    return {name: entry for entries in inner for name, entry in entries.items()}


def _read_assignment(assignment: str) -> dict[str, _Given]:
    key, equals, text = assignment.partition("=")
    if not equals:
        raise ValueError(f"--set {assignment}: expected section.key=value")
    if key.strip().startswith("migration."):
        key = f"runtime.{key.strip()}"
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    return _entries(key.strip(), value, f"--set {assignment}")


def _renamed(given: Mapping[str, _Given]) -> dict[str, _Given]:
    """The same values under the current names, without those of options that are gone, with one warning for all old names."""
    gone = [key for key in GONE if key in given]
    if gone:
        warn_of_gone(gone, stacklevel=3)
    moved = {old: new for old, new in MOVED.items() if old in given}
    for new in moved.values():
        first, *others = (key for key in given if MOVED.get(key, key) == new)
        if others:
            sources = f"{given[first].source}, {given[others[0]].source}"
            raise ValueError(f"{first} and {others[0]} are both given; give {new} alone (from {sources})")
    if moved:
        warn_of_moved(moved, stacklevel=3)
    return {moved.get(key, key): entry for key, entry in given.items() if key not in gone}


def _check_key(key: str, source: str) -> None:
    known = {section: [f.name for f in dataclasses.fields(cls)] for section, cls in _sections().items()}
    section, _, name = key.rpartition(".")
    if key in known:
        raise ValueError(f"'{key}' in {source} is a section; set one of {', '.join(f'{key}.{n}' for n in known[key])}")
    if name in known.get(section, ()):
        return
    # In this order: the nearest name in this section or its siblings, this name in another section, the nearest full key.
    top = section.partition(".")[0]
    beside = {n: other for other, names in known.items() if other.partition(".")[0] == top for n in names}
    near = [f"{beside[match]}.{match}" for match in difflib.get_close_matches(name, beside, n=1)]
    near += [f"{other}.{name}" for other, names in known.items() if name in names]
    if section not in known:
        near += difflib.get_close_matches(key, [f"{other}.{n}" for other, names in known.items() for n in names], n=1)
    listed = [f"{section}.{n}" for n in known[section]] if section in known else list(known)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(listed)}"
    raise ValueError(f"unknown key '{key}' in {source}; {hint}")


def _replace_values(section: str, default: Any, given: Mapping[str, _Given]) -> Any:
    """A section's defaults with the values given for it and its subsections."""
    hints, checked = typing.get_type_hints(type(default), include_extras=True), {}
    for name, hint in hints.items():
        key = f"{section}.{name}"
        if dataclasses.is_dataclass(hint):
            checked[name] = _replace_values(key, getattr(default, name), given)
        elif key in given:
            checked[name] = _check_value(key, hint, given[key])
    try:
        return dataclasses.replace(default, **checked)
    except ValueError as error:
        sources = dict.fromkeys(entry.source for key, entry in given.items() if key.startswith(f"{section}."))
        raise ValueError(f"{error} (from {', '.join(sources)})") from None


def _check_value(key: str, hint: Any, entry: _Given) -> Any:
    is_choice = typing.get_origin(hint) is Literal
    # Pydantic accepts true for a choice of 1; as text it is refused, since no choice is a truth value.
    value = str(entry.value) if is_choice and isinstance(entry.value, bool) else entry.value
    try:
        return TypeAdapter(hint).validate_python(value, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Input ")
        if hint is str:
            problem += f"; put it in quotes, as in --set '{key}=\"{entry.value}\"'"
        choices = [str(choice) for choice in typing.get_args(hint)] if is_choice else []
        nearest = _nearest(entry.value, choices) if choices and isinstance(entry.value, str) else ""
        raise ValueError(f"{key} = {entry.value!r} {problem}{nearest} (from {entry.source})") from None


def _sections() -> Mapping[str, type]:
    """Section name to its dataclass, in file order; subsections such as runtime.debug follow their section."""
    return types.MappingProxyType(dict(_sections_of(Config, "")))


def _sections_of(kind: type, prefix: str) -> Iterator[tuple[str, type]]:
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield f"{prefix}{name}", hint
            yield from _sections_of(hint, f"{prefix}{name}.")


def _nearest(name: str, known: Iterable[str]) -> str:
    """A hint with the nearest of `known`, or with all if none is near."""
    known = list(known)
    matches = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{matches[0]}'?" if matches else f"; known: {', '.join(known)}"

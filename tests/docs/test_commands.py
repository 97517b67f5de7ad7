"""What README and docs/ print runs: commands as printed but for their sizes, Python as printed.

A block of commands runs unless the line above it says `<!-- test: not run: REASON -->`; its options are then read all the same,
as are those of commands in running text. Python runs after README's example where the line above says so; all of it compiles.
"""

import re
import runpy
import shlex
import socket
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import pytest
import torch

from moesaic.launch.cli import cli
from moesaic.launch.config import load_config
from moesaic.launch.doctor.target import make_inputs
from moesaic.launch.entry import run_command
from moesaic.placement.machine import Machine, write_machine
from tests.helpers.pages import PAGES, ROOT, Block, Program, blocks, commands_in_text
from tests.launch.ranks import TINY, set_options, start_ranks, tiny_values, train_tiny, wait_for

BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.language == "sh"]
PYTHON = [block for block in BLOCKS if block.language == "python" and block.page != "docs/api.md"]
EXAMPLE = next(block for block in PYTHON if block.page == "README.md")

# Modules that a launcher starts, as words of the moesaic command.
MODULES = {
    "moesaic.launch.train": ["train"],
    "moesaic.launch.calibrate": ["calibrate"],
    "moesaic.benchmarks.scaling": ["bench", "scaling"],
}
# Commands whose own tests run them, at a tiny size; here their options are read.
TESTED_IN = {
    "bench step": "tests/benchmarks/test_step.py",
    "bench scaling": "tests/benchmarks/test_scaling.py",
    "bench collectives": "tests/benchmarks/test_collectives.py",
    "bench kernels": "tests/kernels/test_bench_kernels.py",
    "bench overlap": "tests/benchmarks/test_overlap.py",
    "bench placement": "tests/benchmarks/test_bench_placement.py",
    "calibrate": "tests/launch/test_calibrate.py",
    "doctor": "tests/launch/test_cli.py",
    "doctor --model": "tests/launch/test_model_check.py",
    "mpirun": "tests/launch/test_mpirun.py",
}
# Sizes that a test takes instead of those printed.
SMALLER = (
    (r"--steps 20\b", "--steps 3"),
    (r"--experts 64 --ranks 64 --steps 4", "--experts 8 --ranks 4 --steps 2"),
    ("8x8", "2x2"),
)


def name_of(words: Sequence[str]) -> str:
    """The key of a moesaic command in `TESTED_IN`."""
    if words[0] == "bench":
        return " ".join(words[:2])
    return "doctor --model" if words[0] == "doctor" and "--model" in words else words[0]


def moesaic_words(words: Sequence[str]) -> list[str] | None:
    """What a command asks of the moesaic command line, whoever starts it; None for other programs."""
    if words[0] == "moesaic":
        return list(words[1:])
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(words[1:])
        return [*MODULES[given.training_script], *given.training_script_args] if given.module else None
    if "-m" in words:
        module = words[words.index("-m") + 1]
        return [*MODULES[module], *words[words.index("-m") + 2 :]] if module in MODULES else None
    return None


def check(words: Sequence[str]) -> None:
    """Give a command to the parsers of what it starts. Raises if an option, a key or a value is not theirs."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), words
    if words[0] == "sh":
        assert (ROOT / words[1]).is_file(), words
    if words[0] == "sbatch":
        check(shlex.split(words[words.index("--wrap") + 1]))
    args = moesaic_words(words)
    if args is None:
        return
    command: click.Command = cli
    while isinstance(command, click.Group) and args:
        found = command.get_command(click.Context(command), name := args.pop(0))
        assert found is not None, f"{' '.join(words)}: there is no command {name}"
        command = found
    if not any(arg.startswith("-") for arg in args):
        return  # text that only names a command
    context = command.make_context(command.name, list(args))
    if command.name == "train":
        load_config(None, context.params["assignments"])


@pytest.mark.parametrize("page", PAGES)
def test_options_are_those_of_the_programs(page: str) -> None:
    """Of every command on the page, run here or not."""
    for block in (block for block in SHELL if block.page == page):
        for words in block.commands():
            check(words)
    for words in commands_in_text(page):
        check(words)


def test_what_does_not_run_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    """The list of blocks that no test runs, each with its reason, is printed with `pytest -s`."""
    listed = [f"{block.place}: {block.reason_not_to_run}" for block in SHELL if block.how.startswith("not run")]
    with capsys.disabled():
        print("", *listed, sep="\nnot run: ")
    assert all(re.fullmatch(r"\S+:\d+: \w.+", line) for line in listed)
    known = {"", "two nodes", "after the example", "hugging face", "saved as mine.py"}
    assert {block.how for block in BLOCKS if not block.reason_not_to_run} <= known


@pytest.mark.parametrize("command", TESTED_IN)
def test_commands_with_tests_of_their_own_have_them(command: str) -> None:
    text = (ROOT / TESTED_IN[command]).read_text(encoding="utf-8")
    assert all(word in text for word in command.split())


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what pages speak of: a text, a run of one process, a configuration file, mine.py."""
    folder = tmp_path_factory.mktemp("docs")
    words = np.random.default_rng(0).choice(["router ", "expert ", "slot ", "bank ", "owner\n"], size=3000)
    (folder / "text.txt").write_text("".join(words))
    (folder / "run.toml").write_text("[train]\nsteps = 3\n")
    (folder / "mine.py").write_text(next(block.text for block in PYTHON if block.how == "saved as mine.py"))
    save_recordings(folder)
    rates = {"device_bytes_per_s": 1e9, "latency_s": 1e-4, "flops_per_s": 1e11, "half_rate_rows": 16.0}
    write_machine(folder / "machine.toml", Machine(num_nodes=1, ranks_per_node=8, rates=rates))
    train_tiny(1, ["train.steps=4", "train.eval_every=0"], folder)
    return folder


def save_recordings(folder: Path) -> None:
    """What other systems write, as docs/placement.md speaks of it: 24 tokens of 4 layers, top-8 of 128 experts."""
    ids_TLK = np.random.default_rng(0).permuted(np.tile(np.arange(128), (24, 4, 1)), axis=2)[:, :, :8]
    map_TLE = np.zeros((24, 4, 128), dtype=bool)
    np.put_along_axis(map_TLE, ids_TLK, True, axis=2)
    counts_LE = map_TLE.sum(axis=0, dtype=np.int32)
    torch.save({"rank": 0, "logical_count": torch.tensor(counts_LE[None])}, folder / "sglang.pt")
    np.save(folder / "routed_experts.npy", ids_TLK.astype(np.uint8))
    np.save(folder / "weight.npy", counts_LE.astype(np.float32))
    np.save(folder / "routing_map.npy", map_TLE.transpose(1, 0, 2))


def run(words: list[str], folder: Path) -> None:
    """Run one command, at a small size, in `folder`."""
    args = moesaic_words(words)
    if args is None or name_of(args) in TESTED_IN or words[0] in TESTED_IN:
        assert args is not None or words[0] in TESTED_IN, words
        return
    if args[0] == "train":
        ranks = 1 if words[0] == "moesaic" else 2
        tiny = set_options([*tiny_values(folder), "train.steps=2", "train.eval_every=0"])
        ended = wait_for(start_ranks(ranks, [*args[1:], *tiny], folder))
        assert [end.status for end in ended] == [0] * ranks, ended
        return
    line = shlex.join(args)
    for printed, smaller in SMALLER:
        line = re.sub(printed, smaller, line)
    assert run_command(cli, shlex.split(line)) == 0, line


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.page == page for block in SHELL)])
def test_commands_run(page: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page; torchrun's own part is tested below, here its ranks are forked."""
    monkeypatch.chdir(workspace)
    for block in SHELL:
        if block.page == page and not block.how:
            for words in block.commands():
                run(words, workspace)


def test_two_nodes_meet(workspace: Path) -> None:
    """The line for two nodes, started twice on this machine with one rank each."""
    (block,) = (block for block in SHELL if block.how == "two nodes")
    (words,) = block.commands()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        here = f"127.0.0.1:{free.getsockname()[1]}"
    line = shlex.join(words).replace("HOST:29500", here).replace("--nproc-per-node 8", "--nproc-per-node 1")
    tiny = set_options([*tiny_values(workspace), "train.eval_every=0", "run.name=two-nodes"])
    nodes = [Program([*shlex.split(line), *tiny], workspace, f"node-{node}") for node in range(2)]
    outputs = [node.output() for node in nodes]
    assert sum(output.count("moesaic: 2 rank(s)") for output in outputs) == 1


def test_the_example_learns_and_what_follows_it_runs(tmp_path: Path) -> None:
    """README's example on two processes, started as the text says, and after its loop every block that is to run there.

    It is started from the checkout's root, whose folder `kernels` must not stand in for Hugging Face's package of that name.
    """
    end = "dist.destroy_process_group()\n"
    assert EXAMPLE.text.count("\n") <= 25
    assert EXAMPLE.text.endswith(end)
    assert (ROOT / "examples/wrap_a_model.py").read_text(encoding="utf-8") == EXAMPLE.text
    leave_root = (
        f"import importlib.util, os, re\nprint('kernels:', importlib.util.find_spec('kernels'))\nos.chdir({str(tmp_path)!r})\n"
    )
    parts = [EXAMPLE.text.removesuffix(end), leave_root]
    for block in PYTHON:
        if block.how == "after the example":
            (tmp_path / block.place.replace("/", "-")).write_text(block.text, encoding="utf-8")
            parts.append(f"exec(compile(open({block.place.replace('/', '-')!r}).read(), {block.place!r}, 'exec'))\n")
    parts.append(AFTERWARDS)
    (tmp_path / "example.py").write_text("".join([*parts, end]), encoding="utf-8")
    *line, script = ["torchrun", "--standalone", "--nproc-per-node", "2", "example.py"]
    assert [*line, script] in commands_in_text("README.md")
    output = Program([*line, str(tmp_path / script)], tmp_path, "example", cwd=ROOT).output()
    assert output.count("kernels:") == 2
    assert str(ROOT / "kernels") not in output
    losses = [float(loss) for loss in re.findall(r"^\d+ loss ([\d.]+) busiest rank [\d.]+ of the mean$", output, re.MULTILINE)]
    assert len(losses) == 5
    assert losses[-1] < 0.1 * losses[0]
    assert all(output.count(f"{what} on rank {rank}") == 1 for what in ("averages moved", "blocks agree") for rank in range(2))


# After the blocks of the pages, on both ranks: averages in the optimizer's state follow experts that move. The first block of
# docs/huggingface.md, computed expert by expert, against the layer that its adapter makes; the second against itself unshared.
AFTERWARDS = """
from moesaic.placement import OwnerMap


def averages():
    mine = {name: value.clone() for name, value in handle.state_dict(optimizer).items() if re.search(r"experts.*average$", name)}
    everybody = [None, None]
    dist.all_gather_object(everybody, mine)
    return mine, everybody[0] | everybody[1]


mine, before = averages()
handle.migrate([OwnerMap(1 - owners.expert_to_owner_LE, 2) for owners in handle.owner_maps], optimizer)
mine_now, after = averages()
assert len(mine) == 8 and before.keys() == after.keys() and not mine.keys() & mine_now.keys()
assert all(torch.equal(value, after[name]) for name, value in before.items())
print(f"averages moved on rank {dist.get_rank()}")

torch.manual_seed(0)
block, x = MyBlock(8, 16, 4), torch.randn(5, 8)
expected = []
for row in x:
    weights, ids = torch.softmax(block.gate(row), 0).topk(2)
    outputs = []
    for e in ids:
        gate, up = (block.gate_up[e] @ row).chunk(2)
        outputs.append(block.down[e] @ (nn.functional.silu(gate) * up))
    expected.append(sum(w * y for w, y in zip(weights / weights.sum(), outputs)))
state = {f"0.{name}": value.clone() for name, value in block.state_dict().items()}
model = nn.Sequential(block)
handle = shard_experts(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
torch.testing.assert_close(model(x), torch.stack(expected))
found = handle.weights.state_dict()
assert found.keys() == (state.keys() if dist.get_rank() == 0 else set())
assert all(torch.equal(value, state[name]) for name, value in found.items())

block = MyFeedForward(8, 16, 4)
expected = block(x).detach()
model = nn.Sequential(block)
shard_experts(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
torch.testing.assert_close(model(x), expected)
assert expected.abs().max() > 0
print(f"blocks agree on rank {dist.get_rank()}")
"""


def test_hugging_face_in_eight_lines(tmp_path: Path) -> None:
    """On one process, from a folder that transformers wrote to one that it reads."""
    (block,) = (block for block in PYTHON if block.how == "hugging face")
    assert block.text.count("\n") <= 8
    (tmp_path / "script.py").write_text(HUGGING_FACE.replace("# the block\n", block.text), encoding="utf-8")
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'moesaic[hf]'")
    Program(["python", "script.py"], tmp_path, "script").output()


HUGGING_FACE = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import MixtralConfig, MixtralForCausalLM
from moesaic import shard_experts

folder = "in"
config = MixtralConfig(vocab_size=16, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                       num_key_value_heads=2, num_local_experts=4)
before = MixtralForCausalLM(config)
before.save_pretrained(folder)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
# the block
after = MixtralForCausalLM.from_pretrained("out").state_dict()
assert before.state_dict().keys() == after.keys()
for name, value in before.state_dict().items():
    assert torch.equal(value, after[name]), name
dist.destroy_process_group()
"""


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.place)
def test_python_compiles(block: Block) -> None:
    compile(block.text, block.place, "exec")


def test_mine_is_what_the_doctor_takes(workspace: Path) -> None:
    """docs/doctor.md's mine.py: a model whose inputs the doctor makes up."""
    model = runpy.run_path(str(workspace / "mine.py"))["make_model"]()
    assert model(*make_inputs(model, 32, 2).args).shape[-1] == 16


def test_tiny_is_smaller_than_the_demo() -> None:
    """The sizes that tests put in place of printed ones are of keys that exist."""
    load_config(None, TINY)

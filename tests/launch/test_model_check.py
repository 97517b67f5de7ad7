"""moesaic doctor --model: right models pass, wrong ones fail where they are wrong, and wrong use is one line."""

import json
import math
from pathlib import Path

import pytest
import torch

from moesaic import MoELayer, RouterConfig, Routing
from moesaic.launch.cli import cli
from moesaic.launch.doctor import model_check
from moesaic.launch.doctor.children import Child, problem_of, run_children
from moesaic.launch.doctor.model_check import Comparison, Difference, Request, check_model, check_rank, moved
from moesaic.launch.doctor.observe import Choices
from moesaic.launch.doctor.target import Inputs, find_target, make_inputs
from moesaic.launch.entry import run_command
from moesaic.launch.run.process import Process
from moesaic.placement import OwnerMap
from moesaic.runtime.routing.router import TopKRouter
from tests.helpers.ranks import run_ranks

MODELS = """
import torch
import torch.distributed as dist
from torch import nn
from moesaic import MoELayer, RouterConfig

class Model(nn.Module):
    def __init__(self, fault="", rounds=1):
        super().__init__()
        self.fault = fault
        self.rounds = rounds
        self.embed = nn.Embedding(11, 16)
        scopes = ("micro_batch", "global_batch")
        routers = [RouterConfig(aux_loss_coef=0.02, z_loss_coef=0.001, aux_loss_scope=scope) for scope in scopes]
        self.blocks = nn.ModuleList(nn.Sequential(nn.Dropout(0.5), MoELayer(16, 24, 5, 2, router=router)) for router in routers)
        self.head = nn.Linear(16, 11)

    def forward(self, ids):
        x = self.embed(ids)
        for block in [*self.blocks] * self.rounds:
            x = x + block(x)
        if self.fault == "output" and dist.is_initialized() and dist.get_rank() == 1:
            x = x * 1.01
        if self.fault == "gradient" and dist.is_initialized() and dist.get_rank() == 1:
            x = x + self.head.weight.sum() - self.head.weight.sum().detach()
        return {"logits": self.head(x), "length": ids.shape[1]}

def unseeded():
    torch.seed()
    return Model()

def twice():
    return Model(rounds=2)

def output():
    return Model("output")

def gradient():
    return Model("gradient")

def dense():
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.ones(4, 3)

def odd():
    return nn.Sequential(nn.Conv1d(3, 3, 1))

def mismatched():
    return Model(), torch.ones(4, 3)

def batch_of_three():
    return Model(), torch.zeros(3, 4, dtype=torch.int64)

def ragged():
    return Model(), (torch.ones(4, 3), torch.ones(5, 3))

def broken():
    raise KeyError("size")

def number():
    return 7
"""


@pytest.fixture
def models(tmp_path: Path) -> str:
    path = tmp_path / "models.py"
    path.write_text(MODELS, encoding="utf-8")
    return str(path)


def on_pool(rank: int, request: Request, folder: str) -> list[Comparison]:
    """What a process that doctor starts does, in a process that is there already."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (request.ranks,))
    return check_rank(Process(rank, request.ranks, rank, request.ranks, None, torch.device("cpu")), mesh, request, Path(folder))


@pytest.fixture
def without_new_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks run in the test suite's own processes."""

    def run(request: Request, folder: Path) -> list[Comparison]:
        return run_ranks(request.ranks, on_pool, request, str(folder))[0]

    monkeypatch.setattr(model_check, "_run_ranks", run)


def test_a_model_passes_at_the_command_line(models: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Real processes; a model that nobody seeded, with dropout; every comparison is made, and copies and moves there were."""
    path = tmp_path / "rows.json"
    assert run_command(cli, ["doctor", "--model", f"{models}:unseeded", "--device", "cpu", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert "all 20 checks passed" in text
    rows = json.loads(path.read_text())["rows"]
    checks = ["outputs", "gradients", "global norm", "aux loss", "counts", "choices"]
    assert [row["check"] for row in rows] == ["outputs", "global norm", *checks * 3]
    assert [row["plan"] for row in rows[2:]] == [p for p in ("owners alone", "with copies", "moved, with copies") for _ in checks]
    assert {row["result"] for row in rows} == {"pass"}
    assert all(row["difference"] == 0 for row in rows if row["check"] == "counts")
    by_check = {row["check"]: row for row in rows}
    assert by_check["counts"]["compared"] == 2 * 2 * 5
    assert by_check["choices"]["compared"] == 2 * 128
    # Embedding, head and its bias, two routers, and two weights of five experts in two layers.
    assert by_check["gradients"]["compared"] == 5 + 2 * 5 * 2


@pytest.mark.usefixtures("without_new_processes")
def test_layers_that_are_called_twice_pass(models: str) -> None:
    """Every call's choices are followed, and every call's router loss counts."""
    rows = check_model(Request(f"{models}:twice", device="cpu"))
    assert {row.result for row in rows} == {"pass"}
    assert {row.compared for row in rows if row.check == "choices"} == {2 * 2 * 128}


@pytest.mark.usefixtures("without_new_processes")
@pytest.mark.parametrize(
    "fault, failing", [("output", {"outputs", "gradients", "global norm"}), ("gradient", {"gradients", "global norm"})]
)
def test_a_model_that_is_wrong_on_one_rank_fails(models: str, fault: str, failing: set[str]) -> None:
    rows = check_model(Request(f"{models}:{fault}", device="cpu"))
    for plan in ("owners alone", "with copies", "moved, with copies"):
        assert failing <= {row.check for row in rows if row.plan == plan and row.result == "fail"}
    (worst,) = {row.worst for row in rows if row.check == "outputs" and row.result == "fail"} or {"logits on rank 1"}
    assert worst == "logits on rank 1"
    assert all(row.result == "pass" for row in rows if row.plan == "on one rank, as built" or row.check == "counts")


@pytest.mark.usefixtures("without_new_processes")
def test_a_hugging_face_folder(tmp_path: Path) -> None:
    """Random weights of the configuration, against the model that transformers runs."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'moesaic[hf]'")
    from tests.helpers.families import FAMILIES

    prefix, options = FAMILIES["deepseek_v3"]
    getattr(transformers, prefix + "Config")(**options).save_pretrained(tmp_path)
    rows = check_model(Request(str(tmp_path), tokens=36, device="cpu"))
    assert [row for row in rows if row.result == "fail"] == []


@pytest.mark.usefixtures("without_new_processes")
@pytest.mark.parametrize(
    "target, message",
    [
        ("nothing", "nothing is no folder and names no callable; give file.py:function, package.module:callable"),
        ("/nowhere.py:make", "there is no file /nowhere.py; give"),
        ("no.such.module:make", "importing no.such.module raised ModuleNotFoundError: No module named 'no'"),
        ("FILE:unseded", "has no callable 'unseded'; did you mean 'unseeded'?"),
        ("FOLDER", "holds no config.json; give"),
        ("FILE:broken", "building the model raised KeyError: 'size'"),
        ("FILE:number", "returned int; return a module, or (module, example inputs)"),
        ("FILE:dense", "no MoE block in Sequential, which consists of Linear, ReLU, Sequential; known blocks: moesaic.MoELayer"),
        ("FILE:odd", "its inputs are unknown; return (model, inputs) from the callable, or give --input FILE"),
        ("FILE:mismatched", "the forward of Model with (float32[4, 3]) failed: RuntimeError"),
        ("FILE:batch_of_three", "a batch of 3 does not divide over 2 ranks; give example inputs with a multiple"),
        ("FILE:ragged", "the example inputs hold batch sizes [4, 5]; give tensors [batch, ...] of one batch size"),
    ],
)
def test_wrong_targets_are_one_line(models: str, capsys: pytest.CaptureFixture[str], target: str, message: str) -> None:
    text = target.replace("FILE", models).replace("FOLDER", str(Path(models).parent))
    assert run_command(cli, ["doctor", "--model", text, "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not torch.distributed.is_initialized()


def test_other_wrong_use(
    models: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.save(7, tmp_path / "seven.pt")
    (tmp_path / "text.pt").write_text("text")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for options, message in (
        (["--tolerance", "0"], "--tolerance is 0.0; give a relative difference above 0"),
        (["--tolerance", "nan"], "--tolerance is nan"),
        (["--ranks", "0"], "0 is not in the range x>=1"),
        (["--input", str(tmp_path / "no.pt")], "no.pt: No such file or directory"),
        (["--input", str(tmp_path / "seven.pt")], "seven.pt: the example inputs hold no tensor"),
        (["--input", str(tmp_path / "text.pt")], "text.pt cannot be read"),
        (["--device", "cuda"], "CUDA device(s) that torch sees"),
    ):
        assert run_command(cli, ["doctor", "--model", f"{models}:unseeded", *options]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert message in captured.err
    monkeypatch.setattr(model_check, "_available_bytes", lambda: 1000)
    assert run_command(cli, ["doctor", "--model", f"{models}:unseeded"]) == 2
    assert "takes about 0 GiB and 0 GiB are free: check fewer layers or experts" in capsys.readouterr().err


def test_a_failed_process_is_a_failed_check(models: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it said last stands in the row; wrong use that only it sees is still wrong use."""
    for status, last, expected in ((1, "OutOfMemory: no", "OutOfMemory: no"), (-9, "", "ended with status -9")):
        children = [Child(status, last), Child(None, "")]
        monkeypatch.setattr(model_check, "run_children", lambda *args, children=children: children)
        (row,) = model_check._run_ranks(Request("target"), Path("/nowhere"))
        assert (row.check, row.worst, row.difference, row.result) == ("run", expected, None, "fail")
    monkeypatch.setattr(model_check, "run_children", lambda *args: [Child(2, "a cure"), Child(0, "")])
    with pytest.raises(ValueError, match="a cure"):
        model_check._run_ranks(Request("target"), Path("/nowhere"))


def test_children_end_together() -> None:
    """One that fails ends the others after a while, and the first that said something is quoted."""
    shell = [["sh", "-c", "echo first; echo oh no >&2; exit 3"], ["sh", "-c", "exit 0"]]
    children = run_children(shell, [{}, {}])
    assert children == [Child(3, "oh no"), Child(0, "")]
    assert problem_of(children) == "oh no"
    late = run_children([["sleep", "50"]], [{"PATH": "/usr/bin:/bin"}], limit_s=0.05)
    assert (late, problem_of(late)) == ([Child(None, "")], "no answer in time")
    assert problem_of([Child(0, "a warning")]) == ""


def test_differences() -> None:
    """Relative to the tensor's largest value, but to no less than the floor; what is missing or no number never passes."""
    found = Difference()
    found.add("a", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    assert (found.worst, found.value) == ("a", 0.5)
    found.add("b", torch.tensor([1e-9]), torch.tensor([2e-9]), floor=1.0)
    assert (found.worst, found.compared) == ("a", 2)
    found.add("c", None, torch.tensor([3.0]))
    assert (found.worst, found.value) == ("c", 1.0)
    found.add("none", None, None)
    for bad in (torch.tensor([math.nan]), torch.ones(2)):
        other = Difference()
        other.add("d", bad, torch.ones(1))
        assert other.value == math.inf


def test_choices_between_equal_scores_are_told_from_wrong_ones() -> None:
    router = TopKRouter(2, 4, 2, RouterConfig())

    def gap(logits: list[float], expected: list[int]) -> float:
        logits_TE = torch.tensor([logits])
        chosen = Routing(logits_TE.topk(2).indices, torch.ones(1, 2), logits_TE)
        choices = Choices()
        assert choices.compare("layer", chosen, torch.tensor([expected]), router) == (choices.num_other == 0)
        return choices.worst_gap

    assert gap([4.0, 3.0, 2.0, 1.0], [1, 0]) == 0.0
    assert gap([4.0, 3.0, 2.0, 1.0], [0, 2]) == 0.25
    assert gap([4.0, 3.0, 3.0 - 1e-6, 1.0], [0, 2]) < 1e-6
    choices = Choices()
    choices.compare("layer", Routing(torch.tensor([[0]]), torch.ones(1, 1)), torch.tensor([[1]]), torch.nn.Identity())
    assert choices.worst_gap == math.inf


def test_made_up_inputs_divide_over_the_ranks() -> None:
    for ranks in (1, 2, 3, 7):
        for tokens in (1, 5, 128):
            inputs = make_inputs(MoELayer(4, 8, 2, 1), tokens, ranks)
            assert inputs.batch_size % ranks == 0
            parts = [inputs.part(rank, ranks).args[0] for rank in range(ranks)]
            assert torch.equal(torch.cat(parts), inputs.args[0])
    given = Inputs.of({"x": torch.ones(4, 2), "flag": True})
    assert str(given) == "x=float32[4, 2], flag=True"
    assert given.part(1, 2).kwargs["flag"] is True


def test_experts_move_and_numbers_stay() -> None:
    for layers, experts, ranks in ((1, 4, 2), (2, 5, 2), (3, 3, 4), (2, 6, 1)):
        owners = OwnerMap.contiguous(layers, experts, ranks)
        after = moved(owners)
        assert after.num_rows_R.tolist() == owners.num_rows_R.tolist()
        assert (len(owners.moves_to(after)) > 0) == (ranks > 1)


def test_a_target_is_found_where_python_would(models: str) -> None:
    assert find_target("torch.nn:Identity").build()[1] is None
    assert find_target(f"{models}:mismatched").build()[1] is not None

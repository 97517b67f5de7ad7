"""Check of every MoE family of the installed transformers, for `moesaic doctor --families`. Also the program of each rank.

Each rank builds a small random model of a family, runs it as transformers does, on one part of a batch per rank, and wraps it. On
several ranks, with copies of experts, each runs its own part: logits, loss and every gradient must be those of before.
"""

from __future__ import annotations

import difflib
import gc
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ...runtime import RuntimeConfig, shard_experts
from ...runtime.adapters.experts_modules import is_experts_module
from ...runtime.adapters.weights import dense_tensors, whole
from ..config import LaunchConfig
from ..run.process import Process, find_process, gather, process_group
from .children import problem_of, run_children
from .family_models import family_names, random_ids, run, small_model
from .model_check import FLOOR, SLOTS, Difference, hold_copies
from .observe import disable_dropout

COLUMNS = ("family", "block", "state", "reason", "worst")
TOLERANCE = 1e-5
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class FamilyState:
    """How one family fares."""

    family: str
    """Its folder in `transformers.models`."""
    block: str
    """The class of its experts."""
    state: str
    """pass, fail or unsupported."""
    reason: str = ""
    """Why it does not pass."""
    worst: float | None = None
    """The largest difference, relative to the largest value of the same tensor."""


def check_families(only: Sequence[str], ranks: int) -> list[FamilyState]:
    """Check the families named, or all. Raises ValueError for a name that is none, and without transformers."""
    if find_spec("transformers") is None:
        raise ValueError("--families needs transformers: pip install 'moesaic[hf]'")
    known = family_names()
    for name in only:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"the installed transformers has {', '.join(known)}"
            raise ValueError(f"--only {name}: no such MoE family; {hint}")
    left, found = list(only or known), []
    while left:
        checked, problem = _run_ranks(left, ranks)
        found += checked
        left = left[len(checked) :]
        if left:  # the ranks ended while they checked it
            found.append(FamilyState(left.pop(0), "", "fail", problem or "the ranks ended early"))
    return found


def _run_ranks(families: Sequence[str], ranks: int) -> tuple[list[FamilyState], str]:
    """Check one family after the other as far as it goes; the states found, and what ended it."""
    with tempfile.TemporaryDirectory() as folder:
        numbers = [{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks} for rank in range(ranks)]
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        environments = [os.environ | threads | {name: str(number) for name, number in of.items()} for of in numbers]
        command = [sys.executable, "-m", "moesaic.launch.doctor.families", folder, *families]
        problem = problem_of(run_children([command] * ranks, environments))
        report = Path(folder) / "states.jsonl"
        lines = report.read_text(encoding="utf-8").splitlines() if report.exists() else []
        return [FamilyState(**json.loads(line)) for line in lines], problem


def check_family(process: Process, mesh: DeviceMesh, family: str) -> FamilyState:
    """The state of one family. Collective."""
    try:
        model = small_model(family)
    except ValueError as error:
        return FamilyState(family, "", "unsupported", f"no small model could be built: {error}")
    blocks = list(dict.fromkeys(type(module).__name__ for module in model.modules() if is_experts_module(module)))
    if not blocks:
        kinds = dict.fromkeys(type(module).__name__ for module in model.modules())
        block = next(
            (kind for kind in kinds if "Expert" in kind), next((kind for kind in kinds if re.search("MoE|Moe", kind)), "")
        )
        reason = f"{block} has a layout of its own: write an adapter (register_adapter)"
        return FamilyState(family, block, "unsupported", reason)
    block, found, problem = ", ".join(blocks), Difference(), ""
    try:
        found = _compare(process, mesh, model)
    except ValueError as error:
        problem = " ".join(str(error).split())
    problem = next(filter(None, gather(process, problem)), "")
    if problem:
        return FamilyState(family, block, "unsupported", problem)
    worst = max(gather(process, found), key=lambda each: each.value)
    if worst.value <= TOLERANCE:
        return FamilyState(family, block, "pass", "", worst.value)
    return FamilyState(family, block, "fail", f"{worst.worst} differs", worst.value)


def _compare(process: Process, mesh: DeviceMesh, model: nn.Module) -> Difference:
    """The largest difference on this rank between the wrapped model and the one that it was. Collective."""
    parts = [random_ids(rank) for rank in range(process.world_size)]
    outputs = [run(model, part) for part in parts]
    losses = torch.stack([loss for _, loss in outputs])
    losses.mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
    model.zero_grad()

    config = RuntimeConfig(policy="static", slots=SLOTS, check_replicas_every=0, timeout_s=_TIMEOUT_S)
    handle = shard_experts(model, mesh=mesh, config=config)
    disable_dropout(model, handle.layers)
    hold_copies(handle, {})
    logits, loss = run(model, parts[process.rank])
    loss.backward()
    found, floor = Difference(), FLOOR * max(float(grad.abs().max()) for grad in grads.values())
    found.add("logits", logits, outputs[process.rank][0].detach())
    found.add("loss", loss, losses[process.rank].detach())
    for dense in dense_tensors(model, handle.layers):
        grad = None if dense.tensor.grad is None else whole(dense.tensor.grad)
        found.add(dense.names[0], grad, grads.get(dense.names[0]), floor=floor)
    for name, layer in handle.layers.items():
        for weight, inner in layer.naming.fused:
            expected = grads.get(f"{name}.{inner}")
            for e in layer.runtime.owned_experts:
                theirs = None if expected is None else layer.naming.from_original(weight, expected[e])
                found.add(f"{name}.{inner}[{e}]", layer[e].parameter(weight).grad, theirs, floor=floor)
    return found


def main(folder: Path, families: Sequence[str]) -> None:
    """Check as one rank; rank 0 writes a line for each family."""
    launch = LaunchConfig(device="cpu", init_method=f"file://{folder.resolve()}/rendezvous")
    process = find_process(launch, os.environ)
    with process_group(process, launch, timeout_s=_TIMEOUT_S) as mesh:
        for family in families:
            state = check_family(process, mesh, family)
            if process.is_first:
                with (folder / "states.jsonl").open("a", encoding="utf-8") as report:
                    print(json.dumps(asdict(state)), file=report)
            gc.collect()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""Check of a user's model on several ranks against one rank, for `moesaic doctor --model`. Also the program of each rank.

The command's own process runs the model as built, then sharded over one rank: the reference. Then one process per rank runs it
without copies, with copies, and with copies after a migration of experts.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ...placement import OwnerMap, Placement
from ...runtime import Handle, RuntimeConfig, shard_experts
from ..config import LaunchConfig
from ..entry import USAGE_STATUS
from ..run.process import Process, find_process, gather, process_group
from .children import problem_of, run_children
from .observe import (
    Reference,
    disable_dropout,
    followed_choices,
    gradients_of,
    observe_on_one,
    observe_unwrapped,
    outputs_of,
    projection,
)
from .target import Inputs, find_target, make_inputs, read_inputs

COLUMNS = ("plan", "check", "compared", "worst", "difference", "tolerance", "result")
_WITHOUT_COPIES, _WITH_COPIES, _MOVED = "owners alone", "with copies", "moved, with copies"
# A gradient's difference is relative to its largest value, but at least to this share of the largest gradient: smaller values may
# be rounding alone.
FLOOR = 1e-3
SLOTS = 2


@dataclass(frozen=True)
class Request:
    """The options of a check."""

    target: str
    ranks: int = 2
    tokens: int = 128
    input_path: str | None = None
    tolerance: float = 1e-5
    device: str = "auto"
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise ValueError(f"--tolerance is {self.tolerance}; give a relative difference above 0, such as 1e-5")


@dataclass(frozen=True)
class Comparison:
    """One quantity on several ranks against the reference."""

    model: str
    ranks: int
    plan: str
    check: str
    compared: int
    """The number of tensors, counts or choices compared."""
    worst: str
    """The tensor or layer with the largest difference."""
    difference: float | None
    """The largest difference; of values, relative to the largest value of the same tensor. None: infinite."""
    tolerance: float
    result: str
    """pass or fail."""


@dataclass
class Difference:
    """The largest difference over several tensors."""

    compared: int = 0
    worst: str = ""
    value: float = 0.0

    def add(self, name: str, actual: Tensor | None, expected: Tensor | None, *, floor: float = 0.0) -> None:
        """Compare one more tensor; a missing one counts as zeros."""
        self.compared += 1
        present = expected if actual is None else actual
        if present is None:
            return
        actual = torch.zeros_like(present) if actual is None else actual.detach().cpu()
        expected = torch.zeros_like(present) if expected is None else expected
        if actual.shape != expected.shape:
            self.note(name, math.inf)
        elif expected.numel():
            scale = max(float(expected.double().abs().max()), floor)
            error = float((actual.double() - expected.double()).abs().max())
            self.note(name, error / scale if scale else error)

    def note(self, name: str, value: float) -> None:
        """Record a difference; NaN counts as infinite."""
        value = math.inf if math.isnan(value) else value
        if not self.worst or value > self.value:
            self.worst, self.value = name, value


def check_model(request: Request) -> list[Comparison]:
    """Run the whole check. Raises ValueError if target, inputs or size cannot be checked."""
    request = replace(request, device=_device(request))
    launch = LaunchConfig(device=request.device)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        comparisons = _make_reference(request, find_process(launch, {}), launch, Path(folder))
        (Path(folder) / "request.json").write_text(json.dumps(asdict(request)), encoding="utf-8")
        return comparisons + _run_ranks(request, Path(folder))


def _device(request: Request) -> str:
    """cuda if there is a device for every rank."""
    if request.device != "auto":
        return request.device
    return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= request.ranks else "cpu"


def _make_reference(request: Request, process: Process, launch: LaunchConfig, folder: Path) -> list[Comparison]:
    """Observe the sharded model on one rank and compare it with the model as built; write the reference into `folder`."""
    target = find_target(request.target)
    _check_memory(request, target.count_parameters())
    model, inputs = target.build()
    _check_memory(request, sum(parameter.numel() for parameter in model.parameters()))
    if request.input_path is not None:
        inputs = read_inputs(request.input_path)
    inputs = inputs or make_inputs(model, request.tokens, request.ranks)
    inputs.part(0, request.ranks)
    torch.save(model.state_dict(), folder / "weights.pt")
    torch.save({"args": inputs.args, "kwargs": dict(inputs.kwargs)}, folder / "inputs.pt")
    model, inputs = model.to(process.device), inputs.to(process.device)
    config = RuntimeConfig(policy="static", slots=0, shard_dense=False, timeout_s=request.timeout_s)
    with process_group(process, launch, timeout_s=request.timeout_s) as mesh:
        try:
            built = observe_unwrapped(model, inputs, request.ranks)
        except Exception as error:
            what = " ".join(str(error).split())
            raise ValueError(
                f"--model {request.target}: the forward of {type(model).__name__} with ({inputs}) failed: "
                f"{type(error).__name__}: {what}; return (model, inputs) from the callable, or give --input FILE"
            ) from error
        handle = shard_experts(model, mesh=mesh, config=config)
        disable_dropout(model, handle.layers)
        wrapped = observe_on_one(handle, inputs, request.ranks, with_aux_loss=False)
        reference = observe_on_one(handle, inputs, request.ranks, with_aux_loss=True)
    torch.save(asdict(reference), folder / "reference.pt")
    outputs, norm = Difference(), Difference()
    for index, (actual, expected) in enumerate(zip(wrapped.outputs, built.outputs, strict=True)):
        _compare_outputs(outputs, actual, expected, f" of part {index}")
    norm.add("global norm", torch.tensor(wrapped.norm), torch.tensor(built.norm))
    found = {"outputs": outputs, "global norm": norm}
    return [_comparison(request, "on one rank, as built", 1, name, each) for name, each in found.items()]


def _check_memory(request: Request, num_parameters: int | None) -> None:
    """Raise ValueError unless the reference and, on every rank, the whole model that is built first fit into memory."""
    if num_parameters is None:
        return
    needed, available = 4 * (request.ranks + 3) * num_parameters, _available_bytes()
    if needed > available:
        raise ValueError(
            f"--model {request.target} has {num_parameters / 1e9:.2f} billion parameters; checking it on {request.ranks} ranks "
            f"takes about {needed / 2**30:.0f} GiB and {available / 2**30:.0f} GiB are free: check fewer layers or experts"
        )


def _available_bytes() -> int:
    """Memory available to new processes; on Linux including what its caches would release."""
    path = Path("/proc/meminfo")
    if path.exists():
        for line in path.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _run_ranks(request: Request, folder: Path) -> list[Comparison]:
    """Start the ranks, wait for them, and read the report of rank 0."""
    environments = [
        os.environ
        | {
            "RANK": str(rank),
            "WORLD_SIZE": str(request.ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(request.ranks),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        for rank in range(request.ranks)
    ]
    children = run_children(
        [[sys.executable, "-m", "moesaic.launch.doctor.model_check", str(folder)]] * request.ranks, environments
    )
    problem = problem_of(children)
    if any(child.status == USAGE_STATUS for child in children):
        raise ValueError(problem)
    if problem:
        return [Comparison(request.target, request.ranks, "", "run", 0, problem, None, request.tolerance, "fail")]
    return [Comparison(**values) for values in json.loads((folder / "report.json").read_text(encoding="utf-8"))]


def check_rank(process: Process, mesh: DeviceMesh, request: Request, folder: Path) -> list[Comparison]:
    """The comparisons of all ranks, merged. Collective."""
    target = find_target(request.target)
    model, _ = target.build()
    model.load_state_dict(torch.load(folder / "weights.pt", mmap=True))
    model = model.to(process.device)
    inputs = Inputs(**torch.load(folder / "inputs.pt")).part(process.rank, process.world_size).to(process.device)
    reference = Reference(**torch.load(folder / "reference.pt", mmap=True))
    # The ranks are not compared for drift: a model's buffers may depend on each rank's own tokens.
    config = RuntimeConfig(policy="static", slots=SLOTS, check_replicas_every=0, timeout_s=request.timeout_s)
    handle = shard_experts(model, mesh=mesh, config=config)
    disable_dropout(model, handle.layers)
    comparisons: list[Comparison] = []
    for plan in (_WITHOUT_COPIES, _WITH_COPIES, _MOVED):
        if plan == _MOVED:
            handle.migrate([moved(owners) for owners in handle.owner_maps])
        if plan != _WITHOUT_COPIES:
            hold_copies(handle, reference.loads)
        found = _compare_step(process, handle, inputs, reference)
        comparisons += [_comparison(request, plan, request.ranks, name, each) for name, each in _merged(process, found).items()]
    return comparisons


def moved(owners: OwnerMap) -> OwnerMap:
    """Every expert at its neighbour's owner: most experts move, and every rank owns as many as before."""
    owners_LE = owners.expert_to_owner_LE
    return OwnerMap(
        np.roll(owners_LE.ravel(), owners.num_experts // owners.num_ranks or 1).reshape(owners_LE.shape), owners.num_ranks
    )


def hold_copies(handle: Handle, loads: Mapping[str, Tensor]) -> None:
    """Give every layer copies of its busiest experts from now on, different ones on each rank, one per slot."""
    for name, layer in handle.layers.items():
        runtime = layer.runtime
        owner_E = runtime.bank.owners.expert_to_owner_LE[runtime.layer]
        busiest = np.argsort(-loads[name].numpy().sum(axis=0), kind="stable") if name in loads else np.arange(owner_E.size)
        replicas_RE = Placement.owners_only(owner_E, runtime.group.world_size).replicas_RE.copy()
        for rank in range(runtime.group.world_size):
            others = [e for e in np.roll(busiest, -rank) if owner_E[e] != rank]
            replicas_RE[rank, others[:SLOTS]] = True
        runtime.drop_prefetched()
        runtime.planner.hold(Placement(owner_E, replicas_RE))


def _compare_step(process: Process, handle: Handle, inputs: Inputs, reference: Reference) -> dict[str, Difference]:
    """One forward and backward on this rank, compared with its part of the reference."""
    rank, names = process.rank, ("outputs", "gradients", "global norm", "aux loss", "counts", "choices")
    found = {name: Difference() for name in names}
    with followed_choices(handle, {name: parts[rank] for name, parts in reference.choices.items()}) as choices:
        outputs = outputs_of(handle.model, inputs)
        aux_loss = handle.aux_loss()
        (projection(outputs, rank) + aux_loss).backward()
    _compare_outputs(found["outputs"], outputs, reference.outputs[rank], f" on rank {rank}")
    floor = FLOOR * max((float(grad.abs().max()) for grad in reference.gradients.values() if grad.numel()), default=0.0)
    for name, grad in gradients_of(handle):
        found["gradients"].add(name, grad, reference.gradients.get(name), floor=floor)
    # Each rank compares the gradients of the experts that it owns; together the ranks compare all.
    found["gradients"].compared = len(reference.gradients)
    norm = handle.clip_grad_norm_(math.inf)
    found["global norm"].add("global norm", norm, torch.tensor(reference.norm))
    mean_aux_loss = sum(gather(process, float(aux_loss.detach()))) / process.world_size
    found["aux loss"].add("aux loss", torch.tensor(mean_aux_loss), torch.tensor(reference.aux_loss))
    for name, layer in handle.layers.items():
        load_RE = layer.runtime.counters.load_RE
        expected_RE = reference.loads.get(name)
        if load_RE is not None and expected_RE is not None:
            found["counts"].compared += load_RE.size
            found["counts"].note(name, float(np.abs(load_RE - expected_RE.numpy()).max()))
    found["choices"].compared = choices.num_choices
    found["choices"].note(f"{choices.worst}, {choices.num_other} other choices", choices.worst_gap)
    handle.model.zero_grad()
    handle.step()
    return found


def _compare_outputs(found: Difference, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    for name in expected.keys() | actual.keys():
        found.add(name + where, actual.get(name), expected.get(name))


def _merged(process: Process, found: Mapping[str, Difference]) -> dict[str, Difference]:
    """The largest differences over all ranks. Collective."""
    per_rank, merged = gather(process, found), {}
    for name in found:
        parts = [each[name] for each in per_rank]
        worst = max(parts, key=lambda part: part.value)
        total = sum(part.compared for part in parts) if name in ("outputs", "choices") else max(p.compared for p in parts)
        merged[name] = Difference(total, worst.worst, worst.value)
    return merged


def _comparison(request: Request, plan: str, ranks: int, check: str, found: Difference) -> Comparison:
    tolerance = 0.0 if check == "counts" else request.tolerance
    result = "pass" if found.value <= tolerance else "fail"
    worst, difference = found.worst if found.value else "", found.value if math.isfinite(found.value) else None
    return Comparison(request.target, ranks, plan, check, found.compared, worst, difference, tolerance, result)


def main(folder: Path) -> None:
    """Check as one rank; rank 0 writes the report."""
    request = Request(**json.loads((folder / "request.json").read_text(encoding="utf-8")))
    init_method = f"file://{folder.resolve()}/rendezvous"
    launch = LaunchConfig(device=request.device, init_method=init_method)  # type: ignore[arg-type]
    process = find_process(launch, os.environ)
    with process_group(process, launch, timeout_s=request.timeout_s) as mesh:
        comparisons = check_rank(process, mesh, request, folder)
        if process.is_first:
            (folder / "report.json").write_text(json.dumps([asdict(each) for each in comparisons]), encoding="utf-8")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except ValueError as problem:
        print(" ".join(str(problem).split()), file=sys.stderr)
        sys.exit(USAGE_STATUS)

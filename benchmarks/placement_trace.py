"""Placement on recorded tokens: gap of the exact solver by layer, and hops between layers under several owner maps.

A recording is an `.npz` with `topk_ids`, integers [T, L, K], the experts of every token; `task` [T] is the kind of text.
Machines are H100 nodes of up to 8 ranks; experts have the sizes of DeepSeek-V2-Lite.

Shape letters: T tokens, L layers, K top-k, E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..placement import (
    ExpertLoad,
    LayerShape,
    OwnerMap,
    Problem,
    Topology,
    count_hops,
    get_solver,
    solve_joint,
    split_exact,
    tune_owners,
)
from ..placement.solvers.milp.planner import solve as solve_milp
from ..placement.traces.npz import NpzReader

_MOST_BYTES = 1 << 28
_DIM, _FFN_DIM = 2048, 1408


@dataclass(frozen=True)
class Recording:
    """Experts of every token, int64 [T, L, K], and its kind of text [T]."""

    ids_TLK: np.ndarray
    task_T: np.ndarray
    num_experts: int

    @classmethod
    def read(cls, path: str) -> Recording:
        """Read a file. Raises ValueError if it is no recording."""
        reader = NpzReader(path, "trace")
        if "topk_ids" not in reader.members:
            raise ValueError(f"{path} holds no topk_ids, the experts of every token; record with them")
        ids_TLK = reader.array("topk_ids", _MOST_BYTES).astype(np.int64)
        if ids_TLK.ndim != 3 or not ids_TLK.size or ids_TLK.min() < 0:
            raise ValueError(f"{path}: topk_ids must be [T, L, K] of 0 and more, got {ids_TLK.shape}")
        task_T = reader.array("task", _MOST_BYTES) if "task" in reader.members else np.arange(len(ids_TLK))
        if task_T.shape != ids_TLK.shape[:1]:
            raise ValueError(f"{path}: task must name one kind per token, got {task_T.shape} for {len(ids_TLK)} tokens")
        return cls(ids_TLK, task_T, int(ids_TLK.max()) + 1)

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return int(self.ids_TLK.shape[1])

    def halves(self) -> tuple[Recording, Recording]:
        """The first half of the tasks by number, and the rest; without tasks the two halves of the tokens."""
        tasks = np.unique(self.task_T)
        is_first_T = np.isin(self.task_T, tasks[: (tasks.size + 1) // 2])
        return self._only(is_first_T), self._only(~is_first_T)

    def _only(self, is_chosen_T: np.ndarray) -> Recording:
        return Recording(self.ids_TLK[is_chosen_T], self.task_T[is_chosen_T], self.num_experts)

    def load(self, layer: int, num_ranks: int) -> ExpertLoad:
        """Count a layer's assignments, with the tokens distributed over the ranks in consecutive blocks."""
        blocks = np.array_split(self.ids_TLK[:, layer], num_ranks)
        return ExpertLoad(np.stack([np.bincount(block.ravel(), minlength=self.num_experts) for block in blocks]))

    def pair_counts(self) -> np.ndarray:
        """Count the tokens with expert i in a layer and expert j in the next, int64 [L - 1, E, E]."""
        pairs = []
        for layer in range(self.num_layers - 1):
            cells = self.ids_TLK[:, layer, :, None] * self.num_experts + self.ids_TLK[:, layer + 1, None, :]
            pairs.append(np.bincount(cells.ravel(), minlength=self.num_experts**2).reshape(self.num_experts, -1))
        return np.array(pairs, dtype=np.int64).reshape(-1, self.num_experts, self.num_experts)

    def problem(self, layer: int, topology: Topology, slots: int, *, overlap_s: float = 0.0) -> Problem:
        """The placement problem of one layer, from contiguous owners."""
        shape = LayerShape(self.num_experts, self.ids_TLK.shape[2], _DIM, _FFN_DIM, bytes_per_element=2)
        owner_E = OwnerMap.contiguous(1, self.num_experts, topology.num_ranks).expert_to_owner_LE[0]
        return Problem(self.load(layer, topology.num_ranks), owner_E, topology, shape, slots, overlap_s=overlap_s)


@dataclass(frozen=True, kw_only=True)
class TraceCase:
    """A recording, and the options of its benchmarks.

    layers: those to solve exactly, all if empty. overlap_s: seconds of other work that hide a gather. move_owners: whether owners
    may change. nodes: number of nodes when hops are counted.
    """

    path: str
    layers: tuple[int, ...] = ()
    overlap_s: float = 0.0
    move_owners: bool = False
    nodes: int = 1


def about(what: str, solver: str, problem: Problem) -> dict[str, Any]:
    """The first keys of a record."""
    sizes = {"experts": problem.num_experts, "ranks": problem.num_ranks, "slots": problem.slots}
    return {"what": what, "solver": solver, **sizes}


def milp_gaps(problem: Problem, limits_s: Sequence[float], *, move_owners: bool = True, **more: Any) -> list[dict[str, Any]]:
    """Solve one layer exactly within each time limit; one record per limit, with `more` keys."""
    quota_s = get_solver("quota")(problem).cost.total_s
    records = []
    for limit_s in limits_s:
        answer = solve_milp(problem, move_owners=move_owners, time_limit_s=limit_s)
        split = answer.split or split_exact(problem.load, answer.placement, problem.topology)
        records.append(
            {
                **about("milp", "milp", problem),
                **more,
                "max_over_mean": split.max_over_mean,
                "copies": answer.placement.num_copies,
                "ms_of_step": 1e3 * answer.cost.total_s,
                "ratio_to_quota": answer.cost.total_s / quota_s,
                "gap": answer.gap,
                "limit_s": limit_s,
                "seconds": answer.seconds,
            }
        )
    return records


def milp_gaps_of_trace(trace: TraceCase, ranks: int, slots: int, limits_s: Sequence[float]) -> list[dict[str, Any]]:
    """The same for layers of a recording, one after the other."""
    recording, topology = Recording.read(trace.path), Topology.preset("h100", ranks)
    layers = trace.layers or tuple(range(recording.num_layers))
    if max(layers) >= recording.num_layers:
        raise ValueError(f"--layer {max(layers)} is not among the {recording.num_layers} layers of {trace.path}; count from 0")
    problems = [(layer, recording.problem(layer, topology, slots, overlap_s=trace.overlap_s)) for layer in layers]
    return [record for layer, p in problems for record in milp_gaps(p, limits_s, move_owners=trace.move_owners, layer=layer)]


def _owner_maps(train: Recording, topology: Topology, limit_s: float) -> dict[str, OwnerMap]:
    """Owner maps of all layers from one recording, by solver."""
    num_layers, num_ranks = train.num_layers, topology.num_ranks
    problems = [train.problem(layer, topology, 0) for layer in range(num_layers)]
    totals_LE = np.stack([problem.load.totals_E for problem in problems])
    by_load = [get_solver("lpt")(problem).placement.expert_to_owner_E for problem in problems]
    pairs_LEE = train.pair_counts()
    return {
        "contiguous": OwnerMap.contiguous(num_layers, train.num_experts, num_ranks),
        "lpt": OwnerMap(np.stack(by_load), num_ranks),
        "moetuner": tune_owners(totals_LE, pairs_LEE, topology, time_limit_s=limit_s),
        "joint": solve_joint(problems, pair_counts_LEE=pairs_LEE).owners,
    }


def hops(trace: TraceCase, ranks: int, *, limit_s: float) -> list[dict[str, Any]]:
    """Place by one half of the tasks, and count hops and balance on the other; `ranks` in total, on the trace's nodes."""
    nodes = trace.nodes
    if ranks % nodes:
        raise ValueError(f"--ranks {ranks} do not fill --nodes {nodes}; give a multiple")
    train, test = Recording.read(trace.path).halves()
    topology = Topology.preset("h100", num_nodes=nodes, ranks_per_node=ranks // nodes)
    pairs_LEE, records = test.pair_counts(), []
    for solver, owners in _owner_maps(train, topology, limit_s).items():
        shares = count_hops(owners, pairs_LEE, topology)
        busiest = []
        for layer, owner_E in enumerate(owners.expert_to_owner_LE):
            assignments_R = np.bincount(owner_E, weights=test.load(layer, ranks).totals_E, minlength=ranks)
            busiest.append(assignments_R.max() / assignments_R.mean())
        records.append(
            {
                "what": "moetuner",
                "solver": solver,
                "experts": train.num_experts,
                "ranks": ranks,
                "nodes": nodes,
                "off_rank": shares.off_rank,
                "off_node": shares.off_node,
                "max_over_mean": float(np.mean(busiest)),
            }
        )
    return records

"""The policy simulator: solvers run over a trace as training uses them, evaluated on the load of each step.

A run is one solver with one kind of information:
    predicted   places from a forecast of the past, as training does
    calibrated  the same, and adds copies once the load is known, where training would (`online/calibrate.py`)
    exact       places from the load of the step itself: the value of a perfect forecast of one step
    future      places once, from the mean over the whole trace, hedged against its steps: the value of a plan solved offline with
                hindsight
The split always uses the exact load; solvers that were published with the even split are evaluated under both. The first step,
for which there is no forecast, is not evaluated. Shape letters: L layers, R ranks, E experts.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from time import perf_counter
from types import MappingProxyType

import numpy as np

from ..cost import cost, lower_bound
from ..online.calibrate import CalibrationSwitch, calibrate, calibrated_s, unhedged_if_calibrated
from ..online.choose import SolverChoice
from ..online.predict import make_predictor, prediction_error
from ..owners import OwnerMap
from ..solvers.registry import keeps_owners, policy_solvers
from ..split import Split, split_exact, split_local_even
from ..topology import Topology
from ..traces.sources import LoadSource
from ..values import ExpertLoad, Placement, Problem
from .plans import SavedPlan
from .setting import Recorded, SimulatorSetting, recorded_loads, run_steps

INFORMATION = ("predicted", "calibrated", "exact", "future")
# What runs are simulated unless told otherwise, and those that place from forecasts.
COMPARED_INFORMATION = ("predicted", "exact", "future")
_FROM_FORECASTS = frozenset({"predicted", "calibrated"})
# Published with tokens split evenly over their nearest replicas; EPLB leaves dispatch to its engine, which does the same.
EVENLY_SPLIT = frozenset({"hecate", "laer", "flexmoe", "eplb", "eplb_hierarchical"})
SPLITS: Mapping[str, Callable[[ExpertLoad, Placement, Topology], Split]] = MappingProxyType(
    {"exact": split_exact, "even": split_local_even}
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one run under one split; its field names are those of the records that commands write.

    Means are over the evaluated (step, layer) cells, per-step values are sums over layers.

    knows: the run's information. max_over_mean, _p95, _max: `Topology.max_over_mean` of the rows by rank. bound: mean lower bound
    of max_over_mean over all placements. copies: per layer, over all ranks. off_rank_share, cross_node_share: of the assignments.
    Bytes and `step_s` are per step, by the model of cost.py. solve_s: solver seconds per layer solved. gap: of the predicted
    seconds to their lower bound. moves: total changes of owners.
    """

    solver: str
    knows: str
    split: str
    slots: int
    num_steps: int
    max_over_mean: float
    max_over_mean_p95: float
    max_over_mean_max: float
    bound: float
    copies: float
    off_rank_share: float
    cross_node_share: float
    dispatch_bytes_in_node: float
    dispatch_bytes_cross_node: float
    copy_bytes_in_node: float
    copy_bytes_cross_node: float
    move_bytes: float
    step_s: float
    solve_s: float
    gap: float
    moves: int
    max_over_mean_of_layer: tuple[float, ...]


@dataclass
class _Score:
    """Sums over the cells of one run under one split, of whole steps."""

    split: str
    num_layers: int
    ratios: array[float] = field(default_factory=lambda: array("d"))
    sums: dict[str, float] = field(default_factory=dict)
    cells: list[tuple[Mapping[str, float], float]] = field(default_factory=list)
    """Those of the present step: values, and rows of the busiest rank over the mean rank."""

    def end_step(self) -> None:
        """Add the cells of a step that is whole."""
        for values, ratio in self.cells:
            self.ratios.append(ratio)
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
        self.cells = []


@dataclass(frozen=True)
class _Doubt:
    """What a run is told about the load that it places from: of a forecast, its expected error and the scenarios beside it."""

    error: float = 0.0
    scenarios_SE: np.ndarray | None = None
    is_calibrating: bool = False


class _Run:
    """One solver with one kind of information: its present owners and its scores."""

    def __init__(
        self,
        name: str,
        information: str,
        slots: int,
        setting: SimulatorSetting,
        owners: OwnerMap,
        horizon: int,
        paid_steps: int,
    ) -> None:
        self.name, self.information, self.slots = name, information, slots
        self.horizon, self.paid_steps = horizon, paid_steps
        self.is_fixed = information == "future"
        self._setting = setting
        self._owners = list(owners.expert_to_owner_LE)
        self._standing: list[Placement | None] = [None] * owners.num_layers
        self._age = [0] * owners.num_layers
        self._choices: dict[int, SolverChoice] = {}
        self._solve_s, self._num_solved = 0.0, 0
        splits = ("exact", "even") if name in EVENLY_SPLIT and slots else ("exact",)
        self.scores = [_Score(split, owners.num_layers) for split in splits]

    def fix(self, placements: Sequence[Placement], seconds: float) -> None:
        """Use these placements instead of solving; they took `seconds` in total."""
        self.is_fixed = True
        self._standing = list(placements)
        self._solve_s, self._num_solved = seconds, len(placements)

    def _place(self, layer: int, known: ExpertLoad | None, doubt: _Doubt, is_calibrating: bool) -> Placement:
        standing = self._standing[layer]
        self._age[layer] += 1
        if known is None and standing is not None:
            return standing
        if known is None or not known.total:
            return Placement.owners_only(self._owners[layer], self._setting.topology.num_ranks)
        if standing is not None and not keeps_owners(self.name) and self._age[layer] % self._setting.migrate_every:
            return standing
        problem = self._setting.problem(known, self._owners[layer], self.slots, self.horizon, doubt.error)
        problem = replace(problem, scenarios_SE=doubt.scenarios_SE)
        if is_calibrating:
            problem = unhedged_if_calibrated(problem)
        start = perf_counter()
        placement = self._choice(layer).solve(problem)
        return self._take(layer, placement, perf_counter() - start)

    def _choice(self, layer: int) -> SolverChoice:
        """The run's solver, or the choice between those of `auto`."""
        if layer not in self._choices:
            solvers = {name: self._setting.solver(name) for name in policy_solvers(self.name)}
            self._choices[layer] = SolverChoice(solvers, split_exact)
        return self._choices[layer]

    def _take(self, layer: int, placement: Placement, seconds: float) -> Placement:
        self._solve_s += seconds
        self._num_solved += 1
        self._standing[layer] = placement
        return placement

    def solve(self, layer: int, recorded: Recorded) -> None:
        """Place a layer once, from what was recorded; `auto` as `quota`, which then prices copies as of `balance`."""
        if recorded.mean.total:
            name = policy_solvers(self.name)[0]
            found = self._setting.solve_run(name, recorded, self._owners[layer], self.slots, self.horizon)
            self._take(layer, found.placement, found.seconds)

    def play(self, layer: int, known: ExpertLoad | None, actual: ExpertLoad, doubt: _Doubt) -> None:
        """Place one layer from the known load, given the doubt about it, and evaluate the placement on the actual load."""
        is_calibrating = doubt.is_calibrating and self.information == "calibrated" and self.slots > 0
        placement = self._place(layer, known, doubt, is_calibrating)
        problem = self._setting.problem(actual, self._owners[layer], self.slots, self.horizon)
        bound = lower_bound(problem, owners_may_move=not keeps_owners(self.name))
        moves = int(np.count_nonzero(placement.expert_to_owner_E != self._owners[layer]))
        for score in self.scores:
            split = SPLITS[score.split](actual, placement, self._setting.topology)
            seconds = cost(problem, placement, split)
            # When a move happens it is charged in full, or the part of the run that is simulated; the solver amortises it.
            total_s = seconds.total_s + seconds.move_s * (self.paid_steps - 1)
            if is_calibrating:
                more = calibrate(problem, split, self._choice(layer).solver, SPLITS[score.split])
                total_s, split = (total_s, split) if more is None else (calibrated_s(problem, split, more), more)
            values = _traffic(problem, split.placement, split, moves)
            values["step_s"] = total_s
            values["gap"] = max(0.0, 1.0 - bound.total_s / total_s) if total_s > 0 else 0.0
            values["bound"] = problem.topology.over_mean(bound.max_rows, actual.total)
            score.cells.append((values, problem.topology.max_over_mean(split.rows_R)))
        if layer in self._choices:
            self._choices[layer].observe(problem)
        self._owners[layer] = placement.expert_to_owner_E

    def end_step(self) -> None:
        """Count the step that was played; what is played of a step that does not end counts nowhere."""
        for score in self.scores:
            score.end_step()

    def outcomes(self) -> list[Outcome]:
        """The outcomes, one per split; none before a step has ended."""
        return [self._outcome(score) for score in self.scores if score.ratios]

    def _outcome(self, score: _Score) -> Outcome:
        ratios = np.frombuffer(score.ratios, dtype=np.float64).reshape(-1, score.num_layers)
        num_steps, num_cells, sums = len(ratios), ratios.size, score.sums
        per_step = {name: sums[name] / num_steps for name in (*_BYTES, "step_s")}
        per_cell = {name: sums[name] / num_cells for name in ("bound", "copies", "gap")}
        rows = max(sums["rows"], 1.0)
        return Outcome(
            solver=self.name,
            knows=self.information,
            split=score.split,
            slots=self.slots,
            num_steps=num_steps,
            max_over_mean=float(ratios.mean()),
            max_over_mean_p95=float(np.quantile(ratios, 0.95)),
            max_over_mean_max=float(ratios.max()),
            off_rank_share=sums["off_rank"] / rows,
            cross_node_share=sums["off_node"] / rows,
            solve_s=self._solve_s / self._num_solved if self._num_solved else 0.0,
            moves=int(sums["moves"]),
            max_over_mean_of_layer=tuple(ratios.mean(axis=0).tolist()),
            **per_step,
            **per_cell,
        )


_BYTES = ("dispatch_bytes_in_node", "dispatch_bytes_cross_node", "copy_bytes_in_node", "copy_bytes_cross_node", "move_bytes")


def _traffic(problem: Problem, placement: Placement, split: Split, moves: int) -> dict[str, float]:
    """Count rows, copies and bytes by link: dispatch and combine, forward and backward; gathers and reduce."""
    topology, shape = problem.topology, problem.shape
    off_rank, off_node = split.off_rank, split.off_node(topology)
    ranks, experts = np.nonzero(placement.copies_RE)
    node_R = topology.node_of_rank_R
    cross = int(np.count_nonzero(node_R[placement.expert_to_owner_E[experts]] != node_R[ranks]))
    row_bytes = 4 * shape.row_bytes
    copy_bytes = problem.gathers * shape.expert_bytes + shape.gradient_bytes
    return {
        "rows": split.load.total,
        "off_rank": off_rank,
        "off_node": off_node,
        "copies": ranks.size,
        "moves": moves,
        "dispatch_bytes_in_node": (off_rank - off_node) * row_bytes,
        "dispatch_bytes_cross_node": off_node * row_bytes,
        "copy_bytes_in_node": (ranks.size - cross) * copy_bytes,
        "copy_bytes_cross_node": cross * copy_bytes,
        "move_bytes": moves * shape.parameters_per_expert * 4 * problem.state_multiplier,
    }


def _check_matches(source: LoadSource, setting: SimulatorSetting) -> None:
    meta, topology, shape = source.meta, setting.topology, setting.shape
    if meta.num_ranks != topology.num_ranks:
        raise ValueError(f"the trace is of {meta.num_ranks} ranks, the topology has {topology.num_ranks}; give matching ones")
    if meta.num_experts != shape.num_experts:
        raise ValueError(f"the trace has {meta.num_experts} experts, the shape says {shape.num_experts}; give matching ones")


class Interrupted(KeyboardInterrupt):
    """A comparison was ended by Ctrl-C; `outcomes` are of the steps that were whole by then, none before the first."""

    def __init__(self, outcomes: list[Outcome]):
        super().__init__()
        self.outcomes = outcomes


def compare(
    source: LoadSource,
    setting: SimulatorSetting,
    solvers: Sequence[str],
    *,
    slots: Sequence[int] = (2,),
    information: Sequence[str] = COMPARED_INFORMATION,
    num_steps: int | None = None,
    on_layer: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Run solvers over a source, all runs side by side in one pass; with `future` a pass before it. Ctrl-C: `Interrupted`.

    slots: budgets to try. num_steps: the first that many steps only. A source of one step has no forecasts: its runs are `exact`
    and `future`. `on_layer` is called after every layer of every step of the last pass, and when `future` has placed a layer.
    """
    _check_matches(source, setting)
    steps = min(source.num_steps, num_steps or source.num_steps)
    kinds = [kind for kind in INFORMATION if kind in information and (kind not in _FROM_FORECASTS or steps > 1)]
    owners = OwnerMap.contiguous(source.meta.num_layers, source.meta.num_experts, source.meta.num_ranks)
    runs = [
        _Run(
            name,
            kind,
            budget,
            setting,
            owners,
            run_steps(steps) if kind == "future" else setting.migrate_every,
            steps if kind == "future" else setting.migrate_every,
        )
        for budget in slots
        for kind in kinds
        for name in solvers
        if kind != "calibrated" or keeps_owners(name)
    ]
    try:
        for layer, recorded in enumerate(recorded_loads(source, setting, steps) if "future" in kinds else ()):
            for run in runs:
                if run.information == "future":
                    run.solve(layer, recorded)
            on_layer()
        _play(source, setting, runs, range(int(not _FROM_FORECASTS.isdisjoint(kinds)), steps), on_layer)
    except KeyboardInterrupt:
        raise Interrupted([outcome for run in runs for outcome in run.outcomes()]) from None
    return [outcome for run in runs for outcome in run.outcomes()]


def replay(
    source: LoadSource,
    setting: SimulatorSetting,
    plan: SavedPlan,
    *,
    information: str,
    on_layer: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Evaluate a saved plan on a source, unchanged through all steps. `information`: the kind of load it was solved from."""
    _check_matches(source, setting)
    plan.check_model(source.meta, "the trace")
    run = _Run(plan.solver, information, plan.slots, setting, plan.owners, source.num_steps, source.num_steps)
    run.fix(plan.layers, plan.seconds)
    _play(source, setting, [run], range(source.num_steps), on_layer)
    return run.outcomes()


def _play(
    source: LoadSource, setting: SimulatorSetting, runs: Sequence[_Run], judged: range, on_layer: Callable[[], None]
) -> None:
    """Advance all runs over the source, up to the last evaluated step."""
    predictors = [make_predictor(setting.predictor) for _ in range(source.meta.num_layers)]
    switches = [CalibrationSwitch() for _ in range(source.meta.num_layers)]
    for step, loads_LRE in enumerate(islice(source.steps(), judged.stop)):
        for layer, (predictor, actual) in enumerate(zip(predictors, setting.loads(loads_LRE), strict=True)):
            forecast = predictor.predict()
            doubt = _Doubt(predictor.expected_error(), predictor.scenarios(), switches[layer].is_on)
            for run in runs if step in judged else ():
                is_forecast = run.information in _FROM_FORECASTS
                known = None if run.is_fixed else forecast if is_forecast else actual
                run.play(layer, known, actual, doubt if is_forecast else _Doubt())
            if forecast is not None:
                switches[layer].observe(prediction_error(forecast, actual))
            predictor.observe(actual)
            on_layer()
        for run in runs:
            run.end_step()

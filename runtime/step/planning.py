"""Planning: a placement from the predicted load, early; the token split from the exact load, after the router.

Every rank plans alone and reaches the same plan: the inputs are integers that all ranks gathered, the topology is part of
the configuration, and solvers are deterministic. Nothing here is broadcast, and nothing else in the runtime plans.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ...collectives import Account, Schedule, account, choose_schedule, direct_gather, make_schedule
from ...placement import (
    CalibrationSwitch,
    ExpertLoad,
    LayerShape,
    Placement,
    Problem,
    Solver,
    SolverChoice,
    Split,
    Topology,
    added_copies,
    calibrate,
    make_predictor,
    prediction_error,
    split_exact,
    split_local_even,
    unhedged_if_calibrated,
)
from ..config import RuntimeConfig
from ..experts.memory import staging_limit


@dataclass(frozen=True)
class Plan:
    """The holders of experts for one forward of one layer, how copies get there, and (once routed) which rank computes what."""

    placement: Placement
    schedule_name: str
    """Which of `SCHEDULES` the gather follows."""
    gather: Schedule
    reduce: Schedule
    gather_account: Account
    number: int
    """Counts the placements of a layer's run from 0: the same number on every rank, for errors."""
    split: Split | None = None
    added: Schedule | None = None
    """The gather of the copies that calibration added, which `gather` and `reduce` include; None: it added none."""

    @property
    def num_added(self) -> int:
        """Copies that calibration added."""
        return 0 if self.added is None else len({(route.item, dst) for route in self.added.routes for _, dst in route.hops})

    def experts_of(self, rank: int) -> tuple[int, ...]:
        """The experts that `rank` computes, ascending."""
        return tuple(int(e) for e in np.flatnonzero(self.placement.replicas_RE[rank]))

    def copies_of(self, rank: int) -> tuple[int, ...]:
        """The experts that `rank` holds a copy of, ascending."""
        return tuple(int(e) for e in np.flatnonzero(self.placement.copies_RE[rank]))


class LayerPlanner:
    """Plans one MoE layer, forward after forward.

    Args:
        expert_to_owner_E: the owners of this layer's experts.
        topology, shape: of the machine and of the layer; they turn bytes and routed tokens into seconds.
        solvers: propose the copies; of several, by name, the one that suits the layer.
        config: slots, split rule, predictor.
    """

    def __init__(
        self,
        expert_to_owner_E: np.ndarray,
        topology: Topology,
        shape: LayerShape,
        solvers: Mapping[str, Solver],
        config: RuntimeConfig,
    ):
        self._owners_E = expert_to_owner_E
        self._topology = topology
        self._shape = shape
        assert isinstance(config.slots, int), "slots are still to be chosen; see memory.plan_slots"
        self._debug, self._slots = config.debug, config.slots
        self._predictor = make_predictor(config.debug.predictor)
        self._split_rule = split_exact if config.debug.split == "exact" else split_local_even
        self._solvers = solvers
        self.choice = SolverChoice(solvers, self._split_rule)
        """The solver that places the copies."""
        self.overlap_s = 0.0 if isinstance(config.debug.overlap_s, str) else config.debug.overlap_s
        """Seconds of other work ahead of the layer, as plans take it; see `set_overlap`."""
        self._num_plans = 0
        self._plan = self._plan_of(Placement.owners_only(expert_to_owner_E, topology.num_ranks))
        self._is_held = False
        self._predicted: ExpertLoad | None = None
        self._calibration = CalibrationSwitch()

    def hold(self, placement: Placement) -> None:
        """Keep this placement, of the same owners, for every forward to come; nothing is solved any more."""
        assert np.array_equal(placement.expert_to_owner_E, self._owners_E)
        self._check_budget(placement)
        self._plan = self._plan_of(placement)
        self._is_held = True

    def change_owners(self, expert_to_owner_E: np.ndarray) -> None:
        """Plan for other owners from now on. Observed loads stay valid; a held placement is given up."""
        self._owners_E = expert_to_owner_E
        self._plan = self._plan_of(Placement.owners_only(expert_to_owner_E, self._topology.num_ranks))
        self._is_held = False

    def set_overlap(self, seconds: float) -> None:
        """Plan from now on with so many seconds of other work ahead of the layer. All ranks in the same forward."""
        if seconds != self.overlap_s:
            self.overlap_s = seconds
            self.choice = SolverChoice(self._solvers, self._split_rule)  # earlier trials were priced without

    def problem(self, load: ExpertLoad, forecast_error: float = 0.0) -> Problem:
        """What a solver is asked for this layer, for a load that was measured, or forecast with that error expected."""
        return Problem(
            load=load,
            expert_to_owner_E=self._owners_E,
            topology=self._topology,
            shape=self._shape,
            slots=self._slots,
            overlap_s=self.overlap_s,
            forecast_error=forecast_error,
        )

    def place(self, *, is_training: bool = True) -> Plan:
        """The placement for the next forward. Before the first load it is ownership alone, unless one is held."""
        if self._is_held:
            return self._plan
        predicted = self._predicted = self._predictor.predict()
        if predicted is not None and predicted.total > 0:
            forecast = self.problem(predicted, self._predictor.expected_error())
            forecast = replace(forecast, scenarios_SE=self._predictor.scenarios())
            if self.is_calibrating:
                forecast = unhedged_if_calibrated(forecast)
            placement = self.choice.solve(forecast, is_observed=is_training)
            if placement != self._plan.placement:
                self._check_budget(placement)
                self._plan = self._plan_of(placement)
        return self._plan

    def split(self, plan: Plan, load: ExpertLoad) -> Plan:
        """The same plan with the exact load split over its copies, and over more where calibration adds some."""
        plan = replace(plan, split=self._split_rule(load, plan.placement, self._topology))
        if not self.is_calibrating:
            return plan
        assert plan.split is not None
        more = calibrate(self.problem(load), plan.split, self.choice.solver, self._split_rule)
        if more is None:
            return plan
        self._check_budget(more.placement)
        _, added = self._gather_of(added_copies(more.placement, plan.placement))
        return replace(self._plan_of(more.placement), split=more, added=added, number=plan.number)

    @property
    def is_calibrating(self) -> bool:
        """Whether the next split may add copies: as configured, or while predictions are bad, or there were none."""
        if self._is_held or not self._slots or self._topology.num_ranks == 1:
            return False
        if self._debug.calibrate != "auto":
            return self._debug.calibrate == "always"
        return self._calibration.is_on

    def observe(self, load: ExpertLoad) -> float | None:
        """Update the predictor with a measured load; return its forecast's `prediction_error`, None if there was no forecast."""
        error = None if self._predicted is None else prediction_error(self._predicted, load)
        if error is not None:
            self._calibration.observe(error)
        if self.choice.is_trying:
            self.choice.observe(self.problem(load))
        self._predictor.observe(load)
        return error

    def _check_budget(self, placement: Placement) -> None:
        copies_R = placement.copies_RE.sum(axis=1)
        if copies_R.max() > self._slots:
            rank = int(copies_R.argmax())
            raise ValueError(
                f"the placement puts {copies_R[rank]} copies on rank {rank}, which has {self._slots} slots; "
                "raise runtime.slots, or mend the solver or plan"
            )

    def _plan_of(self, placement: Placement) -> Plan:
        """The placement with its schedules: the gather as configured or predicted best, and the reduce, its transpose.

        Sums are made in fp32. A relay forwards partial sums, which therefore must travel in fp32; narrower gradients, and those
        that are narrowed for the wire, go straight to the owner, in two chunks so that the sum in progress takes half an expert.
        """
        shape, (name, gather) = self._shape, self._gather_of(placement)
        if shape.gradient_bytes_per_element >= 4:
            reduce = gather.transpose().limit_receives(staging_limit(self._slots))
        else:
            reduce = direct_gather(placement, num_chunks=2).transpose().limit_receives(max(self._slots, 1))
        counted = account(gather, self._topology, shape.parameters_per_expert, shape.bytes_per_element)
        self._num_plans += 1
        return Plan(placement, name, gather, reduce, counted, self._num_plans - 1)

    def _gather_of(self, placement: Placement) -> tuple[str, Schedule]:
        """The gather of a placement's copies, and its name: as configured, or the one that is predicted to be fastest."""
        if self._debug.schedule == "auto":
            choice = choose_schedule(placement, self._topology, self._shape)
            return choice.name, choice.schedule
        name = self._debug.schedule
        return name, make_schedule(name, placement, self._topology, self._shape.expert_bytes)

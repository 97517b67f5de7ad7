"""The placement of one layer as a mixed-integer program in PuLP. Import this module lazily: it imports PuLP and HiGHS.

For expert e and rank r:
    owner[e,r], copy[e,r] in {0,1}   r owns e, r holds a copy of e; the fractions below are >= 0
    group[e,r]                       e has rows at its owner r (a copy without rows never pays, so copies always count); whole,
                                     because kept[e], whether e has rows at its owner at all, is 0 or 1
    rows[e,r], own[e,r]              rows of e computed on r, and those of them that come from r itself (own_node likewise);
                                     own is bounded by its load times the holder's variable as well: with fractional
                                     owners, all tokens could otherwise stay on their ranks
Minimised is cost.py's model term by term, in units of `seconds`: compute of the busiest rank, dispatch and copies and moves over
the busiest device and node link, less what hides. The split is free here: fractional, and chosen with the whole cost in
view. So the optimum is a lower bound on the cost of every placement under the exact split.

Placements above `seconds` are cut off, which says how much work and dispatch the others can have at most (bounds.room_within),
and with it which copies they need at least: a rank above that work must hand on experts, one that the others leave too little
work must receive some, and a rank or node must hold experts that keep enough of its rows on it. Each is a knapsack cover, with
coefficients no larger than the need: fractions of large copies no longer do.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pulp

from ...cost import prices_of
from ...values import Placement, Problem
from ..bounds import Room, room_within
from ..engines import minimise

# Needs below this many rows are a matter of rounding.
_LEAST_NEED = 1e-3

Table = dict[tuple[int, int], pulp.LpVariable]


@dataclass(frozen=True)
class Answer:
    """What an engine returned: the best placement it found, if any, and its proven bound in seconds (0 if it proved none).

    is_complete: it ended by itself, not by its time limit. is_interrupted: it was ended by Ctrl-C.
    """

    placement: Placement | None
    bound_s: float
    is_complete: bool
    is_interrupted: bool


@dataclass(frozen=True)
class CopyRange:
    """From `low` to `high` copies, both included; None for any number."""

    low: int
    high: int | None


@dataclass(frozen=True)
class _Link:
    """One exchange: items on its busiest link (a node link's counted at the device rate), and whether there are any.

    Items, not seconds, so that coefficients stay near 1 whatever the rates; only the objective and the overlap see seconds.
    """

    items: pulp.LpVariable
    used: pulp.LpVariable

    def time(self, per_item: float, latency: float) -> pulp.LpAffineExpression:
        """Return the exchange's time in objective units."""
        return per_item * self.items + latency * self.used


@dataclass
class Model:
    """The program of one problem, of all placements that cost no more than `seconds`, the unit of its objective.

    `copies` narrows it to placements whose busiest device sends or receives that many.
    """

    problem: Problem
    seconds: float
    move_owners: bool
    copies: CopyRange = CopyRange(0, None)
    program: pulp.LpProblem = field(init=False)
    owner: Table = field(init=False)
    copy: Table = field(init=False)

    def __post_init__(self) -> None:
        problem, self._room = self.problem, self._room_within()
        if self.move_owners and not self._room.moves:
            # One move alone would cost too much.
            self.move_owners = False
            self._room = self._room_within()
        self.program = pulp.LpProblem("placement", pulp.LpMinimize)
        # Rows are counted in mean ranks, so that coefficients stay near 1.
        self._unit_rows = max(problem.load.total / problem.num_ranks, 1.0)
        self._load_RE = problem.load.load_RE / self._unit_rows
        # Of a row, over that of the fastest rank: 1 where all ranks are as fast.
        self._cost_R = (problem.topology.cost_R / problem.topology.least_cost).tolist()
        # Of an item on a node link, over that on a device link.
        slower = problem.topology.device_bytes_per_s / problem.topology.node_bytes_per_s / problem.topology.node_unit
        self._slower_N = (slower * problem.topology.node_cost_N).tolist()
        self._latency = problem.topology.latency_s / self.seconds
        self._experts, self._ranks = range(problem.num_experts), range(problem.num_ranks)
        pairs = [(e, r) for e in self._experts for r in self._ranks]
        self.owner, self.copy = self._table("owner", pairs, pulp.LpBinary), self._table("copy", pairs, pulp.LpBinary)
        self._fix_owners()
        rows = self._table("rows", pairs)
        self._constrain_holders()
        objective = [self._compute_s(rows)]
        if problem.num_ranks > 1:
            objective += [self._dispatch_s(rows), self._copy_s()]
        if self.move_owners:
            objective.append(self._move_s())
        self.program += pulp.lpSum(objective), "seconds"
        self._add(pulp.lpSum(objective) <= 1, "cutoff")
        if problem.num_ranks > 1:
            self._cover_needs()

    def _table(self, name: str, pairs: list[tuple[int, int]], kind: str = pulp.LpContinuous) -> Table:
        upper = 1 if kind == pulp.LpBinary else None
        return {(a, b): self.program.add_variable(f"{name}_{a}_{b}", 0, upper, kind) for a, b in pairs}

    def _variable(self, name: str, kind: str = pulp.LpContinuous) -> pulp.LpVariable:
        return self.program.add_variable(name, 0, 1 if kind == pulp.LpBinary else None, kind)

    def _add(self, constraint: pulp.LpConstraint, name: str) -> None:
        self.program.addConstraint(constraint, name)

    def _fix_owners(self) -> None:
        """Without moves every owner variable is a constant."""
        if self.move_owners:
            return
        for (e, r), variable in self.owner.items():
            is_owner = int(self.problem.expert_to_owner_E[e] == r)
            variable.lowBound = variable.upBound = is_owner

    def _constrain_holders(self) -> None:
        """One owner per expert, as many owned per rank as now, at most `slots` copies per rank, no copy at the owner."""
        owned_R = np.bincount(self.problem.expert_to_owner_E, minlength=self.problem.num_ranks)
        for e in self._experts:
            self._add(pulp.lpSum(self.owner[e, r] for r in self._ranks) == 1, f"one_owner_{e}")
            for r in self._ranks:
                self._add(self.copy[e, r] + self.owner[e, r] <= 1, f"copy_elsewhere_{e}_{r}")
        for r in self._ranks:
            self._add(pulp.lpSum(self.owner[e, r] for e in self._experts) == int(owned_R[r]), f"owned_{r}")
            self._add(pulp.lpSum(self.copy[e, r] for e in self._experts) <= self.problem.slots, f"slots_{r}")

    def _compute_s(self, rows: Table) -> pulp.LpAffineExpression:
        problem, topology = self.problem, self.problem.topology
        totals_E = self._load_RE.sum(axis=0)
        busiest = self._busiest = self._variable("busiest_rows")
        group = self._group = self._table("group", list(rows))
        for e in self._experts:
            kept = self._variable(f"kept_{e}", pulp.LpBinary)
            self._add(pulp.lpSum(group[e, r] for r in self._ranks) == kept, f"kept_at_owner_{e}")
            self._add(pulp.lpSum(rows[e, r] for r in self._ranks) == totals_E[e], f"all_rows_{e}")
            for r in self._ranks:
                self._add(rows[e, r] <= totals_E[e] * (self.copy[e, r] + group[e, r]), f"held_{e}_{r}")
                self._add(group[e, r] <= self.owner[e, r], f"group_at_owner_{e}_{r}")
        overhead = topology.half_rate_rows / self._unit_rows
        for r in self._ranks:
            work = pulp.lpSum(rows[e, r] + overhead * (self.copy[e, r] + group[e, r]) for e in self._experts)
            self._add(self._cost_R[r] * work <= busiest, f"busiest_{r}")
        row_s = prices_of(problem).work_row_s * topology.least_cost
        return busiest * (row_s * self._unit_rows / self.seconds)

    def _link(self, name: str, most: float, device: Table, node: Table) -> _Link:
        """Add an exchange in which every device and node sends (index, 0) and receives (index, 1) that many items.

        `most` is at least the number of items in all.
        """
        weights = {"device": [1.0] * self.problem.num_ranks, "node": self._slower_N}
        items, used = self._variable(f"{name}_items"), self._variable(f"{name}_used", pulp.LpBinary)
        for table, place in ((device, "device"), (node, "node")):
            for (index, direction), count in table.items():
                self._add(items >= count * weights[place][index], f"{name}_{place}_{index}_{direction}")
        self._add(items <= used * (most * max(1.0, *self._slower_N)), f"{name}_latency")
        return _Link(items, used)

    def _per_item(self, item_bytes: float) -> float:
        """Return the objective's units per item on a device link."""
        return item_bytes / self.problem.topology.device_bytes_per_s / self.seconds

    def _dispatch_s(self, rows: Table) -> pulp.LpAffineExpression:
        problem, per_node = self.problem, self.problem.topology.ranks_per_node
        own = self._table("own", list(rows))
        device, node = {}, {}
        for (e, r), variable in own.items():
            variable.upBound = self._load_RE[r, e]
            self._add(variable <= rows[e, r], f"own_rows_{e}_{r}")
            self._add(variable <= self._load_RE[r, e] * (self.copy[e, r] + self._group[e, r]), f"own_held_{e}_{r}")
        for r in self._ranks:
            stays = pulp.lpSum(own[e, r] for e in self._experts)
            device[r, 0] = float(self._load_RE[r].sum()) - stays
            device[r, 1] = pulp.lpSum(rows[e, r] for e in self._experts) - stays
        for n in range(problem.topology.num_nodes if problem.topology.num_nodes > 1 else 0):
            inside = range(n * per_node, (n + 1) * per_node)
            load_E = self._load_RE[list(inside)].sum(axis=0)
            stays_e = []
            for e in self._experts:
                stays_e.append(self.program.add_variable(f"own_node_{e}_{n}", 0, load_E[e]))
                self._add(stays_e[-1] <= pulp.lpSum(rows[e, r] for r in inside), f"own_node_rows_{e}_{n}")
                holders = pulp.lpSum(self.copy[e, r] + self._group[e, r] for r in inside)
                self._add(stays_e[-1] <= load_E[e] * holders, f"own_node_held_{e}_{n}")
            stays = pulp.lpSum(stays_e)
            node[n, 0] = float(load_E.sum()) - stays
            node[n, 1] = pulp.lpSum(rows[e, r] for e in self._experts for r in inside) - stays
        link = self._dispatch = self._link("dispatch", problem.load.total / self._unit_rows, device, node)
        return 4 * link.time(self._per_item(problem.shape.row_bytes * self._unit_rows), self._latency)

    def _sent(self, name: str, owners: pulp.LpAffineExpression, copies: pulp.LpAffineExpression, most: int) -> pulp.LpVariable:
        """Return a variable that is at least `copies` where `owners` is 1."""
        sent = self._variable(name)
        self._add(sent >= copies - most * (1 - owners), f"{name}_at_owner")
        return sent

    def _copy_s(self) -> pulp.LpAffineExpression:
        problem, topology, shape = self.problem, self.problem.topology, self.problem.shape
        per_node, num_ranks = topology.ranks_per_node, problem.num_ranks
        device, node = {}, {}
        sent_ER: list[list[pulp.LpVariable]] = []
        copies = {e: pulp.lpSum(self.copy[e, r] for r in self._ranks) for e in self._experts}
        for e in self._experts:
            sent = [self._sent(f"sent_{e}_{r}", self.owner[e, r], copies[e], num_ranks - 1) for r in self._ranks]
            sent_ER.append(sent)
            # Implied by whole owners, and what keeps fractional ones from sending nothing.
            self._add(pulp.lpSum(sent) == copies[e], f"all_sent_{e}")
            for r in self._ranks:
                self._add(sent[r] <= (num_ranks - 1) * self.owner[e, r], f"sent_by_owner_{e}_{r}")
        for r in self._ranks:
            device[r, 0] = pulp.lpSum(sent[r] for sent in sent_ER)
            device[r, 1] = pulp.lpSum(self.copy[e, r] for e in self._experts)
        for n in range(topology.num_nodes if topology.num_nodes > 1 else 0):
            inside = range(n * per_node, (n + 1) * per_node)
            sent, received = [], []
            for e in self._experts:
                home = pulp.lpSum(self.owner[e, r] for r in inside)
                here = pulp.lpSum(self.copy[e, r] for r in inside)
                sent.append(self._sent(f"sent_node_{e}_{n}", home, copies[e] - here, num_ranks - per_node))
                received.append(self._sent(f"received_node_{e}_{n}", 1 - home, here, per_node))
            node[n, 0], node[n, 1] = pulp.lpSum(sent), pulp.lpSum(received)
        link = self._link("copies", problem.num_experts * num_ranks, device, node)
        link.items.lowBound = self.copies.low
        for (r, direction), count in device.items() if self.copies.high is not None else ():
            self._add(count <= self.copies.high, f"copies_at_most_{r}_{direction}")
        gather = link.time(self._per_item(shape.expert_bytes), self._latency)
        backward = (problem.gathers - 1) * gather + link.time(self._per_item(shape.gradient_bytes), self._latency)
        if not problem.overlap_s:
            return gather + backward
        overlap = problem.overlap_s / self.seconds
        exposed_gather, exposed_backward = self._variable("exposed_gather"), self._variable("exposed_backward")
        self._add(exposed_gather >= gather - overlap, "gather_hides")
        self._add(exposed_backward >= backward - 2 * overlap, "backward_hides")
        return exposed_gather + exposed_backward

    def _move_s(self) -> pulp.LpAffineExpression:
        problem, shape, topology = self.problem, self.problem.shape, self.problem.topology
        current_E = problem.expert_to_owner_E
        device, node = {}, {}
        latency, num_nodes = self._latency, topology.num_nodes if topology.num_nodes > 1 else 0
        for r in self._ranks:
            device[r, 0] = pulp.lpSum(1 - self.owner[e, r] for e in self._experts if current_E[e] == r)
            device[r, 1] = pulp.lpSum(self.owner[e, r] for e in self._experts if current_E[e] != r)
        if problem.mean_moves:
            device = {(0, 0): pulp.lpSum(device[r, 0] for r in self._ranks) * (1 / problem.num_ranks)}
            latency, num_nodes = 0.0, 0
        for n in range(num_nodes):
            inside = range(n * topology.ranks_per_node, (n + 1) * topology.ranks_per_node)
            home = {e: pulp.lpSum(self.owner[e, r] for r in inside) for e in self._experts}
            node[n, 0] = pulp.lpSum(1 - home[e] for e in self._experts if int(current_E[e]) in inside)
            node[n, 1] = pulp.lpSum(home[e] for e in self._experts if int(current_E[e]) not in inside)
        state_bytes = shape.parameters_per_expert * 4 * problem.state_multiplier
        link = self._link("moves", problem.num_experts, device, node)
        for (r, direction), count in device.items():
            self._add(count <= self._room.moves, f"moves_at_most_{r}_{direction}")
        return link.time(self._per_item(state_bytes), latency) * (1 / problem.move_horizon_steps)

    def _room_within(self) -> Room:
        return room_within(self.problem, self.seconds, self.copies.low, self.copies.high, owners_may_move=self.move_owners)

    def _cover(self, name: str, need: float, items: list[tuple[float, pulp.LpAffineExpression]]) -> None:
        """Require whole items that weigh `need` together; one that weighs more counts as the need."""
        if need * self._unit_rows > _LEAST_NEED:
            total = pulp.lpSum(min(weight / need, 1.0) * item for weight, item in items if weight > 0)
            self._add(total >= 1, f"cover_{name}")

    def _cover_needs(self) -> None:
        """Bound work and dispatch, and add the covers that follow for what ranks and nodes keep, hand on and take."""
        topology, room = self.problem.topology, self._room
        most_work, most_items = room.work_rows / topology.least_cost / self._unit_rows, room.device_rows / self._unit_rows
        self._busiest.upBound, self._dispatch.items.upBound = most_work, most_items
        for r in self._ranks:
            self._cover_kept(f"kept_{r}", [r], most_items)
        per_node = topology.ranks_per_node
        for n in range(topology.num_nodes if topology.num_nodes > 1 else 0):
            self._cover_kept(f"kept_node_{n}", list(range(n * per_node, (n + 1) * per_node)), most_items / self._slower_N[n])
        if not self.move_owners:
            self._cover_work(most_work)

    def _cover_kept(self, name: str, inside: list[int], most_sent: float) -> None:
        """What ranks `inside` do not send they keep, by holding experts."""
        load_E = self._load_RE[inside].sum(axis=0)
        need, items = float(load_E.sum()) - most_sent, []
        for e in self._experts:
            if not self.move_owners and self.problem.expert_to_owner_E[e] in inside:
                need -= load_E[e]
                continue
            holders = pulp.lpSum(self.copy[e, r] + self.owner[e, r] for r in inside)
            items.append((float(load_E[e]), holders))
        self._cover(name, need, items)

    def _cover_work(self, most_work: float) -> None:
        """A rank that owns more than its `most_work` hands experts on; one that the others cannot work for takes some."""
        owner_E, totals_E = self.problem.expert_to_owner_E, self._load_RE.sum(axis=0)
        work_E = totals_E + (totals_E > 0) * (self.problem.topology.half_rate_rows / self._unit_rows)
        rate_R = 1 / np.array(self._cost_R)
        for r in self._ranks:
            least_work = float(work_E.sum()) - float(rate_R.sum() - rate_R[r]) * most_work
            owned = float(work_E[owner_E == r].sum())
            handed = [
                (work_E[e], pulp.lpSum(self.copy[e, other] for other in self._ranks)) for e in self._experts if owner_E[e] == r
            ]
            self._cover(f"handed_on_{r}", owned - float(rate_R[r]) * most_work, handed)
            taken = [(work_E[e], self.copy[e, r]) for e in self._experts if owner_E[e] != r]
            self._cover(f"taken_{r}", least_work - owned, taken)

    def solve(self, engine: str, time_limit_s: float, relative_gap: float) -> Answer:
        """Run an engine ("highs" or "cbc")."""
        outcome = minimise(self.program, engine, time_limit_s, relative_gap)
        if outcome.is_infeasible:
            # Nothing in this range of copies is as cheap.
            return Answer(None, self.seconds, is_complete=True, is_interrupted=False)
        placement = self._placement() if outcome.has_solution else None
        # Nothing is known of what was cut off.
        bound_s = min(max(outcome.bound, 0.0), 1.0) * self.seconds
        return Answer(placement, bound_s, outcome.is_complete, outcome.is_interrupted)

    def _placement(self) -> Placement | None:
        """Read the placement out of the variables; None if the engine has no integer solution."""
        num_experts, num_ranks = self.problem.num_experts, self.problem.num_ranks
        holds_2RE = np.zeros((2, num_ranks, num_experts))
        for table, holds_RE in zip((self.owner, self.copy), holds_2RE, strict=True):
            for (e, r), variable in table.items():
                holds_RE[r, e] = variable.varValue if variable.varValue is not None else 0.0
        held_2RE = np.round(holds_2RE).astype(np.bool_)
        if np.abs(holds_2RE - held_2RE).max() > 1e-4 or (held_2RE[0].sum(axis=0) != 1).any():
            return None
        return Placement(held_2RE[0].argmax(axis=0), held_2RE[0] | held_2RE[1])

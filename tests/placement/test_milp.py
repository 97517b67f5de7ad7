"""The mixed-integer program against enumeration, against the heuristics, and one engine against the other."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
import time

import highspy
import numpy as np
import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.placement import (
    SOLVERS,
    ExpertLoad,
    LayerShape,
    OwnerMap,
    Placement,
    Problem,
    Topology,
    cost,
    get_solver,
    split_exact,
)
from moesaic.placement.cost import prices_of, seconds_of
from moesaic.placement.solvers.exhaustive import every_placement
from moesaic.placement.solvers.milp import model as milp_model
from moesaic.placement.solvers.milp import planner as milp
from moesaic.placement.solvers.milp import search as milp_search
from moesaic.placement.solvers.milp.priced import split_priced
from tests.placement.cases import examples, problems, shared_trace, zipf_problem


def only_rows_count(problem: Problem) -> Problem:
    """The same problem with equal ranks whose links and small groups are free: the exact split is then the optimal one."""
    topology = dataclasses.replace(
        problem.topology, device_bytes_per_s=1e18, node_bytes_per_s=1e18, latency_s=0.0, half_rate_rows=0, rank_costs=()
    )
    return dataclasses.replace(problem, topology=topology)


@settings(deadline=None, max_examples=examples(60))
@given(problem=problems(max_ranks=3, max_experts=4, max_slots=1))
def test_equals_enumeration_when_rows_count(problem):
    problem = only_rows_count(problem)
    answer = milp.solve(problem, move_owners=False, relative_gap=1e-7)
    best = get_solver("exhaustive")(problem)
    assert answer.cost.total_s == pytest.approx(best.cost.total_s, rel=1e-4, abs=1e-15)
    assert answer.bound.total_s <= best.cost.total_s


@settings(deadline=None, max_examples=examples(60))
@given(problem=problems(max_ranks=3, max_experts=4, max_slots=1))
def test_equals_enumeration_with_every_stage(problem):
    """bound <= the best of all placements under their best known split <= the answer's cost, and the gap says how far."""
    answer = milp.solve(problem, move_owners=False)
    best = min(cost(problem, p, split_priced(problem, p)).total_s for p in every_placement(problem))
    assert answer.bound.total_s <= best * (1 + 1e-9)
    assert best <= answer.cost.total_s * (1 + 1e-12)
    # The program's rows are fractions; the two differ by what rounding a row at a rank, and at a link, can cost.
    row, node_row = int(problem.topology.cost_R.max()), int(problem.topology.node_cost_N.max())
    a_row = seconds_of(prices_of(problem), row, 2, 2 * node_row, 0, 0, 0, 0)
    free = seconds_of(prices_of(problem)._replace(row_bytes=0.0), row, 2, 2 * node_row, 0, 0, 0, 0)
    assert answer.cost.total_s <= best * (1 + 1e-4) + 2 * (sum(a_row) - sum(free) + a_row[0])
    assert answer.cost == cost(problem, answer.placement, answer.split)
    assert answer.gap == pytest.approx(max(0.0, 1 - answer.bound.total_s / answer.cost.total_s) if answer.cost.total_s else 0.0)


@settings(deadline=None, max_examples=examples(30))
@given(
    problem=problems(max_ranks=3, max_experts=4, max_slots=1),
    horizon=st.sampled_from([1, 100, 10**6]),
    mean_moves=st.booleans(),
)
def test_bound_holds_for_all_owners(problem, horizon, mean_moves):
    """Owners may move: no placement with as many owned experts per rank is below the bound, however moves are counted."""
    problem = dataclasses.replace(problem, move_horizon_steps=horizon, mean_moves=mean_moves)
    answer = milp.solve(problem, relative_gap=1e-3)
    for owner_E in set(itertools.permutations(problem.expert_to_owner_E.tolist())):
        for placement in every_placement(dataclasses.replace(problem, expert_to_owner_E=np.array(owner_E))):
            split = split_exact(problem.load, placement, problem.topology)
            assert answer.bound.total_s <= cost(problem, placement, split).total_s


def test_bound_holds_when_links_are_almost_free():
    """Link terms nine orders below compute once made the engine prove three times the optimum."""
    load = ExpertLoad(np.array([[1131, 3195], [3264, 0], [2973, 914]]))
    problem = only_rows_count(Problem(load, np.array([1, 1]), Topology.preset("h100", 3), LayerShape(2, 1, 64, 64), slots=1))
    answer, best = milp.solve(problem, move_owners=False), get_solver("exhaustive")(problem)
    assert answer.bound.total_s <= best.cost.total_s
    assert answer.cost.compute_s == best.cost.compute_s


@settings(deadline=None, max_examples=examples(12))
@given(problem=problems(max_ranks=3, max_experts=4, max_slots=1))
def test_two_engines_agree(problem):
    """HiGHS and CBC prove bounds that differ by no more than both tolerances."""
    by_highs, by_cbc = (milp.solve(problem, engine=engine) for engine in ("highs", "cbc"))
    unit = max(by_highs.cost.total_s, by_cbc.cost.total_s)
    assert by_highs.bound.total_s == pytest.approx(by_cbc.bound.total_s, abs=1e-3 * unit)


@settings(deadline=None, max_examples=examples(25))
@given(problem=problems(max_ranks=4, max_experts=5, max_slots=2))
def test_never_worse_than_the_heuristics(problem):
    """Owners are as many per rank as before, slots hold, and no heuristic with as many rows per rank is cheaper."""
    answer = milp.solve(problem, time_limit_s=0.5)
    owned_R = np.bincount(problem.expert_to_owner_E, minlength=problem.num_ranks)
    assert (np.bincount(answer.placement.expert_to_owner_E, minlength=problem.num_ranks) == owned_R).all()
    assert (answer.placement.copies_RE.sum(axis=1) <= problem.slots).all()
    for name in sorted(SOLVERS.keys() - {"milp", "moetuner", "exhaustive"}):
        other = get_solver(name)(problem)
        # EPLB packs copies first: it may leave ranks with other numbers of rows to own.
        if (np.bincount(other.placement.expert_to_owner_E, minlength=problem.num_ranks) == owned_R).all():
            assert answer.cost.total_s <= other.cost.total_s, name


def test_a_layer_that_the_joint_form_places_better_than_other_heuristics():
    """By less than the gap at which the search ends."""
    problem = Problem(
        ExpertLoad(np.array([[0, 5, 1, 5, 4], [0, 4, 2, 1, 3], [2, 2, 4, 0, 5]])),
        np.array([1, 1, 2, 2, 0]),
        Topology.preset("h100", 3),
        LayerShape(num_experts=5, top_k=1, dim=16, ffn_dim=16, bytes_per_element=4, gradient_bytes_per_element=4),
        slots=1,
        overlap_s=1e-5,
        move_horizon_steps=100,
    )
    answer, by_joint = milp.solve(problem, time_limit_s=0.5), get_solver("joint")(problem)
    assert answer.cost.total_s <= by_joint.cost.total_s


def test_starts_are_candidates():
    """Within a time that is too short for any search: no dearer than owners that somebody else found, if these may move."""
    problem = dataclasses.replace(zipf_problem(8, 64, 1.0, slots=2, overlap_s=0.0), move_horizon_steps=10**6)
    start = get_solver("joint")(problem).placement
    start_s = cost(problem, start, split_exact(problem.load, start, problem.topology)).total_s
    without, answer = (milp.solve(problem, time_limit_s=1e-3, starts=starts) for starts in ((), (start,)))
    assert answer.cost.total_s <= start_s < without.cost.total_s
    assert answer.bound.total_s <= answer.cost.total_s


def test_a_search_that_is_off_finds_nothing():
    """It ends by itself, and leaves the other cores to others."""
    problem = zipf_problem(4, 16, 1.0, slots=2)
    with milp.SearchOn(problem, [problem.expert_to_owner_E], True, 0.01, is_on=False) as searching:
        searching._searching.result(timeout=60)
        best = milp.best_heuristic(problem)
        assert searching.take(best, np.inf) is best


def test_owners_move_only_when_it_pays():
    """Two hot experts on one rank: exchanging one pays when written off over many steps, and not within one step."""
    load = ExpertLoad(np.array([[900, 900, 1, 1], [900, 900, 1, 1]]))
    problem = Problem(load, np.array([0, 0, 1, 1]), Topology.preset("h100", 2), LayerShape(4, 2, 512, 512), slots=0)
    patient = milp.solve(dataclasses.replace(problem, move_horizon_steps=10**6))
    assert split_exact(load, patient.placement, problem.topology).max_rows == 1802
    slow = dataclasses.replace(problem.topology, device_bytes_per_s=1e6)
    hasty = milp.solve(dataclasses.replace(problem, topology=slow, move_horizon_steps=1))
    assert (hasty.placement.expert_to_owner_E == problem.expert_to_owner_E).all()
    assert hasty.cost.move_s == 0


@pytest.mark.parametrize(
    "problem",
    [zipf_problem(1, 8, 1.0, slots=1), dataclasses.replace(zipf_problem(2, 8, 1.0, 1), load=ExpertLoad(np.zeros((2, 8), int)))],
)
def test_one_rank_and_no_tokens(problem):
    answer = milp.solve(problem)
    assert answer.placement.num_copies == 0
    assert answer.gap == pytest.approx(0.0, abs=1e-3)


def test_bad_options():
    problem = zipf_problem(2, 8, 1.0, slots=1)
    with pytest.raises(ValueError, match="unknown engine 'gurobi'; use one of highs, cbc"):
        milp.solve(problem, engine="gurobi")
    with pytest.raises(ValueError, match="time_limit_s must be finite and above 0, got 0"):
        milp.solve(problem, time_limit_s=0)


def test_prices_end_with_the_time():
    """On a clock by which a price takes a second, no price starts after the end; the exact split does instead."""
    problem, clock_s, priced = zipf_problem(2, 8, 1.0, slots=1), [0.0], []
    placements = list(every_placement(problem))
    exact_s = [cost(problem, p, split_exact(problem.load, p, problem.topology)).total_s for p in placements]

    def price(problem, placement, time_limit_s, below_s):
        priced.append((clock_s[0], time_limit_s, below_s))
        clock_s[0] += 1.0
        return split_priced(problem, placement)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(milp_search, "perf_counter", lambda: clock_s[0])
        patch.setattr("moesaic.placement.solvers.milp.priced.split_priced", price)
        best = milp_search.cheapest(problem, zip(exact_s, placements, strict=True), end=2.5)
    assert [(start, limit) for start, limit, _ in priced] == [(0.0, 2.5), (1.0, 1.5), (2.0, 0.5)]
    assert priced[0][2] == np.inf
    assert best.cost.total_s <= min(exact_s)
    assert priced[2][2] >= best.cost.total_s


def test_no_engine_starts_when_the_time_is_over():
    """Nor is a program written down that the engine would get too late; what is proven already stays."""
    problem = zipf_problem(4, 16, 1.0, slots=2)
    best = milp.best_heuristic(problem)
    proof = milp._Proof(problem, False, "highs", best, 0.0, milp._Clock(time.perf_counter() - 9.8, 10.0))
    with milp.SearchOn(problem, [problem.expert_to_owner_E], False, 0.01) as searching, pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesaic.placement.solvers.milp.model.Model", None)
        proof.tighten(1e-9, searching)
    assert 0 < proof.bound_s < best.cost.total_s


def test_handing_a_program_over_takes_of_the_engines_time():
    """The limit counts from the making of the engine, on a clock that jumps four seconds until HiGHS begins."""
    from moesaic.placement.solvers import engines

    program = pulp.LpProblem("one", pulp.LpMinimize)
    count, unused = program.add_variable("count", 0, None, pulp.LpInteger), program.add_variable("unused", None, 7)
    program += 2 * count + 1, "cost"
    program.addConstraint(3 * count >= 4, "least")
    program.addConstraint(count + 0 * unused <= 9, "most")
    limits_s, start_solve = [], highspy.Highs.startSolve

    def start(highs):
        limits_s.append(highs.getOptionValue("time_limit")[1])
        start_solve(highs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "perf_counter", iter([100.0, 104.0]).__next__)
        patch.setattr(highspy.Highs, "startSolve", start)
        outcome = engines.minimise(program, "highs", 5.0, 0.0)
    assert (count.varValue, pulp.value(program.objective)) == (2.0, 5.0)
    assert (outcome.has_solution, outcome.is_complete, outcome.bound) == (True, True, 5.0)
    assert limits_s == [1.0]


def test_engines_print_nothing():
    """From HiGHS 1.16 on the first solver of a process says who it is, on the standard output that `--json -` has to itself."""
    script = """
import os, pulp
from moesaic.placement.solvers import engines
program = pulp.LpProblem("one", pulp.LpMinimize)
count = program.add_variable("count", 0, None, pulp.LpInteger)
program += 2 * count, "cost"
program.addConstraint(3 * count >= 4, "least")
assert engines.minimise(program, "highs", 10.0, 0.0).bound == 4.0
print("the end", flush=True)
os.write(1, b"of it")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the end\nof it", "")


def test_ctrl_c_ends_the_engine_with_what_it_knows():
    """It is heard while the engine works; what is proven until then counts."""
    problem, wait = zipf_problem(8, 64, 1.0, slots=2), highspy.Highs.wait
    heard: list[float] = []

    def interrupted(highs, timeout):
        heard.append(timeout)
        if len(heard) == 1:
            raise KeyboardInterrupt
        return wait(highs, timeout)

    model = milp_model.Model(problem, get_solver("quota")(problem).cost.total_s, move_owners=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(highspy.Highs, "wait", interrupted)
        answer = model.solve("highs", 60.0, 1e-9)
    assert len(heard) > 1
    assert answer.is_interrupted
    assert not answer.is_complete
    assert 0 <= answer.bound_s <= model.seconds


@pytest.mark.parametrize("place", ["pricing", "search", "model"])
def test_ctrl_c_ends_a_solve_with_the_best_so_far(place):
    problem, heard = zipf_problem(8, 64, 1.0, slots=2), []

    def interrupted(*args, **options):
        heard.append(args)
        raise KeyboardInterrupt

    def searched(*args, search=milp.search, wait=highspy.Highs.wait, **options):
        patch.setattr(highspy.Highs, "wait", lambda *waited: wait(*waited) if heard else interrupted())
        return search(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        if place == "pricing":
            patch.setattr(milp, "search", searched)
        elif place == "search":
            patch.setattr(milp, "search", interrupted)
        else:
            patch.setattr(milp_model, "Model", interrupted)
            patch.setattr(milp.chains, "are_few", lambda problem: False)
        found = milp.solve(problem, move_owners=False, time_limit_s=30.0)
    assert len(heard) == 1
    assert found.seconds < 15
    assert found.bound.total_s <= found.cost.total_s <= get_solver("static")(problem).cost.total_s


def test_constraints_are_named():
    from moesaic.placement.solvers.milp.model import Model

    program = Model(zipf_problem(2, 8, 1.0, slots=1), seconds=1.0, move_owners=True).program
    for name in ("one_owner_3", "slots_1", "owned_0", "held_7_1", "busiest_0", "dispatch_device_0_1", "gather_hides"):
        assert program.get_constraint_by_name(name) is not None


@settings(deadline=None, max_examples=examples(60))
@given(problem=problems(max_ranks=3, max_experts=4, max_slots=2), seed=st.integers(0, 99))
def test_owners_may_leave_an_expert_to_its_copies(problem, seed):
    """The priced split is no dearer than splits in which some owners keep no rows, up to the rounding of rows."""
    rng = np.random.default_rng(seed)
    placements = list(every_placement(problem))
    placement = placements[rng.integers(len(placements))]
    priced = cost(problem, placement, split_priced(problem, placement))
    exact = cost(problem, placement, split_exact(problem.load, placement, problem.topology))
    for below, at_most in ((1.001, priced), (0.5, exact)):
        # What is not below a price may be left at any split; what is, is found.
        found = cost(problem, placement, split_priced(problem, placement, below_s=below * priced.total_s))
        assert found.total_s <= at_most.total_s * (1 + 1e-5)
    replicas_RE, owner_E = placement.replicas_RE.copy(), placement.expert_to_owner_E.copy()
    for expert in np.flatnonzero(placement.copies_RE.any(axis=0)):
        if rng.integers(2):
            replicas_RE[owner_E[expert], expert] = False
            owner_E[expert] = np.flatnonzero(placement.copies_RE[:, expert])[0]
    left = Placement(owner_E, replicas_RE)
    other = cost(problem, left, split_exact(problem.load, left, problem.topology))
    a_row = seconds_of(prices_of(problem)._replace(latency_s=0.0), 1, 2, 2, 0, 0, 0, 0)
    assert priced.compute_s + priced.dispatch_s <= other.compute_s + other.dispatch_s + 2 * sum(a_row[:2])


def test_a_split_that_sends_no_row_saves_the_latency_of_dispatch() -> None:
    """Few rows, every expert everywhere: the second group on each rank costs less than four messages."""
    load = ExpertLoad(np.array([[2, 3], [4, 3]]))
    problem = Problem(load, np.array([0, 1]), Topology.preset("h100", 2), LayerShape(2, 1, 16, 512), slots=1)
    everywhere = Placement(problem.expert_to_owner_E, np.ones((2, 2), dtype=bool))
    assert (split_priced(problem, everywhere).rows_RE == load.load_RE).all()
    assert milp.solve(problem).cost.dispatch_s == 0.0
    one_copy = Placement(problem.expert_to_owner_E, np.array([[True, True], [False, True]]))
    assert cost(problem, one_copy, split_priced(problem, one_copy)).dispatch_s > 4 * problem.topology.latency_s


def test_covers_say_which_copies_a_cheap_placement_needs():
    """Rank 0 owns nearly all rows: who wants to be within a tenth of the mean rank must hand experts on and take some."""
    from moesaic.placement.solvers.milp.model import Model

    load = ExpertLoad(np.array([[900, 900, 10, 10], [900, 900, 10, 10]]) * 100)
    problem = Problem(load, np.array([0, 0, 1, 1]), Topology.preset("h100", 2), LayerShape(4, 2, 512, 512), 1, overlap_s=1.0)
    seconds = 1.1 * get_solver("balance")(problem).cost.total_s
    program = Model(problem, seconds, move_owners=False).program
    for name in ("cover_handed_on_0", "cover_taken_1"):
        assert program.get_constraint_by_name(name) is not None
    assert program.get_constraint_by_name("cover_handed_on_1") is None


def test_real_layer_is_nearly_closed():
    """DeepSeek-V2-Lite, layer 3, 8 ranks: a small gap within seconds, and better than every heuristic."""
    ids_TLK = np.load(shared_trace("deepseek_v2_lite_esft_topk.npz"))["topk_ids"]
    load = ExpertLoad(np.stack([np.bincount(block[:, 3].ravel(), minlength=64) for block in np.array_split(ids_TLK, 8)]))
    owner_E = OwnerMap.contiguous(1, 64, 8).expert_to_owner_LE[0]
    shape = LayerShape(64, 6, 2048, 1408, bytes_per_element=2)
    problem = Problem(load, owner_E, Topology.preset("h100", 8), shape, slots=2)
    answer = milp.solve(problem, move_owners=False, time_limit_s=60.0, relative_gap=0.01)
    assert answer.gap <= 0.01
    assert answer.cost.total_s < get_solver("quota")(problem).cost.total_s

"""The policy simulator: what every run is told, how it is judged, saved plans, synthetic traces, back-tests."""

from dataclasses import replace

import numpy as np
import pytest

from moesaic.placement import (
    CalibrationSwitch,
    ExpertLoad,
    LayerShape,
    OwnerMap,
    SolverChoice,
    Topology,
    Trace,
    TraceMeta,
    calibrate,
    cost,
    get_solver,
    make_predictor,
    prediction_error,
    split_exact,
    unhedged_if_calibrated,
    write_trace,
)
from moesaic.placement.offline.backtest import backtest
from moesaic.placement.offline.setting import SimulatorSetting, recorded_loads
from moesaic.placement.offline.simulate import Interrupted, Outcome, compare, replay
from moesaic.placement.offline.solve import solve_plan
from moesaic.placement.online.calibrate import calibrated_s
from moesaic.placement.traces.synth import KINDS, SynthSpec, synthesize
from moesaic.placement.traces.workloads import WORKLOADS, Workload

META = TraceMeta(num_layers=2, num_experts=8, top_k=2, num_ranks=4, dim=64, ffn_dim=64)


@pytest.fixture
def trace(tmp_path) -> Trace:
    spec = SynthSpec(META, "drifting", num_steps=5, tokens_per_rank=200, drift=0.3)
    write_trace(tmp_path / "t.npz", META, np.stack(list(synthesize(spec))))
    return Trace(tmp_path / "t.npz")


@pytest.fixture
def setting() -> SimulatorSetting:
    """Two nodes of two ranks; copies hide under a second of other work."""
    topology = Topology.preset("h100", num_nodes=2, ranks_per_node=2)
    return SimulatorSetting(topology=topology, shape=LayerShape(8, 2, 64, 64), predictor="last", overlap_s=1.0)


def one(outcomes: list[Outcome], **wanted: object) -> Outcome:
    (found,) = (outcome for outcome in outcomes if all(getattr(outcome, name) == value for name, value in wanted.items()))
    return found


def test_every_lane_sees_what_it_may(trace, setting):
    """max/mean and copies of all three runs against a plain loop over steps and layers."""
    outcomes = compare(trace, setting, ["quota"], slots=(1,))
    quota, owners = get_solver("quota"), OwnerMap.contiguous(2, 8, 4).expert_to_owner_LE
    steps = [[ExpertLoad(load_RE) for load_RE in loads_LRE] for loads_LRE in trace.steps()]
    hindsight = [
        setting.solve_run("quota", recorded, owner_E, 1, 100).placement
        for recorded, owner_E in zip(recorded_loads(trace, setting), owners, strict=True)
    ]
    for what in ("predicted", "exact", "future"):
        ratios, copies = [], []
        for step in range(1, 5):
            for layer in range(2):
                placement = hindsight[layer]
                if what != "future":
                    known = steps[step - (what == "predicted")][layer]
                    placement = quota(setting.problem(known, owners[layer], 1, 1)).placement
                ratios.append(split_exact(steps[step][layer], placement, setting.topology).max_over_mean)
                copies.append(placement.num_copies)
        found = one(outcomes, knows=what)
        assert found.max_over_mean == pytest.approx(np.mean(ratios))
        assert found.max_over_mean_p95 == pytest.approx(np.quantile(ratios, 0.95))
        assert found.max_over_mean_max == max(ratios)
        assert found.copies == pytest.approx(np.mean(copies))
        assert found.num_steps == 4
    assert one(outcomes, knows="exact").max_over_mean <= one(outcomes, knows="predicted").max_over_mean


def test_a_calibrated_run_adds_copies_where_training_would(trace, setting):
    """Against a plain loop: planned without hedging while forecasts are bad, and copies added once the load is known."""
    setting = replace(setting, overlap_s=1e-5, scale=4096)
    outcomes = compare(trace, setting, ["quota", "balance", "eplb"], slots=(1,), information=("predicted", "calibrated"))
    assert {outcome.solver for outcome in outcomes if outcome.knows == "calibrated"} == {"quota", "balance"}
    owners = OwnerMap.contiguous(2, 8, 4).expert_to_owner_LE
    steps = [setting.loads(loads_LRE) for loads_LRE in trace.steps()]
    solve, seconds, ratios, added = get_solver("balance"), 0.0, [], 0
    for layer in range(2):
        predictor, switch = make_predictor("last"), CalibrationSwitch()
        predictor.observe(steps[0][layer])
        for step in range(1, 5):
            forecast, actual = predictor.predict(), steps[step][layer]
            problem = setting.problem(actual, owners[layer], 1, 1)
            planned = setting.problem(forecast, owners[layer], 1, 1, predictor.expected_error())
            planned = replace(planned, scenarios_SE=predictor.scenarios())
            if switch.is_on:
                planned = unhedged_if_calibrated(planned)
            split = split_exact(actual, solve(planned).placement, setting.topology)
            more = calibrate(problem, split, solve, split_exact) if switch.is_on else None
            added += more is not None
            seconds += cost(problem, split.placement, split).total_s if more is None else calibrated_s(problem, split, more)
            ratios.append((more or split).max_over_mean)
            switch.observe(prediction_error(forecast, actual))
            predictor.observe(actual)
    found = one(outcomes, solver="balance", knows="calibrated")
    assert added
    assert found.max_over_mean == pytest.approx(np.mean(ratios))
    assert found.step_s == pytest.approx(seconds / 4)


def test_auto_places_each_layer_as_the_solver_that_pays(trace, setting):
    """Against the choice of training, step after step; and it is one of its two solvers in every step."""
    outcomes = compare(trace, setting, ["auto", "quota", "balance"], slots=(1,), information=("predicted", "future"))
    owners = OwnerMap.contiguous(2, 8, 4).expert_to_owner_LE
    steps = [setting.loads(loads_LRE) for loads_LRE in trace.steps()]
    solvers, seconds = {name: get_solver(name) for name in ("quota", "balance")}, 0.0
    for layer in range(2):
        predictor, choice = make_predictor("last"), SolverChoice(solvers, split_exact)
        predictor.observe(steps[0][layer])
        for step in range(1, 5):
            planned = setting.problem(predictor.predict(), owners[layer], 1, 1, predictor.expected_error())
            placement = choice.solve(replace(planned, scenarios_SE=predictor.scenarios()))
            actual = setting.problem(steps[step][layer], owners[layer], 1, 1)
            seconds += cost(actual, placement, split_exact(actual.load, placement, setting.topology)).total_s
            choice.observe(actual)
            predictor.observe(actual.load)
    assert one(outcomes, solver="auto", knows="predicted").step_s == pytest.approx(seconds / 4)
    assert one(outcomes, solver="auto", knows="future").step_s == one(outcomes, solver="quota", knows="future").step_s


def test_bounds_shares_and_bytes(trace, setting):
    outcomes = compare(trace, setting, ["static", "hecate", "eplb"], slots=(0, 2))
    for outcome in outcomes:
        assert 1.0 <= outcome.bound <= outcome.max_over_mean <= outcome.max_over_mean_max
        assert 0.0 <= outcome.cross_node_share <= outcome.off_rank_share <= 1.0
        assert 0.0 <= outcome.gap <= 1.0
        assert outcome.step_s > 0
        if not outcome.slots:
            assert outcome.copies == outcome.copy_bytes_in_node == outcome.copy_bytes_cross_node == 0
    static = one(outcomes, solver="static", slots=0, knows="exact")
    rows = 2 * 4 * 200 * 2
    row_bytes = 4 * 64 * 4
    assert static.dispatch_bytes_cross_node == pytest.approx(static.cross_node_share * rows * row_bytes)
    crossing = static.dispatch_bytes_in_node + static.dispatch_bytes_cross_node
    assert crossing == pytest.approx(static.off_rank_share * rows * row_bytes)
    assert {outcome.split for outcome in outcomes if outcome.solver == "hecate" and outcome.slots} == {"exact", "even"}
    exact, even = (one(outcomes, solver="hecate", slots=2, knows="exact", split=split) for split in ("exact", "even"))
    assert exact.max_over_mean <= even.max_over_mean
    assert exact.copies == even.copies


def test_owners_follow_solvers_that_change_them(trace, setting):
    """A plan that stands for long moves less often, and its moves are paid in full when they happen."""
    often, rarely = (
        one(
            compare(trace, SimulatorSetting(**{**setting.__dict__, "migrate_every": every}), ["lpt"], information=["predicted"]),
            solver="lpt",
        )
        for every in (1, 10)
    )
    assert often.moves > rarely.moves > 0
    moved = 3 * 64 * 64 * 4 * 3
    assert often.move_bytes == pytest.approx(often.moves * moved / 4)
    assert often.step_s > one(compare(trace, setting, ["static"], information=["exact"]), solver="static").step_s


def test_moves_of_a_plan_for_a_whole_run_pay(trace):
    """A plan amortises moves over the steps of its trace, at least 100, and a run in hindsight pays that part of them."""
    topology = Topology.preset("h100", 4)
    setting = SimulatorSetting(topology=topology, shape=LayerShape(8, 2, 64, 64), scale=10)
    plans = [solve_plan(trace, setting, "joint", 0, horizon=horizon) for horizon in (None, 100, 1)]
    assert plans[0].layers == plans[1].layers
    assert plans[0].moves > plans[2].moves == 0
    (hindsight,) = compare(trace, setting, ["lpt"], slots=(0,), information=["future"])
    lpt = solve_plan(trace, setting, "lpt", 0)
    (replayed,) = replay(trace, setting, lpt, information="future")
    # The rank that sends most, or takes most, of each layer.
    most = sum(
        max(np.bincount(ranks[moved], minlength=4).max() for ranks in (before_E, after_E))
        for before_E, after_E in zip(OwnerMap.contiguous(2, 8, 4).expert_to_owner_LE, lpt.owners.expert_to_owner_LE, strict=True)
        if (moved := before_E != after_E).any()
    )
    move_s = 2 * topology.latency_s + most * 3 * 64 * 64 * 4 * 3 / topology.device_bytes_per_s
    assert hindsight.step_s == pytest.approx(replayed.step_s + move_s / 100)


def test_an_interrupted_comparison_keeps_whole_steps(trace, setting):
    """Ctrl-C in the fourth step, within a layer: what there is equals a comparison of three steps."""
    calls: list[None] = []

    def interrupt() -> None:
        calls.append(None)
        if len(calls) == 2 * 3 + 1:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        compare(trace, setting, ["static", "lpt"], slots=(1,), information=["exact"], on_layer=interrupt)
    whole = compare(trace, setting, ["static", "lpt"], slots=(1,), information=["exact"], num_steps=3)
    assert [replace(outcome, solve_s=0.0) for outcome in caught.value.outcomes] == [replace(o, solve_s=0.0) for o in whole]


def test_one_step_and_fewer_steps(tmp_path, trace, setting):
    assert one(compare(trace, setting, ["static"], num_steps=3), knows="exact").num_steps == 2
    first, seen = np.stack(list(trace.steps()))[:2], []
    for loads_SLRE in (first, np.concatenate([first, 50 * first[..., ::-1]])):
        write_trace(tmp_path / "first.npz", META, loads_SLRE)
        source = Trace(tmp_path / "first.npz")
        (outcome,) = compare(source, setting, ["lpt"], slots=(0,), num_steps=2, information=["future"])
        seen.append(outcome.max_over_mean_of_layer)
    assert seen[0] == seen[1]
    write_trace(tmp_path / "one.npz", META, next(trace.steps())[None])
    outcomes = compare(Trace(tmp_path / "one.npz"), setting, ["static"])
    assert {outcome.knows for outcome in outcomes} == {"exact", "future"}


def test_a_plan_replays_as_it_was_solved(trace, setting):
    """On the trace it was solved from, the replay is the hindsight run over all steps."""
    plan = solve_plan(trace, setting, "quota", 1, trace_digest="sha256:1")
    assert plan.objective_s >= plan.bound_s > 0
    assert plan.moves == 0
    (found,) = replay(trace, setting, plan, information="future")
    assert (found.solver, found.num_steps, found.moves) == ("quota", 5, 0)
    hindsight = one(compare(trace, setting, ["quota"], slots=(1,), information=["future"]), knows="future")
    assert hindsight.num_steps == 5
    assert found.max_over_mean == hindsight.max_over_mean
    assert found.step_s == pytest.approx(hindsight.step_s)


def test_a_plans_seconds_leave_compiling_out(trace, setting, monkeypatch):
    """They are read off the clock that stands still meanwhile."""
    monkeypatch.setattr("moesaic.placement.offline.solve.run_seconds", iter([10.0, 12.5]).__next__)
    assert solve_plan(trace, setting, "static", 0).seconds == 2.5


def test_moves_of_a_plan_start_from_the_current_owners(trace, setting):
    first = solve_plan(trace, setting, "lpt", 0)
    assert first.moves > 0
    assert solve_plan(trace, setting, "lpt", 0, current=first.owners).moves <= first.moves
    with pytest.raises(ValueError, match="the current owners are of 1 layers"):
        solve_plan(trace, setting, "lpt", 0, current=OwnerMap.contiguous(1, 8, 4))


def test_joint_deals_rows_out_over_all_layers(trace, setting):
    """Every rank owns as many experts as before over all layers, and the plan costs no more than quota's."""
    layers: list[None] = []
    plan = solve_plan(trace, setting, "joint", 1, on_layer=lambda: layers.append(None))
    assert len(layers) == trace.meta.num_layers
    meta = trace.meta
    assert plan.owners.num_rows_R.tolist() == [meta.num_layers * meta.num_experts // meta.num_ranks] * meta.num_ranks
    assert plan.bound_s <= plan.objective_s <= solve_plan(trace, setting, "quota", 1).objective_s


def test_moetuner_follows_tokens_from_layer_to_layer(tmp_path, trace, setting):
    """With pair counts both of its stages run: experts that follow each other share a rank."""
    loads_SLRE = np.full((1, 2, 4, 8), 4)
    pairs_LEE = np.zeros((1, 8, 8), dtype=int)
    pairs_LEE[0, np.arange(8), (np.arange(8) // 2 * 2 + 2) % 8 + np.arange(8) % 2] = 100
    write_trace(tmp_path / "pairs.npz", META, loads_SLRE, pair_counts_LEE=pairs_LEE)
    plan = solve_plan(Trace(tmp_path / "pairs.npz"), setting, "moetuner", 0)
    first_E, second_E = plan.owners.expert_to_owner_LE
    followers = pairs_LEE[0].argmax(axis=1)
    assert (first_E == second_E[followers]).mean() >= 0.5


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WORKLOADS])
def test_synthetic_traces_are_valid_and_repeatable(tmp_path, kind):
    spec = SynthSpec(META, kind, num_steps=4, tokens_per_rank=50, seed=3)
    steps = np.stack(list(synthesize(spec)))
    assert np.array_equal(steps, np.stack(list(synthesize(spec))))
    write_trace(tmp_path / "t.npz", META, steps)
    assert (steps.sum(axis=3) == 100).all()
    assert steps.max() <= 50
    shares = steps.sum(axis=(0, 2)) / steps[:, 0].sum()
    skew = shares.max(axis=1) * 8
    assert (skew < 1.3).all() if kind == "uniform" else (skew > 1.5).all()
    if kind == "one-hot":
        assert (steps.max(axis=3) == 50).all()


@pytest.mark.parametrize("kind", WORKLOADS)
def test_traces_of_workloads_are_their_loads(tmp_path, kind):
    spec = SynthSpec(META, kind, num_steps=4, tokens_per_rank=50, seed=3)
    write_trace(tmp_path / "t.npz", META, np.stack(list(synthesize(spec))))
    steps = np.stack(list(Trace(tmp_path / "t.npz").steps()))
    for layer in range(2):
        workload = Workload(name=kind, num_ranks=4, num_experts=8, top_k=2, tokens_per_rank=50, seed=3, layer=layer)
        assert np.array_equal(steps[:, layer], [workload.load_RE(step) for step in range(4)])


def test_wrong_synthetic_wishes():
    for change, message in (
        ({"kind": "odd"}, "unknown kind 'odd'"),
        ({"skew": -1.0}, "skew"),
        ({"tokens_per_rank": 2**31}, "int32"),
    ):
        with pytest.raises(ValueError, match=message):
            SynthSpec(**{"meta": META, "kind": "zipf", "num_steps": 1, "tokens_per_rank": 1, **change})


def test_loads_that_leave_the_range_of_integers_are_refused(tmp_path):
    """Cumulative counts: a scale, or a sum over steps, that would wrap around."""
    meta = TraceMeta(num_layers=1, num_experts=2, top_k=1, num_ranks=1)
    write_trace(tmp_path / "t.npz", meta, np.full((600, 1, 1, 2), 2**52))
    setting = SimulatorSetting(topology=Topology.preset("h100", 1), shape=LayerShape(2, 1, 8, 8), scale=4)
    with pytest.raises(ValueError, match="a load of 4503599627370496 at scale 4 is above 9007199254740992; lower --scale"):
        compare(Trace(tmp_path / "t.npz"), setting, ["static"], information=("exact",), num_steps=1)
    write_trace(tmp_path / "t.npz", meta, np.full((1100, 1, 1, 2), 2**52))
    with pytest.raises(ValueError, match=r"loads sum to \d+ up to a step, above 4611686018427387904; divide the recording's"):
        recorded_loads(Trace(tmp_path / "t.npz"), setting)


def test_backtest_errors_by_hand(tmp_path):
    """Shares 1, 0 and 0, 1 in turn: the last value is always wrong after one step and right after two."""
    meta = TraceMeta(num_layers=1, num_experts=2, top_k=1, num_ranks=1)
    write_trace(tmp_path / "t.npz", meta, np.array([[[[4, 0]]], [[[0, 4]]]] * 3))
    found = {(row.predictor, row.age): row for row in backtest(Trace(tmp_path / "t.npz"), ages=(1, 2, 50))}
    assert (found["last", 1].mean, found["last", 1].num_cells) == (1.0, 5)
    assert (found["last", 2].mean, found["last", 2].worst, found["last", 2].num_cells) == (0.0, 0.0, 4)
    assert 0.3 < found["window", 1].mean < 0.8
    assert ("last", 50) not in found

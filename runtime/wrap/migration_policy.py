"""When experts migrate, which is to change their owner: observe, ask a solver in the background, migrate if it pays.

Every `migration.every` steps the loads observed since the last question go to a process of its own (`online.propose`). No step
waits for it: half as many steps later, and then after every tenth as many, rank 0 checks for an answer and broadcasts what it
finds. So all ranks migrate after the same step. An answer may be ten times as many steps old, since what it is
worth is judged by the load observed in between: a migration must save more predicted seconds until the next question than it
is expected to take. How long migrations take is measured: of two equal runs one may migrate experts where the other does not,
which changes no loss beyond rounding. What a migration did save is measured too, by the steps before and after it.

Shape letters: L layers, R ranks, E experts.
"""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch

from ...collectives.lifetime import start
from ...jit import run_seconds
from ...placement import ExpertLoad, OwnerMap, Problem
from ...placement.online.propose import Proposal, Question, propose, saved_s
from ..agreement import Doing
from ..config import RuntimeConfig
from ..experts.bank import Bank
from ..experts.migrate import bytes_per_expert, bytes_to_migrate, expert_states, migrate
from ..group import RankGroup
from ..sharded_experts import ShardedExperts

logger = logging.getLogger("moesaic.migration")

# The rate to expect is the best of so many migrations: one slow migration does not lower it.
_RATES_KEPT = 3
# Measured rates rise by this factor with every proposal that is rejected, so that the rate is measured again some day.
_RATE_REGAINED = 1.1
# Between two questions there are so many checks for an answer; a question is given up after so many times that interval.
_CHECKS_PER_INTERVAL = 10
_MOST_INTERVALS = 10
# Of the seconds between two questions: the first check comes after half of them.
_LIMIT_SHARE = 0.4


@dataclass(frozen=True)
class Decision:
    """What came of one proposal; the same on every rank in `step` and `moved`, elsewhere on rank 0 alone.

    Where there was no answer, `reason` says why and the numbers are 0. `objective` and `bound` are seconds of a step by the load
    that the solver was asked with; what is saved is predicted by the load observed since.
    """

    step: int
    reason: str
    moved: int = 0
    """Experts that changed their owner."""
    solver: str = ""
    """What the owners come from, "milp" or "joint"; see `Proposal`."""
    objective: float = 0.0
    """Predicted seconds of a step under the owners proposed, moves included."""
    bound: float = 0.0
    """What no owners go below."""
    gap: float = 0.0
    """(objective - bound) / objective."""
    seconds: float = 0.0
    """The solver's time."""
    saved_s_predicted: float = 0.0
    """Until the next question."""
    move_s: float = 0.0
    """Expected from the bytes and the rate of earlier migrations; measured if experts migrated."""

    def to_dict(self) -> dict[str, Any]:
        """Everything but the step, as in a line of metrics.jsonl."""
        return {name: value for name, value in asdict(self).items() if name != "step"}


class _Solver:
    """The background process of rank 0: one question at a time.

    It starts at once and stays, so that what it imports and loads is there by the first question.
    """

    def __init__(self) -> None:
        self._start()
        self._thread: threading.Thread | None = None
        self._answer: Proposal | str = ""

    def ask(self, question: Question) -> None:
        """Send a question to the process. The one before must be answered, or given up."""
        if self._process.poll() is not None:
            self._start()
        self._answer = ""
        self._thread = threading.Thread(target=self._converse, args=(self._process, question), daemon=True)
        self._thread.start()

    def answer(self) -> Proposal | str | None:
        """The proposal, or why there is none; None while the process still works on it. Never waits."""
        assert self._thread is not None
        return None if self._thread.is_alive() else self._answer

    def give_up(self) -> None:
        """End the process with its question; the next one starts another."""
        assert self._thread is not None
        self._process.kill()
        self._thread.join()

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        command = [sys.executable, "-c", f"from {propose.__module__} import main; main()"]
        # The process must not outlive the run, however that ends.
        self._process = start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors)
        weakref.finalize(self, self._process.kill)

    def _converse(self, process: subprocess.Popen[bytes], question: Question) -> None:
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump(question, process.stdin)
            process.stdin.flush()
            self._answer = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            status = process.wait()
            self._errors.seek(0)
            last = self._errors.read().decode(errors="replace").strip().splitlines()
            self._answer = f"the solver ended with {status}: {last[-1] if last else 'without a message'}"
        except Exception as error:  # unpickling raises whatever the bytes make it
            process.kill()
            self._answer = f"the solver's answer cannot be read: {error!r}"


class MigrationRate:
    """Bytes per second that a rank sends in a migration: the best of the last few; at first, the topology's.

    Example: where the topology has 1 GB/s, and the only migration so far made 0.1, proposals are priced at 0.1 GB/s, then at
    0.11, then at 0.121, until one is taken, or at 1.
    """

    def __init__(self, nominal_bytes_per_s: float):
        self._nominal = nominal_bytes_per_s
        self._measured: deque[float] = deque(maxlen=_RATES_KEPT)

    @property
    def bytes_per_s(self) -> float:
        """The rate to expect."""
        return max(self._measured, default=self._nominal)

    def measure(self, bytes_per_s: float) -> None:
        """Add the rate of a migration."""
        self._measured.append(bytes_per_s)

    def refuse(self) -> None:
        """A proposal was rejected: raise the measured rates, up to the topology's."""
        for place, rate in enumerate(self._measured):
            self._measured[place] = max(rate, min(rate * _RATE_REGAINED, self._nominal))


class _StepTimes:
    """The last steps' seconds on this rank, and by how much a migration changed them.

    A step counts from one `Migrator.step` to the next, without compilation. As many are kept as half an interval has: those
    before the solver was asked are compared with as many after the migration, as the solver may slow those in between.
    """

    def __init__(self, every: int):
        self._every = every
        self._seconds: deque[float] = deque(maxlen=max(1, every // 2))
        self._start_s: float | None = None
        self._before_s = 0.0  # the median when the solver was asked
        self._migrated: tuple[int, float] | None = None  # the step, and the median before

    @property
    def median_s(self) -> float:
        """Of the last steps; 0 before there is one."""
        return median(self._seconds) if self._seconds else 0.0

    def begin(self) -> None:
        """A step begins."""
        self._start_s = run_seconds()

    def asked(self) -> None:
        """The solver is asked now."""
        self._before_s = self.median_s

    def migrated(self, step: int) -> None:
        """Experts migrated after this step."""
        self._migrated = step, self._before_s

    def end(self, step: int) -> dict[str, float]:
        """A step ends: what a migration saved until the next question, and its step, once there are steps enough after it."""
        if self._start_s is not None:
            self._seconds.append(run_seconds() - self._start_s)
        if self._migrated is None or step < self._migrated[0] + (self._seconds.maxlen or 0):
            return {}
        (migration_step, before_s), self._migrated = self._migrated, None
        return {"saved_s_observed": (before_s - self.median_s) * self._every, "migration_step": float(migration_step)}


class Migrator:
    """Migrates the experts of one bank while training runs.

    Args:
        bank, layers: the bank and its layers, in order.
        group: the ranks; rank 0 solves.
        config: `migration`, `debug.migration_effort`, policy.
    """

    def __init__(self, bank: Bank, layers: Sequence[ShardedExperts], group: RankGroup, config: RuntimeConfig):
        self.bank = bank
        self._layers = list(layers)
        self._group = group
        self._config = config
        self._solver = _Solver() if group.is_first else None
        self._loads: np.ndarray | None = None  # int64 [L, R, E], since the last question
        self._num_steps = 0
        self._asked_at = -1
        self._is_unanswered = False  # the last question had no answer
        self._expert_bytes = 0  # of one expert and its state, when the solver was asked
        self._rate = MigrationRate(group.topology.device_bytes_per_s)
        self._times = _StepTimes(config.migration.every)
        self.decisions: list[Decision] = []
        self.observed: dict[str, float] = {}
        """On rank 0, what this step has shown that a migration saved; see `_StepTimes.end`."""

    def step(self, step: int, loads: Mapping[str, np.ndarray], optimizer: torch.optim.Optimizer | None) -> None:
        """Close step number `step` (from 1) with the loads [R, E] it had by layer. Collective."""
        every = self._config.migration.every
        if self._solver is not None:
            self.observed = self._times.end(step)
        loads_LRE = np.stack([loads[layer.runtime.name] for layer in self._layers])
        self._loads = loads_LRE if self._loads is None else self._loads + loads_LRE
        self._num_steps += 1
        late_by = step - self._asked_at - max(1, every // 2)
        if self._asked_at >= 0 and late_by >= 0 and late_by % max(1, every // _CHECKS_PER_INTERVAL) == 0:
            self._follow_answer(step, optimizer)
        if step % every == 0 and self._asked_at < 0:
            # State that cannot migrate is refused before anything is solved.
            self._expert_bytes = bytes_per_expert(expert_states(self.bank, optimizer))
            if self._solver is not None:
                self._solver.ask(self._question())
                self._times.asked()
            self._loads, self._num_steps, self._asked_at = None, 0, step
        self._times.begin()

    def _question(self) -> Question:
        """The present state. After a question without an answer the next is one without an engine, which may have been why."""
        config, migration = self._config, self._config.migration
        limit_s = migration.time_limit_s or _LIMIT_SHARE * migration.every * self._times.median_s
        solver = "joint" if self._is_unanswered else migration.solver
        return Question(self._problems(), config.policy, config.debug.migration_effort, solver, limit_s)

    def _problems(self) -> tuple[Problem, ...]:
        """The layers under the mean load since the last question, with moves at the rate expected, of this optimizer's state."""
        assert self._loads is not None
        # The mean step, rounded up: an expert that was chosen at all stays one that is.
        mean_LRE = -(-self._loads // self._num_steps)
        return tuple(
            self._with_moves(layer.runtime.planner.problem(ExpertLoad(load_RE)))
            for layer, load_RE in zip(self._layers, mean_LRE, strict=True)
        )

    def _with_moves(self, problem: Problem) -> Problem:
        slower = self._group.topology.device_bytes_per_s / self._rate.bytes_per_s
        multiplier = self._expert_bytes / (4 * problem.shape.parameters_per_expert) * slower
        return replace(problem, move_horizon_steps=self._config.migration.every, state_multiplier=multiplier)

    def _follow_answer(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Rank 0 checks for an answer and prices it; all ranks follow the decision of rank 0."""
        current = self.bank.owners
        decided: tuple[OwnerMap, Decision] | None = None
        if self._solver is not None:
            answer, age, most = self._solver.answer(), step - self._asked_at, _MOST_INTERVALS * self._config.migration.every
            if answer is None and age >= most:
                self._solver.give_up()
                answer = f"the solver had no answer {age} steps after it was asked, and {most} are allowed"
            decided = None if answer is None else self._decide(step, answer, self._expert_bytes)
        (is_decided,) = self._from_first([decided is not None])
        if not is_decided:
            return
        wanted, decision = decided or (current, Decision(step, "decided by rank 0"))
        owners = self._from_first(wanted.expert_to_owner_LE.ravel().tolist())
        wanted = OwnerMap(np.reshape(owners, current.expert_to_owner_LE.shape), current.num_ranks)
        self._asked_at = -1
        if len(current.moves_to(wanted)):
            start_s = time.perf_counter()
            self._migrate(wanted, optimizer)
            move_s = time.perf_counter() - start_s
            moved = len(current.moves_to(self.bank.owners))
            if moved:
                self._rate.measure(bytes_to_migrate(current, self.bank.owners, self._expert_bytes, self._group.topology) / move_s)
                self._times.migrated(step)
            decision = replace(decision, moved=moved, move_s=move_s)
        self.decisions.append(decision)
        if self._group.is_first:
            logger.info("step %d: %s", step, decision.reason)

    def _decide(self, step: int, answer: Proposal | str, row_bytes: int) -> tuple[OwnerMap, Decision]:
        """Price a proposal with the load observed since it was asked for, and the owners of now."""
        current = self.bank.owners
        self._is_unanswered = isinstance(answer, str)
        if isinstance(answer, str):
            return current, Decision(step, f"owners stay: {answer}")
        horizon = self._config.migration.every
        num_moves = len(current.moves_to(answer.owners))
        saving_s = saved_s(self._problems(), answer.owners, self._config.policy) * horizon
        move_s = bytes_to_migrate(current, answer.owners, row_bytes, self._group.topology) / self._rate.bytes_per_s
        pays = num_moves > 0 and saving_s > move_s
        reason = (
            f"{'experts migrate' if pays else 'owners stay'}: {num_moves} experts would save {saving_s:.3g} s over {horizon} "
            f"steps and take {move_s:.3g} s to migrate, by the load of the {self._num_steps} steps since the solver was asked"
            f"{answer.note and '; '}{answer.note}"
        )
        if not pays:
            self._rate.refuse()
        decision = Decision(
            step,
            reason,
            num_moves if pays else 0,
            answer.solver,
            answer.objective_s,
            answer.bound_s,
            answer.gap,
            answer.seconds,
            saving_s,
            move_s,
        )
        return answer.owners if pays else current, decision

    def _from_first(self, values: Sequence[int]) -> list[int]:
        """The values of rank 0 of the first replica, on every rank of every replica, as replicas own the same experts."""
        found = torch.tensor(values, dtype=torch.int64, device=self.bank.device)  # that the transports take integers on
        runtime = self._layers[0].runtime
        for ranks in (self._group.tokens, self._group.replicas):
            found = runtime.agreement.gather(ranks, found, Doing.OWNERS, runtime.step).values_Rn[0].contiguous()
        return found.tolist()

    def _migrate(self, wanted: OwnerMap, optimizer: torch.optim.Optimizer | None) -> None:
        migrate(self.bank, optimizer, wanted, self._group.experts, where="migration")
        for layer in self._layers:
            layer.follow_bank()

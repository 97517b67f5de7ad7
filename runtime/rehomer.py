"""When experts change their owner: observe, ask a solver in the background, move if it pays.

Every `rehome_every` steps the loads observed since the last question go to a process of its own (`placement.propose`); half
as many steps later its answer is used if it is there, and dropped if not: no step waits for a solver. Rank 0 asks and decides,
everybody follows. A move must save more predicted seconds until the next question than it is expected to take.

Shape letters: L layers, R ranks, E experts.
"""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..placement import ExpertLoad, OwnerMap, Problem
from ..placement.propose import Proposal, Question, propose
from .bank import Bank
from .config import RuntimeConfig
from .group import RankGroup
from .layer_runtime import LayerRuntime
from .rehome import bytes_per_row, bytes_to_move, migrate, row_tensors

logger = logging.getLogger("moesaic.rehome")


@dataclass(frozen=True)
class Decision:
    """What came of one proposal; the same on every rank, but for the seconds, which only rank 0 knows before a move."""

    step: int
    num_moved: int  # experts that changed their owner
    saved_s: float  # predicted, until the next question
    move_s: float  # expected from the bytes and the rate of earlier moves; measured if it moved
    reason: str


class _Solver:
    """The background process of rank 0: at most one question at a time."""

    def __init__(self, limit_s: float):
        self._limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._answer: Proposal | None = None
        self._problem = ""

    def ask(self, question: Question) -> None:
        self._answer, self._problem = None, f"no answer within {self._limit_s:g} s"
        command = [sys.executable, "-c", f"from {propose.__module__} import main; main()"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        # The process must not outlive the run that asked.
        weakref.finalize(self, process.kill)
        self._process = process
        self._thread = threading.Thread(target=self._converse, args=(process, question), daemon=True)
        self._thread.start()

    def answer(self) -> Proposal | str:
        """The proposal, or why there is none; whatever still runs is ended."""
        assert self._process is not None and self._thread is not None
        is_late = self._thread.is_alive()
        if is_late:
            self._process.kill()
        self._thread.join()
        return "the solver was not done in time" if is_late else self._answer or self._problem

    def _converse(self, process: subprocess.Popen[bytes], question: Question) -> None:
        try:
            output, errors = process.communicate(pickle.dumps(question), timeout=self._limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return
        if process.returncode == 0:
            self._answer = pickle.loads(output)
        else:
            last = errors.decode(errors="replace").strip().splitlines()
            self._problem = f"the solver ended with {process.returncode}: {last[-1] if last else 'it said nothing'}"


class Rehomer:
    """Re-homes the experts of one bank while training runs.

    Args:
        bank, runtimes: the bank and its layers, in order.
        group: the ranks; rank 0 solves.
        config: `rehome_every`, `rehome_effort`, policy.
    """

    def __init__(self, bank: Bank, runtimes: Sequence[LayerRuntime], group: RankGroup, config: RuntimeConfig):
        self.bank = bank
        self._runtimes = list(runtimes)
        self._group = group
        self._config = config
        self._solver = _Solver(limit_s=config.timeout_s)
        self._loads: np.ndarray | None = None  # int64 [L, R, E], since the last question
        self._num_steps = 0
        self._asked_at = -1
        self._bytes_per_s = group.topology.device_bytes_per_s
        self.decisions: list[Decision] = []

    def step(self, step: int, loads_LRE: np.ndarray, optimizer: torch.optim.Optimizer | None) -> None:
        """Close step number `step` (from 1) with the loads it had. Collective."""
        every = self._config.rehome_every
        self._loads = loads_LRE.copy() if self._loads is None else self._loads + loads_LRE
        self._num_steps += 1
        if self._asked_at >= 0 and step == self._asked_at + max(1, every // 2):
            self._asked_at = -1
            self._follow_answer(step, optimizer)
        if step % every == 0 and self._asked_at < 0:
            row_tensors(self.bank, optimizer)  # state that cannot move is refused before anything is solved
            if self._group.is_first:
                self._solver.ask(Question(self._problems(), self._config.policy, self._config.rehome_effort))
            self._loads, self._num_steps, self._asked_at = None, 0, step

    def _problems(self) -> tuple[Problem, ...]:
        assert self._loads is not None
        # The mean step, rounded up: an expert that was chosen at all stays one that is.
        mean_LRE = -(-self._loads // self._num_steps)
        return tuple(
            runtime.planner.problem(ExpertLoad(load_RE)) for runtime, load_RE in zip(self._runtimes, mean_LRE, strict=True)
        )

    def _follow_answer(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        current = self.bank.owners
        tensors = row_tensors(self.bank, optimizer)
        wanted, decision = current, Decision(step, 0, 0.0, 0.0, "decided by rank 0")
        if self._group.is_first:
            wanted, decision = self._decide(step, self._solver.answer(), bytes_per_row(tensors))
        wanted = self._agree(wanted)
        num_moved = len(current.moves_to(wanted))
        if num_moved:
            start_s = time.perf_counter()
            self._move(wanted, tensors)
            move_s = time.perf_counter() - start_s
            self._bytes_per_s = bytes_to_move(current, wanted, bytes_per_row(tensors)) / move_s
            decision = Decision(step, num_moved, decision.saved_s, move_s, decision.reason)
        self.decisions.append(decision)
        if self._group.is_first:
            logger.info("step %d: %s", step, decision.reason)

    def _decide(self, step: int, answer: Proposal | str, row_bytes: int) -> tuple[OwnerMap, Decision]:
        current = self.bank.owners
        if isinstance(answer, str):
            return current, Decision(step, 0, 0.0, 0.0, f"owners stay: {answer}")
        horizon = self._config.rehome_every
        num_moves = len(current.moves_to(answer.owners))
        saved_s = (answer.current_step_s - answer.step_s) * horizon
        move_s = bytes_to_move(current, answer.owners, row_bytes) / self._bytes_per_s
        numbers = f"{num_moves} experts would save {saved_s:.3g} s over {horizon} steps and take {move_s:.3g} s to move"
        if num_moves == 0 or saved_s <= move_s:
            return current, Decision(step, 0, saved_s, move_s, f"owners stay: {numbers}")
        return answer.owners, Decision(step, num_moves, saved_s, move_s, f"owners move: {numbers}")

    def _agree(self, wanted: OwnerMap) -> OwnerMap:
        """Rank 0's owner map, on every rank, of replicas too: they must go on owning the same experts."""
        owners = torch.from_numpy(wanted.expert_to_owner_LE.copy()).flatten()
        owners = self._group.tokens.all_gather_ints(owners, where="re-homing")[0].contiguous()
        owners = self._group.replicas.all_gather_ints(owners, where="re-homing")[0]
        return OwnerMap(owners.view(wanted.expert_to_owner_LE.shape).numpy(), wanted.num_ranks)

    def _move(self, wanted: OwnerMap, tensors: Sequence[torch.Tensor]) -> None:
        migrate(self.bank, tensors, wanted, self._group.experts, where="re-homing")
        for runtime in self._runtimes:
            runtime.follow_bank()

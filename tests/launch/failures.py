"""Training in which a rank is killed, stopped or cut off at a random moment, and what the others do about it.

`python -m tests.launch.failures --times 50` does it that many times and prints a line each.
"""

import argparse
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from moesaic.benchmarks.network import Network
from tests.launch.ranks import Rank, set_options, tiny_values

# The time limit of every wait, and what starting up, noticing and ending may take beside it.
TIMEOUT_S = 5.0
LIMIT_S = 90.0
# A busy machine compiles and imports slowly.
START_LIMIT_S = 300.0
FAILURES = ("kill", "stop", "cut")


@dataclass(frozen=True)
class Case:
    """One run that fails."""

    how: str
    transport: str
    seed: int
    ranks_per_node: int = 3
    """Ranks of each of two nodes for `cut`, of the only one otherwise."""

    @property
    def world_size(self) -> int:
        return self.ranks_per_node * (2 if self.how == "cut" else 1)


@dataclass(frozen=True)
class Outcome:
    """What the ranks that were left did."""

    how: str
    victims: tuple[int, ...]
    moment_s: float
    statuses: tuple[int | None, ...]
    """Exit status of every rank, None where it had to be killed by the test."""
    stderrs: tuple[str, ...]
    ended_s: float
    """Seconds from the failure to the end of the last rank that was left."""
    leftovers: tuple[str, ...]
    """New files in /dev/shm that carry a rank's process id; other tests of this machine may have files of theirs there."""

    def _states_of(self, rank: int) -> tuple[str, ...]:
        """What another rank may say of it."""
        if rank in self.victims:
            return ("is gone (its process",) if self.how == "kill" else ("is stopped (process",)
        # One that noticed nothing yet runs; one that has nothing to wait for with others may end without a word.
        return ("failed too (", "runs (process", "is gone (its process")

    def check(self) -> None:
        """Assert that every rank that could stop did, with a failure report, and that nothing is left."""
        for rank, (status, stderr) in enumerate(zip(self.statuses, self.stderrs, strict=True)):
            if rank in self.victims:
                continue
            assert status not in (None, 0), f"rank {rank} ended with {status}: {stderr[-2000:]}"
            last = stderr.strip().splitlines()[-1]
            assert f"rank {rank}" in last, f"rank {rank} does not say who it is: {last}"
            for what in ("step ", "last completed on this rank: ", ", plan "):
                assert what in last, f"rank {rank} does not say where it was: {last}"
            for other in set(range(len(self.statuses))) - {rank}:
                assert any(f"rank {other} {state}" in last for state in self._states_of(other)), f"what of rank {other}? {last}"
        assert not self.leftovers, f"left in /dev/shm: {self.leftovers}"


def fail(case: Case, folder: Path) -> Outcome:
    """Train until the moment, make a rank fail, wait for the others."""
    rng = random.Random(case.seed)
    (folder / "text.txt").write_text("".join(rng.choice(["router ", "expert ", "bank\n"]) for _ in range(3000)), encoding="utf-8")
    before = set(os.listdir("/dev/shm"))
    with ExitStack() as stack:
        network = stack.enter_context(Network(2, bits_per_s=1e9)) if case.how == "cut" else None
        processes = _start(case, folder, network)
        stack.callback(_kill_all, processes)
        _wait_for_steps(folder / "runs" / "demo" / "metrics.jsonl", 2, processes)
        moment_s = rng.uniform(0.0, 1.0)
        time.sleep(moment_s)
        victims: tuple[int, ...] = (rng.randrange(case.world_size),)
        if network is not None:
            # Both sides go on; neither hears of the other.
            network.cut(victims[0] // case.ranks_per_node)
            victims = ()
        else:
            os.kill(processes[victims[0]].pid, signal.SIGKILL if case.how == "kill" else signal.SIGSTOP)
        failed_s = time.monotonic()
        statuses: dict[int, int | None] = {}
        for rank, process in enumerate(processes):
            if rank not in victims:
                try:
                    statuses[rank] = process.wait(max(0.0, failed_s + LIMIT_S - time.monotonic()))
                except subprocess.TimeoutExpired:
                    statuses[rank] = None
        ended_s = time.monotonic() - failed_s
    new = sorted(set(os.listdir("/dev/shm")) - before)
    leftovers = tuple(name for name in new if any(str(process.pid) in name for process in processes))
    stderrs = tuple((folder / f"stderr-{rank}").read_text(encoding="utf-8") for rank in range(case.world_size))
    return Outcome(
        case.how, victims, moment_s, tuple(statuses.get(r) for r in range(case.world_size)), stderrs, ended_s, leftovers
    )


def _start(case: Case, folder: Path, network: Network | None) -> list[Rank]:
    values = [
        *tiny_values(folder),
        "train.steps=1000000",
        "train.eval_every=0",
        f"runtime.timeout_s={TIMEOUT_S}",
        f"runtime.transport={case.transport}",
        f"launch.init_method=file://{folder}/rendezvous",
    ]
    processes: list[Rank] = []
    for rank in range(case.world_size):
        node = network.nodes[rank // case.ranks_per_node] if network else None
        variables = {
            "RANK": str(rank),
            "WORLD_SIZE": str(case.world_size),
            "LOCAL_RANK": str(rank % case.ranks_per_node),
            "LOCAL_WORLD_SIZE": str(case.ranks_per_node),
            "OMP_NUM_THREADS": "1",
        }
        path = folder / f"stderr-{rank}"
        processes.append(Rank(set_options(values), os.environ | variables, folder, Path(os.devnull), path, node))
    return processes


def _wait_for_steps(metrics: Path, steps: int, processes: Sequence[Rank]) -> None:
    deadline_s = time.monotonic() + START_LIMIT_S
    while not metrics.exists() or metrics.read_text(encoding="utf-8").count("\n") < steps:
        assert time.monotonic() < deadline_s, "training did not begin"
        for rank, process in enumerate(processes):
            problem = (metrics.parents[2] / f"stderr-{rank}").read_text(encoding="utf-8")
            assert process.poll() is None, f"rank {rank} ended before anything was done to it: {problem}"
        time.sleep(0.02)


def _kill_all(processes: Sequence[Rank]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def main() -> None:
    """Run many cases of every kind in turn; end with status 1 at the first that is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    kinds = [Case("kill", "shm", 0), Case("stop", "shm", 0), Case("kill", "c10d", 0), Case("stop", "c10d", 0)]
    kinds += [Case("cut", "c10d", 0, ranks_per_node=1), Case("cut", "hierarchical", 0, ranks_per_node=2)]
    for index in range(arguments.times):
        kind = kinds[index % len(kinds)]
        case = Case(kind.how, kind.transport, arguments.seed + index, kind.ranks_per_node)
        with tempfile.TemporaryDirectory() as folder:
            outcome = fail(case, Path(folder))
        print(f"{index + 1}: {case.how} over {case.transport}, {case.world_size} ranks, ", end="")
        print(f"ended {outcome.ended_s:.1f} s later, statuses {outcome.statuses}", flush=True)
        for rank, stderr in enumerate(outcome.stderrs):
            if rank not in outcome.victims:
                print(f"   {(stderr.strip().splitlines() or ['nothing'])[-1]}", flush=True)
        outcome.check()


if __name__ == "__main__":
    main()

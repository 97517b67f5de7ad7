"""One process: rank and sizes from the environment, threads, memory, agreement between ranks, and stop signals."""

import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import pytest
import torch
import torch.distributed as dist

import moesaic.launch.run.process as module
from moesaic.launch.config import LaunchConfig
from moesaic.launch.entry import RunError
from moesaic.launch.run.process import (
    Process,
    StopSignal,
    agreed,
    check_same,
    find_process,
    from_first,
    process_group,
    reuse_memory,
    set_threads,
    stop_with_launcher,
)
from tests.helpers.ranks import forking, run_ranks

CPU = LaunchConfig(device="cpu")


def process_of(rank: int, world_size: int) -> Process:
    return Process(rank, world_size, rank, world_size, None, torch.device("cpu"))


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, (0, 1, 0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4, 2, 4)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, (5, 8, 1, 4)),
    ],
)
def test_rank_from_the_environment(env: dict[str, str], expected: tuple[int, int, int, int]) -> None:
    process = find_process(CPU, env)
    assert (process.rank, process.world_size, process.local_rank, process.local_world_size) == expected
    assert process.is_first == (expected[0] == 0)


@pytest.mark.parametrize(
    "env, message",
    [
        ({"RANK": "0"}, "only one of RANK and WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "only one of RANK and WORLD_SIZE"),
        ({"RANK": "two", "WORLD_SIZE": "4"}, "RANK is 'two', expected a whole number"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK 4 does not fit WORLD_SIZE 4"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "RANK -1 does not fit"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK 1 of LOCAL_WORLD_SIZE 1"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE 3 does not fit WORLD_SIZE 2"),
    ],
)
def test_wrong_environment(env: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_process(CPU, env)


def test_more_ranks_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"2 rank\(s\) on this machine, 1 CUDA device\(s\)"):
        find_process(LaunchConfig(device="cuda"), {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match="where they are on several, set LOCAL_RANK and LOCAL_WORLD_SIZE; otherwise start at"):
        find_process(LaunchConfig(device="cuda"), {"RANK": "0", "WORLD_SIZE": "2"})
    assert find_process(LaunchConfig(device="cuda"), {}).device == torch.device("cuda", 0)


@pytest.mark.parametrize(
    "env, num_threads, local_world_size, expected",
    [
        ({}, 0, 1, 8),
        ({}, 0, 2, 4),
        ({}, 0, 16, 1),
        ({}, 3, 2, 3),
        ({"OMP_NUM_THREADS": "1"}, 0, 2, 5),
        ({"OMP_NUM_THREADS": "1"}, 6, 2, 6),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, 0, 2, 4),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, 0, 1, 5),
        ({"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "none"}, 0, 2, 5),
    ],
)
def test_threads(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], num_threads: int, local_world_size: int, expected: int
) -> None:
    """On 8 cores, where torch has started with 5 threads: 5 stays where OMP_NUM_THREADS is the user's."""
    chosen = [5]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    assert set_threads(process_of(0, local_world_size), LaunchConfig(num_threads=num_threads), env) == expected


def _faults(switch: str, pipe: Connection) -> None:
    """Page faults of the later ones of 40 steps, each of which makes two tensors above malloc's 32 MiB limit."""
    torch.set_num_threads(1)
    config = LaunchConfig(device="cpu", reuse_memory=switch == "on")
    done = reuse_memory(find_process(config, {}), config)

    def step() -> int:
        torch.empty(12 << 20).fill_(1.0) + 1
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    counts = [step() for _ in range(40)]
    pipe.send((done, counts[-1] - counts[19]))


def test_reused_memory_is_not_faulted_in_again() -> None:
    """A step's page faults vanish with the switch on, apart from the first steps'."""
    faults = {}
    for switch in ("on", "off"):
        ours, theirs = forking().Pipe()
        process = forking().Process(target=_faults, args=(switch, theirs))
        process.start()
        done, faults[switch] = ours.recv()
        process.join()
        assert done == (switch == "on" and platform.libc_ver()[0] == "glibc")
    if platform.libc_ver()[0] == "glibc":
        assert 10 * faults["on"] < faults["off"]


# Agreement


def _agree(rank: int, fails_on: list[int], error: type[Exception]) -> tuple[str, int]:
    def action() -> int:
        if rank in fails_on:
            raise error(f"no text on rank {rank}")
        return 10 + rank

    try:
        return "", agreed(process_of(rank, 2), action)
    except ValueError as caught:
        return str(caught), -1


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_ranks_agree_on_what_only_one_can_see(error: type[Exception]) -> None:
    """All raise the same line or none does; the line names the ranks unless it is all of them."""
    assert run_ranks(2, _agree, [], error) == [("", 10), ("", 11)]
    assert run_ranks(2, _agree, [1], error) == [("no text on rank 1 (rank 1 of 2)", -1)] * 2
    assert run_ranks(2, _agree, [0, 1], error) == [("no text on rank 0", -1)] * 2


def _same(rank: int, texts: list[str]) -> str:
    try:
        check_same(process_of(rank, 2), {"the text": "a", "the configuration": texts[rank]})
    except ValueError as caught:
        return str(caught)
    return ""


def test_a_difference_between_ranks_names_the_line() -> None:
    assert run_ranks(2, _same, ["a = 1\nb = 2", "a = 1\nb = 2"]) == ["", ""]
    expected = "the configuration differs between ranks: b = 2 on rank 0, b = 3 on rank 1"
    assert run_ranks(2, _same, ["a = 1\nb = 2", "a = 1\nb = 3"]) == [expected] * 2
    expected = "the configuration differs between ranks: b = 2 on rank 0, nothing on rank 1"
    assert run_ranks(2, _same, ["a = 1\nb = 2", "a = 1"]) == [expected] * 2


def test_what_is_wrong_after_the_ranks_have_met_is_for_rank_0_to_say() -> None:
    alone = find_process(CPU, {})
    with pytest.raises(RunError, match="too few tokens"), process_group(alone, CPU, timeout_s=60.0):
        raise ValueError("too few tokens")
    assert not dist.is_initialized()


def _first(rank: int) -> str:
    return from_first(process_of(rank, 2), f"from rank {rank}")


def test_value_of_the_first_rank() -> None:
    assert run_ranks(2, _first) == ["from rank 0"] * 2


# Signals


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.fixture
def default_hangup() -> Iterator[None]:
    """A hangup ends this process, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("default_hangup")
@pytest.mark.parametrize("signum", StopSignal.signals)
def test_a_signal_is_noted_and_the_old_handlers_come_back(signum: signal.Signals) -> None:
    before = [signal.getsignal(number) for number in StopSignal.signals]
    with StopSignal() as stop:
        assert stop.signum == 0
        os.kill(os.getpid(), signum)
        _wait_until(lambda: stop.signum != 0)
        assert stop.signum == signum
        # A launcher's echo of the same signal, right after it, does not end the process.
        os.kill(os.getpid(), signum)
        time.sleep(0.1)
    assert [signal.getsignal(number) for number in StopSignal.signals] == before


def test_a_hangup_that_is_ignored_stays_so() -> None:
    """As nohup asks."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
            _wait_until(lambda: stop.signum != 0)
            assert stop.signum == signal.SIGUSR1
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "env, ends",
    [
        ({"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}, True),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, False),
        ({}, False),
    ],
    ids=["torchrun", "mpiexec", "by hand", "alone"],
)
def test_who_ends_with_the_process_that_started_it(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], ends: bool) -> None:
    """A rank of a launcher; one of a shell's background processes goes on."""
    signals: list[int] = []
    monkeypatch.setattr(module, "end_with_parent", lambda *, signum: signals.append(signum))
    stop_with_launcher(find_process(CPU, env), env)
    assert signals == [signal.SIGTERM] * ends


def test_a_second_signal_ends_a_rank_that_is_stuck() -> None:
    """The main thread waits in C++ for a key that never comes; the second signal ends the process all the same."""
    script = """
import datetime
import torch.distributed as dist
from moesaic.launch.run.process import StopSignal
with StopSignal():
    print("ready", flush=True)
    dist.HashStore().wait(["never"], datetime.timedelta(seconds=100))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    process.stdout.close()

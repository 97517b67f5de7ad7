"""The rendezvous: it waits for late ranks, and names the ranks that never join."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch.distributed as dist

from moesaic.launch.entry import RankError
from moesaic.launch.launcher import LAUNCHERS, RankInfo
from moesaic.launch.run.rendezvous import names, rendezvous
from tests.launch.ranks import metrics_of, set_options, start_ranks, tiny_values, wait_for

Found = dist.Store | ValueError


def join_in_threads(starts_s: list[float | None], limit_s: float, init_method: str, env: dict[str, str]) -> dict[int, Found]:
    """The result of every rank that starts, by rank; None never starts."""
    found: dict[int, Found] = {}

    def join(rank: int, start_s: float) -> None:
        time.sleep(start_s)
        try:
            found[rank] = rendezvous(RankInfo(rank, len(starts_s), 0, 1, None), init_method, limit_s, env)
        except ValueError as error:
            found[rank] = error

    threads = [
        threading.Thread(target=join, args=(rank, start_s)) for rank, start_s in enumerate(starts_s) if start_s is not None
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def address_of(how: str, folder: Path) -> tuple[str, dict[str, str]]:
    if how == "file":
        return f"file://{folder}/rendezvous", {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return "env://", {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


@pytest.mark.parametrize("how", ["file", "address"])
def test_a_late_rank_is_waited_for(how: str, tmp_path: Path) -> None:
    """All get a store in which each finds what another wrote."""
    stores = join_in_threads([0.0, 0.6, 0.3], 30.0, *address_of(how, tmp_path))
    for rank, store in stores.items():
        assert isinstance(store, dist.Store), store
        store.set(f"word {rank}", str(rank))
    for store in stores.values():
        assert isinstance(store, dist.Store)
        assert [store.get(f"word {rank}") for rank in range(3)] == [b"0", b"1", b"2"]


@pytest.mark.parametrize(
    "how, starts_s, who",
    [
        ("file", [None, 0.0, 0.0, None], "2 of 4 ranks did not join within 3 s: ranks 0, 3; joined: ranks 1-2; "),
        ("address", [0.0, 0.0, None], "1 of 3 ranks did not join within 3 s: rank 2; joined: ranks 0-1; "),
    ],
)
def test_ranks_that_never_join_are_named(how: str, starts_s: list[float | None], who: str, tmp_path: Path) -> None:
    """One line, the same on all ranks that joined; the first of them prints it."""
    place = address_of(how, tmp_path)
    found = join_in_threads(starts_s, 3.0, *place)
    assert {str(error) for error in found.values()} == {
        who + "see what they printed, or give ranks that start further apart more time, --set launch.init_timeout_s=SECONDS"
    }
    assert [isinstance(found[rank], RankError) for rank in sorted(found)] == [True, False]
    if how == "file":
        # A failed rendezvous leaves nothing that the next one would read.
        again = join_in_threads([0.0] * len(starts_s), 30.0, *place)
        assert all(isinstance(store, dist.Store) for store in again.values()), again


def test_a_rendezvous_that_another_run_has_used(tmp_path: Path) -> None:
    place = address_of("file", tmp_path)
    # A run that crashes leaves the file; one that ends closes its stores, and the last takes the file away.
    stores = join_in_threads([0.0, 0.0], 30.0, *place)
    assert all(isinstance(store, dist.Store) for store in stores.values())
    for rank, error in join_in_threads([0.0, 0.0], 30.0, *place).items():
        assert str(error).startswith(f"rank {rank} of 2: another run has used this rendezvous; give a new file")


@pytest.mark.parametrize("rank, world_size, job", [(2, 3, "7"), (1, 2, "8")], ids=["larger", "another job"])
def test_a_rank_of_another_run(rank: int, world_size: int, job: str, tmp_path: Path) -> None:
    """It is refused, though no rank has joined under its number; the ranks of the run join all the same."""
    init_method, _ = address_of("file", tmp_path)
    file = Path(urlparse(init_method).path)
    srun = next(launcher for launcher in LAUNCHERS if launcher.name == "srun")

    def join(rank: int, world_size: int, job: str) -> dist.Store:
        return rendezvous(RankInfo(rank, world_size, 0, 1, srun), init_method, 30.0, {"SLURM_JOB_ID": job, "SLURM_STEP_ID": "0"})

    with ThreadPoolExecutor() as pool:
        first = pool.submit(join, 0, 2, "7")
        while not file.exists() or b"joined/0" not in file.read_bytes():
            time.sleep(0.01)
        with pytest.raises(RankError, match=f"^rank {rank} of {world_size}: another run has used this rendezvous"):
            join(rank, world_size, job)
        assert isinstance(join(1, 2, "7"), dist.Store)
        assert isinstance(first.result(), dist.Store)


def test_a_port_that_cannot_be_served() -> None:
    init_method, env = address_of("address", Path())
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", int(env["MASTER_PORT"])))
        taken.listen()
        found = join_in_threads([0.0, None], 2.0, init_method, env)
    where = f"127.0.0.1:{env['MASTER_PORT']}"
    assert str(found[0]).startswith(f"rank 0 cannot serve the rendezvous store at {where}; choose another")
    assert "\n" not in str(found[0])
    error = join_in_threads([0.0, None], 2.0, init_method, env | {"MASTER_PORT": "abc"})[0]
    assert str(error) == "MASTER_PORT is 'abc'; give a number up to 65535"


def test_a_folder_that_is_not_there() -> None:
    error = join_in_threads([None, 0.0], 30.0, "file:///nowhere/rendezvous", {})[1]
    assert str(error).startswith(
        "launch.init_method file:///nowhere/rendezvous: there is no folder /nowhere on this machine; make it"
    )


def test_nobody_serves_the_store() -> None:
    """Without rank 0 no rank can list those that joined; each names what it did not reach."""
    error = join_in_threads([None, 0.0], 0.5, *address_of("address", Path()))[1]
    assert isinstance(error, RankError)
    assert str(error).startswith("rank 1 of 2 lost the rendezvous store, or did not reach it within 0.5 s; rank 0 or")
    assert "\n" not in str(error)


def test_names() -> None:
    assert [names(r) for r in ([3], [0, 1], [0, 2, 3, 4, 7])] == ["rank 3", "ranks 0-1", "ranks 0, 2-4, 7"]


def test_training_with_a_rank_that_starts_after_the_limit_of_a_wait(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("router expert slot bank owner\n" * 600, encoding="utf-8")
    values = [*tiny_values(tmp_path), "train.steps=2", "train.eval_every=0", "runtime.timeout_s=5"]
    ended = wait_for(start_ranks(2, set_options(values), tmp_path, starts_s=[0.0, 5.5]))
    assert [end.status for end in ended] == [0, 0], ended
    assert metrics_of(tmp_path / "runs" / "demo")[-1]["step"] == 2


def test_training_without_a_rank(tmp_path: Path) -> None:
    """The rank that joined prints the line, though it is not the first of the run."""
    (tmp_path / "text.txt").write_text("router expert slot bank owner\n" * 600, encoding="utf-8")
    values = [*tiny_values(tmp_path), "launch.init_timeout_s=0.5"]
    (ended,) = wait_for(start_ranks(2, set_options(values), tmp_path, starts_s=[None, 0.0]))
    assert ended.status == 2
    assert ended.stderr.startswith("moesaic: 1 of 2 ranks did not join within 0.5 s: rank 0; joined: rank 1; see what")
    assert ended.stderr.count("\n") == 1

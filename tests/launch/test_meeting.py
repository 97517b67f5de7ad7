"""How ranks meet: late ones are waited for, and where some never come the others name them."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch.distributed as dist

from moesaic.launch.entry import RankError
from moesaic.launch.launcher import LAUNCHERS, Place
from moesaic.launch.run.meeting import meet, names
from tests.launch.ranks import metrics_of, set_options, start_ranks, tiny_values, wait_for

Met = dist.Store | ValueError


def meet_in_threads(starts_s: list[float | None], limit_s: float, init_method: str, env: dict[str, str]) -> dict[int, Met]:
    """What every rank that comes finds, by rank; None never comes."""
    found: dict[int, Met] = {}

    def come(rank: int, start_s: float) -> None:
        time.sleep(start_s)
        try:
            found[rank] = meet(Place(rank, len(starts_s), 0, 1, None), init_method, limit_s, env)
        except ValueError as error:
            found[rank] = error

    threads = [
        threading.Thread(target=come, args=(rank, start_s)) for rank, start_s in enumerate(starts_s) if start_s is not None
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def place_to_meet(how: str, folder: Path) -> tuple[str, dict[str, str]]:
    if how == "file":
        return f"file://{folder}/meeting", {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return "env://", {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


@pytest.mark.parametrize("how", ["file", "address"])
def test_a_late_rank_is_waited_for(how: str, tmp_path: Path) -> None:
    """All get a store in which each finds what another wrote."""
    stores = meet_in_threads([0.0, 0.6, 0.3], 30.0, *place_to_meet(how, tmp_path))
    for rank, store in stores.items():
        assert isinstance(store, dist.Store), store
        store.set(f"word {rank}", str(rank))
    for store in stores.values():
        assert isinstance(store, dist.Store)
        assert [store.get(f"word {rank}") for rank in range(3)] == [b"0", b"1", b"2"]


@pytest.mark.parametrize(
    "how, starts_s, who",
    [
        ("file", [None, 0.0, 0.0, None], "2 of 4 ranks did not come within 3 s: ranks 0, 3; came: ranks 1-2; "),
        ("address", [0.0, 0.0, None], "1 of 3 ranks did not come within 3 s: rank 2; came: ranks 0-1; "),
    ],
)
def test_those_that_never_came_are_named(how: str, starts_s: list[float | None], who: str, tmp_path: Path) -> None:
    """One line, the same on all that came; the first of them prints it."""
    place = place_to_meet(how, tmp_path)
    found = meet_in_threads(starts_s, 3.0, *place)
    assert {str(error) for error in found.values()} == {
        who + "see what they printed, or give ranks that start further apart more time, --set launch.init_timeout_s=SECONDS"
    }
    assert [isinstance(found[rank], RankError) for rank in sorted(found)] == [True, False]
    if how == "file":
        # What is left of a meeting must not be taken for the next one.
        again = meet_in_threads([0.0] * len(starts_s), 30.0, *place)
        assert all(isinstance(store, dist.Store) for store in again.values()), again


def test_a_place_where_others_have_met(tmp_path: Path) -> None:
    place = place_to_meet("file", tmp_path)
    # A run that crashes leaves the file; one that ends closes its stores, and the last takes the file away.
    met = meet_in_threads([0.0, 0.0], 30.0, *place)
    assert all(isinstance(store, dist.Store) for store in met.values())
    for rank, error in meet_in_threads([0.0, 0.0], 30.0, *place).items():
        assert str(error).startswith(f"rank {rank} of 2: another run has come here before; give a new file")


@pytest.mark.parametrize("rank, world_size, job", [(2, 3, "7"), (1, 2, "8")], ids=["larger", "another job"])
def test_a_rank_of_another_run(rank: int, world_size: int, job: str, tmp_path: Path) -> None:
    """It has no part in the roll-call, though its number is free there; those of the run meet all the same."""
    init_method, _ = place_to_meet("file", tmp_path)
    file = Path(urlparse(init_method).path)
    srun = next(launcher for launcher in LAUNCHERS if launcher.name == "srun")

    def come(rank: int, world_size: int, job: str) -> dist.Store:
        return meet(Place(rank, world_size, 0, 1, srun), init_method, 30.0, {"SLURM_JOB_ID": job, "SLURM_STEP_ID": "0"})

    with ThreadPoolExecutor() as pool:
        first = pool.submit(come, 0, 2, "7")
        while not file.exists() or b"came/0" not in file.read_bytes():
            time.sleep(0.01)
        with pytest.raises(RankError, match=f"^rank {rank} of {world_size}: another run has come here before"):
            come(rank, world_size, job)
        assert isinstance(come(1, 2, "7"), dist.Store)
        assert isinstance(first.result(), dist.Store)


def test_a_port_that_cannot_be_served() -> None:
    init_method, env = place_to_meet("address", Path())
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", int(env["MASTER_PORT"])))
        taken.listen()
        found = meet_in_threads([0.0, None], 2.0, init_method, env)
    where = f"127.0.0.1:{env['MASTER_PORT']}"
    assert str(found[0]).startswith(f"rank 0 cannot serve the store in which the ranks meet at {where}; choose another")
    assert "\n" not in str(found[0])
    error = meet_in_threads([0.0, None], 2.0, init_method, env | {"MASTER_PORT": "abc"})[0]
    assert str(error) == "MASTER_PORT is 'abc'; give a number up to 65535"


def test_a_folder_that_is_not_there() -> None:
    error = meet_in_threads([None, 0.0], 30.0, "file:///nowhere/meeting", {})[1]
    assert str(error).startswith(
        "launch.init_method file:///nowhere/meeting: there is no folder /nowhere on this machine; make it"
    )


def test_nobody_serves_the_store() -> None:
    """Where rank 0 would have, the others cannot know who came; each says what it looked for."""
    error = meet_in_threads([None, 0.0], 0.5, *place_to_meet("address", Path()))[1]
    assert isinstance(error, RankError)
    assert str(error).startswith("rank 1 of 2 lost, or did not find within 0.5 s, the store in which the ranks meet; rank 0 or")
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
    """The rank that came prints the line, though it is not the first of the run."""
    (tmp_path / "text.txt").write_text("router expert slot bank owner\n" * 600, encoding="utf-8")
    values = [*tiny_values(tmp_path), "launch.init_timeout_s=0.5"]
    (ended,) = wait_for(start_ranks(2, set_options(values), tmp_path, starts_s=[None, 0.0]))
    assert ended.status == 2
    assert ended.stderr.startswith("moesaic: 1 of 2 ranks did not come within 0.5 s: rank 0; came: rank 1; see what")
    assert ended.stderr.count("\n") == 1

"""Rank and sizes of a process from the variables of each launcher."""

import pytest

from moesaic.launch.launcher import first_host, is_local_leader, is_rank_zero, read_rank_info

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_TASKS_PER_NODE": "2(x4)"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_NODEID": "1"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, (0, 1, 0, 1, None)),
        (OPEN_MPI, (3, 8, 1, 2, "Open MPI's mpirun")),
        (HYDRA, (3, 8, 1, 2, "Hydra's mpiexec")),
        (SLURM | STEP, (3, 8, 1, 2, "srun")),
        (SLURM | STEP | {"SLURM_TASKS_PER_NODE": "2,6"}, (3, 8, 1, 6, "srun")),
        (SLURM | STEP | {"SLURM_TASKS_PER_NODE": "odd"}, (3, 8, 1, 8, "srun")),
        (SLURM, (0, 1, 0, 1, None)),
        (TORCHRUN | OPEN_MPI | SLURM | STEP, (5, 6, 2, 3, "torchrun")),
        (OPEN_MPI | SLURM | STEP, (3, 8, 1, 2, "Open MPI's mpirun")),
        (SLURM | STEP | {"PMI_RANK": "3", "PMI_SIZE": "8"}, (3, 8, 1, 2, "srun")),
        (HYDRA | SLURM | STEP | {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, (3, 8, 1, 2, "Hydra's mpiexec")),
    ],
    ids=[
        "alone",
        "open mpi",
        "hydra",
        "srun",
        "uneven",
        "unread",
        "batch script",
        "torchrun first",
        "mpirun in a job",
        "srun with pmi2",
        "hydra in a step",
    ],
)
def test_rank_info(env: dict[str, str], expected: tuple[int, int, int, int, str | None]) -> None:
    info = read_rank_info(env)
    name = info.launcher.name if info.launcher else None
    assert (info.rank, info.world_size, info.local_rank, info.local_world_size, name) == expected


@pytest.mark.parametrize(
    "env, message",
    [
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "8"}, "OMPI_COMM_WORLD_RANK 8 does not fit OMPI_COMM_WORLD_SIZE 8"),
        (SLURM | STEP | {"SLURM_PROCID": "x"}, "SLURM_PROCID is 'x', expected a whole number"),
        (HYDRA | {"MPI_LOCALRANKID": "2"}, "MPI_LOCALRANKID 2 of MPI_LOCALNRANKS 2 does not fit PMI_SIZE 8"),
        ({"RANK": "1"}, "only one of RANK and WORLD_SIZE"),
    ],
)
def test_wrong_variables(env: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_rank_info(env)


def test_which_rank_prints() -> None:
    """Rank 0 for the run, each machine's first rank for the machine, whatever started them; and a rank with wrong variables."""
    assert is_rank_zero({})
    assert not is_rank_zero(OPEN_MPI)
    assert is_rank_zero(OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0"})
    assert not is_local_leader(SLURM | STEP)
    assert is_local_leader(SLURM | STEP | {"SLURM_LOCALID": "0"})
    assert is_local_leader({})
    for wrong in ({"RANK": "2"}, OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "8"}, HYDRA | {"MPI_LOCALRANKID": "2"}):
        assert is_local_leader(wrong)


@pytest.mark.parametrize(
    "nodelist, host",
    [
        ("login", "login"),
        ("a1,a2", "a1"),
        ("gpu[03-05,9],login", "gpu03"),
        ("gpu[7,9]", "gpu7"),
        ("a1,gpu[7,9]", "a1"),
        ("n[1-4]-ib", "n1-ib"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host

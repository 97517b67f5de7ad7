"""Rank, world size, local rank and local world size of a process, from the environment variables of its launcher.

The variables of torchrun come first, then those of MPI launchers, then Slurm's; without any the world size is 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launcher:
    """A launcher, by the environment variables that it sets."""

    name: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str
    is_mpi: bool = False
    """Whether its processes form one MPI job."""
    only_with: str = ""
    """A variable that must be set too for the others to count."""


TORCHRUN = Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# MPICH, Intel MPI and MVAPICH.
HYDRA = Launcher("Hydra's mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", is_mpi=True)
LAUNCHERS = (
    TORCHRUN,
    Launcher(
        "Open MPI's mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        is_mpi=True,
    ),
    HYDRA,
    # Slurm sets the rank in a batch script too, but only srun starts one process per rank, in a numbered step.
    Launcher("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_TASKS_PER_NODE", only_with="SLURM_STEP_ID"),
)


@dataclass(frozen=True)
class RankInfo:
    """The rank of one process, and the size of the run."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    """Ranks of this run on this machine."""
    launcher: Launcher | None
    """What started the ranks; None for a single process."""


def read_rank_info(env: Mapping[str, str]) -> RankInfo:
    """Read rank and sizes from `env`. Raises `ValueError` for variables that contradict each other."""
    launcher = launcher_of(env)
    if launcher is None:
        return RankInfo(0, 1, 0, 1, None)
    rank, world_size = _integer(env, launcher.rank, 0), _integer(env, launcher.world_size, 1)
    if not 0 <= rank < world_size:
        raise ValueError(
            f"{launcher.rank} {rank} does not fit {launcher.world_size} {world_size}: ranks are 0 to {launcher.world_size} - 1"
        )
    local_rank = _integer(env, launcher.local_rank, rank)
    local_world_size = _local_world_size(env, launcher, world_size)
    if not 0 <= local_rank < local_world_size <= world_size:
        raise ValueError(
            f"{launcher.local_rank} {local_rank} of {launcher.local_world_size} {local_world_size} does not fit "
            f"{launcher.world_size} {world_size}"
        )
    return RankInfo(rank, world_size, local_rank, local_world_size, launcher)


def launcher_of(env: Mapping[str, str]) -> Launcher | None:
    """The first launcher whose rank and world size `env` holds; None without any."""
    if ("RANK" in env) != ("WORLD_SIZE" in env):
        raise ValueError("only one of RANK and WORLD_SIZE is set: start with torchrun, or set both or neither")
    for launcher in LAUNCHERS:
        needed = (launcher.rank, launcher.world_size, *([launcher.only_with] if launcher.only_with else []))
        if all(name in env for name in needed) and not (launcher is HYDRA and _is_by_srun(env)):
            return launcher
    return None


def _is_by_srun(env: Mapping[str, str]) -> bool:
    """Whether srun itself set PMI's variables (`--mpi=pmi2`), which then lack the local rank: they equal Slurm's own. Where Hydra
    starts its processes inside a step, the two differ."""
    pairs = (("PMI_RANK", "SLURM_PROCID"), ("PMI_SIZE", "SLURM_NTASKS"))
    return "SLURM_STEP_ID" in env and all(env.get(pmi) == env.get(slurm) for pmi, slurm in pairs)


def is_local_leader(env: Mapping[str, str]) -> bool:
    """Whether this process is the first of its machine; True where `env` does not say or contradicts itself."""
    try:
        launcher = read_rank_info(env).launcher
    except ValueError:
        return True
    return launcher is None or (env.get(launcher.local_rank) or "0") == "0"


def is_rank_zero(env: Mapping[str, str]) -> bool:
    """Whether this process is rank 0. Raises `ValueError` for variables that contradict each other."""
    return read_rank_info(env).rank == 0


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list.

    Example: `gpu[03-05,9]-ib,login` gives gpu03-ib.
    """
    prefix, bracket, rest = nodelist.partition("[")
    if not bracket or "," in prefix:
        return nodelist.partition(",")[0]
    numbers, _, suffix = rest.partition("]")
    return prefix + numbers.partition(",")[0].partition("-")[0] + suffix.partition(",")[0]


def _local_world_size(env: Mapping[str, str], launcher: Launcher, world_size: int) -> int:
    if launcher.name != "srun":
        return _integer(env, launcher.local_world_size, world_size)
    # Slurm lists tasks by node, as in "4(x2),3".
    counts: list[int] = []
    for part in env.get(launcher.local_world_size, "").replace("(", " ").replace(")", "").split(","):
        count, _, times = part.partition(" x")
        if not count.strip().isdigit() or (times and not times.isdigit()):
            return world_size
        counts += [int(count)] * (int(times) if times else 1)
    node = _integer(env, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else world_size


def _integer(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise ValueError(f"the environment variable {name} is {text!r}, expected a whole number") from None

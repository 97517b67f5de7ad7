"""Processes that each get a fixed share of a core, whatever else runs: slower machines, emulated on one.

A control group limits the CPU time of its processes (cpu.max of cgroup version 2, cpu.cfs_quota_us of version 1). As long as all
shares together fit the machine, a rank with twice the work takes twice the time, however few cores there are. Linux only;
requires the right to make control groups.
"""

from __future__ import annotations

import os
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
# Bounds for the quota and the period: runs of at least a millisecond, in periods as short as that allows.
_SHORTEST_RUN_US = 1000
_SHORTEST_PERIOD_US = 5000


class CpuShares:
    """One control group per rank, each with the same share of a core; a context manager that removes them.

    Args:
        num_ranks: number of groups.
        cores: share of a core for each, above 0; 0.25 emulates a core a quarter as fast.

    Raises:
        OSError: this machine does not allow control groups.
    """

    def __init__(self, num_ranks: int, cores: float):
        self._folders: list[Path] = []
        base, is_v2 = _base()
        period_us = max(_SHORTEST_PERIOD_US, round(_SHORTEST_RUN_US / cores))
        quota_us = round(period_us * cores)
        try:
            for rank in range(num_ranks):
                folder = base / f"moesaic-{os.getpid()}-{rank}"
                folder.mkdir()
                self._folders.append(folder)
                if is_v2:
                    (folder / "cpu.max").write_text(f"{quota_us} {period_us}")
                else:
                    (folder / "cpu.cfs_period_us").write_text(str(period_us))
                    (folder / "cpu.cfs_quota_us").write_text(str(quota_us))
        except BaseException:
            self.close()
            raise

    def folder(self, rank: int) -> Path:
        """The control group of a rank, for `enter`."""
        return self._folders[rank]

    def close(self) -> None:
        """Remove the groups. Their processes must have ended."""
        for folder in self._folders:
            folder.rmdir()
        self._folders = []

    def __enter__(self) -> CpuShares:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def enter(folder: Path) -> None:
    """Move the calling process, with all its threads, into a control group, permanently."""
    (folder / "cgroup.procs").write_text(str(os.getpid()))


def _base() -> tuple[Path, bool]:
    """The folder in which control groups with a CPU limit can be made, and whether that is cgroup version 2."""
    if (_ROOT / "cpu" / "cpu.cfs_quota_us").exists() or (_ROOT / "cpu" / "cgroup.procs").exists():
        return _ROOT / "cpu", False
    control = _ROOT / "cgroup.subtree_control"
    if not control.exists():
        raise FileNotFoundError(f"no control groups in {_ROOT}")
    if "cpu" not in control.read_text(encoding="ascii").split():
        control.write_text("+cpu")
    return _ROOT, True

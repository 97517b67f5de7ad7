"""The house rules that a machine can check: who imports whom, what folders list, what an import costs, what is public."""

import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import moesaic
from tests.helpers.house import FOLDERS, MAY_IMPORT, ROOT, SOURCES, entries_of, entry_graph, imports_of, listed_in


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_go_one_way(path: Path) -> None:
    folder = relative(path).partition("/")[0]
    assert {relative(file).partition("/")[0] for file in imports_of(path)} <= MAY_IMPORT[folder] | {folder}


@pytest.mark.parametrize("folder", FOLDERS, ids=relative)
def test_files_of_a_folder_import_in_no_circle(folder: Path) -> None:
    """A sub-folder counts as one; what is imported inside functions, or for type checkers only, counts too."""
    TopologicalSorter(entry_graph(folder)).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("folder", FOLDERS, ids=relative)
def test_a_folder_lists_what_it_holds(folder: Path) -> None:
    """With each module's own first sentence; `python -m tests.helpers.house` writes it."""
    assert listed_in(folder) == entries_of(folder)


def test_import_costs_nothing() -> None:
    """No device is touched, no compiler loaded, no file written."""
    script = """
import builtins, os, sys
written = []
plain_open = builtins.open
def watched(file, mode="r", *args, **kwargs):
    if set(mode) & set("wax+") and file != os.devnull:  # which dill opens, where torch finds it
        written.append(str(file))
    return plain_open(file, mode, *args, **kwargs)
builtins.open = watched
import moesaic.placement, moesaic.launch.cli, moesaic.launch.offline.place, moesaic.launch.offline.trace
assert "torch" not in sys.modules  # placing offline does not wait for it
import moesaic.launch, moesaic.kernels, moesaic.runtime
import torch
assert not written, written
assert not torch.cuda.is_initialized()
assert not torch.distributed.is_initialized()
for module in ("numba", "triton", "pulp", "highspy", "mpi4py", "transformers", "accelerate"):
    assert module not in sys.modules, module
"""
    done = subprocess.run([sys.executable, "-B", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names() -> None:
    """About a dozen names; a new one is a decision."""
    assert moesaic.__all__ == [
        "Adapter",
        "CollectiveError",
        "DebugConfig",
        "DriftError",
        "ExpertNames",
        "ExpertShape",
        "Handle",
        "MigrationConfig",
        "MoELayer",
        "Router",
        "RouterConfig",
        "Routing",
        "RuntimeConfig",
        "ShardedExperts",
        "WeightNaming",
        "register_adapter",
        "shard_experts",
    ]
    assert issubclass(moesaic.DriftError, RuntimeError) and issubclass(moesaic.CollectiveError, RuntimeError)
    assert all(getattr(moesaic, name) is getattr(moesaic.runtime, name) for name in moesaic.__all__)
    with pytest.raises(AttributeError, match="no attribute 'shard_expert'"):
        _ = moesaic.shard_expert

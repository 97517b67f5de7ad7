"""The house rules that a machine can check: who imports whom, what an import costs, what is public, what a wheel holds."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moesaic

ROOT = Path(moesaic.__file__).resolve().parent
# Folder: the folders of ours that it may import.
MAY_IMPORT = {
    "placement": set(),
    "kernels": set(),
    "collectives": {"placement", "kernels"},
    "runtime": {"collectives", "placement", "kernels"},
    "launch": {"runtime", "collectives", "placement", "kernels"},
    "benchmarks": {"runtime", "collectives", "placement", "kernels"},
}
SOURCES = sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))


def imported_folders(path: Path) -> set[str]:
    """The folders of ours that a file imports from, its own left out."""
    package = path.relative_to(ROOT).parts[:-1]
    folders = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "moesaic"]
        elif isinstance(node, ast.ImportFrom) and node.level:
            above = package[: len(package) - node.level + 1]
            module = node.module.split(".") if node.module else []
            names = [".".join(["moesaic", *above, *module, *([] if above or module else [alias.name])]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "moesaic":
            names = [node.module]
        folders |= {name.split(".")[1] for name in names if "." in name}
    return folders - {package[0]}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    assert imported_folders(path) <= MAY_IMPORT[folder]


def test_import_costs_nothing() -> None:
    """No device is touched, no compiler loaded, no file written."""
    script = """
import builtins, sys
written = []
plain_open = builtins.open
def watched(file, mode="r", *args, **kwargs):
    if set(mode) & set("wax+"):
        written.append(str(file))
    return plain_open(file, mode, *args, **kwargs)
builtins.open = watched
import moesaic.placement, moesaic.launch.cli, moesaic.launch.place, moesaic.launch.trace
assert "torch" not in sys.modules  # placing offline does not wait for it
import moesaic.launch, moesaic.kernels, moesaic.runtime
import torch
assert not written, written
assert not torch.cuda.is_initialized()
assert not torch.distributed.is_initialized()
for module in ("numba", "triton", "pulp", "highspy", "mpi4py", "transformers"):
    assert module not in sys.modules, module
"""
    done = subprocess.run([sys.executable, "-B", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_wheel_holds_every_source(tmp_path: Path) -> None:
    """And nothing else: an editable install finds every file, a wheel holds what setup.py names."""
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    package = tmp_path / "moesaic"
    built = {path.relative_to(package) for path in package.rglob("*") if path.is_file()}
    assert built == {path.relative_to(ROOT) for path in SOURCES} | {Path("__init__.py"), Path("py.typed")}


def test_public_names() -> None:
    """About ten names; a new one is a decision."""
    assert moesaic.__all__ == [
        "Adapter",
        "Handle",
        "MoELayer",
        "Router",
        "RouterConfig",
        "Routing",
        "RuntimeConfig",
        "register_adapter",
        "shard_experts",
    ]
    assert all(getattr(moesaic, name) is getattr(moesaic.runtime, name) for name in moesaic.__all__)
    with pytest.raises(AttributeError, match="no attribute 'shard_expert'"):
        _ = moesaic.shard_expert

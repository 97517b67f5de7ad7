"""The house rules that a machine can check: who imports whom, what an import costs, what is public, what README shows."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moesaic

ROOT = Path(moesaic.__file__).resolve().parent
# Folder: the folders of ours that it may import.
MAY_IMPORT = {
    "jit": set(),
    "placement": {"jit"},
    "kernels": {"jit"},
    "collectives": {"placement", "kernels", "jit"},
    "runtime": {"collectives", "placement", "kernels", "jit"},
    "launch": {"runtime", "collectives", "placement", "kernels", "jit"},
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
    return folders - {package[0], "__version__"}


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


def test_setup_packs_every_folder() -> None:
    """An editable install finds every file; a wheel holds only the packages that setup.py names."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    (folders,) = re.findall(r"^FOLDERS = (\[.*?\])", text, re.MULTILINE | re.DOTALL)
    assert set(ast.literal_eval(folders)) == {".".join(path.relative_to(ROOT).parts[:-1]) for path in SOURCES}


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
        "ShardedExperts",
        "register_adapter",
        "shard_experts",
    ]
    assert all(getattr(moesaic, name) is getattr(moesaic.runtime, name) for name in moesaic.__all__)
    with pytest.raises(AttributeError, match="no attribute 'shard_expert'"):
        _ = moesaic.shard_expert


def test_readme_shows_every_file() -> None:
    """The tree in the README names every source file once, in its folder, and no file that is not there."""
    tree = re.search(r"## The files\n\n```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert tree is not None
    folder, shown = "", []
    for name in re.findall(r"^ *([\w/]+/|\w+\.py)", tree[1], re.MULTILINE):
        if name.endswith("/"):
            folder = name
        else:
            shown.append(name if name == "setup.py" else folder + name)
    files = [path.relative_to(ROOT).as_posix() for path in SOURCES if path.name != "__init__.py"]
    assert sorted(shown) == sorted([*files, "setup.py"])

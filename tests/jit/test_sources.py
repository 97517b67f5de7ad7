"""Which files compiled code depends on, where it is kept, and the clock that stands still while it is compiled."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import moesaic
from moesaic.jit import clock, decorators, folders
from moesaic.jit.sources import PACKAGE, digest_of, sources_of
from moesaic.launch.launcher import LAUNCHERS, TORCHRUN

ROOT = Path(moesaic.__file__).resolve().parent
COMPILED = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix()
    for folder in ("placement", "kernels", "collectives")
    for path in (ROOT / folder).rglob("*.py")
    if "jit.decorators import" in path.read_text(encoding="utf-8")
)
# Imports each module anew, in packages that are empty but for it, and prints the files that this has brought.
IMPORTS = """
import importlib, json, sys, types

root, *names = sys.argv[1:]
folders = {"jit", *("/".join(name.split("/")[:depth]) for name in names for depth in range(name.count("/") + 1))}
brought = {}
for name in names:
    for module in [module for module in sys.modules if module.startswith("moesaic")]:
        del sys.modules[module]
    parts = name.split("/")
    for folder in folders:
        package = types.ModuleType(".".join(["moesaic", *folder.split("/")]).rstrip("."))
        package.__path__ = [f"{root}/{folder}"]
        sys.modules[package.__name__] = package
    importlib.import_module(".".join(["moesaic", *parts]))
    modules = [module for module in sys.modules.values() if module.__name__.startswith("moesaic")]
    brought[name] = [module.__file__ for module in modules if getattr(module, "__file__", None)]
print(json.dumps(brought))
"""


def test_the_sources_are_what_an_import_brings() -> None:
    assert {"placement/split_numba", "kernels/permute_cpu", "kernels/cpu/blas", "collectives/hops_numba"} <= set(COMPILED)
    command = [sys.executable, "-c", IMPORTS, str(PACKAGE), *COMPILED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    brought = {name: {Path(file) for file in files} for name, files in json.loads(done.stdout).items()}
    assert brought == {name: set(sources_of(PACKAGE / f"{name}.py")) for name in COMPILED}


def test_all_compiled_code_has_the_cache_that_cannot_be_stale() -> None:
    """Numba's own decorators are named in one file only."""
    for path in ROOT.glob("*/**/*.py"):
        if path.relative_to(ROOT).parts[0] in {"placement", "kernels", "collectives", "runtime", "launch", "benchmarks"}:
            for line in path.read_text(encoding="utf-8").splitlines():
                if line.startswith("from numba import"):
                    assert not {"njit", "jit", "cfunc"} & set(line.replace(",", " ").split()), (path, line)


def test_a_digest_needs_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package without them, as in a zip file, keeps nothing."""
    monkeypatch.setattr("moesaic.jit.sources.PACKAGE", tmp_path)
    assert digest_of(tmp_path / "missing.py") is None


def test_the_cpu_and_the_compiler_are_part_of_the_folders_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Machines with other CPUs may share a home directory."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    file = str(PACKAGE / "placement" / "split_numba.py")
    found = [decorators.folder_of.__wrapped__(file)]
    monkeypatch.setattr("llvmlite.binding.get_host_cpu_name", lambda: "another")
    found.append(decorators.folder_of.__wrapped__(file))
    monkeypatch.setattr("numba.__version__", "0.0")
    found.append(decorators.folder_of.__wrapped__(file))
    assert len(set(found)) == 3
    assert all(folder is not None and folder.name.startswith("placement.split_numba-") for folder in found)


def test_folders_that_nothing_uses_are_deleted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """After two months, of the same module; using one counts."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    source, other = PACKAGE / "placement" / "split_numba.py", PACKAGE / "placement" / "solvers" / "quota_numba.py"
    old, used, of_another = (
        folders.folder_for(path, digest * 20) for path, digest in ((source, "a"), (source, "b"), (other, "c"))
    )
    assert old is not None and used is not None and of_another is not None
    (old / "routine.nbi").touch()
    for folder in (old, used, of_another):
        os.utime(folder, (0, 0))
    assert folders.folder_for(source, "b" * 20) == used
    assert folders.folder_for(source, "d" * 20) is not None
    assert (old.exists(), used.exists(), of_another.exists()) == (False, True, True)


def test_a_folder_that_is_filled_may_be_read_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in an image that was made with `moesaic doctor --warm`; one that is empty may not."""
    image, spare = tmp_path / "image", tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(image))
    monkeypatch.setattr("tempfile.tempdir", str(spare))
    source = PACKAGE / "placement" / "split_numba.py"
    filled = folders.folder_for(source, "a" * 20)
    assert filled is not None
    (filled / "routine.nbi").touch()
    monkeypatch.setattr(folders, "_can_write", lambda folder: not folder.is_relative_to(image))
    assert folders.folder_for(source, "a" * 20) == filled
    assert folders.folder_for(source, "b" * 20) == spare / f"moesaic-{os.getuid()}" / f"placement.split_numba-{'b' * 20}"


def test_local_ranks_are_those_of_the_launchers() -> None:
    assert [launcher.local_rank for launcher in LAUNCHERS] + [TORCHRUN.rank] == list(decorators.LOCAL_RANKS)


def test_the_clock_stands_still_while_routines_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nested blocks count once, and those of threads beside each other; a body that fails counts too."""
    now_s = [100.0]
    monkeypatch.setattr(clock, "perf_counter", lambda: now_s[0])
    compiling = clock._CompileClock()
    monkeypatch.setattr(clock, "CLOCK", compiling)

    def work(seconds: float) -> None:
        now_s[0] += seconds

    assert clock.run_seconds() == 100.0
    work(1.0)

    def compile_in_vain() -> None:
        with compiling.running():
            work(2.0)
            with compiling.running():
                work(4.0)
            raise KeyError

    with pytest.raises(KeyError):
        compile_in_vain()
    assert (clock.compile_seconds(), clock.run_seconds()) == (6.0, 101.0)

    def compile_in_a_thread() -> None:
        with compiling.running():
            work(8.0)

    with compiling.running():
        thread = threading.Thread(target=compile_in_a_thread)
        thread.start()
        thread.join()
        work(16.0)
    assert (clock.compile_seconds(), clock.run_seconds()) == (30.0, 101.0)

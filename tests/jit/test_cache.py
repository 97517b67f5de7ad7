"""The cache of compiled routines, by small packages of real processes: what is stale, who compiles, and what goes wrong."""

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numba
import pytest

import moesaic
from moesaic.collectives.lifetime import end_with_parent
from tests.helpers.ranks import forking

LIMIT_S = 300
CALLER = """
from .callee import value
from .jit.decorators import njit

@njit(cache=True)
def twice(x):
    return 2 * value(x)
"""
CALLEE = """
from .jit.decorators import njit
from .settings import STEP

@njit(cache=True)
def value(x):
    return x + STEP
"""
ROUTINE = """
from .callee import value
from .jit.decorators import cfunc

@cfunc("int64(int64)", cache=True)
def routine(x):
    return 2 * value(x)
"""
# Prints the functions that this process begins to compile, waits for a line before each if it is told to, and prints what it got.
PROGRAM = """
import json, signal, sys
from numba.core import event

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job of a shell's background begins with Ctrl-C ignored

class Compiles(event.Listener):
    def on_start(self, started):
        print(started.data["dispatcher"].py_func.__name__, flush=True)
        if "wait" in sys.argv:
            sys.stdin.readline()

    def on_end(self, ended):
        pass

event.register("numba:compile", Compiles())
from tiny.jit import compile_seconds, lock
if "impatient" in sys.argv:
    lock.WAIT_S = 0.0
from tiny.caller import twice
try:
    print(json.dumps(twice(1)), flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.stdin.readline()
"""


class Program:
    """Python code in a process of its own, forked from one that has imported numba; with three text files to talk to it."""

    def __init__(self, code: str, args: Sequence[str], environment: Mapping[str, str]):
        pipes = [forking().Pipe(duplex=False) for _ in range(3)]
        (read_in, write_in), (read_out, write_out), (read_err, write_err) = pipes
        theirs = (read_in, write_out, write_err)
        self._process = forking().Process(target=_run, args=(code, list(args), dict(environment), theirs), daemon=True)
        self._process.start()
        for pipe in theirs:
            pipe.close()
        self.stdin = os.fdopen(os.dup(write_in.fileno()), "w")
        self.stdout, self.stderr = (os.fdopen(os.dup(pipe.fileno())) for pipe in (read_out, read_err))
        for pipe in (write_in, read_out, read_err):
            pipe.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, signum: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, signum)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, said: str = "") -> tuple[str, str]:
        """Write the last lines; return what is still to be read once the process has ended. All of that fits into pipes."""
        if not self.stdin.closed:
            self.stdin.write(said)
            self.stdin.close()
        self._process.join(LIMIT_S)
        assert self.returncode is not None, "the process does not end"
        return self.stdout.read(), self.stderr.read()


def _run(code: str, args: list[str], environment: dict[str, str], pipes: Sequence[Connection]) -> None:
    end_with_parent()
    for number, pipe in enumerate(pipes):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # what torch imports may have asked for it
    numba.config.reload_config()
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.argv = ["-c", *args]
    sys.path.insert(0, environment["PYTHONPATH"])
    exec(compile(code, "-c", "exec"), {"__name__": "__main__"})


@dataclass
class Tiny:
    """A package with the cache's own code, in which `twice` calls `value` of another file."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        package = self.folder / "tiny"
        root = Path(moesaic.__file__).resolve().parent
        shutil.copytree(root / "jit", package / "jit", ignore=shutil.ignore_patterns("__pycache__"))
        for name, text in (
            ("__init__", "from . import jit"),
            ("caller", CALLER),
            ("callee", CALLEE),
            ("settings", "STEP = 1\n"),
            ("routine", ROUTINE),
        ):
            (package / f"{name}.py").write_text(text)
        unset = {"NUMBA_CACHE_DIR", "LOCAL_RANK", "RANK"}
        self.environment = {name: value for name, value in os.environ.items() if name not in unset}
        self.environment |= {"PYTHONPATH": str(self.folder), "XDG_CACHE_HOME": str(self.cache.parent)}

    @property
    def cache(self) -> Path:
        return self.folder.parent / "cache" / "moesaic"

    def edit(self, module: str, old: str, new: str) -> None:
        path = self.folder / "tiny" / f"{module}.py"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    def start(self, *args: str, program: str = PROGRAM, **environment: str) -> Program:
        return Program(program, args, self.environment | environment)

    def run(self, *args: str, program: str = PROGRAM, **environment: str) -> tuple[int, list[str], str]:
        """What `twice(1)` is, the functions that were compiled for it, and what was said about that."""
        return result_of(self.start(*args, program=program, **environment))


def result_of(process: Program) -> tuple[int, list[str], str]:
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    *compiled, result = stdout.splitlines()
    return json.loads(result), compiled, stderr


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return Tiny(tmp_path / "one")


@pytest.fixture
def compiling(tiny: Tiny) -> Iterator[Program]:
    """A process that has begun to compile `twice`, and waits in the middle."""
    process = tiny.start("wait")
    assert process.stdout.readline() == "twice\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    "module, old, new",
    [("callee", "x + STEP", "x * 100 + STEP"), ("settings", "STEP = 1", "STEP = 100")],
    ids=["code", "constant"],
)
def test_a_changed_callee_is_never_stale(tiny: Tiny, module: str, old: str, new: str) -> None:
    """The caller's file stays as it is, and so does numba's own idea of whether its machine code is fresh."""
    assert tiny.run()[:2] == (4, ["twice", "value"])
    assert tiny.run()[:2] == (4, [])
    tiny.edit(module, old, new)
    assert tiny.run()[:2] == (202, ["twice", "value"])
    assert tiny.run()[:2] == (202, [])
    # What does not depend on the change stays; and back again, what was compiled before is still there.
    tiny.edit(module, new, old)
    assert tiny.run()[:2] == (4, [])
    tiny.edit("caller", "2 *", "3 *")
    assert tiny.run()[:2] == (6, ["twice"])


def test_a_c_function_is_never_stale(tiny: Tiny) -> None:
    program = PROGRAM.replace("tiny.caller import twice", "tiny.routine import routine").replace("twice(1)", "routine.ctypes(1)")
    assert tiny.run(program=program)[:2] == (4, ["value"])
    assert tiny.run(program=program)[:2] == (4, [])
    tiny.edit("settings", "STEP = 1", "STEP = 100")
    assert tiny.run(program=program)[:2] == (202, ["value"])


def test_other_locators_of_numba_are_not_asked(tiny: Tiny) -> None:
    """Those of NUMBA_CACHE_LOCATOR_CLASSES look at a function's own file only."""
    chosen = {"NUMBA_CACHE_LOCATOR_CLASSES": "InTreeCacheLocator"}
    assert tiny.run(**chosen)[0] == 4
    tiny.edit("settings", "STEP = 1", "STEP = 100")
    assert tiny.run(**chosen)[0] == 202


def test_versions_share_a_cache(tmp_path: Path) -> None:
    """Two checkouts in turn: each has its own machine code, and compiles it once. One like the first has the first's."""
    one, other, third = (Tiny(tmp_path / name) for name in ("one", "other", "third"))
    other.edit("settings", "STEP = 1", "STEP = 2")
    assert [tiny.run()[0] for tiny in (one, other, one, other)] == [4, 6, 4, 6]
    assert [tiny.run()[1] for tiny in (one, other, third)] == [[], [], []]


def test_a_source_that_changes_under_a_process_spoils_nothing(tiny: Tiny) -> None:
    """It has imported a constant as it was, and compiles code with it after: that is kept under no digest."""
    program = "import sys, tiny.settings; print('settings', flush=True); sys.stdin.readline()\n" + PROGRAM
    process = tiny.start(program=program)
    assert process.stdout.readline() == "settings\n"
    tiny.edit("settings", "STEP = 1", "STEP = 100")
    process.stdin.write("go on\n")
    process.stdin.flush()
    value, compiled, said = result_of(process)
    assert (value, compiled) == (4, ["twice", "value"])
    assert "sources changed after their import" in said
    assert tiny.run()[:2] == (202, ["twice", "value"])


def test_one_process_compiles_for_all(tiny: Tiny, compiling: Program) -> None:
    """Others begin while the first compiles, and load what that has made. Local rank 0 says what takes so long, in one line."""
    second = tiny.start(LOCAL_RANK="1")
    third = tiny.start(LOCAL_RANK="0")
    line = third.stderr.readline()  # it has found nothing in the cache
    assert line.startswith("moesaic: compiling routines")
    assert str(tiny.cache) in line
    assert "moesaic doctor --warm" in line
    compiling.stdin.write("go on\ngo on\n")
    compiling.stdin.flush()
    assert result_of(compiling)[:2] == (4, ["value"])
    assert result_of(second) == (4, [], "")
    assert result_of(third) == (4, [], "")


def test_the_next_one_compiles_when_the_first_dies(tiny: Tiny, compiling: Program) -> None:
    second = tiny.start()
    assert second.stderr.readline().startswith("moesaic: compiling routines")
    compiling.kill()
    assert result_of(second)[:2] == (4, ["twice", "value"])


def test_ctrl_c_while_compiling_leaves_no_lock(tiny: Tiny, compiling: Program) -> None:
    """The process goes on, as a notebook does, and holds nobody up."""
    compiling.send_signal(signal.SIGINT)
    assert compiling.stdout.readline() == "interrupted\n"
    assert tiny.run()[:2] == (4, ["twice", "value"])
    assert compiling.returncode is None


def test_ctrl_c_while_waiting_ends_the_wait(tiny: Tiny, compiling: Program) -> None:
    second = tiny.start()
    second.stderr.readline()
    second.send_signal(signal.SIGINT)
    stdout, _ = second.communicate("go on\n")
    assert stdout == "interrupted\n"


def test_nobody_waits_for_ever(tiny: Tiny, compiling: Program) -> None:
    """One that was stopped while it compiled keeps its lock; the others compile for themselves after a while."""
    compiling.send_signal(signal.SIGSTOP)
    assert tiny.run("impatient")[:2] == (4, ["twice", "value"])


def test_a_place_is_found_without_a_home(tiny: Tiny, tmp_path: Path) -> None:
    """Where neither the cache's own folder nor home can be written: beside the temporary files, for this user alone."""
    nowhere = {"XDG_CACHE_HOME": "/dev/null/cache", "HOME": "/dev/null/home"}
    spare = tmp_path / "spare"
    spare.mkdir()
    assert tiny.run(**nowhere, TMPDIR=str(spare))[:2] == (4, ["twice", "value"])
    own = spare / f"moesaic-{os.getuid()}"
    assert own.stat().st_mode & 0o777 == 0o700
    assert tiny.run(**nowhere, TMPDIR=str(spare))[:2] == (4, [])
    # Others could have put code there.
    own.chmod(0o777)
    value, compiled, said = tiny.run(**nowhere, TMPDIR=str(spare))
    assert (value, compiled) == (4, ["twice", "value"])
    assert "nothing keeps them" in said


def test_a_relative_cache_home_counts_as_unset(tiny: Tiny, tmp_path: Path) -> None:
    home = tmp_path / "home"
    tiny.run(XDG_CACHE_HOME="cache", HOME=str(home))
    assert (home / ".cache" / "moesaic").is_dir()


def test_numbas_variable_chooses_the_place(tiny: Tiny, tmp_path: Path) -> None:
    chosen = tmp_path / "chosen"
    tiny.run(NUMBA_CACHE_DIR=str(chosen))
    assert sorted(path.name.partition("-")[0] for path in (chosen / "moesaic").iterdir()) == ["callee", "caller"]
    assert not tiny.cache.exists()


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_a_file_that_was_cut_short_is_made_anew(tiny: Tiny, suffix: str) -> None:
    tiny.run()
    for path in tiny.cache.rglob(f"*{suffix}"):
        path.write_bytes(path.read_bytes()[:-20])
    assert tiny.run()[:2] == (4, ["twice", "value"])
    assert tiny.run()[:2] == (4, [])


def test_a_cache_that_cannot_be_written_stops_no_run(tiny: Tiny) -> None:
    """Here each index is a folder, which no file can replace."""
    tiny.run()
    for path in tiny.cache.rglob("*.nbi"):
        path.unlink()
        path.mkdir()
    value, compiled, said = tiny.run()
    assert (value, compiled) == (4, ["twice", "value"])
    assert f"moesaic: cannot keep compiled routines in {tiny.cache}" in said

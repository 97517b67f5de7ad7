"""README and the pages of docs/ as tests see them: blocks of code, what the page says about them, commands in running text."""

import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import moesaic
from moesaic.collectives.lifetime import end_with_parent
from tests.helpers.ranks import LIMIT_S, forking

ROOT = Path(moesaic.__file__).resolve().parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
PROGRAMS = ("moesaic", "torchrun", "mpirun", "srun", "sbatch", "python", "make", "sh", "pip")
_MARK = re.compile(r"<!-- test: (.*) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block. Above it, `<!-- test: HOW -->` says how a test treats it."""

    page: str
    line: int
    """Of its first line of code."""
    language: str
    how: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def reason_not_to_run(self) -> str:
        """Why this machine cannot run it; empty for a block that runs."""
        return self.how.removeprefix("not run: ") if self.how.startswith("not run: ") else ""

    def commands(self) -> list[list[str]]:
        """The words of every command, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> Iterator[Block]:
    how, fence, start, language = "", "", 0, ""
    lines = read(page).splitlines()
    for number, line in enumerate(lines, 1):
        if fence:
            if line.strip() == fence:
                yield Block(page, start, language, how, "\n".join(lines[start - 1 : number - 1]) + "\n")
                how, fence = "", ""
        elif line.startswith("```"):
            fence, language, start = "```", line[3:].strip(), number + 1
        elif mark := _MARK.fullmatch(line):
            how = mark[1]


def prose(page: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.DOTALL | re.MULTILINE)


def spans(page: str) -> list[str]:
    """The code in running text."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def commands_in_text(page: str) -> list[list[str]]:
    """Commands that running text names, with their options if they have any."""
    found = [span for span in spans(page) if span.split()[0] in PROGRAMS and len(span.split()) > 1]
    return [shlex.split(span) for span in found]


class Program:
    """`torchrun ARGUMENTS` or `python SCRIPT`, in a folder. It is forked from a process that has imported torch already.

    Args:
        words: the command.
        folder: where its output is kept.
        name: of the files of its output.
        cwd: where it runs; by default in `folder`.
    """

    def __init__(self, words: Sequence[str], folder: Path, name: str, cwd: Path | None = None):
        self._stdout, self._stderr = (folder / f"{name}.{kind}" for kind in ("out", "err"))
        paths = (self._stdout, self._stderr)
        self._process = forking().Process(target=_run_program, args=(list(words), cwd or folder, paths), daemon=False)
        self._process.start()

    def output(self) -> str:
        """What it printed, once it has ended well."""
        try:
            self._process.join(LIMIT_S)
        finally:
            self._process.kill()
        errors = self._stderr.read_text(encoding="utf-8")
        assert self._process.exitcode == 0, errors
        return self._stdout.read_text(encoding="utf-8")


def _run_program(words: list[str], folder: Path, paths: Sequence[Path]) -> None:
    end_with_parent()
    for path, number in zip(paths, (1, 2), strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(folder)
    sys.argv = words[1:] if words[0] == "python" else words
    if words[0] == "torchrun":
        runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[1], run_name="__main__")

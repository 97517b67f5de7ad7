"""What README and docs/ say is so: printed pages are current, names exist, every error is listed, the site builds."""

import ast
import importlib.util
import re
import subprocess
import sys
import typing
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import pytest
from torch import nn

from docs.tools.pages import PAGES as PRINTED
from docs.tools.pages import values_of
from moesaic import DebugConfig, Handle, MigrationConfig, RouterConfig, RuntimeConfig
from moesaic.launch.config import CountOrZero, Seed, _sections
from moesaic.runtime.wrap.model_weights import ModelWeights
from moesaic.runtime.wrap.telemetry import Telemetry
from tests.helpers.pages import PAGES, ROOT, commands_in_text, prose, read, spans

FOLDERS_OF_USERS = ("runtime", "launch", "collectives", "integrations")
GAP = "…"


@pytest.mark.parametrize("page", PRINTED)
def test_printed_pages_are_current(page: str) -> None:
    assert read(f"docs/{page}") == PRINTED[page](), f"run `make docs`: docs/{page} is not what the code says"


def test_values_in_words() -> None:
    assert values_of(CountOrZero) == "whole number, 0 or more"
    assert values_of(Seed) == "whole number, 0 or more, less than 2^64"
    assert values_of(typing.Literal["a"] | bool) == '`"a"` or `true` `false`'
    assert values_of(Sequence[str]) == "list of texts"


def test_readme_is_short() -> None:
    text = read("README.md")
    assert text.count("\n") <= 130
    assert len(text.encode()) <= 10_000
    assert text.index("## Status") < text.index("## Install")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """As GitHub shows the pages; those of the site are checked where it is built."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if "://" not in target:
            file = (ROOT / page).parent / path if path else ROOT / page
            assert file.is_file(), f"{page}: {target}"
            assert not anchor or anchor in anchors(file), f"{page}: {target}"


def anchors(file: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if page.removeprefix("docs/") not in PRINTED])
def test_names_exist(page: str) -> None:
    """Options in code, arguments of the configuration classes, and members of the handle."""
    sections = {name: {field.name for field in fields(kind)} for name, kind in _sections().items()}
    for section, key in re.findall(r"`([\w.]+)\.(\w+)(?:=[^`]*)?`", prose(page)):
        is_of_module = section == "model" and hasattr(nn.Module, key)
        assert section not in sections or is_of_module or key in sections[section], f"{page}: {section}.{key}"
    for kind in (RuntimeConfig, MigrationConfig, DebugConfig, RouterConfig):
        for key in re.findall(rf"{kind.__name__}\((\w+)=", read(page)):
            assert key in {field.name for field in fields(kind)}, f"{page}: {kind.__name__}({key})"
    for name in re.findall(r"\bhandle\.(\w+)", read(page)):
        assert hasattr(Handle, name), f"{page}: handle.{name}"
    parts = {"weights": ModelWeights, "telemetry": Telemetry}
    for part, name in re.findall(rf"\bhandle\.({'|'.join(parts)})\.(\w+)", read(page)):
        assert hasattr(parts[part], name), f"{page}: handle.{part}.{name}"


def test_refusals_of_torch_are_named() -> None:
    """What tests/runtime/test_torch_surface.py holds to be refused is under "Refused" in docs/composability.md."""
    refused = " ".join(re.findall(r"^\*\*Refused:\*\*.*?\n\n", read("docs/composability.md"), re.DOTALL | re.MULTILINE))
    of_modules = ("copy.deepcopy", "pickle", "AveragedModel", "model.half()", "expert.double()")
    of_hooks = ("register_hook", "register_forward_hook", "call of one")
    of_optimizers = ("built before `shard_experts`", "state with `full_state_dict=True`", "parameter groups of one rank")
    assert not [name for name in (*of_modules, *of_hooks, *of_optimizers) if name not in refused]


def test_no_page_is_left_out() -> None:
    """README leads to every page, mkdocs.yml has every page in its menu."""
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f"]({page}" in read("README.md"), page
        assert Path(page).name.lower() in menu, page


def templates(folder: str) -> Iterator[tuple[str, str]]:
    """Where, and the text of every string in a folder, with a gap for each value that is filled in."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = template_of(node)
            if text:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", text  # type: ignore[attr-defined]


def template_of(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
    return ""


def errors(folder: str) -> Iterator[tuple[str, str]]:
    """Where, and the message of every error of a user's that a folder raises, but for messages made elsewhere."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) != "OSError":
                for text in filter(says_something, map(template_of, node.exc.args)):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def says_something(text: str) -> bool:
    return len(re.findall(r"[A-Za-z]", text)) >= 4


def listed() -> list[str]:
    """The messages of the tables in troubleshooting.md."""
    rows = re.findall(r"^\| `([^`]+)` \|", read("docs/troubleshooting.md"), re.MULTILINE)
    assert len(rows) == len(set(rows))
    return rows


def is_of(row: str, text: str) -> bool:
    """Whether a listed message is that of a string of the code; one without a word must be the whole of it."""
    if not says_something(row):
        return row == text
    at = 0
    for part in row.split(GAP):
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


@pytest.mark.parametrize("folder", FOLDERS_OF_USERS)
def test_every_error_is_listed(folder: str) -> None:
    missing = [f"{where}: {text}" for where, text in errors(folder) if not any(is_of(row, text) for row in listed())]
    assert not missing, "write them into docs/troubleshooting.md:\n" + "\n".join(missing)


def test_listed_errors_exist() -> None:
    texts = [text for folder in (*FOLDERS_OF_USERS, "placement") for _, text in templates(folder)]
    gone = [row for row in listed() if not any(is_of(row, text) for text in texts)]
    assert not gone, "docs/troubleshooting.md lists what no code says any more:\n" + "\n".join(gone)


def test_the_checks_see_what_they_check() -> None:
    assert len(listed()) > 100
    assert sum(1 for folder in FOLDERS_OF_USERS for _ in errors(folder)) > 100
    assert not is_of("rank … is lost", "rank … is gone")
    assert not is_of("…: …", "rank …: gone")
    assert "make docs" in spans("README.md")
    assert ["make", "docs"] in commands_in_text("README.md")


def test_the_site_builds(tmp_path: Path) -> None:
    """Without a warning, of which mkdocs counts those that it prints: no broken link, no page outside the menu."""
    assert importlib.util.find_spec("material") is not None, "mkdocs-material is not installed: pip install 'moesaic[docs]'"
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    home = (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert 'href="training/"' in home
    assert 'href="contributing/"' in home
    assert "https://fonts" not in home

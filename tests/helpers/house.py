"""The package as files and folders: which file imports which, and the listing that every folder's docstring ends with.

python -m tests.helpers.house    writes the listings anew, in the order of imports
"""

import ast
import re
import sys
import textwrap
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

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
    "integrations": {"runtime"},
    "benchmarks": {"runtime", "collectives", "placement", "kernels"},
}
SOURCES = sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))
FOLDERS = sorted({path.parent for path in SOURCES})

_ENTRY = re.compile(r"(\w+\.py|\w+/) +(.*)")


def imports_of(path: Path) -> set[Path]:
    """The files of the package that a file's import statements name, also those inside functions and for type checkers only."""
    package = path.relative_to(ROOT).parts[:-1]
    files: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
            files |= {_file_of(*parts) for first, *parts in modules if first == "moesaic"}
        elif isinstance(node, ast.ImportFrom):
            names = node.module.split(".") if node.module else []
            if node.level:
                names = ["moesaic", *package[: len(package) - node.level + 1], *names]
            if names[0] == "moesaic":
                # The version is the package's own, no folder's.
                named = [alias.name for alias in node.names if (*names, alias.name) != ("moesaic", "__version__")]
                files |= {_file_of(*names[1:], name) for name in named}
    return files - {path}


def _file_of(*names: str) -> Path:
    """The file of a dotted name: a module, a package, or the module or package that the last name is looked up in."""
    path = ROOT.joinpath(*names)
    modules = (path.with_name(f"{path.name}.py"), path / "__init__.py")
    return next(
        file
        for file in (*modules, path.parent.with_name(f"{path.parent.name}.py"), path.parent / "__init__.py")
        if file.is_file()
    )


def entry_graph(folder: Path) -> dict[str, set[str]]:
    """Which entries of a folder (files, and sub-folders as one) import which others: entry -> those that it imports."""
    graph: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        entry = path.relative_to(folder).parts[0]
        targets = {file.relative_to(folder).parts[0] for file in imports_of(path) if folder in file.parents}
        graph.setdefault(entry, set()).update(targets - {entry})
    return graph


def first_sentence(path: Path) -> str:
    """The first sentence of a file's docstring."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())
    sentence = re.match(r".*?[.?](?= |$)", text)
    return sentence[0] if sentence else text


def entries_of(folder: Path) -> dict[str, str]:
    """What a folder holds, as its docstring must list it: every module, and every sub-folder, with its first sentence."""
    modules = {path.name: first_sentence(path) for path in folder.glob("*.py") if path.name != "__init__.py"}
    return modules | {f"{path.name}/": first_sentence(path / "__init__.py") for path in FOLDERS if path.parent == folder}


def listed_in(folder: Path) -> dict[str, str]:
    """What a folder's docstring lists, by entry."""
    listed: dict[str, str] = {}
    for line in (ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or "").splitlines():
        if found := _ENTRY.fullmatch(line):
            name, listed[found[1]] = found[1], found[2]
        elif listed and line.startswith(" "):
            listed[name] += " " + line.strip()
    return listed


def write_listing(folder: Path) -> None:
    """Put the listing in place of the one that a folder's docstring ends with, if any; what is imported stands first."""
    path, entries = folder / "__init__.py", entries_of(folder)
    text = path.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text), clean=False)
    assert docstring is not None, f"{path} has no docstring"
    kept = next((i for i, line in enumerate(docstring.splitlines()) if _ENTRY.fullmatch(line)), None)
    head = "\n".join(docstring.splitlines()[:kept]).rstrip()
    names = [name if name.endswith(".py") else f"{name}/" for name in _in_order(entry_graph(folder))]
    width = max(map(len, entries)) + 2
    lines = (
        line
        for name in names
        if name in entries
        for line in textwrap.wrap(entries[name], 130, initial_indent=name.ljust(width), subsequent_indent=" " * width)
    )
    path.write_text(text.replace(f'"""{docstring}"""', f'"""{head}\n\n' + "\n".join(lines) + '\n"""', 1), encoding="utf-8")


def _in_order(graph: dict[str, set[str]]) -> list[str]:
    """The entries, each after those that it imports; by name where there is no such order."""
    try:
        return list(TopologicalSorter({entry: sorted(graph[entry]) for entry in sorted(graph)}).static_order())
    except CycleError:
        return sorted(graph)


def main() -> None:
    """Write the listings of the folders named, of all by default, that are not as they should be."""
    for folder in [ROOT / name for name in sys.argv[1:]] or FOLDERS:
        if listed_in(folder) != entries_of(folder):
            write_listing(folder)


if __name__ == "__main__":
    main()

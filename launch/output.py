"""What the offline commands print: rows of flat objects, as a table or as JSON with where they come from."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import click
from tqdm import tqdm

from ..placement.files import clear_errors, replace_text, writable

JSON_OPTION = click.option(
    "--json",
    "json_path",
    metavar="FILE",
    help="Also write the rows as JSON; - for standard output alone.",
    callback=lambda context, option, path: writable(path),
)


def publish(name: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], json_path: str | None) -> None:
    """Print `columns` of the rows as a table, and write whole rows as JSON to `json_path`.

    With `-` standard output gets the JSON and nothing else. A file is replaced only when it is complete.
    """
    document = {
        "schema": f"moesaic.{name}/1",
        "command": " ".join(["moesaic", *sys.argv[1:]]),
        "machine": {"system": platform.platform(), "python": platform.python_version()},
        "commit": f"moesaic {version('moesaic')}",
        "rows": list(rows),
    }
    text = json.dumps(document, indent=1)
    if json_path == "-":
        click.echo(text)
        return
    click.echo(table(rows, columns))
    if json_path is not None:
        with clear_errors():
            replace_text(json_path, text + "\n")


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Right-aligned text columns."""
    cells = [list(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if 0 < abs(value) < 0.1 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value)


@contextmanager
def progress(total: int, unit: str) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal's standard error; yields what to call after each of `total` units."""
    with tqdm(total=total, unit=unit, disable=None, leave=False, dynamic_ncols=True) as bar:

        def advance() -> None:
            bar.update()

        yield advance

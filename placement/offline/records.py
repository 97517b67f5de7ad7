"""Records, as commands print them: a text table, or JSON with the command, machine and commit that made them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..files import clear_errors, replace_text


def publish(
    schema: str,
    records: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    json_path: str | None,
    *,
    machine: Mapping[str, Any],
    commit: str,
) -> None:
    """Print `columns` of the records as a table, and write whole records as JSON to `json_path`.

    `-` stands for standard output, to which then only the JSON is written. A file is replaced only when it is complete.
    """
    command = " ".join(["moesaic", *sys.argv[1:]])
    document = {"schema": schema, "command": command, "machine": dict(machine), "commit": commit, "rows": list(records)}
    text = json.dumps(document, indent=1)
    if json_path == "-":
        print(text)
        return
    print(table(records, columns))
    if json_path is not None:
        with clear_errors():
            replace_text(json_path, text + "\n")


def table(records: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Right-aligned text columns."""
    cells = [list(columns), *([_cell(record.get(column)) for column in columns] for record in records)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if 0 < abs(value) < 0.1 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value)

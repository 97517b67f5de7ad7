"""The table of families in huggingface.md, from a run of `moesaic doctor --families --json families.json`.

`python -m docs.tools.families families.json` in the repository's root writes it into the page.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "huggingface.md"
_MARKS = ("<!-- families: printed by docs/tools/families.py -->", "<!-- /families -->")


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """A line for each family: its folder in transformers, the class of its experts, its state."""
    states = [(row["family"], row["block"], row["state"] + (f": {row['reason']}" if row["reason"] else "")) for row in rows]
    lines = [f"| {family} | {f'`{block}`' if block else ''} | {state.replace('|', '')} |" for family, block, state in states]
    passed = sum(row["state"] == "pass" for row in rows)
    head = [f"{passed} of {len(rows)} families pass:", "", "| family | experts | state |", "|---|---|---|"]
    return "\n".join([*head, *lines])


def with_table(text: str, rows: Sequence[Mapping[str, str]]) -> str:
    """The page with this table between its marks."""
    first, last = map(re.escape, _MARKS)
    return re.sub(f"({first}\n).*(?={last})", lambda found: f"{found[1]}\n{table(rows)}\n\n", text, flags=re.DOTALL)


if __name__ == "__main__":
    records = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), records["rows"]), encoding="utf-8")

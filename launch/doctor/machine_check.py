"""Comparison of this machine with a machine file, for `moesaic doctor --machine`."""

from __future__ import annotations

import tempfile
from subprocess import DEVNULL

from ...placement.machine import read_machine
from ..calibrate import start_ranks

# Rates that the ranks of one node have.
_COMPARED = ("device_bytes_per_s", "latency_s", "flops_per_s", "half_rate_rows", "copy_bytes_per_s")
_TOLERANCE = 0.2
_SECONDS = 5.0


def compare_machine(path: str) -> list[tuple[str, str, bool]]:
    """Name, values and whether they agree: versions, device and, measured on as many ranks as a node of the file has, rates.

    Raises:
        ValueError: the file is wrong, or this machine cannot be measured.
    """
    expected = read_machine(path)
    if expected.ranks_per_node == 1 and expected.device != "cpu":
        raise ValueError(
            f"{path} is of one rank a node, which has no links to compare with; run `moesaic calibrate` on two nodes"
        )
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/machine.toml"
        device = "cpu" if expected.device == "cpu" else "auto"
        arguments = ["--out", out, "--seconds", str(_SECONDS), "--device", device]
        if start_ranks(max(2, expected.ranks_per_node), arguments, stdout=DEVNULL):
            raise ValueError(f"this machine cannot be measured as {path} was: the line above says why")
        found = read_machine(out)
    of_file, of_this = ({**m.versions, "device": m.device} for m in (expected, found))
    if expected.num_nodes == 1:
        of_file, of_this = of_file | {"transport": expected.transport}, of_this | {"transport": found.transport}
    lines = [("ranks", f"{expected.num_nodes} x {expected.ranks_per_node} (nodes x ranks per node)", True)]
    for name, text in of_file.items():
        other = of_this.get(name, "nothing")
        lines.append((name, text if text == other else f"{text} in the file, {other} here", text == other))
    for name in _COMPARED:
        if name in expected.rates and name in found.rates:
            there, here = expected.rates[name], found.rates[name]
            agrees = abs(here - there) <= _TOLERANCE * there
            lines.append((name, f"{there:.4g} in the file, {here:.4g} here ({here / (there or 1.0) - 1:+.0%})", agrees))
    return lines

"""A comparison as one HTML page: bars of the balance, and a heat map by layer."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence

from ...placement.files import replace_text
from ...placement.offline.simulate import Outcome
from .page import page, section

_BAR_WIDTH, _ROW_HEIGHT, _LABEL_WIDTH, _CELL_WIDTH = 420, 18, 240, 16
_COLORS = {"predicted": "#c2571a", "exact": "#2b7a3d", "future": "#3465a4"}


def write_picture(path: str | os.PathLike[str], panels: Mapping[str, Sequence[Outcome]]) -> None:
    """Write the page atomically; `panels` maps a title, of one trace and machine, to its outcomes."""
    intro = "<p>1 is perfect balance; the tick is the lower bound.</p>"
    body = [section(title, _bars(outcomes) + _heat_map(outcomes)) for title, outcomes in panels.items()]
    replace_text(path, page("place compare: busiest rank over the mean rank", [intro, *body]))


def _label(outcome: Outcome) -> str:
    return f"{outcome.solver}, {outcome.split} split, {outcome.slots} slots, {outcome.knows}"


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return f'<svg width="{width:.0f}" height="{height:.0f}" role="img">{"".join(parts)}</svg>'


def _bars(outcomes: Sequence[Outcome]) -> str:
    """One bar per outcome: the mean over cells, a thin line to the 95th percentile, a tick at the bound."""
    longest = max(max(outcome.max_over_mean_p95, outcome.bound) for outcome in outcomes)
    unit = _BAR_WIDTH / max(longest, 1.0)
    parts = []
    for row, outcome in enumerate(outcomes):
        top, middle = row * _ROW_HEIGHT + 2, row * _ROW_HEIGHT + _ROW_HEIGHT / 2
        mean, high, bound = (
            _LABEL_WIDTH + unit * value for value in (outcome.max_over_mean, outcome.max_over_mean_p95, outcome.bound)
        )
        color = _COLORS.get(outcome.knows, "#777")
        parts += [
            _text(_LABEL_WIDTH - 8, middle + 4, _label(outcome), "end"),
            f'<rect x="{_LABEL_WIDTH}" y="{top}" width="{mean - _LABEL_WIDTH:.1f}" height="{_ROW_HEIGHT - 4}" fill="{color}"/>',
            f'<line x1="{mean:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}" stroke="{color}"/>',
            f'<line x1="{bound:.1f}" x2="{bound:.1f}" y1="{top}" y2="{top + _ROW_HEIGHT - 4}" stroke="#000"/>',
            _text(max(mean, high) + 6, middle + 4, f"{outcome.max_over_mean:.3f}"),
        ]
    return _svg(_LABEL_WIDTH + _BAR_WIDTH + 80, len(outcomes) * _ROW_HEIGHT + 8, parts)


def _heat_map(outcomes: Sequence[Outcome]) -> str:
    """Outcomes by layers: white is perfect balance, dark red the worst cell of the panel."""
    worst = max(max(outcome.max_over_mean_of_layer) for outcome in outcomes)
    num_layers = len(outcomes[0].max_over_mean_of_layer)
    parts = [_text(_LABEL_WIDTH, 12, f"by layer, 0 to {num_layers - 1}: white 1.000, dark {worst:.3f}")]
    for row, outcome in enumerate(outcomes):
        top = 20 + row * _ROW_HEIGHT
        parts.append(_text(_LABEL_WIDTH - 8, top + 13, _label(outcome), "end"))
        for layer, value in enumerate(outcome.max_over_mean_of_layer):
            heat = (value - 1) / (worst - 1) if worst > 1 else 0.0
            red, other = 255 - int(100 * heat), 255 - int(235 * heat)
            parts.append(
                f'<rect x="{_LABEL_WIDTH + layer * _CELL_WIDTH}" y="{top}" width="{_CELL_WIDTH}" height="{_ROW_HEIGHT}" '
                f'fill="rgb({red},{other},{other})"><title>layer {layer}: {value:.3f}</title></rect>'
            )
    return _svg(_LABEL_WIDTH + num_layers * _CELL_WIDTH + 20, 28 + len(outcomes) * _ROW_HEIGHT, parts)

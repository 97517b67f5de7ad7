"""One self-contained HTML page of sections. No script, no network."""

from __future__ import annotations

import html
from collections.abc import Iterable

_STYLE = (
    "body{font:14px sans-serif;margin:2em;color:#222}text{font:12px sans-serif;fill:#222}h2{margin-top:2em}"
    "svg{display:block;max-width:100%;height:auto}pre{font-size:12px}"
)


def page(title: str, body: Iterable[str]) -> str:
    """The page, whose `body` is HTML."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>moesaic {html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{''.join(body)}</html>\n"
    )


def section(title: str, content: str) -> str:
    """HTML under a heading."""
    return f"<h2>{html.escape(title)}</h2>{content}"

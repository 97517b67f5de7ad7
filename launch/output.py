"""Output of commands: flat records as a table or as JSON, and a progress bar."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import click
from tqdm import tqdm

from ..placement.files import writable
from ..placement.offline import records as printed

JSON_OPTION = click.option(
    "--json",
    "json_path",
    metavar="FILE",
    help="Also write the records as JSON; - for standard output alone.",
    callback=lambda context, option, path: writable(path),
)


def publish(name: str, records: Sequence[Mapping[str, Any]], columns: Sequence[str], json_path: str | None) -> None:
    """Print and write records by `placement.offline.records.publish`, with the system and the version."""
    machine = {"system": platform.platform(), "python": platform.python_version()}
    commit = f"moesaic {version('moesaic')}"
    printed.publish(f"moesaic.{name}/1", records, columns, json_path, machine=machine, commit=commit)


@contextmanager
def progress(total: int, unit: str) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error, if that is a terminal; yields the function to call after each of `total` units."""
    with tqdm(total=total, unit=unit, disable=None, leave=False, dynamic_ncols=True) as bar:

        def advance() -> None:
            bar.update()

        yield advance


def with_options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A decorator that adds click options, or what other such decorators add, to a command, in this order."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate

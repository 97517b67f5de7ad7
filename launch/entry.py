"""The outermost layer of every command: wrong use becomes one line and exit status 2, never a traceback."""

import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from .launcher import is_local_leader, is_rank_zero

USAGE_STATUS = 2
INTERRUPTED_STATUS = 130

# A rank that does not print waits this long before it ends: torchrun ends all ranks, the printing one too, once one has ended.
_SILENT_S = 2.0


class RunError(ValueError):
    """Wrong input that every rank of the run raises; rank 0 prints it."""


class RankError(ValueError):
    """An error printed by the rank that raises it: the other ranks do not have it, or raise it as a `RunError`."""


def run_command(command: click.Command, args: Sequence[str] | None = None, name: str = "moesaic") -> int:
    """Run a click command and return the process's exit status.

    The command returns its status; None counts as 0. A `ValueError` or wrong use of the command line gives status 2 and one line,
    printed by the first rank of each machine, since the error may exist on one machine only. Any other exception is a bug and
    keeps its traceback (status 1).
    """
    # torch 2.13 deprecates the only names that torch 2.11 has; a user cannot do anything about them.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use", category=FutureWarning)
    try:
        status = command.main(args=args, prog_name=name, standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        if not _asks_for_help(error):
            return _report(error, error.format_message(), name)
        if is_local_leader(os.environ):
            error.show()
        return USAGE_STATUS
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED_STATUS
    except ValueError as error:
        return _report(error, str(error), name)
    return status if isinstance(status, int) else 0


@contextmanager
def warnings_as_lines(kind: type[Warning], name: str = "moesaic") -> Iterator[None]:
    """Print warnings of this kind in the body as lines on standard error, on rank 0 only, whatever the filters."""
    show_others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, kind):
            show_others(message, category, *where, **more)
        elif is_rank_zero(os.environ):
            print(f"{name}: {message}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", kind)
        warnings.showwarning = show
        yield


def _asks_for_help(error: click.ClickException) -> bool:
    """Whether a group was called without a command; click 8.2 and later then raise an error that shows the group's help."""
    return type(error).__name__ == "NoArgsIsHelpError"


def _report(error: Exception, message: str, name: str) -> int:
    """Print the message in one line, on the rank that prints this kind of error; return the exit status."""
    if isinstance(error, RunError):
        prints = is_rank_zero(os.environ)
    else:
        prints = isinstance(error, RankError) or is_local_leader(os.environ)
    if prints:
        print(f"{name}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    else:
        time.sleep(_SILENT_S)
    return USAGE_STATUS

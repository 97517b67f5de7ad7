"""What every command shares at its outermost edge: wrong use becomes one line and exit status 2, never a traceback."""

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

from .launcher import is_local_leader, is_rank_zero

USAGE_STATUS = 2
INTERRUPTED_STATUS = 130

# How long a rank stays that leaves the line to another: torchrun ends all of its ranks, that one too, as soon as one has ended.
_SILENT_S = 2.0


class RunError(ValueError):
    """Wrong input that every rank of the run has raised: rank 0 prints it for all."""


class RankError(ValueError):
    """A line that the rank which raises it prints itself: the others cannot, or raise it as a `RunError`."""


def run_command(command: click.Command, args: Sequence[str] | None = None, name: str = "moesaic") -> int:
    """Run a click command and return the process's exit status.

    The command returns its status (None is 0). A `ValueError` or a wrong use of the command line gives 2 and one line, which
    the first rank of each machine prints, as others may not see what is wrong on theirs; anything else is ours to fix and
    keeps its traceback (status 1).
    """
    # The names that torch 2.13 deprecates are the only ones torch 2.11 has; a user can do nothing about them.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use", category=FutureWarning)
    try:
        status = command.main(args=args, prog_name=name, standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        if not _asks_for_help(error):
            _report(error.format_message(), name)
        elif is_local_leader(os.environ):
            error.show()
        return USAGE_STATUS
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED_STATUS
    except RunError as error:
        _report(str(error), name, is_rank_zero)
        return USAGE_STATUS
    except RankError as error:
        _report(str(error), name, lambda env: True)
        return USAGE_STATUS
    except ValueError as error:
        _report(str(error), name)
        return USAGE_STATUS
    return status if isinstance(status, int) else 0


@contextmanager
def warnings_as_lines(kind: type[Warning], name: str = "moesaic") -> Iterator[None]:
    """Have rank 0 alone print a warning of this kind in the body, as one line on standard error, whatever the filters."""
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
    """Whether a group was called without a command, which click (from 8.2 on) answers with the group's help."""
    return type(error).__name__ == "NoArgsIsHelpError"


def _report(message: str, name: str, prints: Callable[[Mapping[str, str]], bool] = is_local_leader) -> None:
    if prints(os.environ):
        line = " ".join(message.split())
        print(f"{name}: {line}", file=sys.stderr, flush=True)
    else:
        time.sleep(_SILENT_S)

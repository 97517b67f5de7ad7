"""What the training program has beside the records of `Handle.record`: its folder, configuration and progress bar.

```
runs/NAME/config.toml       the resolved configuration
runs/NAME/checkpoints/      step-N folders
runs/NAME/profile-rank-N.json  a profile of the last steps, with run.profile_steps
```
"""

import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from ...placement import TraceMeta
from ...placement.files import replace_text
from ...runtime.wrap.recorder import Recorder
from ..config import Config, RunConfig
from .process import Process


@contextmanager
def _ignoring_closed_pipes() -> Iterator[None]:
    """Drop output to a closed pipe, as of `moesaic train | head`, instead of ending the run."""
    try:
        yield
    except BrokenPipeError:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except BrokenPipeError:
                    os.dup2(nowhere.fileno(), stream.fileno())


def show(text: str) -> None:
    """Print text about the run."""
    with _ignoring_closed_pipes():
        print(text, flush=True)


def create_run_folder(config: RunConfig) -> Path:
    """Make and return a new folder for this run: NAME, or the first free of NAME-2, NAME-3, ...; nothing is ever overwritten.

    Raises `ValueError` if the folder cannot be made.
    """
    parent = Path(config.folder).expanduser()
    number = 1
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            folder = parent / (config.name if number == 1 else f"{config.name}-{number}")
            number += 1
            with suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise ValueError(f"cannot make a run folder in {str(parent)!r} ({error.strerror}): set run.folder to another") from None


@dataclass(frozen=True)
class StepRecord:
    """A line of metrics.jsonl, which also holds the number of the step, and the handle's metrics of it.

    `migrations` lists what was decided about owners after the step, if anything was: the fields of `Decision`. A later line has
    `saved_s_observed` and `migration_step`: what experts that migrated after that step saved.
    """

    loss: float
    """Mean training cross-entropy of the global batch, nats per byte."""
    aux_loss: float
    """The router's losses, coefficients applied, mean over ranks."""
    grad_norm: float
    """Global gradient norm before clipping."""
    lr: float
    """Learning rate of the step."""
    seconds: float
    """Wall time of the step on rank 0, without evaluation, checkpoints and `compile_s`."""
    compile_s: float
    """Seconds that rank 0 spent compiling and loading routines since the previous record, or since the start."""
    tokens_per_s: float
    """Over all ranks."""
    bytes_sent: float
    """Bytes that all ranks sent for experts and routed tokens."""


class Records:
    """A recorder, and on rank 0 what the program shows beside: the resolved configuration, a progress bar, printed lines.

    A context manager. On other ranks nothing is written or shown.
    """

    def __init__(self, recorder: Recorder, config: Config, process: Process) -> None:
        self.recorder = recorder
        self._closing = ExitStack()
        self._bar: tqdm | None = None
        if not process.is_first:
            return
        replace_text(recorder.folder / "config.toml", config.to_toml())
        self._bar = self._closing.enter_context(
            tqdm(
                total=config.train.steps,
                initial=recorder.step,
                unit="step",
                disable=not config.launch.progress,
                # A terminal gets a smooth bar, a log file one line from time to time.
                mininterval=0.2 if sys.stderr.isatty() else 15.0,
                dynamic_ncols=True,
            )
        )

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *exc: object) -> None:
        with _ignoring_closed_pipes():
            self._closing.close()

    def add(self, record: StepRecord, metrics: Mapping[str, float], *, val_loss: float | None) -> None:
        """Add one step, of which the handle has `metrics`: its records, the bar, and a printed line per migration decision."""
        values = asdict(record) | ({} if val_loss is None else {"val_loss": val_loss})
        for decision in self.recorder.write(values):
            self.print_line(f"step {self.recorder.step}: {decision.reason}")
        if self._bar is not None:
            self._bar.set_postfix(self._postfix({**values, **metrics}), refresh=False)
            with _ignoring_closed_pipes():
                self._bar.update()

    def print_line(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            with _ignoring_closed_pipes():
                self._bar.write(text, file=sys.stdout)
                sys.stdout.flush()

    def _postfix(self, values: Mapping[str, float]) -> dict[str, str]:
        return {
            "loss": f"{values['loss']:.3f}",
            "val": f"{self.recorder.last_val_loss or math.nan:.3f}",
            "tok/s": f"{values['tokens_per_s']:,.0f}",
            "load": f"{values['max_over_mean']:.2f} (static {values['max_over_mean_static']:.2f})",
            "copies": f"{values['copies_per_layer']:.1f}",
        }


def trace_meta(config: Config, world_size: int) -> TraceMeta:
    """The metadata of the run's trace, which a plan for this run must match; its ranks are those of one replica."""
    model = config.model
    return TraceMeta(
        num_layers=model.num_layers,
        num_experts=model.num_experts,
        top_k=model.top_k,
        num_ranks=config.ranks_per_replica(world_size),
        dim=model.dim,
        ffn_dim=model.ffn_dim,
        source=f"moesaic train {config.run.name}",
    )

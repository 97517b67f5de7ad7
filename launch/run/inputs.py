"""The inputs of a run: text, progress of a checkpoint, placement plan, machine and replayed trace, the same on every rank."""

from dataclasses import dataclass
from pathlib import Path

from ...placement import SavedPlan, Trace, TraceMeta, read_plan
from ...placement.files import digest_of
from ...placement.machine import Machine, read_machine
from ...runtime.wrap.tensorboard import require_tensorboard
from ..config import Config
from .checkpoint import Progress, read_progress
from .data import Text, prepare_text
from .process import Process, agreed, check_same
from .records import trace_meta
from .replay import open_replay


@dataclass(frozen=True)
class RunInputs:
    """The inputs that the configuration names, the same on every rank; None for those that it does not name."""

    text: Text
    resume: Path | None
    """The checkpoint folder to resume from."""
    progress: Progress | None
    """The progress of that checkpoint."""
    plan: SavedPlan | None
    machine: Machine | None
    trace: Trace | None


def read_inputs(config: Config, process: Process) -> RunInputs:
    """Read every input on every rank. Collective. Raises the same `ValueError` on all ranks if one is wrong or differs."""
    check_same(process, {"the configuration": config.to_toml()})
    # One rank per machine joins the text; the other ranks then find it in the cache.
    agreed(process, lambda: prepare_text(config.data) if process.local_rank == 0 else None)
    inputs, contents = agreed(process, lambda: _read(config, process))
    check_same(process, contents)
    return inputs


def _read(config: Config, process: Process) -> tuple[RunInputs, dict[str, str]]:
    """This rank's inputs, and the content of each that may differ between machines."""
    if config.run.tensorboard and process.is_first:
        require_tensorboard()
    meta = trace_meta(config, process.world_size)
    text = prepare_text(config.data)
    contents = {"the text (data.path)": text.digest}
    resume = Path(config.checkpoint.resume).expanduser() if config.checkpoint.resume else None
    progress = read_progress(resume, config, text) if resume else None
    plan, machine, trace = None, None, None
    if config.placement.file:
        plan = _read_plan(config, meta)
        contents["the plan (placement.file)"] = plan.to_json()
    if config.placement.machine:
        machine = read_machine(Path(config.placement.machine).expanduser())
        contents["the machine (placement.machine)"] = machine.to_toml()
    if config.train.replay:
        num_tokens = config.train.batch_size * config.data.seq_len // process.world_size
        trace = open_replay(config.train.replay, meta, num_tokens=num_tokens, num_steps=config.train.steps)
        contents["the trace (train.replay)"] = digest_of(trace.path)
    return RunInputs(text, resume, progress, plan, machine, trace), contents


def _read_plan(config: Config, meta: TraceMeta) -> SavedPlan:
    """The plan of placement.file. Raises `ValueError` if it is for another model or world size, or for more slots."""
    plan = read_plan(Path(config.placement.file).expanduser())
    try:
        plan.check_model(meta, "this run")
    except ValueError as error:
        raise ValueError(f"placement.file {config.placement.file}: {error}") from None
    if config.runtime.slots != "auto" and plan.slots > config.runtime.slots:
        raise ValueError(
            f"placement.file {config.placement.file} uses {plan.slots} slots, runtime.slots is {config.runtime.slots}; "
            f"set runtime.slots={plan.slots}"
        )
    return plan

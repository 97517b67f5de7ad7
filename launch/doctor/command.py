"""`moesaic doctor`: installed packages, devices, transports that work, and the one that a run would use."""

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import click
import torch
import torch.distributed as dist

from ... import __version__
from ...collectives import choose_transport
from ...placement.files import clear_errors, replace_text
from ..output import JSON_OPTION, publish
from ..run.warm import warm_all
from . import families as family_check
from .machine_check import compare_machine
from .model_check import COLUMNS, Request, check_model
from .self_test import two_process_tests

PACKAGES = ("moesaic", "torch", "triton", "numpy", "numba", "pulp", "highspy", "mpi4py", "nvidia-nccl-cu12")


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    """package, device, transport or machine."""
    name: str
    status: str
    """A version, a description, or the reason for the failure."""
    works: bool


def installed_packages() -> list[Finding]:
    """Versions of moesaic and the packages that it uses; optional ones may be missing."""
    findings = [Finding("package", "python", platform.python_version(), True)]
    for name in PACKAGES:
        try:
            findings.append(Finding("package", name, __version__ if name == "moesaic" else version(name), True))
        except PackageNotFoundError:
            findings.append(Finding("package", name, "not installed", False))
    return findings


def devices() -> list[Finding]:
    """The CPU and every CUDA device that torch sees."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    findings = [
        Finding("device", "cpu", f"{cores} core(s), {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}", True)
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        status = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
        findings.append(Finding("device", f"cuda:{index}", status, True))
    return findings


def transports() -> list[Finding]:
    """The transports available to a run on this machine, each tested between two processes, NCCL on one device.

    The last finding is the choice of `runtime.transport = "auto"` for two or more ranks on this machine, and its reason.
    """
    results = two_process_tests()
    chosen = choose_transport([0, 0], on_cuda=torch.cuda.is_available())
    return [
        *(Finding("transport", test.name, test.status, test.works) for test in results),
        Finding("transport", "c10d nccl", *_probe_nccl()),
        Finding("transport", "auto", f"{chosen.name} on this machine: {chosen.reason}", True),
    ]


def _probe_nccl() -> tuple[str, bool]:
    if not dist.is_nccl_available():
        return "this torch is built without NCCL", False
    if not torch.cuda.is_available():
        return "torch sees no CUDA device", False
    try:
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
        ones = torch.ones(8, device="cuda")
        dist.all_reduce(ones)
        works = bool((ones == 1).all())
        dist.destroy_process_group()
    except RuntimeError as error:
        return str(error).splitlines()[0], False
    return "works" if works else "an all-reduce gave wrong numbers", works


@click.command("doctor")
@click.option(
    "--model", "target", metavar="TARGET", help="Check this model: file.py:function, package.module:callable, or a folder."
)
@click.option("--ranks", type=click.IntRange(min=1), default=2, show_default=True, help="Processes to check the model on.")
@click.option("--families", is_flag=True, help="Check every MoE family of the installed transformers on small random models.")
@click.option("--only", metavar="NAME,...", help="Check these families alone.")
@click.option("--tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens of random inputs.")
@click.option("--input", "input_path", type=click.Path(), help="Inputs written by torch.save, in place of random ones.")
@click.option("--tolerance", type=float, default=1e-5, show_default=True, help="Largest relative difference that passes.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--machine", metavar="FILE", help="Also compare this machine with the file that `moesaic calibrate` wrote.")
@click.option("--warm", is_flag=True, help="Compile the routines that runs would compile, and do nothing else.")
@JSON_OPTION
def command(
    target: str | None,
    ranks: int,
    families: bool,
    only: str | None,
    tokens: int,
    input_path: str | None,
    tolerance: float,
    device: str,
    machine: str | None,
    warm: bool,
    json_path: str | None,
) -> int:
    """Show what is installed, the devices, and which transports work on this machine.

    With --model, check instead that your model computes on several ranks what it computes on one: outputs, gradients, global
    norm, router losses and expert counts, without copies of experts, with copies, and after a migration. TARGET is a callable
    that returns the model, or (model, example inputs), or a folder with a Hugging Face config.json, whose model gets random
    weights. The check runs in fp32 and without dropout. Exit status 0 if every check passes, else 1.

    With --families, check instead every Mixture-of-Experts family of the installed transformers, on small models with random
    weights: logits, loss and every gradient on several ranks against the model unwrapped, to 1e-5. Exit status 1 if one differs.

    With --machine, measure also on as many ranks as a node of the file has, for some seconds, and show what differs by more than
    a fifth.
    """
    if only is not None and not families:
        raise ValueError("--only names families; give --families with it")
    if warm:
        if families or target is not None or json_path is not None or machine is not None:
            raise ValueError("--warm stands alone; leave out --model, --machine, --families and --json")
        click.echo(f"every routine is compiled; that took {warm_all():.1f} s")
        return 0
    if families:
        if target is not None or machine is not None:
            raise ValueError("--families stands alone; leave out --model and --machine")
        return _report_families([] if only is None else only.split(","), ranks, json_path)
    if target is not None:
        if machine is not None:
            raise ValueError("--model checks a model alone; leave out --machine")
        return _report_model(Request(target, ranks, tokens, input_path, tolerance, device), json_path)
    compared = compare_machine(machine) if machine is not None else []
    findings = [*installed_packages(), *devices(), *transports(), *(Finding("machine", *line) for line in compared)]
    report = {
        "schema": 1,
        "command": "doctor",
        "machine": {"system": platform.platform(), "python": sys.version.split()[0]},
        "rows": [asdict(finding) for finding in findings],
    }
    if json_path == "-":
        click.echo(json.dumps(report))
        return 0
    if json_path:
        with clear_errors():
            replace_text(json_path, json.dumps(report))
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        click.echo(f"{'ok' if finding.works else '--'}  {finding.what:9}  {finding.name:{width}}  {finding.status}")
    return 0


def _report_model(request: Request, json_path: str | None) -> int:
    comparisons = check_model(request)
    publish("doctor", [asdict(each) for each in comparisons], COLUMNS, json_path)
    failed = sum(each.result == "fail" for each in comparisons)
    if json_path != "-":
        verdict = f"{failed} of {len(comparisons)} checks failed" if failed else f"all {len(comparisons)} checks passed"
        click.echo(f"{verdict}: {request.target} on {request.ranks} ranks")
    return 1 if failed else 0


def _report_families(only: list[str], ranks: int, json_path: str | None) -> int:
    states = family_check.check_families(only, ranks)
    publish("doctor", [asdict(each) for each in states], family_check.COLUMNS, json_path)
    failed = sum(each.state == "fail" for each in states)
    if json_path != "-":
        passed = sum(each.state == "pass" for each in states)
        click.echo(f"{passed} of {len(states)} families pass on {ranks} ranks, {failed} fail")
    return 1 if failed else 0

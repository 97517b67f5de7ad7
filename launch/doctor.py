"""`moesaic doctor`: what is installed, what hardware is here, which transports work, and which one a run would take."""

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import click
import torch
import torch.distributed as dist

from ..collectives import choose_transport
from .self_test import two_process_tests

PACKAGES = ("moesaic", "torch", "triton", "numpy", "numba", "pulp", "highspy", "mpi4py", "nvidia-nccl-cu12")


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    """package, device or transport."""
    name: str
    status: str
    """A version, a description, or the reason why it does not work."""
    works: bool


def installed_packages() -> list[Finding]:
    """Versions of what moesaic stands on; optional packages may be missing."""
    findings = [Finding("package", "python", platform.python_version(), True)]
    for name in PACKAGES:
        try:
            findings.append(Finding("package", name, version(name), True))
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
    """The transports that a run on this machine could use, each tried between two processes, NCCL on one device.

    The last finding is the one that `runtime.transport = "auto"` takes for two or more ranks on this machine, and why.
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
@click.option("--json", "json_path", type=click.Path(), help="Also write the report as JSON; - for standard output alone.")
def command(json_path: str | None) -> int:
    """Show what is installed, the devices, and which transports work on this machine."""
    findings = [*installed_packages(), *devices(), *transports()]
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
        with open(json_path, "w", encoding="utf-8") as file:
            json.dump(report, file)
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        click.echo(f"{'ok' if finding.works else '--'}  {finding.what:9}  {finding.name:{width}}  {finding.status}")
    return 0

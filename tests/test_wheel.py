"""What a wheel of this checkout holds."""

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import moesaic

ROOT = Path(moesaic.__file__).resolve().parent


def test_a_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    """Every module, py.typed, the script of the benchmarks; no setup.py, tests, examples, docs. The version is the package's."""
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "runs")
    shutil.copytree(ROOT, source, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", wheels, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("moesaic/")}
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        said = Parser().parsestr(archive.read(metadata).decode())
    others = {"tests", "examples", "docs", "build", "runs"}
    files = [path.relative_to(ROOT) for path in ROOT.glob("*/**/*.py")]
    modules = {file.as_posix() for file in files if file.parts[0] not in others and file.parts[0][0] != "."}
    assert names == {f"moesaic/{name}" for name in modules | {"__init__.py", "optim.py", "py.typed", "benchmarks/gpu_kernels.sh"}}
    assert said["Version"] == moesaic.__version__
    assert said["Keywords"] and "Programming Language :: Python :: 3.13" in said.get_all("Classifier", [])

"""What README prints runs as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import moesaic

ROOT = Path(moesaic.__file__).resolve().parent


def test_the_example_learns(tmp_path: Path) -> None:
    """The wrap-a-model example, on two processes, as the text says to start it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code, *others = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for other in others:
        compile(other, "README.md", "exec")
    assert code.count("\n") <= 25
    script = tmp_path / "example.py"
    script.write_text(code, encoding="utf-8")
    torchrun = Path(sys.executable).with_name("torchrun")
    done = subprocess.run(
        [torchrun, "--standalone", "--nproc-per-node", "2", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    losses = [
        float(loss) for loss in re.findall(r"^\d+ loss ([\d.]+) busiest rank [\d.]+ of the mean$", done.stdout, re.MULTILINE)
    ]
    assert len(losses) == 5
    assert losses[-1] < 0.1 * losses[0]

"""What README prints runs as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import moesaic

ROOT = Path(moesaic.__file__).resolve().parent


def test_the_example_learns(tmp_path: Path) -> None:
    """The wrap-a-model example, on two processes, as the text says to start it; examples/ has the same.

    It is started from the checkout's root, whose folder `kernels` must not stand in for Hugging Face's package of that name.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code, *others = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for other in others:
        compile(other, "README.md", "exec")
    assert code.count("\n") <= 25
    script = ROOT / "examples" / "wrap_a_model.py"
    assert script.read_text(encoding="utf-8") == code
    (tmp_path / "kernels.py").touch()
    at_exit = "import atexit, importlib.util as u; atexit.register(lambda: print('kernels', u.find_spec('kernels').origin))"
    (tmp_path / "sitecustomize.py").write_text(at_exit)
    torchrun = Path(sys.executable).with_name("torchrun")
    path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [torchrun, "--standalone", "--nproc-per-node", "2", "examples/wrap_a_model.py"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)},
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^kernels (.+)$", done.stdout, re.MULTILINE).count(str(tmp_path / "kernels.py")) >= 2
    losses = [
        float(loss) for loss in re.findall(r"^\d+ loss ([\d.]+) busiest rank [\d.]+ of the mean$", done.stdout, re.MULTILINE)
    ]
    assert len(losses) == 5
    assert losses[-1] < 0.1 * losses[0]

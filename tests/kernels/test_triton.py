from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

CASES = Path(__file__).with_name("triton_cases.py")


def test_triton_kernels_agree_with_their_twins() -> None:
    """All of triton_cases.py: compiled where there is a GPU, else through the interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(CASES)]
    result = subprocess.run(command, env=environment, cwd=CASES.parents[2], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr

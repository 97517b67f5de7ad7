#!/bin/sh
# All GPU checks of the kernels in one call: every Triton kernel compiled and compared with its torch twin, offsets past
# 2**31 elements, the tile sweep of the grouped products, and the rows of `moesaic bench kernels`.
# Usage, from the repository root on a machine with a GPU and torch:  sh benchmarks/gpu_kernels.sh [OUTPUT_FOLDER] [PYTHON]
set -eu
output=${1:-benchmarks/results}
python=${2:-python3}
mkdir -p "$output"
# The repository root is the package, so that a link of that name is all the installation it needs.
path=$(mktemp -d)
trap 'rm -rf "$path"' EXIT
ln -s "$PWD" "$path/moesaic"
export PYTHONPATH="$path:$PWD" TRITON_INTERPRET=0 PYTHONDONTWRITEBYTECODE=1

"$python" -c "import torch, triton; print(torch.cuda.get_device_name(), 'torch', torch.__version__, 'triton', triton.__version__)"
"$python" -m pytest -p no:cacheprovider --import-mode=importlib -q tests/kernels/triton_cases.py
"$python" -m moesaic.benchmarks.kernels --device cuda --json "$output/kernels_gpu.json"
"$python" -m moesaic.benchmarks.kernels --device cuda --sweep --json "$output/kernel_tiles_gpu.json"

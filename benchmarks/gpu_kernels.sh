#!/bin/sh
# All GPU checks of the kernels in one call of less than ten minutes: every Triton kernel compiled and compared with its torch
# twin, tensors past 2**31 elements, the whole layer without a host synchronisation, the records of `moesaic bench kernels` with
# their targets, and the tile sweep of the grouped products. The other parts still run if one fails or exceeds its time limit.
# Usage, from the repository root on a machine with a GPU and torch:  sh benchmarks/gpu_kernels.sh [OUTPUT_FOLDER] [PYTHON]
# Leaves kernels_gpu.json, kernel_tiles_gpu.json (records, machine, versions, commit) and a log of each part. Exit status 1: a part
# failed. A target that is missed is not a failure: the last lines of kernels_gpu.log name it.
set -u
output=${1:-benchmarks/results}
python=${2:-python3}
mkdir -p "$output" || exit 1
# The repository root is the package, so that a link of that name is all the installation it needs.
path=$(mktemp -d) || exit 1
trap 'rm -rf "$path"' EXIT
ln -s "$PWD" "$path/moesaic"
export PYTHONPATH="$path:$PWD" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 TRITON_INTERPRET=0

# part NAME SECONDS COMMAND...: run the command with its output in NAME.log, and show the end of that.
part() {
    name=$1 limit=$2 start=$(date +%s) status=0
    shift 2
    timeout "$limit" "$@" >"$output/$name.log" 2>&1 || status=$?
    tail -n "${lines:-3}" "$output/$name.log"
    echo "== $name: exit status $status after $(($(date +%s) - start)) s of at most $limit"
    [ "$status" -eq 0 ] || echo "$name" >>"$path/failed"
}

# tests NAME SELECTION: a share of the kernel tests. Most of their time is compilation, on one core each.
tests() {
    part "tests_$1" 240 "$python" -m pytest -p no:cacheprovider --import-mode=importlib -q tests/kernels/triton_cases.py -k "$2"
}

"$python" -c "import torch, triton; print(torch.cuda.get_device_name(), 'torch', torch.__version__, 'triton', triton.__version__)" ||
    exit 1
products="test_grouped_gemm and not (transposed or _tma)"
tests products_fp32 "$products and float32" &
tests products_half "$products and not float32" &
tests tiles "test_tiles_of_one_rule or _tma or test_a_tile" &
tests gate test_topk_gate &
tests rows "test_permute or test_swiglu" &
tests others "not (test_tiles_of_one_rule or _tma or test_a_tile or test_topk_gate or test_permute or test_swiglu or ($products))" &
wait
lines=90 part kernels_gpu 240 "$python" -m moesaic.benchmarks.kernels --device cuda --json "$output/kernels_gpu.json"
lines=3 part kernel_tiles_gpu 100 "$python" -m moesaic.benchmarks.kernels --device cuda --sweep --json "$output/kernel_tiles_gpu.json"
[ ! -e "$path/failed" ] || { echo "failed: $(tr '\n' ' ' <"$path/failed")" && exit 1; }

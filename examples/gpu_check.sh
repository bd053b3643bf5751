#!/usr/bin/env bash
# What only a GPU can show, in about ten minutes on an H100: the CUDA tests, then speed and memory of MAR-H
# with random weights, then mar_tiny's images end to end. Everything is left in the folder named (default: output/gpu).
# What fails does not keep the rest from being measured; the exit code tells.
#
#     PYTHON=.venv/bin/python examples/gpu_check.sh [FOLDER]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-output/gpu}
python=${PYTHON:-python3}
failed=0
mkdir -p "$out"
exec > >(tee "$out/log.txt") 2>&1

try() {
    echo "+ $*"
    "$@" || { failed=1; echo "FAILED: $*"; }
}

try nvidia-smi
try "$python" -m pytest -q tests/test_cuda.py
huge=(benchmark.py --device cuda --models mar_huge)
try "$python" "${huge[@]}" --batch_sizes 1 128 --repeats 2 --output "$out/huge.json"
try "$python" "${huge[@]}" --batch_sizes 256 --repeats 1 --method lazymar --output "$out/batch_256.json"
try "$python" benchmark.py --device cuda --models mar_base mar_large --output "$out/smaller.json"
for lazy in "" --lazy_mar; do
    try "$python" eval.py --model mar_tiny --device cuda --num_images 2000 --eval_bsz 500 $lazy \
        --output_dir "$out/mar_tiny$lazy" --overwrite
done
try "$python" compare.py "$out/mar_tiny" "$out/mar_tiny--lazy_mar"
exit "$failed"

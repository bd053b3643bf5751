#!/usr/bin/env bash
# What only a GPU can show, in about ten minutes on an H100: the CUDA tests, then speed, memory and a profile of MAR-H
# with random weights, then mar_tiny's images end to end. Everything is left in the folder named (default: output/gpu).
#
#     PYTHON=.venv/bin/python examples/gpu_check.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-output/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
exec > >(tee "$out/log.txt") 2>&1

nvidia-smi
"$python" -m pytest -q tests/test_cuda.py
"$python" benchmark.py --device cuda --models mar_base mar_large mar_huge --repeats 3 \
    --output "$out/one_image.json" --plot "$out/one_image.png"
"$python" benchmark.py --device cuda --models mar_huge --batch_sizes 128 --repeats 2 --output "$out/batch_128.json"
"$python" benchmark.py --device cuda --models mar_huge --batch_sizes 1 128 --repeats 2 --methods LazyMAR --compile \
    --output "$out/compiled.json"
"$python" benchmark.py --device cuda --models mar_huge --batch_sizes 256 --repeats 1 --methods LazyMAR --profile \
    --output "$out/batch_256.json"
for lazy in "" --lazy_mar; do
    "$python" eval.py --model mar_tiny --device cuda --num_images 2000 --eval_bsz 500 $lazy \
        --output_dir "$out/mar_tiny$lazy" --overwrite
done
"$python" compare.py "$out/mar_tiny" "$out/mar_tiny--lazy_mar"

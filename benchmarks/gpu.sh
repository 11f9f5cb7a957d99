#!/usr/bin/env bash
# All that needs a GPU, in one call, from the repository root: bash benchmarks/gpu.sh [FOLDER]
# Leaves each report, as printed and as JSON, in the folder (default: output/benchmarks).
set -euo pipefail
out=${1:-output/benchmarks}
mkdir -p "$out"
report() { # NAME ARGUMENT…: a benchmark's report in a file of its own
    python -m "benchmarks.$1" "${@:2}" 2>&1 | tee "$out/$1.txt"
}

report pretrain_step --batch_size 256 --compile --rounds 10 \
    --forms visible dense:eager:fp16 mae:eager mae --json "$out/pretrain_step.json"
report finetune_step --batch_size 128 --compile --rounds 10 \
    --forms tokens grid:eager:fp16 --json "$out/finetune_step.json"
report memory_budget --model base --batch_size 256
report profile_step pretrain --batch_size 256 --trace "$out/trace.json"
if [ "$(python -c 'import torch; print(torch.cuda.device_count())')" -gt 1 ]; then
    report scaling --batch_size 256 --compile --steps 20 --rounds 2 --json "$out/scaling.json"
fi

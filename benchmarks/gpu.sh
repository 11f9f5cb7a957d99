#!/usr/bin/env bash
# All that needs a GPU, in one call, from the repository root:
#     bash benchmarks/gpu.sh [FOLDER [NAME…]]
# Leaves each report, as printed and as JSON, in FOLDER (default: output/benchmarks); NAMEs choose
# among the reports below. One that fails or takes too long does not stop the others, but is named
# at the end, with exit status 1.
set -uo pipefail
out=${1:-output/benchmarks}
chosen=("${@:2}")
known=()
failed=()
mkdir -p "$out" || exit 2
gpus=$(python -c 'import torch; print(torch.cuda.device_count())') || exit 2
if [ "$gpus" -eq 0 ]; then
    echo "gpu.sh: no CUDA GPU is visible" >&2
    exit 2
fi

report() { # NAME MODULE ARGUMENT…: a benchmark's report in a file of its own
    local name=$1 start=$SECONDS
    known+=("$name")
    if [ ${#chosen[@]} -gt 0 ] && [[ " ${chosen[*]} " != *" $name "* ]]; then return; fi
    echo "== $name"
    timeout 240 python -m "benchmarks.$2" "${@:3}" 2>&1 | tee "$out/$name.txt" ||
        failed+=("$name")
    echo "== $name: $((SECONDS - start)) s"
}

report pretrain_step pretrain_step --batch_size 256 --compile --rounds 10 \
    --forms visible dense:eager:fp16 mae:eager mae --json "$out/pretrain_step.json"
report inference_step inference_step --batch_size 256 --compile --rounds 10 \
    --forms tokens tokens:eager grid:eager vit vit:eager --json "$out/inference_step.json"
report finetune_step finetune_step --batch_size 128 --compile --rounds 10 \
    --forms tokens grid:eager:fp16 --json "$out/finetune_step.json"
report video_step pretrain_step --video --batch_size 32 --compile --rounds 5 \
    --forms visible dense:eager:fp16 mae:eager --json "$out/video_step.json"
report profile_step profile_step pretrain --batch_size 256 --trace "$out/trace.json"
report memory_budget memory_budget --model base --batch_size 256 --budgets 1 0.5
if [ "$gpus" -gt 1 ]; then
    report scaling scaling --batch_size 256 --compile --steps 20 --rounds 2 \
        --json "$out/scaling.json"
fi
for name in ${chosen[@]+"${chosen[@]}"}; do
    if [[ " ${known[*]} " != *" $name "* ]]; then
        echo "gpu.sh: there is no report $name here: one of ${known[*]}" >&2
        failed+=("$name")
    fi
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "gpu.sh: failed: ${failed[*]}" >&2
    exit 1
fi

#!/usr/bin/env bash
# The proof on one GPU, from the repository root: bash benchmarks/proof.sh DATA OUT [SECONDS]
# First the learning rates, on training pictures held out, the same for all arms; then all arms for
# at most SECONDS (default: 330). What is done then is kept, and the same call goes on with the rest.
set -euo pipefail
data=$1 out=$2 seconds=${3:-330}
jobs=${JOBS:-14} images=${IMAGES:-10000} epochs=${EPOCHS:-20}
settings=(--data_path "$data" --images "$images" --batch_size 128)
mkdir -p "$out"

tune() { # LR FINETUNE_LR: a short run, judged by training pictures that are held out
    python -m benchmarks.proof "${settings[@]}" --output_dir "$out/tune/$1-$2" --tune --seeds 1 \
        --arms mae convmae random random_plain --epochs 8 --curve_points 1 --shares 10 \
        --finetune_epochs 50 --jobs 3 --lr "$1" --finetune_lr "$2" >"$out/tune-$1-$2.log" 2>&1
}

if [ ! -f "$out/chosen" ]; then
    for pair in "1e-3 1e-3" "2e-3 1e-3" "4e-3 1e-3" "2e-3 5e-4" "2e-3 2e-3"; do
        # shellcheck disable=SC2086
        tune $pair &
    done
    wait
    python - "$out" <<'PYTHON'
import json, sys
from pathlib import Path

out, found = Path(sys.argv[1]), {}
for path in sorted(out.glob("tune/*/results.json")):
    results, pair = json.loads(path.read_text())["results"], path.parent.name
    found[pair] = {a: s["0"]["finetune-10"]["accuracy"] for a, s in results.items()}
    print(pair, {arm: round(accuracy, 1) for arm, accuracy in found[pair].items()})


def best(pairs, arms):
    return max(pairs, key=lambda pair: sum(found[pair][arm] for arm in arms)).split(",")


lr = max(("1e-3", "2e-3", "4e-3"), key=lambda lr: sum(found[f"{lr}-1e-3"][a] for a in ("mae", "convmae")))
finetune_lr = max(("5e-4", "1e-3", "2e-3"), key=lambda rate: sum(found[f"2e-3-{rate}"].values()))
(out / "chosen").write_text(f"{lr} {finetune_lr}\n")
PYTHON
fi
read -r lr finetune_lr <"$out/chosen"
echo "lr $lr, fine-tuning $finetune_lr"

timeout -s TERM "$seconds" python -m benchmarks.proof "${settings[@]}" --output_dir "$out/run" \
    --epochs "$epochs" --lr "$lr" --finetune_lr "$finetune_lr" --jobs "$jobs" \
    --finetune_epochs 100 50 12 || test $? = 124
python -m benchmarks.proof --publish --output_dir "$out/run" --page "$out/PROOF.md"

#!/bin/bash
# Two layers with the true widths of Qwen3-30B-A3B (hidden 2048, 32/4 heads of 128, 128 experts of
# 768, top-8, vocabulary 151,936; 1.87 billion parameters): one forward, backward and SGD update
# here and in transformers, fp32; logits, loss and every gradient compared.
#   bash dev/hf/true_width.sh          about 20 GB of free memory (one process at a time) and 32 GB
#                                      of disk, ten minutes on two cores
#   SEQ=32  BATCH=1  CONFIG=...  PYTHON=...  WORK=build/true_width
#   OUT=dev/results/DATE-true-width.md  KEEP=1 leaves the files
set -e -o pipefail
cd "$(dirname "$0")/../.."
CONFIG=${CONFIG:-model/configs/qwen3_30b_a3b.json} SEQ=${SEQ:-32} BATCH=${BATCH:-1}
WORK=${WORK:-build/true_width} OUT=${OUT:-dev/results/$(date +%Y-%m-%d)-true-width.md}
unset ${!OPENBLAS_*} ${!GOTO_*}
PYTHON=$(bash dev/hf/python.sh)
make -s -j "$(nproc)" train_moe
free=$(awk '/^MemAvailable/ { printf "%d", $2 / 1048576 }' /proc/meminfo)
disk=$(df -Pk . | awk 'NR == 2 { printf "%d", $4 / 1048576 }')
if [ "$free" -lt 20 ] || [ "$disk" -lt 32 ]; then
    echo "error: $free GiB of memory and $disk GiB of disk are free, hint: 20 and 32 are needed"
    exit 1
fi
rm -rf "$WORK" && mkdir -p "$WORK" "$(dirname "$OUT")"
[ -n "$KEEP" ] || trap 'rm -rf "$WORK"' EXIT
sed 's/"num_hidden_layers": *[0-9]*/"num_hidden_layers": 2/' "$CONFIG" > "$WORK/config.json"
peak() {
    awk -v who="$1" '/Maximum resident/ { most = $NF / 1048576 }
        /Elapsed/ { took = $NF }
        END { printf "%s: %.2f GiB at most, %s (h:mm:ss or m:ss)\n", who, most, took }' "$2"
}
losses() {
    sed -n 's/.*"step": *\([0-9]*\), *"loss": *\([-0-9.e]*\).*/\1: \2/p' "$1" | tr '\n' ' '
}
timed() {
    if command -v /usr/bin/time > /dev/null; then
        /usr/bin/time -v -o "$1" "${@:2}"
    else
        "${@:2}"
    fi
}

# ids from all of the vocabulary, as an llm.c shard (uint32), two batches
"$PYTHON" - "$WORK/tokens.bin" $((2 * SEQ * BATCH + 1)) "$WORK/config.json" << 'END'
import json
import sys
import numpy as np

n = int(sys.argv[2])
vocabulary = json.load(open(sys.argv[3]))["vocab_size"]
head = np.zeros(256, np.int32)
head[:3] = 20240801, 7, n
ids = np.random.default_rng(0).integers(0, vocabulary, n).astype(np.uint32)
with open(sys.argv[1], "wb") as f:
    f.write(head.tobytes() + ids.tobytes())
END
echo "== checkpoint: random weights, written by moe.c in fp32"
timed "$WORK/time.init" ./train_moe --init "$WORK/config.json" --steps 0 --seq-len "$SEQ" \
    --batch "$BATCH" --optimizer sgd --out "$WORK/init" | tail -1
common=(--model "$WORK/init/checkpoints/step_0" --train "$WORK/tokens.bin" --shuffle off
    --seq-len "$SEQ" --batch "$BATCH" --optimizer sgd --lr 1e-2 --aux-coef 0.001 --steps 2)
echo "== moe.c: two updates, the first one dumped"
timed "$WORK/time.moe" ./train_moe "${common[@]}" --dump "$WORK/moe.safetensors" \
    --out "$WORK/moe" | tee "$WORK/moe.txt" | grep -E '^(step|error)'
echo "== transformers: the same"
timed "$WORK/time.hf" "$PYTHON" dev/hf/reference.py "${common[@]}" --threads "$(nproc)" \
    --dump "$WORK/hf.safetensors" --out "$WORK/hf" | tee "$WORK/hf.txt"
{
    echo "# Two layers of the true widths against transformers"
    echo
    echo "- command: SEQ=$SEQ BATCH=$BATCH bash dev/hf/true_width.sh;" \
        "commit $(git describe --always --dirty 2> /dev/null || echo unknown), $(date +%Y-%m-%d)"
    echo "- $CONFIG cut to 2 layers; $BATCH sequence(s) of $SEQ; fp32; SGD, lr 0.01," \
        "gradient clip 1, aux coefficient 0.001"
    echo "- machine: $(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo | head -1)," \
        "$(nproc) hardware threads," \
        "$(awk '/MemTotal/ { printf "%.1f GiB", $2 / 1048576 }' /proc/meminfo)"
    echo "- $(head -1 "$WORK/hf.txt" | cut -d, -f1-2)"
    echo
    echo '```'
    grep '^parameters' "$WORK/moe.txt"
    echo "moe.c         $(grep '^step 1/' "$WORK/moe.txt")"
    sed -n 's/^step *1/transformers  step 1/p' "$WORK/hf.txt"
    echo "loss of updates   moe.c $(losses "$WORK/moe/log.jsonl") " \
        "transformers $(losses "$WORK/hf/log.jsonl")"
    [ ! -s "$WORK/time.moe" ] || {
        peak moe.c "$WORK/time.moe"
        peak transformers "$WORK/time.hf"
    }
    echo
    "$PYTHON" dev/hf/compare.py dumps "$WORK/moe.safetensors" "$WORK/hf.safetensors" || true
    echo '```'
    echo
    echo "The loss of the second update is after the first one's step in both:" \
        "it compares the update itself."
} > "$OUT"
cat "$OUT"

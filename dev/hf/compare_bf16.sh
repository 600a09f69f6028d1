#!/bin/bash
# make compare-hf PRECISION=bf16: the same checkpoint in bf16 here and in transformers, both with
# the routing that transformers chose in fp32.
#   STEPS=50 TEXT=file CONFIG=model/configs/tiny.json SEQ=64 BATCH=2
#   OUT=dev/results/DATE-compare-bf16
# Required of moe.c: every tensor's error of the first update against fp32 is at most twice that of
# transformers in bf16; over STEPS updates of SGD and of AdamW its loss is within the spread of the
# two runs of transformers: its mean |difference| to fp32 is at most that of transformers in bf16.
# Transformers in bf16 keeps no fp32 masters. The weights are rounded to bf16 first, so that all
# three begin with the same numbers.
# Writes OUT.md, OUT-sgd.png and OUT-adamw.png; exit status 1 where a requirement is not met.
set -e -o pipefail
cd "$(dirname "$0")/../.."
CC=${CC:-cc} TEXT=${TEXT:-} STEPS=${STEPS:-50} SEQ=${SEQ:-64} BATCH=${BATCH:-2}
CONFIG=${CONFIG:-model/configs/tiny.json} OUT=${OUT:-dev/results/$(date +%Y-%m-%d)-compare-bf16}
unset ${!OPENBLAS_*} ${!GOTO_*}
moe=$(make -s show-build BACKEND=cpu PRECISION=bf16 CC="$CC")/train_moe
make -s BACKEND=cpu PRECISION=bf16 CC="$CC" "$moe"
PYTHON=$(bash dev/hf/python.sh)
WORK=build/compare_bf16
rm -rf "$WORK" && mkdir -p "$WORK" "$(dirname "$OUT")"
sh dev/text.sh "$WORK" "$TEXT"
"$moe" --init "$CONFIG" --steps 0 --save-dtype bf16 --out "$WORK/init" | tail -1
common=(--model "$WORK/init/checkpoints/step_0" --train "$WORK/train.txt" --seq-len "$SEQ"
    --batch "$BATCH" --steps "$STEPS")
failed=0
{
    echo "# make compare-hf PRECISION=bf16"
    echo
    echo "- commit $(git describe --always --dirty 2> /dev/null || echo unknown)," \
        "$(date +%Y-%m-%d); $CONFIG, $BATCH windows of $SEQ, $STEPS updates;" \
        "the routing of transformers in fp32 everywhere"
} > "$OUT.md"
reference() { # reference NAME OPTIONS...: a run of transformers
    "$PYTHON" dev/hf/reference.py "${common[@]}" "${options[@]}" --out "$WORK/$kind/$1" \
        --dump "$WORK/$kind-$1.safetensors" "${@:2}" > "$WORK/$kind-$1.txt" 2>&1 || {
        tail -3 "$WORK/$kind-$1.txt"
        exit 1
    }
}
for kind in sgd adamw; do
    options=(--optimizer sgd --lr 0.1)
    [ $kind = sgd ] || options=(--optimizer adamw --lr 1e-3 --warmup 10 --weight-decay 0.1)
    reference hf-fp32 --routing-record "$WORK/$kind/routing"
    reference hf-bf16 --dtype bf16 --routing-replay "$WORK/$kind/routing"
    "$moe" "${common[@]}" "${options[@]}" --shuffle off --routing-replay "$WORK/$kind/routing" \
        --out "$WORK/$kind/moe.c" --dump "$WORK/$kind-moe.safetensors" \
        > "$WORK/$kind.txt" 2>&1 || {
        tail -3 "$WORK/$kind.txt"
        exit 1
    }
    {
        printf '\n## %s\n\n![%s](%s)\n\n```\n' $kind $kind "$(basename "$OUT")-$kind.png"
        "$PYTHON" dev/hf/compare.py bf16 "$WORK/$kind-moe.safetensors" \
            "$WORK/$kind-hf-bf16.safetensors" "$WORK/$kind-hf-fp32.safetensors" ||
            touch "$WORK/failed"
        "$PYTHON" dev/hf/compare.py curves "$WORK/$kind/moe.c" "$WORK/$kind/hf-fp32" \
            "$WORK/$kind/hf-bf16" --ranges 1-10 "11-$STEPS" --out "$OUT-$kind.png" |
            grep -v '^drawn'
        "$PYTHON" - "$WORK/$kind" "$OUT-$kind.png" << 'END' || touch "$WORK/failed"
import json
import sys
from PIL import Image

folder, picture = sys.argv[1:]
# 64 colours are enough, and a third of the bytes
Image.open(picture).convert("RGB").quantize(64).save(picture, optimize=True)


def losses(name):
    with open(f"{folder}/{name}/log.jsonl") as log:
        return [json.loads(line)["loss"] for line in log if '"loss"' in line]


runs = {n: losses(n) for n in ("moe.c", "hf-fp32", "hf-bf16")}


def mean(a, b):
    return sum(abs(x - y) for x, y in zip(runs[a], runs[b])) / len(runs[a])


ours, theirs = mean("moe.c", "hf-fp32"), mean("hf-bf16", "hf-fp32")
print(
    f"mean |difference of the loss| to transformers in fp32: {ours:.2e} here; "
    f"between the two runs of transformers {theirs:.2e}, "
    f"the most allowed: {'met' if ours <= theirs else 'NOT MET'}"
)
sys.exit(ours > theirs)
END
        echo '```'
    } >> "$OUT.md"
done
[ ! -e "$WORK/failed" ] || failed=1
cat "$OUT.md"
echo "written: $OUT.md"
exit $failed

#!/bin/sh
# From a fresh clone to a model that has learnt real text, in under three minutes on two cores,
# without Python and without a GPU.
#   sh dev/quickstart.sh          make quickstart runs it
#   TEXT=file                     the text (default: this repository's own sources and chapters)
#   STEPS=300                     updates
#   OUT=runs/quickstart           where log, checkpoint and plot go; replaced
# Every line shown with a $ in front can be typed again.
set -e
cd "$(dirname "$0")/.."
CC=${CC:-cc} TEXT=${TEXT:-} STEPS=${STEPS:-300} OUT=${OUT:-runs/quickstart}
PYTHON=${PYTHON:-python3}
BEGIN=$(date +%s)
say() { printf '\n== %s  [%d s]\n' "$1" $(($(date +%s) - BEGIN)); }

say "what this machine lacks"
sh dev/deps.sh "$CC"

say "build"
make -s -j "$(getconf _NPROCESSORS_ONLN)" CC="$CC" show-detected train_moe

say "text"
WORK=build/quickstart
rm -rf "$WORK"
sh dev/text.sh "$WORK" "$TEXT"

# ---- training -----------------------------------------------------------------------------------
RUN=$(grep -q '^MPI_LIBS := .' build/detected.mk && sh dev/mpirun.sh 2 || true)
if [ -n "$RUN" ]; then
    say "training: two processes, each with half of the experts"
    EP=2
else
    say "training: one process (no MPI was found)"
    EP=1
fi
rm -rf "$OUT"
set -- ./train_moe --init model/configs/tiny.json --train "$WORK/train.txt" \
    --val "$WORK/val.txt" --ep $EP --seq-len 128 --batch 8 --steps "$STEPS" --lr 4e-3 \
    --beta2 0.98 --warmup 0.1 --schedule cosine --eval-every 50 --eval-batches 8 \
    --router-every 50 --prompt "static void " --generate 240 --temperature 0.9 --out "$OUT"
echo "$ $RUN $(printf '%s ' "$@" | sed 's/static void /"static void "/')"
# all of it goes to screen.txt, here every tenth update is shown
{ $RUN "$@" 2>&1 || echo $? > "$WORK/failed"; } | tee "$WORK/screen.txt" |
    grep --line-buffered -Ev '^step ([2-9]|[0-9]+[1-9])/'
if [ -e "$WORK/failed" ]; then
    echo "error: the training ended with status $(cat "$WORK/failed")," \
        "hint: all it said is in $WORK/screen.txt"
    exit 1
fi

# ---- what was learnt ----------------------------------------------------------------------------
say "the loss"
sh dev/curve.sh "$OUT/log.jsonl"
if $PYTHON -c 'import matplotlib' 2> /dev/null &&
    $PYTHON dev/plot.py "$OUT/log.jsonl" --out "$OUT/plot.png" > /dev/null; then
    PLOT="$OUT/plot.png (and above)"
else
    PLOT="above (python3 with matplotlib would draw $OUT/plot.png)"
fi
say "done"
echo "plot        $PLOT"
echo "log         $OUT/log.jsonl: one object per update"
echo "checkpoint  $OUT/checkpoints/step_$STEPS: transformers loads it"
echo "go on       $RUN ./train_moe --model $OUT/checkpoints/step_$STEPS" \
    "--prompt \"int main(\" --generate 200 --steps 0 --ep $EP"
echo "            make test        ./train_moe --help"
echo "watch       make watch RUN=$OUT      (any run, while it goes on, in a browser)"

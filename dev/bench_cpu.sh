#!/bin/bash
# Speed on this machine: updates of model/configs/bench.json here and in transformers, in turns,
# with near-balanced and with skewed routing; every kernel; memory; two ranks beside one
# (dev/scaling.sh). Writes dev/results/DATE-bench-cpu.md.
#   make bench-cpu PYTHON=...         20 minutes on two cores (ROUNDS=2 STEPS=4 HF_STEPS=2: 10);
#                                     nothing else should run
#   ROUNDS=3  STEPS=8  HF_STEPS=3  EXPERTS="grouped_mm eager"  SKEWS="1 4"     repetitions
#   CONFIG=model/configs/bench.json  SEQ=512  BATCH=8                          another shape
#   make bench-cpu PRECISION=bf16     both programs in bf16; a third row has 8-bit AdamW without
#                                     master weights
#   PYTHON=...  with torch and transformers; PYTHON=off leaves transformers away      OUT=file.md
# No OPENBLAS_*, OMP_* or MKL_* variable is inherited: all cores, the library's own choice of
# kernels.
set -e -o pipefail
cd "$(dirname "$0")/.."
unset ${!OPENBLAS_*} ${!OMP_*} ${!MKL_*} ${!GOTO_*}
BENCH=${BENCH:?make bench-cpu sets it}
ROUNDS=${ROUNDS:-3} STEPS=${STEPS:-8} HF_STEPS=${HF_STEPS:-3} SKEWS=${SKEWS:-1 4}
CONFIG=${CONFIG:-model/configs/bench.json} SEQ=${SEQ:-512} BATCH=${BATCH:-8}
PRECISION=${PRECISION:-fp32}
EMBED=50 # to unit variance: initializer_range is 0.02
OUT=${OUT:-dev/results/$(date +%Y-%m-%d)-bench-cpu.md}
[ "$PYTHON" = off ] || PYTHON=$(bash dev/hf/python.sh)
# Only transformers 5 chooses between implementations of the experts.
[ "$PYTHON" = off ] || EXPERTS=${EXPERTS:-$("$PYTHON" -c 'import transformers
new = int(transformers.__version__.split(".")[0]) > 4
print("grouped_mm eager" if new else "eager")')}
WORK=$PWD/build/bench
rm -rf "$WORK" && mkdir -p "$WORK" "$(dirname "$OUT")"
threads=$(nproc)
load=$(cut -d' ' -f1 /proc/loadavg)
awk "BEGIN { exit !($load > 0.5 * $threads) }" &&
    echo "warning: load average $load on $threads threads, others are computing here:" \
        "these numbers will not mean much"

shape=(--seq-len "$SEQ" --batch "$BATCH")
./train_moe --init "$CONFIG" --steps 0 "${shape[@]}" --out "$WORK/model" > "$WORK/init.txt"
model=$WORK/model/checkpoints/step_0
vocabulary=$(sed -n 's/.*"vocab_size": *\([0-9]*\).*/\1/p' "$CONFIG")
"$BENCH" tokens "$WORK/tokens.bin" "$vocabulary" $((SEQ * BATCH * (STEPS + 8) + 1))
# here OPTIONS...: updates of this program; keep: a line of JSON to the file, its begin to the
# screen
here() {
    "$BENCH" step "$model" "$WORK/tokens.bin" "${shape[@]}" --steps "$STEPS" --embed $EMBED "$@"
}
keep() { tee -a "$WORK/lines.jsonl" | cut -c1-150; }
for skew in $SKEWS; do
    for round in $(seq "$ROUNDS"); do
        echo "skew $skew, round $round of $ROUNDS"
        here --skew "$skew" 2> "$WORK/phases.$skew.txt" | keep
        [ "$PRECISION" = bf16 ] &&
            here --skew "$skew" --optimizer adamw8bit 2> /dev/null | keep
        [ "$PYTHON" = off ] && continue
        for experts in $EXPERTS; do
            "$PYTHON" dev/hf/bench.py step --model "$model" --train "$WORK/tokens.bin" \
                "${shape[@]}" --steps "$HF_STEPS" --threads "$threads" --experts "$experts" \
                --dtype "$PRECISION" --embed $EMBED --skew "$skew" 2> "$WORK/hf.err" | keep || {
                tail -3 "$WORK/hf.err"
                exit 1
            }
        done
    done
done
"$BENCH" kernels "$model" "${shape[@]}" | tee "$WORK/kernels.txt"
first=${SKEWS%% *}
cat "$WORK/phases.$first.txt"
PRECISION=$PRECISION ROUNDS=$ROUNDS STEPS=$STEPS CONFIG=$CONFIG SEQ=$SEQ BATCH=$BATCH \
    OUT=$WORK/scaling.md BENCH=$BENCH bash dev/scaling.sh ./train_moe
if [ "$PYTHON" = off ]; then
    echo "no report: PYTHON=off"
    exit 0
fi
cpu=$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo | head -1)
simd() {
    grep -o -w -E 'avx2|avx512f|avx512_bf16|amx_bf16' /proc/cpuinfo | sort -u | paste -sd ' '
}
memory() { awk '/MemTotal/ { printf "%.0f GiB", $2 / 1048576 }' /proc/meminfo; }
command="make bench-cpu PRECISION=$PRECISION (ROUNDS=$ROUNDS STEPS=$STEPS HF_STEPS=$HF_STEPS"
command="$command EXPERTS=\"$EXPERTS\" SKEWS=\"$SKEWS\")"
tokens="sequences of $SEQ, $((SEQ * BATCH)) tokens an update"
others="load average at the start $load"
"$PYTHON" dev/hf/bench.py report "$WORK/lines.jsonl" --kernels "$WORK/kernels.txt" \
    --phases "$WORK/phases.$first.txt" --out "$OUT" --note \
    "command: $command" \
    "model: $CONFIG, $tokens, AdamW, clipping, $PRECISION" \
    "commit $(git describe --always --dirty 2> /dev/null || echo unknown), $(date +%Y-%m-%d)" \
    "machine: ${cpu:-unknown}, $threads hardware threads, $(simd), $(memory), $others" \
    "compiler: $(cc --version | head -1)"
[ ! -f "$WORK/scaling.md" ] || {
    echo
    sed 's/^# /## /' "$WORK/scaling.md"
} >> "$OUT"
echo "written: $OUT"

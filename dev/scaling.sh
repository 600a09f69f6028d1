#!/bin/bash
# Two ranks on this machine beside one: tokens/s of ep 2 and of fsdp 2 relative to one rank with the
# same number of threads in all, and where the ranks' communication goes.
#   dev/scaling.sh [TRAIN_MOE]                   about 5 minutes on two cores; nothing else should
#                                                run
#   ROUNDS=3 STEPS=8  CONFIG=model/configs/bench.json SEQ=512 BATCH=8  OUT=file.md
#   LAYOUTS="--ep 2;--fsdp 2;--ep 2 --attention heads"
# Layouts take turns, so that a machine that slows down does so for all; the best of ROUNDS medians
# counts. Target: 0.92 or more for ep 2 and fsdp 2.
set -e -o pipefail
cd "$(dirname "$0")/.."
train=${1:-./train_moe} ROUNDS=${ROUNDS:-3} STEPS=${STEPS:-8} SEQ=${SEQ:-512} BATCH=${BATCH:-8}
CONFIG=${CONFIG:-model/configs/bench.json} PRECISION=${PRECISION:-fp32}
LAYOUTS=${LAYOUTS:---ep 2;--fsdp 2;--ep 2 --micro-batch 1;--ep 2 --attention heads}
mpirun=$(sh dev/mpirun.sh 2)
[ -n "$mpirun" ] || {
    echo "dev/scaling.sh: skipped, there is no mpirun here"
    exit 0
}
unset ${!OPENBLAS_*} ${!OMP_*} ${!MKL_*} ${!GOTO_*}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
threads=$(nproc)
load=$(cut -d' ' -f1 /proc/loadavg)
awk "BEGIN { exit !($load > 0.5 * $threads) }" &&
    echo "warning: load average $load on $threads threads, others are computing here:" \
        "these numbers will not mean much"
# Random ids over the whole vocabulary: text of few symbols would make the routing, and so the
# ranks, uneven.
vocabulary=$(sed -n 's/.*"vocab_size": *\([0-9]*\).*/\1/p' "$CONFIG")
"${BENCH:-$(make -s show-build)/dev/bench_cpu}" tokens "$WORK/tokens.bin" "$vocabulary" \
    $((SEQ * BATCH * (STEPS + 4) + 1))
options="--init $CONFIG --train $WORK/tokens.bin --seq-len $SEQ --batch $BATCH --steps $STEPS"
options="$options --profile $STEPS"
# Median of the updates but the first two (set-up) and the last (profiled).
median() {
    sed -n 's/.*"step":\([0-9]*\),.*"ms":\([^,]*\),.*/\1 \2/p' "$1" |
        awk -v last="$STEPS" '$1 > 2 && $1 < last { print $2 }' | sort -g |
        awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'
}
best() { sort -g "$1" | head -1; }
IFS=';' read -r -a layouts <<< "$LAYOUTS"
for round in $(seq "$ROUNDS"); do
    rm -rf "$WORK/run"
    "$train" $options --threads "$threads" --out "$WORK/run" > "$WORK/one.txt"
    median "$WORK/run/log.jsonl" >> "$WORK/one.ms"
    for i in "${!layouts[@]}"; do
        rm -rf "$WORK/run"
        $mpirun "$train" $options ${layouts[$i]} --threads $((threads > 1 ? threads / 2 : 1)) \
            --out "$WORK/run" > "$WORK/$i.txt"
        median "$WORK/run/log.jsonl" >> "$WORK/$i.ms"
    done
    printf '%s' "round $round of $ROUNDS: $(tail -1 "$WORK/one.ms") ms on one rank, "
    for i in "${!layouts[@]}"; do
        printf '%s ' "$(tail -1 "$WORK/$i.ms")"
    done
    echo "ms on two"
done
one=$(best "$WORK/one.ms")
{
    echo "| layout | ms an update | tokens/s | relative to one rank |"
    echo "|---|---|---|---|"
    awk -v ms="$one" -v n=$((SEQ * BATCH)) -v t="$threads" \
        'BEGIN { printf "| one rank, %d threads | %.1f | %.0f | 1 |\n", t, ms, 1000 * n / ms }'
    for i in "${!layouts[@]}"; do
        awk -v ms="$(best "$WORK/$i.ms")" -v one="$one" -v n=$((SEQ * BATCH)) \
            -v l="${layouts[$i]}" \
            'BEGIN { printf "| two ranks, `%s` | %.1f | %.0f | %.3f |\n", l, ms, 1000 * n / ms,
                         one / ms }'
    done
    for i in "${!layouts[@]}"; do
        printf '\n`%s`, one update of rank 0 (waiting for the other rank included):\n\n```\n' \
            "${layouts[$i]}"
        sed -n '/^communication of rank/,/together/p' "$WORK/$i.txt"
        echo '```'
    done
} > "$WORK/table.md"
cat "$WORK/table.md"
[ -z "$OUT" ] || {
    {
        commit=$(git describe --always --dirty 2> /dev/null || echo unknown)
        printf '# Two ranks beside one\n\n`dev/scaling.sh`: %s, %s tokens an update, AdamW, %s; ' \
            "$CONFIG" $((SEQ * BATCH)) "$PRECISION"
        printf '%s hardware threads, load average at the start %s; commit %s, %s\n\n' \
            "$threads" "$load" "$commit" "$(date +%Y-%m-%d)"
        cat "$WORK/table.md"
    } > "$OUT"
    echo "written: $OUT"
}

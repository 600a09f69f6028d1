#!/bin/sh
# Checkpoints across layouts, and ranks that are killed.
#   dev/tests/kill.sh TRAIN_MOE RESHARD [KILLS]    KILLS: how often a rank is killed, default 8
#                                              (50: make test-mutations; 0: part 1 alone)
# 1. A checkpoint written by 8 ranks (ep 4, fsdp 2) is resumed by 1, 2, 3 and 6: parameters and
#    moments bit for bit (dev/tests/reshard.c), and the losses go on as those of a run that was left
#    alone, to 1e-5.
# 2. kill -9 of one rank at random moments, saving after every update so that many fall inside a
#    save: every time the run ends within --timeout with a status that is not 0, and the last
#    complete checkpoint resumes. The run that was killed so often ends with the bits of the one
#    that was left alone.
set -u
usage="usage: kill.sh TRAIN_MOE RESHARD [KILLS]"
train=${1:?$usage} reshard=${2:?$usage} kills=${3:-8}
cd "$(dirname "$0")/../.." || exit 1
[ -n "$(sh dev/mpirun.sh 2)" ] || {
    echo "dev/tests/kill.sh: skipped, there is no mpirun here"
    exit 0
}
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
passed=0 failed=0 timeout=20
ok() {
    passed=$((passed + 1))
    echo "$((passed + failed)) ok    $*"
}
bad() {
    failed=$((failed + 1))
    echo "$((passed + failed)) FAIL  $*"
    tail -5 "$T/out" | sed 's/^/      /'
}
check() {
    status=$?
    if [ $status -eq 0 ]; then ok "$*"; else bad "$*"; fi
}
# ranks N COMMAND...: on N ranks; mpirun itself ends 2 x GRACE seconds after a rank is gone
ranks() {
    np=$1
    shift
    launch=
    [ "$np" = 1 ] || launch=$(GRACE=1 sh dev/mpirun.sh "$np")
    $launch "$@" > "$T/out" 2>&1
}
model="--model dev/fixtures/parallel --train dev/fixtures/parallel/tokens.bin --seq-len 16"
model="$model --batch 24 --ignore-target 2 --lr 1e-3 --weight-decay 0.01 --grad-clip 0.5"
model="$model --z-coef 0.001 --threads 1 --timeout $timeout"
. dev/tests/shell.sh

# ---- 1. layouts ---------------------------------------------------------------------------------
ranks 1 "$train" $model --steps 8 --out "$T/whole"
check "one process, 8 updates"
ranks 8 "$train" $model --steps 4 --ep 4 --fsdp 2 --out "$T/eight"
check "8 ranks (ep 4, fsdp 2), 4 updates"
for grid in "1" "2 --ep 2" "2 --fsdp 2" "3 --fsdp 3" "6 --fsdp 3 --ep 2"; do
    n=${grid%% *} options=${grid#"$n"}
    rm -rf "$T/go"
    cp -r "$T/eight" "$T/go"
    ranks "$n" "$train" $model $options --steps 8 --resume --out "$T/go"
    status=$?
    d=$(apart "$T/whole" "$T/go")
    [ $status -eq 0 ] && least "$d" 1e-5
    check "resumed by $grid: losses of 8 updates as of one process to $d"
done
for n in 1 2 3 6; do
    ranks $n "$reshard" "$T/eight/checkpoints/step_4" dev/fixtures/parallel/tokens.bin
    status=$?
    said=$(grep -v '^ *[0-9]* ok' "$T/out" | tail -1)
    [ $status -eq 0 ]
    check "$said, bit for bit"
done

finish() {
    echo "dev/tests/kill.sh: $passed passed, $failed failed"
    [ $failed -eq 0 ]
    exit
}
[ "$kills" -gt 0 ] || finish

# ---- 2. kills -----------------------------------------------------------------------------------
run="$model --ep 2 --steps 100000 --save-every 1 --keep 3"
lines() {
    if [ -f "$1/log.jsonl" ]; then
        wc -l < "$1/log.jsonl"
    else
        echo 0
    fi
}
saving() { ls -d "$T"/kill/checkpoints/incomplete_* > /dev/null 2>&1; }
processes() { # those of the run, without mpirun
    pgrep -f "$train .*--out $T/kill" | while read -r p; do
        [ "$(cat /proc/"$p"/comm 2> /dev/null)" = mpirun ] || echo "$p"
    done
}
seed=12345 intact=0 ended=0 inside=0 slowest=0
i=0
while [ $i -lt "$kills" ]; do
    i=$((i + 1))
    before=$(lines "$T/kill")
    $(GRACE=1 sh dev/mpirun.sh 2) "$train" $run --resume --out "$T/kill" > "$T/out" 2>&1 &
    launcher=$!
    # wait for the next update at most 60 s, then for up to a second; every second time on until a
    # save has begun
    k=0
    while [ $k -lt 600 ] && [ "$(lines "$T/kill")" -le "$before" ] &&
        kill -0 $launcher 2> /dev/null; do
        sleep 0.1
        k=$((k + 1))
    done
    seed=$(((seed * 1103515245 + 12345) % 2147483648))
    sleep "0.$(printf %03d $((seed / 65536 % 1000)))"
    victim=$(processes | sed -n "$((seed / 4096 % 2 + 1))p")
    k=0
    while [ $((i % 2)) -eq 0 ] && [ $k -lt 300 ] && ! saving; do
        k=$((k + 1))
    done
    [ -n "$victim" ] && kill -9 "$victim" 2> /dev/null
    saving && inside=$((inside + 1))
    start=$(date +%s)
    wait $launcher
    status=$?
    took=$(($(date +%s) - start))
    [ $took -gt $slowest ] && slowest=$took
    if [ -n "$victim" ] && [ $status -ne 0 ] && [ $took -le $((timeout + 5)) ]; then
        ended=$((ended + 1))
    else
        echo "      kill $i: victim '$victim', status $status after $took s"
    fi
    ranks 1 "$train" --model "$T/kill/checkpoints/latest" --steps 0 && intact=$((intact + 1))
done
[ $ended -eq "$kills" ]
check "kill -9 of one of 2 ranks, $kills times ($inside inside a save): the run ends each time," \
    "after at most $slowest s, with a status that is not 0 ($ended)"
[ $intact -eq "$kills" ]
check "the last complete checkpoint loads each time ($intact of $kills)"
last=$(($(losses "$T/kill" | tail -1 | cut -d' ' -f1) + 3))
ranks 2 "$train" $model --ep 2 --save-every 1 --keep 3 --steps $last --resume --out "$T/kill"
check "the run goes on to update $last"
ranks 2 "$train" $model --ep 2 --steps $last --out "$T/alone"
check "the same run left alone"
same() { cmp -s "$T/kill/checkpoints/step_$last/$1" "$T/alone/checkpoints/step_$last/$1"; }
same model.safetensors && same optimizer.safetensors
check "both end with the same bits"
finish

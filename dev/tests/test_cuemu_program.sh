#!/bin/sh
# The whole CUDA program, run by the emulator of dev/cuemu, against the CPU backend: every gradient
# of the first update and the losses of three; and test_moe, against transformers.
#   test_cuemu_program.sh BUILD CPU_FP32 CPU_BF16 [quick|ci|nightly]
# BUILD is the folder with MODE-PRECISION/PROGRAM (dev/mk/cuemu.mk), CPU_* are train_moe of the CPU
# backend. `quick` means one run of each mode; `nightly` adds to `ci` combinations of modes and
# layouts of which each is there by itself (dev/cuemu/README.md). Every line ends with its seconds.
# fp32: both sides round in fp32 and differ in the order of sums; the CPU is within 5e-6 of fp64
# (test_moe.c), a mistake makes 8e-5 and more: 1e-5. bf16: at most twice the error that the CPU's
# bf16 build, which rounds wherever it stores, has against fp32 (FlashAttention's rule). The
# fixture's routing is the same in all.
# Modes: plain; asan with UBSan; tsan; streams as late as a synchronisation forces them
# (CUEMU_LAZY=1) and running ahead of each other at random (seeds); asynchronous copies early and at
# random, threads in random order.
build=$1 cpu_fp32=$2 cpu_bf16=$3 tier=${4:-ci}
: "${MPIRUN:=mpirun --allow-run-as-root --oversubscribe --bind-to none}" "${PYTHON:=python3}"
here=$(dirname "$0")
fixture=$here/../fixtures/gqa
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
# no sockets: ThreadSanitizer dislikes their locks
export OMPI_MCA_btl=self,vader OMPI_MCA_btl_vader_single_copy_mechanism=none
export OMPI_MCA_mpi_yield_when_idle=1
export ASAN_OPTIONS=detect_leaks=0:use_sigaltstack=0
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export TSAN_OPTIONS="halt_on_error=1 report_signal_unsafe=0 detect_deadlocks=0"
# MPI is not built for ThreadSanitizer: two of its own threads inside it (the watchdog's and the
# caller's) look like a race.
printf 'race:mca_\nrace:libmpi\nrace:libopen-\nmutex:mca_\n' > "$dir/mpi.supp"
TSAN_OPTIONS="$TSAN_OPTIONS suppressions=$dir/mpi.supp"
base="--model $fixture --train $fixture/tokens.bin --seq-len 16 --batch 4 --steps 3"
base="$base --shuffle off --aux-coef 0.01 --z-coef 0.001"

now=$(date +%s)
took() { before=$now now=$(date +%s) took=$((now - before)); }
ok() {
    passed=$((passed + 1))
    took
    echo "ok    $1, $took s"
}
bad() {
    failed=$((failed + 1))
    took
    echo "FAIL  $1, $took s"
    grep -v '^ *$' "$dir/output" | tail -${2:-25} | sed 's/^/      /'
}

# reference NAME OPTIONS: what the CPU backend makes of it, in both precisions
reference() {
    options=$2
    for p in fp32 bf16; do
        [ $p = fp32 ] && program=$cpu_fp32 || program=$cpu_bf16
        # shellcheck disable=SC2086
        "$program" $base $options --out "$dir/$1.$p" --dump "$dir/$1.$p.safetensors" \
            > "$dir/output" 2>&1 || {
            bad "the CPU backend, $p: $options"
            exit 1
        }
    done
    name=$1
}
# run 'SETTINGS' MODE-PRECISION RANKS OPTIONS: the last reference's numbers, in another layout
run() {
    settings=$1 variant=$2 ranks=$3
    shift 3
    what="$settings${settings:+ }$variant, $ranks ranks: $name $*"
    rm -rf "$dir/run" "$dir/run.safetensors"
    program=$build/$variant/train_moe
    [ "$ranks" = 1 ] || program="$MPIRUN -np $ranks $program"
    # shellcheck disable=SC2086
    if ! timeout 300 env $settings $program $base $options "$@" --out "$dir/run" \
        --dump "$dir/run.safetensors" > "$dir/output" 2>&1; then
        bad "$what"
        return
    fi
    for kind in safetensors log; do
        case $kind in
        log) part=/log.jsonl ;;
        *) part=.safetensors ;;
        esac
        want=$dir/$name.fp32$part got=$dir/run$part naive=$dir/$name.bf16$part
        case $variant in *fp32) naive= ;; esac
        # shellcheck disable=SC2086
        "$PYTHON" "$here/compare_dumps.py" "$want" "$got" 1e-5 $naive \
            > "$dir/output" 2>&1 || {
            bad "$what ($kind)"
            return
        }
        [ $kind = log ] || line=$(cat "$dir/output")
    done
    ok "$what  [$line]"
}
# program NAME RANKS 'SETTINGS' ARGUMENTS: a test program that counts for itself; 0 ranks: without
# mpirun
program() {
    test=$1 ranks=$2 settings=$3
    shift 3
    launcher=
    [ "$ranks" = 0 ] || launcher="$MPIRUN -np $ranks"
    # shellcheck disable=SC2086
    timeout 900 env $settings $launcher "$build/$test" "$@" > "$dir/output" 2>&1
    status=$?
    line=$(grep -E '[0-9]+ passed, [0-9]+ failed' "$dir/output" | tail -1)
    if [ $status = 0 ] && [ -n "$line" ]; then
        ok "$settings $test, $ranks ranks $*  [$line]"
    else
        bad "$settings $test, $ranks ranks $* (status $status)"
    fi
}

# stuck 'SETTINGS' FAULT 'PATTERN': three ranks of which one does something else; one line of ours
# says who has entered the call and who has not. (Where MPI joins, mpirun names a rank that is
# gone.)
stuck() {
    settings=$1 fault=$2 pattern=$3
    # shellcheck disable=SC2016,SC2086
    timeout 200 env $settings MASTER_ADDR=127.0.0.1 WORLD_SIZE=3 CUEMU_NCCL_TIMEOUT=400 \
        $MPIRUN -np 3 sh -c 'RANK=$OMPI_COMM_WORLD_RANK exec "$@"' sh \
        "$build/plain-fp32/parallel/test_comm" --timeout 15 --fault "$fault" > "$dir/output" 2>&1
    status=$?
    if [ $status != 0 ] && [ $status != 124 ] && one_error && grep -q "$pattern" "$dir/output"; then
        ok "$settings a rank that is at another call ($fault) is named"
    else
        bad "$settings $fault (status $status; wanted: $pattern)"
    fi
}
one_error() { [ "$(grep -c '^error: ' "$dir/output")" = 1 ]; }

# wrong 'SETTINGS' 'PATTERN' OPTIONS: a collective that brings a wrong number ends two ranks at
# their start, with one line
wrong() {
    settings=$1 pattern=$2
    shift 2
    # shellcheck disable=SC2086
    timeout 200 env $settings $MPIRUN -np 2 "$build/plain-fp32/train_moe" $base "$@" \
        --out "$dir/run" > "$dir/output" 2>&1
    status=$?
    if [ $status != 0 ] && one_error && ! grep -q '^step ' "$dir/output" &&
        grep -q "^error: the check of the collectives: $pattern" "$dir/output"; then
        ok "$settings is found at the start"
    else
        bad "$settings (status $status; wanted: $pattern)"
    fi
}

# waits STEPS MICRO_BATCH OPTIONS: how often the host waits in an update, and its downloads above
# 1 KiB there, both over two ranks with ep 2
count() {
    waited='the host waited \([0-9]*\) times; [0-9]* downloads, \([0-9]*\) above'
    sed -n "s/.*cuemu: $waited.*/\1 \2/p" "$1" |
        awk '{ a += $1; b += $2 } END { print a, b }'
}
waits() {
    other=$here/../fixtures/parallel
    for steps in 1 3; do
        # shellcheck disable=SC2086
        timeout 300 env CUEMU_COUNT=1 $MPIRUN -np 2 "$build/plain-fp32/train_moe" \
            --model "$other" --train "$other/tokens.bin" --seq-len 16 --batch 4 --ep 2 \
            --steps $steps --out "$dir/waits" "$@" > "$dir/output" 2>&1 || echo 0 failed
        rm -rf "$dir/waits"
        count "$dir/output"
    done | awk '{ a[NR] = $1; b[NR] = $2 } END { print (a[2] - a[1]) / 2, (b[2] - b[1]) / 2 }'
}
# The host reads the routing once a layer of experts and micro-batch (I11): 3 of the fixture's 4
# layers, on two ranks, for a second micro-batch; recompute and backward read nothing.
host_waits() {
    one=$(waits --micro-batch 2) two=$(waits --micro-batch 1)
    again=$(waits --micro-batch 1 --recompute layer)
    echo "waits, large downloads of an update: $one; two micro-batches: $two;" \
        "recomputed: $again" > "$dir/output"
    if [ "${one#* }" = 0 ] && [ "$two" = "$again" ] && [ "${two#* }" = 0 ] &&
        [ $((${two% *} - ${one% *})) = 6 ]; then
        ok "the host waits once a layer of experts and micro-batch  [$(cat "$dir/output")]"
    else
        bad "the host waits once a layer of experts and micro-batch"
    fi
}

reference sgd "--optimizer sgd --lr 0.05 --momentum 0.9 --weight-decay 0.01 --grad-clip 0.5"
run '' plain-fp32 1
run '' plain-bf16 4 --ep 2 --fsdp 2
run '' asan-bf16 1
run '' tsan-bf16 1
run CUEMU_LAZY=1 plain-fp32 2 --ep 2 --micro-batch 1
if [ "$tier" != quick ]; then
    run '' plain-fp32 1 --force-comm --check-comm
    run '' plain-fp32 4 --dp 2 --ep 2 --dispatch allgather
    run '' plain-fp32 4 --ep 2 --fsdp 2 --dispatch allreduce
    run '' plain-fp32 4 --ep 2 --fsdp 2 --attention heads
    run 'CUEMU_ASYNC=random CUEMU_RANDOM=7' plain-bf16 1
    run '' asan-bf16 2 --ep 2
    run '' tsan-bf16 2 --ep 2
    run CUEMU_LAZY=3 plain-fp32 4 --ep 2 --fsdp 2
fi
if [ "$tier" = nightly ]; then
    run '' plain-fp32 2 --fsdp 2 --micro-batch 1
    run '' plain-fp32 4 --ep 4
    run '' plain-bf16 1
    run '' plain-bf16 2 --ep 2
    run CUEMU_ASYNC=early plain-bf16 1
    run '' asan-bf16 4 --ep 2 --fsdp 2
    run '' tsan-bf16 4 --ep 2 --fsdp 2
    run CUEMU_LAZY=1 plain-fp32 1
    run CUEMU_LAZY=77 plain-fp32 2 --fsdp 2 --micro-batch 1
    for seed in 2 5; do run CUEMU_LAZY=$seed plain-fp32 4 --ep 2 --fsdp 2; done
fi
if [ "$tier" != quick ]; then
    adamw="--optimizer adamw --lr 0.001 --weight-decay 0.01"
    reference adamw "$adamw --update layer --recompute layer"
    run '' plain-fp32 1
    run CUEMU_LAZY=11 plain-bf16 4 --ep 2 --fsdp 2
    for f in gqa tied dense; do program plain-fp32/test_moe 0 '' --quick --only $f; done
    program plain-bf16/test_moe 0 '' --quick --only dense
    program plain-fp32/test_moe 2 CUEMU_LAZY=1 --quick --only gqa
    program asan-bf16/parallel/test_join 0 ''
    program plain-fp32/parallel/test_comm 1 '' --force
    program plain-fp32/parallel/test_comm 3 '' --check
    program plain-fp32/parallel/test_comm 3 CUEMU_LAZY=9
    program plain-fp32/parallel/test_comm 2 MOE_COMM_SUMS=nccl
    program plain-fp32/parallel/test_comm 4 NCCL_LAUNCH_ORDER_IMPLICIT=0
    program plain-fp32/parallel/test_comm_staged 3 CUEMU_LAZY=5 --check
    host_waits
    numbers='in group all of 2 ranks brings rank 1 wrong numbers, the worst at element'
    sums=MOE_COMM_SUMS=nccl
    wrong CUEMU_NCCL_WRONG=AllGather "all_gather $numbers 255: " --ep 2
    wrong CUEMU_NCCL_WRONG=Recv "reduce_scatter $numbers 127: " --ep 2
    wrong "$sums CUEMU_NCCL_WRONG=AllReduce" "all_reduce $numbers 254: " --ep 2
    wrong "$sums CUEMU_NCCL_WRONG=ReduceScatter" "reduce_scatter $numbers 127: " --ep 2
    absent='entered by rank 0, 1; not by rank 2'
    latest="$absent, whose latest call is .*call"
    stuck '' stuck "call 2 in group all, reduce_scatter of 1000 f32: $latest 1 in group all"
    stuck '' skip "call 2 in group all, all_reduce of 100 f32: $latest 2 in group all, all_gather"
    stuck 'MOE_JOIN=tcp MASTER_PORT=29571' stuck "$absent"
    stuck 'MOE_JOIN=tcp MASTER_PORT=29573' skip "$latest 2 in group all, all_gather"
    stuck 'MOE_JOIN=tcp MASTER_PORT=29572' kill 'the process of rank 2 is gone'
fi
if [ "$tier" = nightly ]; then
    run CUEMU_LAZY=1 plain-fp32 2 --ep 2 --micro-batch 1
    run '' asan-bf16 2 --fsdp 2 --micro-batch 1
    program plain-bf16/test_moe 0 '' --quick --only wide
    program plain-fp32/test_moe 2 CUEMU_LAZY=1 --quick
    program plain-fp32/test_moe 4 CUEMU_LAZY=7 --quick
    program plain-fp32/parallel/test_comm 4 ''
fi
echo "test_cuemu_program.sh: $passed passed, $failed failed"
[ "$failed" = 0 ]

#!/bin/sh
# test_modes.sh BUILD TIER MODE...: runs the emulated kernel tests in the modes plain, asan, tsan
# and lazy; ends with 'N passed, N failed'. TIER nightly adds to ci what repeats its evidence with
# other seeds or in another precision (dev/cuemu/README.md). The tests print the seconds of every
# check.
build=$1 tier=$2
shift 2
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0:use_sigaltstack=0
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export TSAN_OPTIONS="halt_on_error=1 report_signal_unsafe=0"
passed=0 failed=0
run() { # label, then VAR=value... command
    label=$1
    shift
    begin=$(date +%s)
    out=$(env "$@" 2>&1)
    status=$?
    p=$(printf '%s\n' "$out" | grep -cE '^ *[0-9]+ ok ')
    f=$(printf '%s\n' "$out" | grep -cE '^ *[0-9]+ FAILED ')
    if [ $status -ne 0 ] && [ "$f" = 0 ] || [ $((p + f)) = 0 ]; then f=$((f + 1)); fi
    passed=$((passed + p)) failed=$((failed + f))
    echo "kernels $label: $p passed, $f failed, $(($(date +%s) - begin)) s"
    [ "$f" = 0 ] || printf '%s\n' "$out" | grep -vE '^ *[0-9]+ ok ' | cut -c1-200 | head -40
}
plain=$build/plain-bf16/kernels/test_cuda tsan=$build/tsan-bf16/kernels/test_cuda
for mode in "$@"; do
    case $mode in
    lazy)
        seeds=2 orders=1
        [ "$tier" != nightly ] || { seeds="2 77" orders="1 2 3"; }
        run "bf16 streams late" CUEMU_LAZY=1 "$plain"
        for seed in $seeds; do # without the experts, which use one stream, and most of the time
            run "bf16 streams late, seed $seed" CUEMU_LAZY=$seed "$plain" -experts
        done
        run "bf16 copies early" CUEMU_ASYNC=early CUEMU_RANDOM=5 "$plain"
        # threads in random order with copies as late as allowed: fences and arrivals that nothing
        # orders
        for seed in $orders; do
            for what in attention experts; do
                run "bf16 random order $seed, $what" CUEMU_RANDOM=$seed "$plain" $what
            done
        done
        ;;
    tsan)
        run "bf16 tsan" "$tsan"
        [ "$tier" = nightly ] || continue
        # and copies to shared memory as early as allowed: into a buffer that is still read
        for what in attention experts; do
            run "bf16 tsan, copies early, $what" CUEMU_ASYNC=early "$tsan" $what
        done
        ;;
    *)
        run "bf16 $mode" "$build/$mode-bf16/kernels/test_cuda"
        [ "$mode$tier" = asanci ] || run "fp32 $mode" "$build/$mode-fp32/kernels/test_cuda"
        [ "$mode" = plain ] || continue
        for p in bf16 fp32; do
            run "$p offsets" "$build/plain-$p/kernels/test_offsets"
        done
        ;;
    esac
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]

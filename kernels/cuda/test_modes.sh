#!/bin/sh
# test_modes.sh BUILD MODE...: runs the emulated kernel tests in the modes plain, asan, tsan and lazy; ends with 'N passed, N failed'.
build=$1
shift
passed=0 failed=0
run() {                        # label, then VAR=value... command
    label=$1
    shift
    out=$(env "$@" 2>&1)
    status=$?
    p=$(printf '%s\n' "$out" | grep -cE '^ *[0-9]+ ok ')
    f=$(printf '%s\n' "$out" | grep -cE '^ *[0-9]+ FAILED ')
    if [ $status -ne 0 ] && [ "$f" = 0 ] || [ $((p + f)) = 0 ]; then f=$((f + 1)); fi
    passed=$((passed + p)) failed=$((failed + f))
    echo "$label: $p passed, $f failed"
    [ "$f" = 0 ] || printf '%s\n' "$out" | grep -vE '^ *[0-9]+ ok ' | head -40
}
for mode in "$@"; do
    case $mode in
    lazy)
        for seed in 1 2 77; do run "bf16 streams late, seed $seed" CUEMU_LAZY=$seed "$build/bf16_plain/test_cuda"; done
        run "bf16 copies early" CUEMU_ASYNC=early CUEMU_RANDOM=5 "$build/bf16_plain/test_cuda";;
    tsan) run "bf16 tsan" "$build/bf16_tsan/test_cuda";;
    *)
        run "bf16 $mode" "$build/bf16_$mode/test_cuda"
        run "fp32 $mode" "$build/fp32_$mode/test_cuda";;
    esac
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]

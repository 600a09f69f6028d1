#!/bin/sh
# Every check of the communication layer, and every fault that must end a run with a line that names
# it.
#   test_comm.sh PROGRAM [quick]      PROGRAM: test_comm;  quick: fewer ranks.  MPIRUN: the launcher
#                                     (default: mpirun --allow-run-as-root --oversubscribe), none:
#                                     built without MPI
program=$1
quick=$2
: "${MPIRUN:=mpirun --allow-run-as-root --oversubscribe}"
passed=0 failed=0
output=$(mktemp)
trap 'rm -f "$output"' EXIT

ok() { passed=$((passed + 1)); }
bad() {
    failed=$((failed + 1))
    echo "FAIL $1"
    sed 's/^/     /' "$output" | head -20
}

# expect_pass RANKS ARGUMENTS...: all checks pass
expect_pass() {
    ranks=$1
    shift
    launcher=
    [ "$ranks" = 0 ] || launcher="$MPIRUN -np $ranks"
    if timeout 300 $launcher "$program" "$@" > "$output" 2>&1; then
        ok
        grep '^test_comm:' "$output"
    else
        bad "$ranks ranks: $*"
    fi
}
# expect_fault SECONDS RANKS 'PATTERN' ARGUMENTS...: ends within SECONDS, status not 0, exactly one
# line of ours, which matches
expect_fault() {
    seconds=$1 ranks=$2 pattern=$3
    shift 3
    timeout "$seconds" $MPIRUN -np "$ranks" "$program" "$@" > "$output" 2>&1
    status=$?
    lines=$(grep -c '^error: ' "$output")
    if [ $status != 0 ] && [ $status != 124 ] && [ "$lines" = 1 ] &&
        grep -q "$pattern" "$output"; then
        ok
    else
        bad "$ranks ranks: $* (status $status, $lines lines; wanted: $pattern)"
    fi
}

expect_pass 0
expect_pass 0 --force
if [ "$MPIRUN" != none ]; then
    expect_pass 2
    expect_pass 3 --check
    expect_pass 4
    if [ "$quick" != quick ]; then
        expect_pass 1
        expect_pass 1 --force --check
        expect_pass 2 --check
        expect_pass 3
        expect_pass 4 --force
        expect_pass 6
        expect_pass 8
    fi
    # ranks that disagree: at the first call where they do, with --check by the records, else by the
    # length of a message
    calls='rank 0 is at step 7, layer 3 backward: call 2 in group all, all_reduce of 100 f32; '
    calls="${calls}rank 2 is at step 7, layer 2 backward: call 2 in group all, all_gather"
    expect_fault 20 3 "$calls" --check --fault skip
    expect_fault 20 3 'rank 0 is at step 7, layer 2 .*; rank 2 is at step 7, layer 1 ' \
        --check --fault layer
    expect_fault 20 3 'rank 2 is at .* end of step' --check --fault last
    expect_fault 20 3 'rank 2 sends 96 bytes to rank 0, which expects 80' --check --fault rows
    expect_fault 20 3 'rank 2 sends 64 bytes to rank 0, which expects 80' \
        --check --fault rows-few
    expect_fault 20 3 'source changed between start and wait' --check --fault source
    expect_fault 20 3 'destination was poison until the wait' --check --fault destination
    expect_fault 20 3 'waited for already' --fault twice
    expect_fault 20 3 'ranks disagree: step 7, layer 3 backward' --fault skip
    expect_fault 20 3 'rank 0 expects 80 bytes from rank 2, which sends more' --fault rows
    expect_fault 20 3 'rank 0 expects 80 bytes from rank 2, which sends 64' --fault rows-few
    # ranks that are gone or stuck
    calls='waited 2.* step 7, layer 3 backward: call 2 in group all, reduce_scatter of 1000 f32: '
    calls="${calls}no answer from rank 2, of which 2 waits for nobody"
    expect_fault 20 3 "$calls" --timeout 2 --fault stuck
    expect_fault 20 3 'waited 2.* no answer from rank 2' --timeout 2 --fault last
    expect_fault 20 3 'something is wrong on one rank (rank 2)' --fault die
    timeout 20 $MPIRUN -np 3 "$program" --timeout 5 --fault kill > "$output" 2>&1
    status=$?
    if [ $status != 0 ] && [ $status != 124 ]; then
        ok
    else
        bad "a killed rank ends the run (status $status)"
    fi
    # layouts that cannot be
    expect_fault 20 2 'needs 6 ranks and there are 2.*hint' --fault layout-product
    expect_fault 20 2 'needs 3 ranks and there are 2.*hint' --fault layout-divide
    expect_fault 20 2 'there are 2 ranks.*--fsdp 2 fits' --fault layout-rest
    expect_fault 20 2 'does not divide the model.s 25 experts.*fits here: 1' --fault layout-experts
    expect_fault 20 2 'does not divide the model.s 3 KV heads.*fits here: 1' --fault layout-heads
    # blocks used against the rules
    expect_fault 20 2 'weights of dense block of layer 2 wanted while' --fault slots-third
    expect_fault 20 2 'fsdp_release of dense block of layer 0, which is not gathered' \
        --fault slots-release
    expect_fault 20 2 'fsdp_reduce of dense block of layer 0, whose gradient is idle' \
        --fault slots-reduce
    expect_fault 20 2 'gradient of dense block of layer 2 wanted while' --fault slots-grad
    expect_fault 20 2 'are not used up' --fault slots-done
fi
echo "test_comm.sh: $passed passed, $failed failed"
[ "$failed" = 0 ]

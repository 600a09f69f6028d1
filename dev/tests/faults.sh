#!/bin/bash
# Injected faults: the n-th system call of a kind fails while a run starts, saves, resumes and logs.
# strace injects them, so no root is needed (ptrace must be allowed).
#   dev/tests/faults.sh PROGRAM [COUNT] [SEED]      COUNT faults (default 150), chosen at random by
#                                                   SEED from all (call, error, n)
# A fault may end the run, with a status that is not 0 and one `error:` line, or be survived.
# Afterwards, without faults:
#   - every published checkpoint verifies (--verify);
#   - nothing that was published before is gone (--keep 0);
#   - --resume ends with the same weights and optimizer, byte for byte, as the run that nobody
#     disturbed;
#   - log.jsonl has every update once, in order, and run.json is whole.
# Prints the counts by call, and ends with 'N passed, N failed'.
cd "$(dirname "$0")/../.." || exit 1
program=$(realpath "${1:?usage: faults.sh PROGRAM [COUNT] [SEED]}") count=${2:-150} seed=${3:-1}
command -v strace > /dev/null || {
    echo "faults: no strace here, left out"
    echo "0 passed, 0 failed"
    exit 0
}
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
strace -qq -o /dev/null -e trace=close true 2> /dev/null || {
    echo "faults: ptrace is not allowed here, left out"
    echo "0 passed, 0 failed"
    exit 0
}
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
. dev/tests/shell.sh
micro_model
# shellcheck disable=SC2206   words
options=($micro --save-every 1 --lr 0.01)
first=2 last=4 # updates before the fault, and in all
run() { timeout 30 "$@" > "$T/out" 2> "$T/err"; }
run "$program" "${options[@]}" --steps $last --out "$T/whole" || {
    cat "$T/err"
    echo "0 passed, 1 failed"
    exit 1
}
sums() { (cd "$1/checkpoints/step_$last" && sha256sum ./*.safetensors); }
want=$(sums "$T/whole")
run "$program" "${options[@]}" --steps $first --out "$T/before" || {
    cat "$T/err"
    echo "0 passed, 1 failed"
    exit 1
}

# All calls of the part under test: --resume from update $first to $last. Calls before the first
# look at --out belong to the loader of the program and are left alone.
cp -a "$T/before" "$T/probe"
kinds="openat read pread64 write pwrite64 fsync fdatasync rename renameat renameat2 mkdir mkdirat"
kinds="$kinds unlink unlinkat symlink symlinkat getdents64 ftruncate newfstatat fstat lseek close"
kinds="$kinds fallocate"
known=
for kind in $kinds; do
    strace -qq -o /dev/null -e trace="$kind" true 2> /dev/null && known="$known,$kind"
done
strace -f -qq -o "$T/trace" -e trace="${known#,}" "$program" "${options[@]}" --steps $last \
    --resume --out "$T/probe" > /dev/null 2>&1
awk -v out="$T/probe" '
    {
        sub(/^[0-9]+ +/, "")
        if (!match($0, /^[a-z0-9_]+\(/)) next
        kind = substr($0, 1, RLENGTH - 1)
        n[kind]++
    }
    index($0, out) { seen = 1 }
    seen { print kind, n[kind] }' "$T/trace" > "$T/calls"
errors_of() {
    case $1 in
    write | pwrite64 | fallocate | ftruncate | mkdir* | symlink*) echo ENOSPC EIO EINTR ESTALE ;;
    openat) echo EIO ESTALE EACCES EMFILE EINTR ;;
    *) echo EIO ESTALE EINTR ;;
    esac
}
while read -r kind n; do
    for e in $(errors_of "$kind"); do
        echo "$kind $n $e"
    done
done < "$T/calls" > "$T/all"
total=$(wc -l < "$T/all")
[ "$total" -gt 0 ] || {
    echo "faults: no call was seen"
    echo "0 passed, 1 failed"
    exit 1
}
shuf --random-source=<(yes "$seed") -n "$count" "$T/all" > "$T/chosen"

passed=0 failed=0 survived=0 ended=0
bad() {
    failed=$((failed + 1))
    echo "FAIL $1"
    sed 's/^/     /' "$T/err" | head -3
}
check() { # what is left after the fault
    local status=$1 name=$2 step lines
    [ "$status" != 124 ] || {
        bad "$name: hangs"
        return
    }
    [ "$status" -lt 128 ] || {
        bad "$name: ended by signal, status $status"
        return
    }
    if [ "$status" != 0 ]; then
        lines=$(grep -c '^error: ' "$T/err")
        [ "$lines" = 1 ] || {
            bad "$name: status $status and $lines error lines"
            return
        }
        grep -q 'hint: ' "$T/err" || {
            bad "$name: no hint"
            return
        }
        ended=$((ended + 1))
    else
        survived=$((survived + 1))
    fi
    for step in 1 2; do
        [ -d "$T/o/checkpoints/step_$step" ] || {
            bad "$name: step_$step is gone"
            return
        }
    done
    for step in "$T"/o/checkpoints/step_*; do
        timeout 30 "$program" --verify "$step" > "$T/verify" 2>&1 || {
            cp "$T/verify" "$T/err"
            bad "$name: ${step##*/} does not verify"
            return
        }
    done
    run "$program" "${options[@]}" --steps $last --resume --out "$T/o" || {
        bad "$name: --resume afterwards"
        return
    }
    [ "$(sums "$T/o")" = "$want" ] || {
        bad "$name: other weights after --resume"
        return
    }
    python3 - "$T/o" $last > "$T/err" 2>&1 << 'P' || {
import json
import sys

steps = [json.loads(line)["step"] for line in open(sys.argv[1] + "/log.jsonl")]
assert steps == list(range(1, int(sys.argv[2]) + 1)), steps
json.load(open(sys.argv[1] + "/run.json"))
P
        bad "$name: log.jsonl or run.json"
        return
    }
    passed=$((passed + 1))
}
while read -r kind n error; do
    rm -rf "$T/o"
    cp -a "$T/before" "$T/o"
    timeout 30 strace -f -qq -o /dev/null -e trace="$kind" -e inject="$kind:error=$error:when=$n" \
        "$program" "${options[@]}" --steps $last --resume --out "$T/o" > "$T/out" 2> "$T/err"
    check $? "$kind $n $error"
done < "$T/chosen"
echo "faults: $total possible, $((passed + failed)) injected, $ended ended the run," \
    "$survived were survived"
cut -d' ' -f1 "$T/chosen" | sort | uniq -c | sed 's/^ */     /'
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]

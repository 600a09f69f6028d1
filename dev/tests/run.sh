#!/bin/sh
# Builds and runs test programs one after another, forwards what they say, and ends with
# 'N passed, N failed' over all of them. make test, make test-full and make test-nightly call it.
#   dev/tests/run.sh test      everything on this machine: kernels, data, checkpoints, the model in
#                              three precisions, the command line, and with MPI 2 and 4 ranks.
#                              PRECISION=bf16 (or fp32, fp64): all of it in that precision alone
#   dev/tests/run.sh full      what takes longer: sanitizers, other compilers and missing libraries,
#                              the rest of the bf16 build, 3 and 6 ranks, valgrind
#   dev/tests/run.sh nightly   what seldom finds more than those do: the whole command line and the
#                              checkpoints under the sanitizers, 8 ranks, more builds
# A program is a failure by itself when it ends without its closing line, with a status that
# contradicts that line, or not at all within its time. The exit status is 1 where anything failed.
# LIST=1 only prints the suites; ONLY=word runs those whose title has the word in it.
cd "$(dirname "$0")/../.." || exit 1
what=${1:-test}
case $what in
test | full | nightly) ;;
*)
    echo "usage: dev/tests/run.sh test|full|nightly" >&2
    exit 2
    ;;
esac
jobs=$(nproc 2> /dev/null || echo 2)
passed=0 failed=0
log=$(mktemp) bad=$(mktemp) # bad: what failed, said once more above the closing line
trap 'rm -f "$log" "$bad"' EXIT
unset MAKEFLAGS MAKELEVEL MFLAGS
cc=${CC:-cc}

mk() { make --no-print-directory -s CC="$cc" "$@"; }
seconds() { date +%s; }
chosen() {
    [ -n "$LIST" ] && echo "$1" && return 1
    case $1 in *"$ONLY"*) ;; *) return 1 ;; esac
}

# count TITLE STATUS: adds the closing line in $log
count() {
    line=$(grep -E '(^|: )[0-9]+ passed, [0-9]+ failed$' "$log" | tail -1)
    p=$(echo "$line" | sed -n 's/.*\(^\|[: ]\)\([0-9][0-9]*\) passed.*/\2/p')
    f=$(echo "$line" | sed -n 's/.* \([0-9][0-9]*\) failed$/\1/p')
    if [ -z "$line" ]; then
        echo "---- $1: no closing line, exit status $2"
        p=0 f=1
    elif [ "$2" != 0 ] && [ "$f" = 0 ]; then
        echo "---- $1: exit status $2 in spite of its closing line"
        f=1
    fi
    passed=$((passed + p)) failed=$((failed + f))
    echo "---- $1: $p passed, $f failed, $(($(seconds) - begin)) s"
    [ "$f" = 0 ] && return
    {
        echo "---- $1: exit status $2"
        grep FAIL "$log" || tail -15 "$log"
    } >> "$bad"
}
# suite TITLE LIMIT COMMAND...: one program, at most LIMIT seconds
suite() {
    title=$1 limit=$2
    shift 2
    chosen "$title" || return 0
    echo "---- $title"
    begin=$(seconds)
    {
        timeout --kill-after=10 "$limit" "$@" 2>&1 < /dev/null
        echo "$?" > "$log.status"
    } | tee "$log"
    status=$(cat "$log.status")
    rm -f "$log.status"
    count "$title" "$status"
}
# prepare TITLE VARIABLES... -- TARGETS...: builds targets in the folder of that variant, which
# becomes $dir, and sets $ranks where the variant has MPI and this machine a launcher.
prepare() {
    title=$1 variables='' targets='' ranks=''
    shift
    while [ "$1" != -- ]; do
        variables="$variables $1"
        shift
    done
    shift
    # shellcheck disable=SC2086   variables and targets are words
    dir=$(mk $variables show-build)
    case $dir in *-mpi*) [ -n "$(launcher 2)" ] && ranks=1 ;; esac
    [ -n "$LIST" ] && return 0
    for t; do targets="$targets $dir/$t"; done
    begin=$(seconds)
    # shellcheck disable=SC2086
    if make --no-print-directory -j "$jobs" -s CC="$cc" $variables $targets > "$log" 2>&1; then
        echo "---- build $title: $dir, $(($(seconds) - begin)) s"
        return 0
    fi
    {
        echo "---- build $title FAILED:"
        tail -30 "$log"
    } | tee -a "$bad"
    failed=$((failed + 1))
    return 1
}
launcher() { sh dev/mpirun.sh "$1"; }
anyhow() { launcher "$1" | sed "s/ -np $1\$//"; }          # a launcher without its -np
soon() { GRACE=1 sh dev/mpirun.sh 2 | sed 's/ -np 2$//'; } # one that kills after a second
script=
command -v python3 > /dev/null 2>&1 && script=data/tokenize.py

# ---- the suites; each runs programs of $dir -----------------------------------------------------
KERNELS="kernels/test_kernels kernels/test_experts kernels/test_optimizer kernels/test_gemm_bf16"
RANKS="parallel/test_comm parallel/test_dispatch dev/tests/edge"
kernels() {
    suite "$1 kernels" 300 "$dir/kernels/test_kernels"
    suite "$1 experts" 300 "$dir/kernels/test_experts"
    suite "$1 optimizer" 300 "$dir/kernels/test_optimizer"
    suite "$1 bf16 products" 300 "$dir/kernels/test_gemm_bf16"
}
data() {
    suite "data" 120 "$dir/data/test_data" $script
    [ -n "$script" ] || return
    suite "data tokenize.py" 200 "${PYTHON:-python3}" data/test_tokenize.py
    suite "data plots, exports, page" 300 "${PYTHON:-python3}" dev/tests/test_tools.py
}
checkpoint() { suite "$1 checkpoint" 600 "$dir/model/test_checkpoint"; }
model() { suite "$1 model" 900 "$dir/test_moe"; }
command_line() { suite "$1 command line" 1200 "$dir/dev/tests/test_cli" "$dir/train_moe"; }
model_on() { # model_on NAME RANKS
    # shellcheck disable=SC2046
    suite "$1 model on $2 ranks" 900 $(launcher "$2") "$dir/test_moe"
}
edges_on() { # edges_on NAME RANKS [--quick]
    # shellcheck disable=SC2046,SC2086
    suite "$1 edges on $2 ranks" 900 $(launcher "$2") "$dir/dev/tests/edge" $3
}
command_line_ranks() {
    suite "$1 command line, several ranks" 300 "$dir/dev/tests/test_cli" "$dir/train_moe" \
        --mpirun "$(anyhow 4)"
}
communication() { # communication NAME [quick]
    # shellcheck disable=SC2086
    suite "$1 communication" 1200 env MPIRUN="$(soon) --oversubscribe" \
        sh parallel/test_comm.sh "$dir/parallel/test_comm" $2
}
dispatchers() { # dispatchers NAME RANKS...
    name=$1
    shift
    suite "$name dispatchers" 900 sh parallel/test_dispatch.sh "$dir/parallel/test_dispatch" "$@"
}

# ---- make test ----------------------------------------------------------------------------------
test_one() { # everything, in one precision
    # shellcheck disable=SC2086
    prepare "$1" PRECISION="$1" -- train_moe test_moe $KERNELS data/test_data \
        model/test_checkpoint dev/tests/test_cli || return
    kernels "$1"
    data
    checkpoint "$1"
    model "$1"
    [ "$1" != fp32 ] ||
        suite "naive model" 120 env CC="$cc" sh dev/tests/test_naive.sh "$dir/train_moe"
    command_line "$1"
}
test_ranks() {
    if [ -z "$ranks" ]; then
        [ -n "$LIST" ] || echo "---- no MPI here: several ranks: see make doctor"
        return
    fi
    # shellcheck disable=SC2086
    prepare "$1, several ranks" PRECISION="$1" -- $RANKS || return
    communication "$1" quick
    dispatchers "$1" 1 2 4
    model_on "$1" 2
    model_on "$1" 4
    edges_on "$1" 2 --quick
    command_line_ranks "$1"
}
test_all() {
    test_one "${PRECISION:-fp32}"
    if [ -z "$PRECISION" ]; then
        # shellcheck disable=SC2086
        for precision in fp64 bf16; do
            prepare $precision PRECISION=$precision -- test_moe $KERNELS || continue
            kernels $precision
            model $precision
        done
    fi
    test_ranks "${PRECISION:-fp32}"
}

# ---- make test-full -----------------------------------------------------------------------------
# ASan, UBSan, memory filled with NaN. Leaks are looked for where our own code is alone; MPI and a
# process that dies on purpose keep theirs.
full_sanitizers() {
    # shellcheck disable=SC2086
    prepare debug DEBUG=1 -- train_moe test_moe $KERNELS data/test_data dev/tests/test_cli $RANKS ||
        return
    export ASAN_OPTIONS=detect_leaks=0
    kernels debug
    suite "debug data" 300 "$dir/data/test_data" $script
    for part in training resume data models; do
        suite "debug command line: $part" 600 \
            "$dir/dev/tests/test_cli" "$dir/train_moe" --only $part
    done
    if [ -n "$ranks" ]; then
        dispatchers debug 2 3
        model_on debug 2
        edges_on debug 2 --quick
    fi
    unset ASAN_OPTIONS
    prepare "debug without MPI, leaks looked for" DEBUG=1 MPI=off -- test_moe &&
        model "debug without MPI"
}
full_compilers() {
    if command -v clang > /dev/null 2>&1; then
        host=$cc cc=clang
        # shellcheck disable=SC2086
        prepare clang WERROR=-Werror -- train_moe test_moe $KERNELS && kernels clang && model clang
        cc=$host
        mk show-build > /dev/null # what was detected is the usual compiler's again
    fi
    prepare "nothing optional" BLAS=off OPENMP=off MPI=off -- train_moe test_moe &&
        model "nothing optional"
}
full_bf16() { # with what make test has of it: make test PRECISION=bf16
    # shellcheck disable=SC2086
    prepare bf16 PRECISION=bf16 -- train_moe test_moe model/test_checkpoint dev/tests/test_cli \
        $RANKS || return
    checkpoint bf16
    command_line bf16
    [ -n "$ranks" ] || return
    communication bf16 quick
    dispatchers bf16 1 2 4
    model_on bf16 2
    model_on bf16 4
    edges_on bf16 2 --quick
    command_line_ranks bf16
}
full_ranks() {
    # shellcheck disable=SC2086
    prepare "fp32, several ranks" -- train_moe test_moe $RANKS dev/tests/reshard || return
    [ -n "$ranks" ] || return
    communication fp32
    dispatchers fp32 3 6
    suite "model through the transport on 1 rank" 900 "$dir/test_moe" --force-comm
    model_on fp32 3
    model_on fp32 6
    suite "checkpoints across layouts, killed ranks" 900 \
        sh dev/tests/kill.sh "$dir/train_moe" "$dir/dev/tests/reshard"
}
full_faults() {
    prepare "for faults" -- train_moe && command -v strace > /dev/null 2>&1 &&
        suite "injected faults" 600 bash dev/tests/faults.sh "$dir/train_moe" 40
}
# valgrind 3.19 knows no AVX-512. It sees uninitialised memory, which the sanitizers do not.
full_valgrind() {
    command -v valgrind > /dev/null 2>&1 || return
    prepare "for valgrind" MARCH=-march=x86-64-v3 MPI=off OPENMP=off -- train_moe || return
    chosen "valgrind: a short training run" || return
    begin=$(seconds)
    valgrind -q --error-exitcode=9 "$dir/train_moe" --model dev/fixtures/parallel \
        --train dev/fixtures/parallel/tokens.bin --seq-len 16 --batch 4 --micro-batch 2 --steps 3 \
        --optimizer adamw8bit --recompute moe --z-coef 0.001 > "$log" 2>&1
    status=$?
    if [ $status = 0 ] && ! grep -q '^==' "$log"; then
        echo "1 passed, 0 failed" >> "$log"
    else
        cat "$log"
        echo "0 passed, 1 failed" >> "$log"
    fi
    count "valgrind: a short training run" 0
}

# ---- make test-nightly --------------------------------------------------------------------------
nightly() {
    # shellcheck disable=SC2086
    if prepare debug DEBUG=1 -- train_moe test_moe model/test_checkpoint dev/tests/test_cli \
        $RANKS; then
        export ASAN_OPTIONS=detect_leaks=0
        checkpoint debug
        model debug
        command_line debug
        [ -z "$ranks" ] || edges_on debug 4 --quick
        unset ASAN_OPTIONS
    fi
    prepare "no BLAS" BLAS=off -- test_moe && model "no BLAS"
    prepare "no OpenMP" OPENMP=off -- test_moe && model "no OpenMP"
    prepare "nothing optional" BLAS=off OPENMP=off MPI=off -- train_moe dev/tests/test_cli &&
        command_line "nothing optional"
    # shellcheck disable=SC2086
    prepare "fp32, several ranks" -- test_moe $RANKS && [ -n "$ranks" ] || return
    dispatchers fp32 8
    model_on fp32 8
    edges_on fp32 4
    prepare fp64 PRECISION=fp64 -- test_moe && model_on fp64 4
}

case $what in
test) test_all ;;
full)
    full_sanitizers
    full_compilers
    full_bf16
    full_ranks
    full_faults
    full_valgrind
    ;;
nightly) nightly ;;
esac
[ -n "$LIST" ] && exit 0
[ ! -s "$bad" ] || {
    echo "==== failed:"
    cat "$bad"
}
echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]

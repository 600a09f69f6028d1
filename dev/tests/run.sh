#!/bin/sh
# Builds and runs test programs one after another, forwards what they say, and ends with 'N passed, N failed' over all of them: what make test and make test-full call.
#   dev/tests/run.sh test      every part on this machine: kernels, data, checkpoints, the model in three precisions, the command line, and with MPI 2 and 4 ranks
#   dev/tests/run.sh full      what takes longer: sanitizers, other compilers and missing libraries, 3, 6 and 8 ranks, valgrind
# A program is a failure by itself when it ends without its closing line, with a status that contradicts it, or not at all within its time. Exit status 1 where anything failed.
# LIST=1 only prints the suites; ONLY=word runs those whose title has the word in it.
cd "$(dirname "$0")/../.." || exit 1
what=${1:-test}
case $what in test|full) ;; *) echo "usage: dev/tests/run.sh test|full" >&2; exit 2 ;; esac
jobs=$(nproc 2> /dev/null || echo 2)
passed=0 failed=0
log=$(mktemp) bad=$(mktemp)      # bad: what failed, said once more above the closing line
trap 'rm -f "$log" "$bad"' EXIT
unset MAKEFLAGS MAKELEVEL MFLAGS
cc=${CC:-cc}

mk() { make --no-print-directory -s CC="$cc" "$@"; }
chosen() { [ -n "$LIST" ] && echo "$1"; [ -z "$LIST" ] && case "$1" in *"$ONLY"*) : ;; *) false ;; esac; }
seconds() { date +%s; }

# count TITLE STATUS: adds the closing line in $log
count() {
    line=$(grep -E '(^|: )[0-9]+ passed, [0-9]+ failed$' "$log" | tail -1)
    p=$(echo "$line" | sed -n 's/.*\(^\|[: ]\)\([0-9][0-9]*\) passed.*/\2/p')
    f=$(echo "$line" | sed -n 's/.* \([0-9][0-9]*\) failed$/\1/p')
    if [ -z "$line" ]; then echo "---- $1: no closing line, exit status $2"; p=0 f=1
    elif [ "$2" != 0 ] && [ "$f" = 0 ]; then echo "---- $1: exit status $2 in spite of its closing line"; f=1
    fi
    passed=$((passed + p)) failed=$((failed + f))
    echo "---- $1: $p passed, $f failed, $(($(seconds) - begin)) s"
    [ "$f" = 0 ] || { echo "---- $1: exit status $2"; grep FAIL "$log" || tail -15 "$log"; } >> "$bad"
}
# suite TITLE LIMIT COMMAND...: one program, at most LIMIT seconds
suite() {
    title=$1 limit=$2
    shift 2
    chosen "$title" || return 0
    echo "---- $title"
    begin=$(seconds)
    { timeout --kill-after=10 "$limit" "$@" 2>&1 < /dev/null; echo "$?" > "$log.status"; } | tee "$log"
    status=$(cat "$log.status")
    rm -f "$log.status"
    count "$title" "$status"
}
# prepare TITLE VARIABLES... -- TARGETS...: builds; the folder of that variant into $dir. Targets without a slash in front are files of that folder.
prepare() {
    title=$1 variables='' targets=''
    shift
    while [ "$1" != -- ]; do variables="$variables $1"; shift; done
    shift
    # shellcheck disable=SC2086   variables and targets are words
    dir=$(mk $variables show-build)
    [ -n "$LIST" ] && return 0
    for t; do targets="$targets $dir/$t"; done
    begin=$(seconds)
    # shellcheck disable=SC2086
    if make --no-print-directory -j "$jobs" -s CC="$cc" $variables $targets > "$log" 2>&1; then echo "---- build $title: $dir, $(($(seconds) - begin)) s"; return 0; fi
    { echo "---- build $title FAILED:"; tail -30 "$log"; } | tee -a "$bad"
    failed=$((failed + 1))
    return 1
}
launcher() { sh dev/mpirun.sh "$1"; }
kernels() { suite "$1 kernels" 300 "$dir/kernels/test_kernels"; suite "$1 experts" 300 "$dir/kernels/test_experts"; suite "$1 optimizer" 300 "$dir/kernels/test_optimizer"; suite "$1 bf16 products" 300 "$dir/kernels/test_gemm_bf16"; }
KERNELS="kernels/test_kernels kernels/test_experts kernels/test_optimizer kernels/test_gemm_bf16"
script=; command -v python3 > /dev/null 2>&1 && script=data/tokenize.py

if [ "$what" = test ]; then
    ranks=
    # shellcheck disable=SC2086
    if prepare fp32 -- train_moe test_moe $KERNELS data/test_data model/test_checkpoint dev/tests/test_cli; then
        plain=$dir
        case $dir in *-mpi*) [ -n "$(launcher 2)" ] && ranks=1 ;; esac
        kernels fp32
        suite data 120 "$dir/data/test_data" $script
        [ -z "$script" ] || suite "data tokenize.py" 200 "${PYTHON:-python3}" data/test_tokenize.py
        [ -z "$script" ] || suite "data plots, exports, page" 300 "${PYTHON:-python3}" dev/tests/test_tools.py
        suite checkpoint 300 "$dir/model/test_checkpoint"
        suite "model fp32" 600 "$dir/test_moe"
        suite "naive model" 120 env CC="$cc" sh dev/tests/test_naive.sh "$dir/train_moe"
        suite "command line" 900 "$dir/dev/tests/test_cli" "$dir/train_moe"
    fi
    # shellcheck disable=SC2086
    if prepare fp64 PRECISION=fp64 -- test_moe $KERNELS; then
        kernels fp64
        suite "model fp64" 600 "$dir/test_moe"
    fi
    # shellcheck disable=SC2086
    if prepare bf16 PRECISION=bf16 -- test_moe $KERNELS; then
        kernels bf16
        suite "model bf16" 600 "$dir/test_moe"
    fi
    # shellcheck disable=SC2046
    if [ -n "$ranks" ] && prepare "fp32, several ranks" -- parallel/test_comm parallel/test_dispatch dev/tests/edge; then
        suite "communication" 600 env MPIRUN="$(GRACE=1 sh dev/mpirun.sh 2 | sed 's/ -np 2$//') --oversubscribe" sh parallel/test_comm.sh "$plain/parallel/test_comm" quick
        suite "dispatchers" 300 sh parallel/test_dispatch.sh "$plain/parallel/test_dispatch" 1 2 4
        suite "model on 2 ranks" 300 $(launcher 2) "$plain/test_moe"
        suite "model on 4 ranks" 600 $(launcher 4) "$plain/test_moe"
        suite "edges on 2 ranks" 300 $(launcher 2) "$plain/dev/tests/edge" --quick
        suite "command line, several ranks" 300 "$plain/dev/tests/test_cli" "$plain/train_moe" --mpirun "$(launcher 4 | sed 's/ -np 4$//')"
    else [ -n "$LIST" ] || [ -n "$ranks" ] || echo "---- no MPI here: several ranks are not tested (make doctor says what is missing)"
    fi
else
    # Sanitizers: ASan, UBSan, memory filled with NaN. Leaks are looked for where our own code is alone; MPI and a process that dies on purpose keep theirs.
    # shellcheck disable=SC2086
    if prepare debug DEBUG=1 -- train_moe test_moe $KERNELS data/test_data model/test_checkpoint dev/tests/test_cli parallel/test_comm parallel/test_dispatch dev/tests/edge; then
        kernels debug
        ASAN_OPTIONS=detect_leaks=0
        export ASAN_OPTIONS
        suite "debug data" 300 "$dir/data/test_data" $script
        suite "debug checkpoint" 600 "$dir/model/test_checkpoint"
        suite "debug model" 900 "$dir/test_moe"
        suite "debug command line" 1200 "$dir/dev/tests/test_cli" "$dir/train_moe"
        # shellcheck disable=SC2046
        case $dir in *-mpi*) if [ -n "$(launcher 2)" ]; then
            suite "debug dispatchers" 600 sh parallel/test_dispatch.sh "$dir/parallel/test_dispatch" 2 3
            suite "debug model on 2 ranks" 600 $(launcher 2) "$dir/test_moe"
            suite "debug edges on 4 ranks" 900 $(launcher 4) "$dir/dev/tests/edge" --quick
        fi ;; esac
        unset ASAN_OPTIONS
    fi
    prepare "fp32 without MPI, leaks looked for" DEBUG=1 MPI=off -- test_moe && suite "debug model without MPI" 900 "$dir/test_moe"
    # shellcheck disable=SC2086
    if command -v clang > /dev/null 2>&1; then
        host=$cc cc=clang
        prepare clang WERROR=-Werror -- train_moe test_moe $KERNELS && { kernels clang; suite "clang model" 600 "$dir/test_moe"; }
        cc=$host
        mk show-build > /dev/null        # what was detected is the usual compiler's again
    fi
    prepare "no BLAS" BLAS=off -- test_moe && suite "model without BLAS" 600 "$dir/test_moe"
    prepare "no OpenMP" OPENMP=off -- test_moe && suite "model without OpenMP" 600 "$dir/test_moe"
    prepare "nothing optional" BLAS=off OPENMP=off MPI=off -- train_moe test_moe dev/tests/test_cli &&
        { suite "model with nothing optional" 600 "$dir/test_moe"; suite "command line with nothing optional" 900 "$dir/dev/tests/test_cli" "$dir/train_moe"; }
    prepare "fp32, several ranks" -- train_moe test_moe parallel/test_comm parallel/test_dispatch dev/tests/edge dev/tests/reshard dev/tests/test_cli
    # shellcheck disable=SC2046
    case $dir in *-mpi*) if [ -n "$(launcher 2)" ]; then
        plain=$dir
        suite "communication, all" 1200 env MPIRUN="$(GRACE=1 sh dev/mpirun.sh 2 | sed 's/ -np 2$//') --oversubscribe" sh parallel/test_comm.sh "$dir/parallel/test_comm"
        suite "dispatchers, more ranks" 900 sh parallel/test_dispatch.sh "$dir/parallel/test_dispatch" 3 6 8
        suite "model through the transport on 1 rank" 900 "$dir/test_moe" --force-comm
        for n in 3 6 8; do suite "model on $n ranks" 900 $(launcher $n) "$plain/test_moe"; done
        suite "edges on 4 ranks" 900 $(launcher 4) "$plain/dev/tests/edge"
        suite "checkpoints across layouts, killed ranks" 900 sh dev/tests/kill.sh "$plain/train_moe" "$plain/dev/tests/reshard"
        prepare fp64 PRECISION=fp64 -- test_moe && suite "model fp64 on 4 ranks" 900 $(launcher 4) "$dir/test_moe"
        prepare bf16 PRECISION=bf16 -- test_moe && suite "model bf16 on 4 ranks" 900 $(launcher 4) "$dir/test_moe"
    fi ;; esac
    if prepare "for faults" -- train_moe && command -v strace > /dev/null 2>&1; then
        suite "injected faults" 600 bash dev/tests/faults.sh "$dir/train_moe" 40
    fi
    # valgrind 3.19 knows no AVX-512; it sees uninitialised memory, which the sanitizers do not
    if command -v valgrind > /dev/null 2>&1 && prepare "for valgrind" MARCH=-march=x86-64-v3 MPI=off OPENMP=off -- train_moe && chosen "valgrind"; then
        begin=$(seconds)
        valgrind -q --error-exitcode=9 "$dir/train_moe" --model dev/fixtures/parallel --train dev/fixtures/parallel/tokens.bin --seq-len 16 --batch 4 --micro-batch 2 --steps 3 \
            --optimizer adamw8bit --recompute moe --z-coef 0.001 > "$log" 2>&1
        status=$?
        if [ $status = 0 ] && ! grep -q '^==' "$log"; then echo "1 passed, 0 failed" >> "$log"; else cat "$log"; echo "0 passed, 1 failed" >> "$log"; fi
        count "valgrind: a short training run" 0
    fi
fi
[ -n "$LIST" ] && exit 0
[ ! -s "$bad" ] || { echo "==== failed:"; cat "$bad"; }
echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]

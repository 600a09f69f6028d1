#!/bin/sh
# Fuzzes each parser from its seeds (corpus/PARSER, small files of each kind), as many at a time as
# there are cores.
#   dev/fuzz/run.sh PARSER...     SECONDS_EACH: time for each (default 30); RUNS: inputs instead of
#                                 a time.
#                                 ONLY=PARSER: that one. The last line is 'N passed, N failed', one
#                                 check a parser.
# A crash, a sanitizer report, an input that takes more than a second or a process above 256 MB is a
# failure; the input lies in build/fuzz/found and is run again by: build/fuzz/fuzz-PARSER FILE
cd "$(dirname "$0")/../.." || exit 1
unset MAKEFLAGS MAKELEVEL MFLAGS

# one PARSER: fuzzes it and prints one line, or what was found
one() {
    log=$(mktemp)
    corpus=build/fuzz/corpus/$1
    mkdir -p "$corpus"
    cp dev/fuzz/corpus/"$1"/* "$corpus"
    limit=-max_total_time=${SECONDS_EACH:-30}
    [ -z "${RUNS:-}" ] || limit=-runs=$RUNS
    dictionary=
    [ ! -f "dev/fuzz/$1.dict" ] || dictionary=-dict=dev/fuzz/$1.dict
    # The memory limit is the program's own (fuzz.c): that of libFuzzer needs a thread.
    # shellcheck disable=SC2086   an absent dictionary is no word
    if build/fuzz/fuzz-"$1" "$limit" $dictionary -timeout=60 -rss_limit_mb=0 \
        -malloc_limit_mb=256 -max_len=65536 -print_final_stats=1 -verbosity=1 \
        -artifact_prefix=build/fuzz/found/"$1"- "$corpus" > "$log" 2>&1; then
        echo "ok   $1: $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") inputs," \
            "peak $(sed -n 's/^stat::peak_rss_mb: *//p' "$log") MB"
    else
        echo "FAIL $1"
        grep -aE 'ERROR|more than|runtime error|ALARM|Test unit|die outside|#[0-9] ' "$log" |
            head -20
    fi
    rm -f "$log"
}
if [ "$1" = --one ]; then
    one "$2"
    exit
fi

command -v clang > /dev/null || {
    echo "fuzz: no clang here  hint: apt-get install clang libclang-rt-14-dev"
    echo "0 passed, 1 failed"
    exit 1
}
said=$(mktemp)
trap 'rm -f "$said"' EXIT
flags='-O1 -g -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=undefined'
flags="$flags -fno-omit-frame-pointer"
if ! make --no-print-directory -s -j "$(nproc)" CC=clang BACKEND=cpu MPI=off BLAS=off \
    OPENMP=off ROOT_BUILD=build/fuzz OPTIMIZE="$flags" fuzz-build > "$said" 2>&1; then
    tail -20 "$said"
    echo "0 passed, 1 failed"
    exit 1
fi
mkdir -p build/fuzz/found
ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=4:allocator_may_return_null=1
export ASAN_OPTIONS=$ASAN_OPTIONS:max_allocation_size_mb=512
for parser in ${ONLY:-"$@"}; do
    echo "$parser"
done | xargs -P "$(nproc)" -n 1 sh dev/fuzz/run.sh --one | tee "$said"
passed=$(grep -c '^ok ' "$said") failed=$(grep -c '^FAIL ' "$said")
echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]

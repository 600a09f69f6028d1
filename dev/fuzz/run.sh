#!/bin/sh
# Fuzzes each parser from its seeds (corpus/PARSER, small files of each kind).
#   dev/fuzz/run.sh PARSER...     SECONDS_EACH: time for each (default 30); RUNS: inputs instead of
#                                 a time.
#                                 ONLY=PARSER: that one. The last line is 'N passed, N failed', one
#                                 check a parser.
# A crash, a sanitizer report, an input that takes more than a second or a process above 256 MB is a
# failure; the input lies in build/fuzz/found and is run again by: build/fuzz/fuzz-PARSER FILE
cd "$(dirname "$0")/../.." || exit 1
unset MAKEFLAGS MAKELEVEL MFLAGS
command -v clang > /dev/null || { echo "fuzz: no clang here  hint: apt-get install clang libclang-rt-14-dev"; echo "0 passed, 1 failed"; exit 1; }
log=$(mktemp)
trap 'rm -f "$log"' EXIT
flags='-O1 -g -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer'
if ! make --no-print-directory -s -j "$(nproc)" CC=clang BACKEND=cpu MPI=off BLAS=off OPENMP=off ROOT_BUILD=build/fuzz OPTIMIZE="$flags" fuzz-build > "$log" 2>&1; then
    tail -20 "$log"; echo "0 passed, 1 failed"; exit 1
fi
mkdir -p build/fuzz/found
passed=0 failed=0
export ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=4:allocator_may_return_null=1:max_allocation_size_mb=512
for parser; do
    [ -z "${ONLY:-}" ] || [ "$ONLY" = "$parser" ] || continue
    corpus=build/fuzz/corpus/$parser
    mkdir -p "$corpus"
    cp dev/fuzz/corpus/"$parser"/* "$corpus"
    if [ -n "${RUNS:-}" ]; then limit=-runs=$RUNS; else limit=-max_total_time=${SECONDS_EACH:-30}; fi
    dictionary=
    [ ! -f "dev/fuzz/$parser.dict" ] || dictionary=-dict=dev/fuzz/$parser.dict
    # shellcheck disable=SC2086   an absent dictionary is no word
    if build/fuzz/fuzz-"$parser" "$limit" $dictionary -timeout=60 -rss_limit_mb=256 -max_len=65536 -print_final_stats=1 -verbosity=1 \
        -artifact_prefix=build/fuzz/found/"$parser"- "$corpus" > "$log" 2>&1; then
        passed=$((passed + 1))
        echo "ok   $parser: $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") inputs, peak $(sed -n 's/^stat::peak_rss_mb: *//p' "$log") MB"
    else
        failed=$((failed + 1))
        echo "FAIL $parser"
        grep -aE 'ERROR|more than a second|runtime error|ALARM|Test unit|die outside|#[0-9] ' "$log" | head -20
    fi
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]

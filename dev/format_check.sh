#!/bin/sh
# Checks the layout of the C and CUDA sources: what clang-format would change, lines that it cannot
# break, expressions with more than one `?:`, and invariants (README.md, "What holds it together")
# that are cited without their word.
#   dev/format_check.sh CLANG_FORMAT FILE...
# The last line is 'N passed, N failed', one check a file.
formatter=$1
shift
command -v "$formatter" > /dev/null || {
    echo "format-check: no $formatter here  hint: apt-get install clang-format-14"
    echo "0 passed, 1 failed"
    exit 1
}
passed=0 failed=0
for file; do
    if ! "$formatter" --dry-run -Werror "$file" > /dev/null 2>&1; then
        echo "FAIL $file: differs from its layout  hint: make format"
        failed=$((failed + 1))
    elif awk 'length > 100 { print "FAIL " FILENAME ":" FNR ": " length " columns"; bad = 1 }
              END { exit !bad }' "$file"; then
        failed=$((failed + 1))
    elif ! awk -f "$(dirname "$0")/conditionals.awk" "$file"; then failed=$((failed + 1))
    elif grep -nE '\bI(1[01]|[1-9])\b' "$file" | grep -vE '\bI(1[01]|[1-9]),( |$)' |
        sed "s|^|FAIL $file: an invariant without its word: |" | grep .; then
        failed=$((failed + 1))
    else passed=$((passed + 1))
    fi
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]

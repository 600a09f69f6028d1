#!/bin/sh
# Checks the layout of the sources. C and CUDA: what clang-format would change, lines that it cannot
# break, expressions with more than one `?:`, lines with two declarations and a value, invariants
# (README.md, "What holds it together") that are cited without their word. Other files, which are
# scripts and make files: no line above 100 columns.
#   dev/format_check.sh CLANG_FORMAT FILE...
# The last line is 'N passed, N failed', one check a file.
formatter=$1
shift
command -v "$formatter" > /dev/null || {
    echo "format-check: no $formatter here  hint: apt-get install clang-format-14"
    echo "0 passed, 1 failed"
    exit 1
}
# narrow FILE: says which lines are above 100 columns; status 1 where there is one
narrow() {
    awk 'length > 100 {
             print "FAIL " FILENAME ":" FNR ": " length " columns"
             bad = 1
         }
         END { exit bad }' "$1"
}
# formatted FILE: the checks of C and CUDA; says what is wrong, status 1
formatted() {
    if ! "$formatter" --dry-run -Werror "$1" > /dev/null 2>&1; then
        echo "FAIL $1: differs from its layout  hint: make format"
        return 1
    fi
    narrow "$1" || return 1
    awk -f "$(dirname "$0")/conditionals.awk" "$1" || return 1
    awk -f "$(dirname "$0")/declarations.awk" "$1" || return 1
    ! grep -nE '\bI(1[01]|[1-9])\b' "$1" | grep -vE '\bI(1[01]|[1-9]),( |$)' |
        sed "s|^|FAIL $1: an invariant without its word: |" | grep .
}
passed=0 failed=0
for file; do
    case $file in
    *.c | *.h | *.cu | *.cuh | *.cpp) formatted "$file" ;;
    *) narrow "$file" ;;
    esac && passed=$((passed + 1)) || failed=$((failed + 1))
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]

#!/bin/sh
# Runs test_dispatch under several numbers of ranks and adds up.
#   parallel/test_dispatch.sh build/test_dispatch [ranks...]       default: 1 2 3 4
# MPIRUN: the launcher (default mpirun). Exit status 1 where anything failed, was killed or did not
# report.
test=${1:?usage: test_dispatch.sh PROGRAM [ranks...]}
shift
[ $# -gt 0 ] || set -- 1 2 3 4
launcher=${MPIRUN:-mpirun}
options=
if $launcher --version 2> /dev/null | grep -q 'Open MPI'; then
    options="--oversubscribe --mca btl_vader_single_copy_mechanism none"
    [ "$(id -u)" = 0 ] && options="--allow-run-as-root $options"
fi
passed=0 failed=0
add() { # add TEXT: the last line that test_dispatch printed
    printf '%s\n' "$1" | grep -v '^test_dispatch,'
    line=$(printf '%s\n' "$1" | grep '^test_dispatch,')
    echo "${line:-test_dispatch: no result}"
    p=$(printf '%s' "$line" | sed -n 's/.*: \([0-9]*\) passed, \([0-9]*\) failed$/\1/p')
    f=$(printf '%s' "$line" | sed -n 's/.*: \([0-9]*\) passed, \([0-9]*\) failed$/\2/p')
    passed=$((passed + ${p:-0})) failed=$((failed + ${f:-1}))
}
OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
export OMP_NUM_THREADS OPENBLAS_NUM_THREADS
for ranks; do
    # shellcheck disable=SC2086   options are words
    add "$($launcher $options -np "$ranks" "$test" 2>&1)"
    [ "$ranks" = 1 ] && add "$($launcher $options -np 1 "$test" --force-comm 2>&1)"
done
echo "test_dispatch.sh: $passed passed, $failed failed"
[ "$failed" = 0 ]

#!/bin/sh
# Plants the bugs that other systems shipped, one at a time, and checks that a test fails for each: make test-mutations (nightly; about 40 minutes on 2 cores).
#   dev/mutations/run.sh [NAME-PART]       only mutations whose name contains it
# dev/mutations/list.txt holds blocks separated by lines of ----: a name, `file:`, `test:`, then the text to find (it must occur exactly once) between `<<<` and `===`, and what replaces it up to `>>>`.
# Each is built in a copy of the tree under build/mutants, so only the changed file compiles again. A mutant that survives, does not compile, or whose text is not found counts as failed.
set -u
top=$(cd "$(dirname "$0")/../.." && pwd)
copy=$top/build/mutants/tree
only=${1:-}
mkdir -p "$copy"
(cd "$top" && git ls-files -z --cached --others --exclude-standard -- . ':!dev/cuemu' ':!dev/results' | xargs -0 tar cf - 2> /dev/null) | tar xf - -C "$copy"
cd "$copy" || exit 1
mkdir -p build
cp "$top/build/detected.mk" build/ 2> /dev/null
make -s test_moe > build/log 2>&1 || { cat build/log; echo "the unchanged tree does not build"; exit 1; }

# The test of a mutation: fails (status 1) when the mutant is caught; prints the first failed check.
run_test() {
    case $1 in
    one) timeout 300 ./test_moe ;;
    two) timeout 300 $(sh dev/mpirun.sh 2) ./test_moe ;;
    four) timeout 600 $(sh dev/mpirun.sh 4) ./test_moe ;;
    esac > build/out 2>&1
}

passed=0; failed=0
perl -0777 -ne 'for (split /^----\n/m) { next unless /\S/; my ($n) = /^name: (.*)$/m; my ($f) = /^file: (.*)$/m; my ($t) = /^test: (.*)$/m; print "$n\t$f\t$t\n"; }' dev/mutations/list.txt > build/names
while IFS="$(printf '\t')" read -r name file test; do
    case $name in *"$only"*) ;; *) continue ;; esac
    cp "$file" build/saved
    NAME="$name" perl -0777 -e '
        open F, "<", "dev/mutations/list.txt"; $all = <F>; close F;
        for (split /^----\n/m, $all) { next unless /^name: \Q$ENV{NAME}\E$/m; ($old, $new) = /^<<<\n(.*?)^===\n(.*?)^>>>$/ms; }
        chomp $old; chomp $new;
        open F, "<", $ARGV[0]; $text = <F>; close F;
        $n = () = $text =~ /\Q$old\E/g; exit 2 if $n != 1;
        $text =~ s/\Q$old\E/$new/; open F, ">", $ARGV[0]; print F $text;' "$file"
    status=$?
    if [ $status -ne 0 ]; then verdict="FAILED  $name: its text is not found exactly once in $file"
    elif ! make -s test_moe > build/log 2>&1; then verdict="FAILED  $name: does not compile: $(grep -m1 error build/log)"
    elif run_test $test; then verdict="FAILED  $name: SURVIVED the test '$test'"
    else verdict="ok      $name: $(grep -m1 -E 'FAILED|error:' build/out | cut -c1-150)"; fi
    case $verdict in ok*) passed=$((passed + 1)) ;; *) failed=$((failed + 1)) ;; esac
    printf '%4d %s\n' $((passed + failed)) "$verdict"
    cp build/saved "$file"
done < build/names
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]

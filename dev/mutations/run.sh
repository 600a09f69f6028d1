#!/bin/sh
# Plants mistakes one at a time and checks that a test fails for each: make test-mutations, the bugs
# that other systems shipped (nightly; about half an hour on 2 cores), and make test-mutations-cuda,
# mistakes of the CUDA backend, found by the emulator.
#   dev/mutations/run.sh LIST [PATTERN]    LIST: list.txt or kernels.txt of this folder; only
#                                          mutations whose name, file or test matches PATTERN (grep)
#   LIST=1 dev/mutations/run.sh ...        builds and runs nothing: says which of these mutations
#                                          find their text exactly once
# A list holds blocks separated by lines of ----: `name:`, `file:`, `test:`, then the text to find
# (it must occur exactly once) between `<<<` and `===`, and what replaces it up to `>>>`. White
# space in the text to find counts only where it separates two words, so a formatter may lay out the
# source differently. test: RANKS, NAME=VALUE... for the environment, then a command in
# which tests are named as their source without its .c, emulated ones as
# cuemu/MODE-PRECISION/PROGRAM.
# Each is built in a copy of the tree under build/mutants, so only the changed file compiles again.
# A mutant is caught when a check prints FAIL, the program ends with its own `error:`
# line, or a sanitizer or the emulator reports; the test is stopped there. So every test
# that is used must first pass on the unchanged tree. A mutant that survives, crashes or hangs
# without a word, does not compile, or whose text is not found counts as failed. The last line is 'N
# passed, N failed'.
set -u
top=$(cd "$(dirname "$0")/../.." && pwd)
copy=$top/build/mutants/tree
list=dev/mutations/$1 only=${2:-}
dry=${LIST:-} # read here: plant gives its perl a LIST of its own
# Prints name, file and test of every mutation of the list.
names() {
    perl -0777 -ne '
        for (split /^----\n/m) {
            next unless /\S/;
            my ($n) = /^name: (.*)$/m;
            my ($f) = /^file: (.*)$/m;
            my ($t) = /^test: (.*)$/m;
            print "$n\t$f\t$t\n";
        }' "$list"
}
# Plants the mutation NAME of LIST in FILE, or only looks for its text where DRY is set. The status
# is 2 where the text is not found exactly once.
plant() {
    NAME="$1" LIST="$list" DRY="$dry" perl -0777 -e '
        open F, "<", $ENV{LIST};
        $all = <F>;
        close F;
        for (split /^----\n/m, $all) {
            next unless /^name: \Q$ENV{NAME}\E$/m;
            ($old, $new) = /^<<<\n(.*?)^===\n(.*?)^>>>$/ms;
        }
        s/\A\s+//, s/\s+\z// for $old, $new;
        @token = $old =~ /\w+|[^\w\s]/g;
        $old = quotemeta shift @token;
        $word = $old =~ /\w\z/;
        for (@token) {
            $old .= ($word && /^\w/ ? "\\s+" : "\\s*") . quotemeta;
            $word = /^\w/;
        }
        open F, "<", $ARGV[0] or exit 2;
        $text = <F>;
        close F;
        $n = () = $text =~ /$old/g;
        exit 2 if $n != 1;
        exit 0 if $ENV{DRY};
        $text =~ s/$old/$new/;
        open F, ">", $ARGV[0];
        print F $text;' "$2"
}
if [ -n "$dry" ]; then
    cd "$top" || exit 1
    names | grep -- "$only" | {
        found=0 lost=0
        while IFS="$(printf '\t')" read -r name file test; do
            if plant "$name" "$file"; then
                found=$((found + 1))
            else
                lost=$((lost + 1))
                echo "not found exactly once in $file: $name"
            fi
        done
        echo "$found passed, $lost failed"
        [ $lost -eq 0 ]
    }
    exit
fi
mkdir -p "$copy"
(
    cd "$top" &&
        git ls-files -z --cached --others --exclude-standard -- . ':!dev/results' |
        xargs -0 tar cf - 2> /dev/null
) | tar xf - -C "$copy"
cd "$copy" || exit 1
mkdir -p build
# objects that earlier runs left of these may be mutants, newer than the tree's files
[ -f build/mutated ] && sort -u -o build/mutated build/mutated && xargs touch -c < build/mutated
cp -p "$top/build/detected.mk" build/ 2> /dev/null
# objects of the same sources: their times are kept
if [ -d "$top/build/cuemu" ] && [ ! -d build/cuemu ]; then
    mkdir build/cuemu
    (
        cd "$top/build/cuemu" &&
            tar cf - source twins plain plain-bf16 plain-fp32 tsan tsan-bf16 2> /dev/null
    ) | tar xf - -C build/cuemu
fi
quiet() { "$@" > build/log 2>&1; }
if [ "$1" = kernels.txt ]; then # as dev/tests/test_cuemu_program.sh
    export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
    export OMPI_MCA_btl=self,vader OMPI_MCA_btl_vader_single_copy_mechanism=none
fi
export ASAN_OPTIONS=detect_leaks=0:use_sigaltstack=0 UBSAN_OPTIONS=halt_on_error=1
export TSAN_OPTIONS="halt_on_error=1 report_signal_unsafe=0 detect_deadlocks=0"
folder=$(make -s --eval='show-folder: ; @echo $(BUILD)' show-folder)

# The words of a test as a command: test_moe and ./train_moe lie at the root, other tests (words
# with a source) in the folder of this variant; `targets` are what `make` builds for it.
resolve() {
    line='' targets=''
    for word; do
        case $word in
        test_moe | ./train_moe) word=./${word#./} targets="$targets ${word#./}" ;;
        *.sh) word="sh $word" ;;
        *=*) word="env $word" ;;
        cuemu/*)
            word=build/$word
            targets="$targets $word"
            ;;
        *) [ -f "$word.c" ] && word=$folder/$word && targets="$targets $word" ;;
        esac
        line="$line $word"
    done
}
# RANKS WORDS...; once more, for ranks of the last mutant that are still ending can hold a program
# that is to be replaced
build() {
    shift
    resolve "$@"
    quiet make -s $targets || {
        sleep 2
        quiet make -s $targets
    }
}
# Runs RANKS WORDS... into build/out, until it ends, or says FAIL or error:, or 10 minutes have
# passed.
said='FAIL(ED)? |^error: |WARNING: ThreadSanitizer|ERROR: AddressSanitizer|runtime error: |^cuemu: '
run_test() {
    ranks=$1
    shift
    resolve "$@"
    launcher=
    [ "$ranks" = 1 ] || launcher=$(GRACE=1 sh dev/mpirun.sh "$ranks")
    : > build/out # the last mutant's words must not be heard again
    timeout 600 $launcher $line > build/out 2>&1 &
    pid=$!
    while kill -0 $pid 2> /dev/null; do
        if grep -qE "$said" build/out; then
            sleep 0.2
            kill $pid 2> /dev/null
            break
        fi
        sleep 0.3
    done
    wait $pid 2> /dev/null
    status=$?
    if grep -qE "$said" build/out; then return 1; fi
    return $((status ? 2 : 0))
}

passed=0
failed=0
names > build/names
grep -- "$only" build/names > build/chosen
cut -f3 build/chosen | sort -u > build/tests
[ "${UNCHANGED:-}" != passed ] || : > build/tests # the caller has seen the unchanged tree pass
while read -r test <&3; do
    set -- $test
    build "$@" || {
        cat build/log
        echo "the unchanged tree does not build"
        exit 1
    }
    run_test "$@" || {
        grep -E -m3 "$said" build/out || tail -3 build/out
        echo "the unchanged tree fails '$test'"
        exit 1
    }
done 3< build/tests
while IFS="$(printf '\t')" read -r name file test <&3; do
    set -- $test
    cp "$file" build/saved
    echo "$file" >> build/mutated
    plant "$name" "$file"
    status=$?
    if [ $status -ne 0 ]; then
        verdict="FAILED  $name: its text is not found exactly once in $file"
    elif ! build "$@"; then
        verdict="FAILED  $name: does not compile: $(grep -m1 error build/log)"
    else
        run_test "$@"
        case $? in
        1)
            heard=$(grep -m1 -E "$said" build/out | sed -E 's/^ *[0-9]* *FAIL(ED)? *//' |
                cut -c1-150)
            verdict="ok      $name: $heard"
            ;;
        0) verdict="FAILED  $name: SURVIVED $test" ;;
        *)
            heard=$(grep -v '^[- ]*$' build/out | tail -2 | tr '\n' ' ' | cut -c1-250)
            verdict="FAILED  $name: $test ended with status $status and no failed check: $heard"
            ;;
        esac
    fi
    case $verdict in
    ok*) passed=$((passed + 1)) ;;
    *) failed=$((failed + 1)) ;;
    esac
    printf '%4d %s\n' $((passed + failed)) "$verdict"
    cp build/saved "$file"
done 3< build/chosen
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]

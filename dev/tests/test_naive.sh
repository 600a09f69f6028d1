#!/bin/sh
# The naive model beside the real one, and its chapter beside its program.
#   dev/tests/test_naive.sh TRAIN_MOE      from the root of the repository; 'N passed, N failed'
# Needs the compiler (CC) and nothing else. TRAIN_MOE is an fp32 build.
train=$1
folder=$(mktemp -d) || exit 1
trap 'rm -rf "$folder"' EXIT
passed=0 failed=0
check() { # STATUS TEXT
    if [ "$1" = 0 ]; then
        passed=$((passed + 1))
        echo "ok    $2"
    else
        failed=$((failed + 1))
        echo "FAIL  $2"
    fi
}

${CC:-cc} -std=c11 -O2 -Wall -Wextra -Werror dev/naive/train_naive.c -lm -o "$folder/naive"
check $? "the naive model compiles with C11 and libm alone, without a warning"

# The same text, weights, order and optimizer: every loss and every gradient norm.
cat README.md model/README.md > "$folder/text.txt"
for optimizer in adamw sgd; do
    same="--steps 6 --batch 2 --seq-len 32 --lr 0.003 --weight-decay 0.1 --optimizer $optimizer"
    "$folder/naive" "$folder/text.txt" --config model/configs/tiny.json $same \
        > "$folder/naive.log"
    "$train" --init model/configs/tiny.json --train "$folder/text.txt" --shuffle off $same \
        --threads 1 --out "$folder/$optimizer" > "$folder/train.log" 2>&1
    sed -n 's/.*"loss":\([^,]*\),"aux":\([^,]*\),.*"grad_norm":\([^,]*\),.*/\1 \2 \3/p' \
        "$folder/$optimizer/log.jsonl" > "$folder/real"
    awk '{ print $4, $6, $8 }' "$folder/naive.log" | paste -d' ' - "$folder/real" > "$folder/both"
    worst=$(awk '
        {
            for (i = 1; i <= 3; i++) {
                d = ($i - $(i + 3)) / $(i + 3)
                if (d < 0) d = -d
                if (d > worst) worst = d
            }
            n++
        }
        END { printf "%.1e %d\n", worst, n == 6 && NF == 6 && worst < 3e-5 }' "$folder/both")
    what="$optimizer: loss, aux and gradient norm of 6 updates equal train_moe's"
    [ "${worst#* }" = 1 ]
    check $? "$what (worst ${worst% *})"
done

# Every line that the example prints stands in the chapter, in this order, and no other.
"$folder/naive" --example > "$folder/example"
awk '/^```$/ { inside = 0 } inside { print } /^```example$/ { inside = 1 }' \
    dev/naive/README.md > "$folder/page"
cmp -s "$folder/example" "$folder/page"
check $? "dev/naive/README.md shows what ./naive --example prints"
[ "$failed" = 0 ] || diff "$folder/example" "$folder/page" | head -5
sh dev/walk.sh --check > "$folder/walk"
check $? "the walk's files exist and its first day has at most 2,000 lines"
grep FAIL "$folder/walk"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]

#!/bin/sh
# Prints the way through the sources: files in reading order, lines of each, what to look for.
#   dev/walk.sh [--check]      --check: fails where a file is missing or the first day is longer
#                              than 2,000 lines, and ends with 'N passed, N failed'
cd "$(dirname "$0")/.." || exit 1
check=${1:-}
limit=2000 passed=0 failed=0

day() {
    [ -n "$check" ] || printf '\n%s\n\n' "$1"
    total=0
}
file() {
    if [ ! -f "$1" ]; then
        echo "FAIL $1 is named by dev/walk.sh and does not exist"
        failed=$((failed + 1))
        return
    fi
    lines=$(wc -l < "$1")
    total=$((total + lines)) passed=$((passed + 1))
    [ -n "$check" ] || printf '  %5d  %-30s %s\n' "$lines" "$1" "$2"
}
sum() { [ -n "$check" ] || printf '  %5d  lines\n' "$total"; }

[ -n "$check" ] ||
    echo "Before it: dev/naive/README.md, one MoE layer with six tokens, every number on the page."
day "First day: one update on one process, from main to the last CPU kernel"
file train_moe.cu "main parses the options and calls the command; look for the loop over updates"
file model/model.h "dimensions, the parameter table, what forward saves for backward"
file model/layer.c "one layer, forward and backward; the second half mirrors the first"
file model/step.c "one update: layers outside, micro-batches inside; who gathers and reduces when"
file kernels/kernels.h "every operation with its shapes: the table of contents of the mathematics"
file kernels/cpu/experts.c \
    "the experts as products over sorted rows: gather, multiply, weighted sum"
sum
if [ "$total" -gt $limit ]; then
    [ -z "$check" ] || echo "FAIL the first day has $total lines, more than $limit"
    failed=$((failed + 1))
else
    passed=$((passed + 1))
fi
day "Second day: the same update on many processes"
file parallel/grid.c "rank = (dp * FSDP + fsdp) * EP + ep, and the five groups that follow from it"
file parallel/fsdp.c "a block is gathered before its layer and reduced after its backward"
file parallel/dispatch.c "tokens to experts and back: two linear maps and their adjoints"
file parallel/comm.h "the collectives in start and wait form, which everything above calls"
sum
day "Third day: the same operations on a GPU (kernels/README.md first)"
file kernels/cuda/common.cuh "the rules of the folder"
file kernels/cuda/norm_rope.cu "a kernel that is bound by memory: one visit"
file kernels/cuda/router.cu "top-k in registers, a warp a token"
file kernels/cuda/experts.cu "the products of the experts with mma.sync"
file kernels/cuda/experts_hopper.cu "the same with TMA and wgmma (climb dev/kernels first)"
sum
[ -z "$check" ] || echo "$passed passed, $failed failed"
[ -z "$check" ] || [ "$failed" = 0 ]

#!/bin/bash
# Power cuts: what lies on the disk at a moment, without what only the page cache holds, must be a
# run that goes on.
#   dev/tests/power_cut.sh PROGRAM [CUTS]      needs root and ext4 (a loop device); nightly. Default
#                                              62 cuts.
# A run writes into an ext4 image; at a random moment it is stopped and the image is copied: the
# copy has what had reached the block device. Its journal is replayed (mount), and then: every
# published checkpoint verifies, log.jsonl holds every update up to the newest checkpoint, run.json
# is whole, and --resume goes on from it. The next cut continues from the copy.
cd "$(dirname "$0")/../.." || exit 1
program=$(realpath "${1:?usage: power_cut.sh PROGRAM [CUTS]}") cuts=${2:-62}
t=$(mktemp -d)
trap 'kill -9 $pid 2> /dev/null; umount "$t/disk" 2> /dev/null; rm -rf "$t"' EXIT
mkdir "$t/disk"
truncate -s 96M "$t/image"
[ "$(id -u)" = 0 ] && mkfs.ext4 -q "$t/image" && mount -o loop "$t/image" "$t/disk" || {
    echo "power_cut: needs root, ext4 and a loop device, left out"
    echo "0 passed, 0 failed"
    exit 0
}
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
head -c 20000 README.md > "$t/text.txt"
cat > "$t/micro.json" << 'J'
{"model_type": "qwen3_moe", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
 "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 256,
 "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "intermediate_size": 16,
 "max_position_embeddings": 64}
J
options=(--init "$t/micro.json" --train "$t/text.txt" --seq-len 16 --batch 4 --threads 1
    --save-every 3 --keep 2 --steps 1000000 --lr 0.001)
newest_step() { # the number of the newest published checkpoint, or nothing
    find "$t/disk/run/checkpoints" -maxdepth 1 -name 'step_*' 2> /dev/null |
        sed 's/.*_//' | sort -n | tail -1
}
passed=0 failed=0 empty=0 before=-1
for cut in $(seq "$cuts"); do
    "$program" "${options[@]}" --resume --out "$t/disk/run" > "$t/out" 2> "$t/err" &
    pid=$!
    sleep "$((RANDOM % 3)).$((RANDOM % 900 + 100))"
    kill -STOP $pid || {
        echo "FAIL cut $cut: the run had ended: $(head -1 "$t/err")"
        failed=$((failed + 1))
        break
    }
    cp --sparse=always "$t/image" "$t/copy"
    newest=$(newest_step)
    kill -9 $pid
    wait $pid 2> /dev/null
    umount "$t/disk"
    mv "$t/copy" "$t/image"
    mount -o loop "$t/image" "$t/disk" || {
        echo "FAIL cut $cut: the image does not mount"
        failed=$((failed + 1))
        break
    }
    why=
    for step in "$t"/disk/run/checkpoints/step_*; do
        [ -d "$step" ] || continue
        "$program" --verify "$step" > "$t/verify" 2>&1 || why="${step##*/}: $(head -1 "$t/verify")"
    done
    found=$(newest_step)
    [ -n "$found" ] || {
        found=-1
        empty=$((empty + 1))
    }
    [ "$found" -ge "$before" ] || why="the newest checkpoint was step $before and is step $found"
    [ "$found" = "${newest:--1}" ] || [ "$found" -ge "$((${newest:-0} - 3))" ] ||
        why="published: ${newest:-none}, on the disk: $found"
    if [ -z "$why" ] && [ "$found" -ge 0 ]; then
        why=$(
            python3 - "$t/disk/run" "$found" 2>&1 << 'P'
import json
import sys

run, newest = sys.argv[1], int(sys.argv[2])
steps = []
for line in open(run + "/log.jsonl"):
    if not line.endswith("\n"):
        break
    steps.append(json.loads(line)["step"])
json.load(open(run + "/run.json"))
missing = [s for s in range(1, newest + 1) if s not in steps]
if missing:
    print("log.jsonl lacks updates", missing[:5], "of", newest)
P
        )
    fi
    if [ -n "$why" ]; then
        failed=$((failed + 1))
        echo "FAIL cut $cut: $why"
    else
        passed=$((passed + 1))
    fi
    before=$found
done
echo "power cuts: $((passed + failed)), $empty of them before the first checkpoint," \
    "newest step at the end $before"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]

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
T=$(mktemp -d)
trap 'kill -9 $pid 2> /dev/null; umount "$T/disk" 2> /dev/null; rm -rf "$T"' EXIT
mkdir "$T/disk"
truncate -s 96M "$T/image"
[ "$(id -u)" = 0 ] && mkfs.ext4 -q "$T/image" && mount -o loop "$T/image" "$T/disk" || {
    echo "power_cut: needs root, ext4 and a loop device, left out"
    echo "0 passed, 0 failed"
    exit 0
}
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
. dev/tests/shell.sh
micro_model
# shellcheck disable=SC2206   words
options=($micro --save-every 3 --keep 2 --steps 1000000 --lr 0.001)
newest_step() { # the number of the newest published checkpoint, or nothing
    find "$T/disk/run/checkpoints" -maxdepth 1 -name 'step_*' 2> /dev/null |
        sed 's/.*_//' | sort -n | tail -1
}
passed=0 failed=0 empty=0 before=-1
for cut in $(seq "$cuts"); do
    "$program" "${options[@]}" --resume --out "$T/disk/run" > "$T/out" 2> "$T/err" &
    pid=$!
    sleep "$((RANDOM % 3)).$((RANDOM % 900 + 100))"
    kill -STOP $pid || {
        echo "FAIL cut $cut: the run had ended: $(head -1 "$T/err")"
        failed=$((failed + 1))
        break
    }
    cp --sparse=always "$T/image" "$T/copy"
    newest=$(newest_step)
    kill -9 $pid
    wait $pid 2> /dev/null
    umount "$T/disk"
    mv "$T/copy" "$T/image"
    mount -o loop "$T/image" "$T/disk" || {
        echo "FAIL cut $cut: the image does not mount"
        failed=$((failed + 1))
        break
    }
    why=
    for step in "$T"/disk/run/checkpoints/step_*; do
        [ -d "$step" ] || continue
        "$program" --verify "$step" > "$T/verify" 2>&1 || why="${step##*/}: $(head -1 "$T/verify")"
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
            python3 - "$T/disk/run" "$found" 2>&1 << 'P'
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

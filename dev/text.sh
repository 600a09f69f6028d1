#!/bin/sh
# Real text to learn from, without a network: writes DIR/train.txt and DIR/val.txt, the last
# sixteenth of every file held out.
#   sh dev/text.sh DIR [FILE]     FILE: a text; default: this repository's own sources and chapters,
#                                 in order of their names
cd "$(dirname "$0")/.." || exit 1
DIR=${1:?a folder} TEXT=$2
mkdir -p "$DIR" && rm -f "$DIR/train.txt" "$DIR/val.txt" || exit 1
if [ -n "$TEXT" ]; then
    [ -r "$TEXT" ] || {
        echo "error: TEXT=$TEXT cannot be read, hint: name a text file" >&2
        exit 1
    }
    echo "$TEXT"
else
    find . \( -name build -o -name runs -o -name results -o -name fixtures -o -name '.?*' \) \
        -prune -o -type f \( -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' -o -name '*.md' \
        -o -name '*.py' -o -name '*.sh' -o -name Makefile \) -print | LC_ALL=C sort
fi > "$DIR/files"
while read -r file; do
    bytes=$(wc -c < "$file")
    head -c $((bytes - bytes / 16)) "$file" >> "$DIR/train.txt"
    tail -c $((bytes / 16)) "$file" >> "$DIR/val.txt"
done < "$DIR/files"
echo "$(wc -l < "$DIR/files") files; $(wc -c < "$DIR/train.txt") bytes to learn from," \
    "$(wc -c < "$DIR/val.txt") held out; a byte is a token"

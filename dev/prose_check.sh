#!/bin/sh
# Checks the chapters: prose wrapped at 100 columns (tables, code and pictures excepted), no table
# cell above 160 characters, links to files that exist, and no mention of an invariant without its
# definition in README.md.
#   dev/prose_check.sh FILE...      the last line is 'N passed, N failed', one check a file
passed=0 failed=0
for file; do
    bad=$(awk '
        function say(text) { print FILENAME ":" FNR ": " text }
        /^```/ {
            code = !code
            next
        }
        code || /^    / || /^!\[/ { next }
        /^\|/ {
            n = split($0, cell, "|")
            for (i in cell)
                if (length(cell[i]) > 160) say("a table cell of " length(cell[i]) " characters")
            next
        }
        length > 100 { say(length " columns") }' "$file")
    folder=$(dirname "$file")
    for link in $(sed -n 's/.*](\([^)#:]*\)[)#].*/\1/p' "$file"); do
        [ -e "$folder/$link" ] || bad="$bad
$file: links to $link, which does not exist"
    done
    for tag in $(grep -owE 'I[0-9]+' "$file" | sort -u); do
        grep -q "^- \*\*$tag, " README.md || bad="$bad
$file: $tag is not defined in README.md"
    done
    if [ -n "$bad" ]; then
        echo "$bad" | sed '/^$/d; s/^/FAIL /'
        failed=$((failed + 1))
    else
        passed=$((passed + 1))
    fi
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]

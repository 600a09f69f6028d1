#!/bin/sh
# Draws the losses of a log.jsonl as text, with nothing but awk: '.' training loss (mean of the
# updates of a column), 'o' validation.
#   sh dev/curve.sh runs/first/log.jsonl [columns] [rows]
LOG=${1:?a log.jsonl, or the folder of a run}
[ -d "$LOG" ] && LOG=$LOG/log.jsonl
awk -v columns="${2:-72}" -v rows="${3:-14}" '
function value(key) {
    if (!match($0, "\"" key "\":[-+0-9.eE]+")) return ""
    return substr($0, RSTART + length(key) + 3, RLENGTH - length(key) - 3) + 0
}
{
    step = value("step")
    loss = value("loss")
    val = value("val_loss")
    if (loss != "") {
        n++
        at[n] = step
        train[n] = loss
    }
    if (val != "") {
        m++
        val_at[m] = step
        held[m] = val
    }
    if (step > last) last = step
    x = loss != "" ? loss : val
    if (x == "") next
    if (!seen || x > most) most = x
    if (!seen || x < least) least = x
    seen = 1
}
function row(x) { return most > least ? int((most - x) / (most - least) * (rows - 1) + 0.5) : 0 }
function column(s) { return last ? int(s / last * (columns - 1) + 0.5) : 0 }
END {
    if (!seen) {
        print "no loss in this log"
        exit 1
    }
    for (i = 1; i <= n; i++) {
        c = column(at[i])
        sum[c] += train[i]
        count[c]++
    }
    for (c in sum) mark[row(sum[c] / count[c]), c] = "."
    for (i = 1; i <= m; i++) mark[row(held[i]), column(val_at[i])] = "o"
    for (r = 0; r < rows; r++) {
        line = ""
        for (c = 0; c < columns; c++) line = line ((r, c) in mark ? mark[r, c] : " ")
        sub(/ +$/, "", line)
        printf "%7.3f |%s\n", most - (most - least) * r / (rows - 1), line
    }
    line = ""
    for (c = 0; c < columns; c++) line = line "-"
    printf "        +%s\n         update 0%*d\n", line, columns - 8, last
    if (n) printf "training loss    %.4f -> %.4f  (.)\n", train[1], train[n]
    if (m)
        printf "validation loss  %.4f -> %.4f  (o), %.1f %% of its first value\n", held[1],
            held[m], 100 * held[m] / held[1]
}' "$LOG"

# Prints every expression of the C, C++ and CUDA files given that has more than one `?:`. Arguments
# of a call and elements of an initialiser are expressions of their own. `count` is the number in
# the present expression and `most` the largest number that an earlier expression in the same
# brackets had, both for each depth of open brackets.
#   awk -f dev/conditionals.awk FILE...      status 1 if it printed anything
function open_bracket(c) {
    kind[++depth] = c
    count[depth] = most[depth] = 0
}
function end_expression() {
    if (count[depth] > 1 && !reported) {
        print "FAIL " FILENAME ":" FNR ": " count[depth] " ?: in one expression"
        found = reported = 1
    }
    if (count[depth] > most[depth]) most[depth] = count[depth]
    count[depth] = 0
}
function take(c) {
    if (c == "?") count[depth]++
    else if (c == "," || c == ";") end_expression()
    else if (c ~ /[[({@]/) open_bracket(c)
    else if (depth > 0) {
        end_expression()
        inner = most[depth]
        opened = kind[depth--]
        if (opened == "(" || opened == "[") count[depth] += inner
        else end_expression()  # a block, an initialiser, or the condition of a statement (@)
    }
    if (c == ";" || c == "}") reported = 0
}
FNR == 1 { depth = count[0] = most[0] = comment = directive = 0 }
{
    line = $0
    if (comment && !sub(/^.*\*\//, "", line)) next
    gsub(/\\[\\"']/, "", line)
    gsub(/"[^"]*"|'[^']*'/, "", line)
    gsub(/\/\*([^*]|\*[^\/])*\*\//, "", line)
    sub(/\/\/.*$/, "", line)
    comment = sub(/\/\*.*$/, "", line)
    if (line ~ /^[ \t]*#/ && !directive) {
        outside = depth
        directive = 1
        open_bracket("{")
    }
    gsub(/(^|[^A-Za-z0-9_])(if|for|while|switch) *(constexpr *)?\(/, "@", line)
    gsub(/[^][?,;(){}@]/, "", line)
    for (i = 1; i <= length(line); i++) take(substr(line, i, 1))
    if (directive && $0 !~ /\\$/) {
        end_expression()
        depth = outside
        directive = 0
    }
}
END { exit found }

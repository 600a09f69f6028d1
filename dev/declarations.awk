# Prints every line of the C, C++ and CUDA files given that declares two variables and gives one of
# them a value, or whose comma makes one statement of two. Dimensions are excepted: names of one or
# two letters that begin with a capital.
#   awk -f dev/declarations.awk FILE...      status 1 if it printed anything
BEGIN {
    name = "\\**[A-Za-z_][A-Za-z_0-9]*"
    declares = "^ *(static |const |unsigned )*[A-Za-z_][A-Za-z_0-9]* \\**[a-z][A-Za-z_0-9]* = .*;$"
    assigns = "^ *[A-Za-z_*][A-Za-z_0-9.>-]* *[-+*/|&^]?= .*;$"
}
{
    line = $0
    sub(/\/\/.*/, "", line)
    sub(/ +$/, "", line)
    if (line ~ /^ *\(void\)[A-Za-z_0-9]+,/) told("two statements")
    if (line ~ /^ *(return|else|case|goto|typedef|using) /) next
    # What stands in brackets or quotes holds commas of its own.
    while (gsub(/"[^"]*"|'[^']*'|\([^()]*\)|\[[^][]*\]|\{[^{}]*\}|<[^<>;=]*>/, "", line)) continue
    if (line ~ declares && line ~ ", *" name "( =|,|;)") told("two declarations and a value")
    if (line ~ assigns && line ~ ", *" name "[.>A-Za-z_0-9-]* *[-+*/|&^]?= ") told("two statements")
}
function told(what) {
    print "FAIL " FILENAME ":" FNR ": " what " in one line"
    found = 1
}
END { exit found }

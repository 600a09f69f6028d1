# Prints every line of the C, C++ and CUDA files given that declares two variables and gives one of
# them a value. Dimensions are excepted: names of one or two letters that begin with a capital.
#   awk -f dev/declarations.awk FILE...      status 1 if it printed anything
{
    line = $0
    sub(/\/\/.*/, "", line)
    if (line !~ /^ *(static |const |unsigned )*[A-Za-z_][A-Za-z_0-9]* \**[a-z][A-Za-z_0-9]* = .*;$/)
        next
    if (line ~ /^ *(return|else|case|goto|typedef|using) /) next
    # What stands in brackets or quotes holds commas of its own.
    while (gsub(/"[^"]*"|'[^']*'|\([^()]*\)|\[[^][]*\]|\{[^{}]*\}|<[^<>;=]*>/, "", line)) continue
    if (line ~ /, *\**[A-Za-z_][A-Za-z_0-9]*( =|,|;)/) {
        print "FAIL " FILENAME ":" FNR ": two declarations and a value in one line"
        found = 1
    }
}
END { exit found }

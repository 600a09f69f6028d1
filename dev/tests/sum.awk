# Sums the closing lines 'N passed, N failed' of the files given, of each its last one, and prints
# one itself. A file without such a line is one failure. Status 1 where anything failed.
/(^|: )[0-9]+ passed, [0-9]+ failed$/ {
    passed[FILENAME] = $(NF - 3)
    failed[FILENAME] = $(NF - 1)
}
END {
    for (i = 1; i < ARGC; i++) {
        f = ARGV[i]
        if (!(f in passed)) {
            print f ": no closing line"
            bad++
        }
        good += passed[f]
        bad += failed[f]
    }
    print good + 0 " passed, " bad + 0 " failed"
    exit bad > 0
}

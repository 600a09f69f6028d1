#!/bin/sh
# Compiles every kernel and fails where one keeps something in local memory, as spilled registers or
# as an array that is indexed by a variable: in a loop that is limited by memory or tensor cores,
# that is traffic that nobody planned. Fails too where ptxas serializes wgmma or ignores setmaxnreg.
#   dev/check_spills.sh [ARCH...]        default: 90a 80; PRECISIONS: default "bf16 fp32"
# make check-spills runs it. It needs no GPU.
# dev/spills.txt lists the exceptions: kernel (a part of its name), precision, architecture (* =
# any), most bytes, and the reason, which must be there.
# Prints the kernels with most registers, each use of local memory, and 'N passed, N failed' (a
# kernel counts once per precision and architecture).
cd "$(dirname "$0")/.." || exit 1
: "${NVCC:=nvcc}" "${PRECISIONS:=bf16 fp32}"
[ $# -gt 0 ] || set -- 90a 80
command -v "$NVCC" > /dev/null 2>&1 || {
    echo "error: no nvcc  hint: PATH=/usr/local/cuda/bin:\$PATH, or NVCC=..."
    exit 1
}
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
filt=$(command -v cu++filt || command -v c++filt || echo cat)

for arch in "$@"; do
    for precision in $PRECISIONS; do
        for file in kernels/cuda/*.cu parallel/comm_nccl.cu; do
            if ! "$NVCC" -std=c++17 -O3 -gencode=arch=compute_"$arch",code=sm_"$arch" \
                $([ "$precision" = bf16 ] && echo -DMOE_BF16) -Xptxas -v -cubin \
                -o "$dir/cubin" "$file" > "$dir/log" 2>&1; then
                grep -iE 'error|fatal' "$dir/log" | head -5
                echo "FAIL $file does not compile for sm_$arch, $precision"
                echo "$arch $precision 0 1 $file: does not compile" >> "$dir/all"
                continue
            fi
            # What ptxas only remarks on: wgmma that it could not keep asynchronous (C7510), a
            # register budget that it ignored (C7508)
            remark=$(grep -m1 -E 'wgmma.*serialized|setmaxnreg.*ignored' "$dir/log" | cut -c1-200)
            if [ -n "$remark" ]; then
                echo "FAIL $file, sm_$arch, $precision: $remark"
                echo "$arch $precision 0 1 $file: $remark" >> "$dir/all"
            fi
            # ptxas names the function, then its stack frame and spills, then its registers
            awk -v where="$arch $precision" '
                function bytes(unit) {
                    return match($0, "[0-9]+ bytes " unit) ? substr($0, RSTART) + 0 : 0
                }
                /Compiling entry function/ {
                    split($0, q, "\047")
                    name = q[2]
                    local = 0
                }
                /bytes stack frame/ {
                    local = bytes("stack frame")
                    if (bytes("spill stores") > local) local = bytes("spill stores")
                    if (bytes("spill loads") > local) local = bytes("spill loads")
                }
                /Used [0-9]+ registers/ {
                    match($0, /Used [0-9]+/)
                    print where, substr($0, RSTART + 5, RLENGTH - 5), local, name
                }' "$dir/log" >> "$dir/all"
        done
    done
done
$filt < "$dir/all" > "$dir/named"

echo "most registers (a thread has 255 at most):"
sort -k3,3nr "$dir/named" | head -5 | sed 's/^/    /' | cut -c1-160
awk -v list=dev/spills.txt '
    function matches(pattern, value) {
        return pattern == "*" || pattern == value
    }
    BEGIN {
        while ((getline line < list) > 0) {
            if (line ~ /^#/ || line !~ /[^ ]/) continue
            n++
            split(line, f, " ")
            kernel[n] = f[1]
            precision[n] = f[2]
            arch[n] = f[3]
            most[n] = f[4]
            if (f[5]) continue
            print "FAIL dev/spills.txt: no reason for " f[1]
            failed++
        }
    }
    {
        ok = $4 == 0
        for (i = 1; i <= n && !ok; i++)
            if (index($0, kernel[i]) && matches(precision[i], $2) && matches(arch[i], $1) &&
                $4 <= most[i])
                ok = used[i] = 1
        if (ok) {
            passed++
            next
        }
        failed++
        name = $0
        sub(/^[^ ]+ [^ ]+ [^ ]+ [^ ]+ /, "", name)
        print "FAIL sm_" $1 " " $2 ": " $4 " bytes of local memory (" $3 " registers): " \
            substr(name, 1, 120)
    }
    END {
        for (i = 1; i <= n; i++)
            if (!used[i])
                print "note: dev/spills.txt: " kernel[i] " " precision[i] " " arch[i] \
                    " is not needed here"
        print passed + 0 " passed, " failed + 0 " failed"
        exit failed > 0
    }' "$dir/named"

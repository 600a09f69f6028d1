#!/bin/sh
# Compiles every kernel and fails where ptxas spills registers to memory: in a loop that is limited by memory or tensor cores, each spill is traffic that nobody planned.
#   dev/check_spills.sh [ARCH...]        default: 90a 80.   PRECISIONS: default "bf16 fp32".  make check-spills runs it; no GPU needed
# dev/spills.txt lists the exceptions: kernel (a part of its name), precision, architecture (* = any), most bytes, and the reason, which must be there.
# Prints the kernels with most registers, each spill, and 'N passed, N failed' (a kernel counts once per precision and architecture).
cd "$(dirname "$0")/.." || exit 1
: "${NVCC:=nvcc}" "${PRECISIONS:=bf16 fp32}"
[ $# -gt 0 ] || set -- 90a 80
command -v "$NVCC" > /dev/null 2>&1 || { echo "error: no nvcc  hint: PATH=/usr/local/cuda/bin:\$PATH, or NVCC=..."; exit 1; }
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
filt=$(command -v cu++filt || command -v c++filt || echo cat)

for arch in "$@"; do
    for precision in $PRECISIONS; do
        for file in kernels/cuda/*.cu parallel/comm_nccl.cu; do
            if ! "$NVCC" -std=c++17 -O3 -gencode=arch=compute_"$arch",code=sm_"$arch" $([ "$precision" = bf16 ] && echo -DMOE_BF16) -Xptxas -v -cubin -o "$dir/cubin" "$file" > "$dir/log" 2>&1; then
                grep -iE 'error|fatal' "$dir/log" | head -5
                echo "FAIL $file does not compile for sm_$arch, $precision"
                echo "$arch $precision 0 1 $file: does not compile" >> "$dir/all"
                continue
            fi
            # ptxas names the function, then its stack and spills, then its registers
            awk -v where="$arch $precision" '
                /Compiling entry function/ { split($0, q, "\047"); name = q[2]; spill = 0 }
                /bytes spill stores/ { match($0, /[0-9]+ bytes spill stores/); s = substr($0, RSTART); split(s, a, " "); match($0, /[0-9]+ bytes spill loads/); t = substr($0, RSTART); split(t, b, " ")
                    spill = a[1] > b[1] ? a[1] : b[1] }
                /Used [0-9]+ registers/ { match($0, /Used [0-9]+/); print where, substr($0, RSTART + 5, RLENGTH - 5), spill, name }' "$dir/log" >> "$dir/all"
        done
    done
done
$filt < "$dir/all" > "$dir/named"

echo "most registers (a thread has 255 at most):"
sort -k3,3nr "$dir/named" | head -5 | sed 's/^/    /' | cut -c1-160
awk -v list=dev/spills.txt '
    BEGIN { while ((getline line < list) > 0) if (line !~ /^#/ && line ~ /[^ ]/) { n++; split(line, f, " "); kernel[n] = f[1]; precision[n] = f[2]; arch[n] = f[3]; most[n] = f[4]
                if (!f[5]) { print "FAIL dev/spills.txt: no reason for " f[1]; failed++ } } }
    { ok = $4 == 0
      for (i = 1; i <= n && !ok; i++)
          if (index($0, kernel[i]) && (precision[i] == "*" || precision[i] == $2) && (arch[i] == "*" || arch[i] == $1) && $4 <= most[i]) ok = used[i] = 1
      if (ok) passed++; else { failed++; name = $0; sub(/^[^ ]+ [^ ]+ [^ ]+ [^ ]+ /, "", name); print "FAIL sm_" $1 " " $2 ": " $4 " bytes spilled (" $3 " registers): " substr(name, 1, 120) } }
    END { for (i = 1; i <= n; i++) if (!used[i]) print "note: dev/spills.txt: " kernel[i] " " precision[i] " " arch[i] " is not needed here"
          print passed + 0 " passed, " failed + 0 " failed"; exit failed > 0 }' "$dir/named"

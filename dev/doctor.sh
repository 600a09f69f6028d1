#!/bin/sh
# What this machine can run and what stands in the way. Every line begins with
#   ok     there, and good
#   fine   absent or small, nothing to do
#   fix    costs you something: what to type follows
#   sh dev/doctor.sh [RANKS]        make doctor [NP=RANKS] runs it; RANKS defaults to 2
cd "$(dirname "$0")/.." || exit 1
CC=${CC:-cc} NP=${1:-2}
ok() { printf 'ok    %-10s %s\n' "$1" "$2"; }
fine() { printf 'fine  %-10s %s\n' "$1" "$2"; }
fix() {
    printf 'fix   %-10s %s\n      %-10s -> %s\n' "$1" "$2" "" "$3"
    fixes=$((fixes + 1))
}
has() { command -v "$1" > /dev/null 2>&1; }
first() { "$@" 2> /dev/null | head -1; }
fixes=0
FOUND=$(mktemp) && DIR=$(mktemp -d) || exit 1
trap 'rm -rf "$FOUND" "$DIR"' EXIT
sh dev/detect.sh "$CC" | sed -n 's/^\([A-Z_]*\) := *\(.*\)$/\1="\2"/p' > "$FOUND"
. "$FOUND"

# ---- machine ------------------------------------------------------------------------------------
distribution=$([ -r /etc/os-release ] && . /etc/os-release && printf ', %s' "$PRETTY_NAME")
ok system "$(uname -sm) $(uname -r)$distribution"
threads=$(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN)
cores=$(lscpu -p=core,socket 2> /dev/null | grep -v '^#' | sort -u | wc -l)
[ "$cores" -ge 1 ] 2> /dev/null || cores=$threads
model=$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo 2> /dev/null | head -1)
simd=$(grep -o -m1 -w -e avx512f /proc/cpuinfo 2> /dev/null ||
    grep -o -m1 -w -e avx2 /proc/cpuinfo 2> /dev/null || echo "no AVX2")
simd=$(echo "$simd" | head -1)
ok cores "$cores cores, $threads hardware threads allowed, ${model:-unknown model}, $simd"
quota=$(awk '$1 != "max" { printf "%.1f", $1 / $2 }' /sys/fs/cgroup/cpu.max 2> /dev/null)
[ -z "$quota" ] ||
    fix cores "this container may use $quota cores, whatever the kernel shows" \
        "give --threads so that ranks x threads <= $quota"
load=$(cut -d' ' -f1 /proc/loadavg 2> /dev/null || echo 0)
if awk "BEGIN { exit !($load > 0.5 * $threads) }"; then
    fix load "load average $load on $threads threads: others are computing here" \
        "measure nothing now"
else
    ok load "load average $load"
fi
total=$(awk '/^MemTotal/ { printf "%.1f", $2 / 1048576 }' /proc/meminfo 2> /dev/null)
free=$(awk '/^MemAvailable/ { printf "%.1f", $2 / 1048576 }' /proc/meminfo 2> /dev/null)
[ -n "$total" ] &&
    ok memory "$free of $total GiB free; ./train_moe --plan ... says what a run takes"
limit=$(cat /sys/fs/cgroup/memory.max 2> /dev/null)
case $limit in
'' | max) ;;
*)
    fix memory "this container may use $((limit / 1048576)) MiB, whatever the kernel shows" \
        "compare with the total of --plan"
    ;;
esac
disk=$(df -Pk . | awk 'NR == 2 { printf "%.1f", $4 / 1048576 }')
if awk "BEGIN { exit !($disk < 2) }"; then
    fix disk "$disk GiB free in this folder" \
        "give --out on a larger disk; a checkpoint with AdamW takes 16 bytes a parameter in fp32"
else
    ok disk "$disk GiB free in this folder"
fi

# ---- to build -----------------------------------------------------------------------------------
if [ -n "$HAVE_CC" ]; then
    ok compiler "$CC: $(first "$CC" --version)"
else
    fix compiler "$CC does not compile C11" "make deps, or make CC=..."
fi
for other in gcc clang; do
    has $other && [ "$other" != "$CC" ] && ok compiler "$other: $(first $other --version)"
done
if [ -n "$HAVE_CJSON" ]; then
    ok cJSON "found${CJSON_CFLAGS:+ with $CJSON_CFLAGS}"
else
    fix cJSON "needed to read configs and checkpoints" "make deps"
fi
if [ -n "$OPENMP_FLAGS" ]; then
    ok OpenMP "$OPENMP_FLAGS"
else
    fix OpenMP "not found: one thread per rank" "make deps"
fi
if [ -n "$BLAS_LIBS" ]; then
    cat > "$DIR/b.c" << 'END'
#include <stdio.h>
char *openblas_get_config(void), *openblas_get_corename(void);
int main(void) {
    printf("%s, core %s\n", openblas_get_config(), openblas_get_corename());
    return 0;
}
END
    $CC $BLAS_CFLAGS "$DIR/b.c" -o "$DIR/b" $BLAS_LIBS 2> /dev/null && config=$("$DIR/b")
    inherited=$(env | grep -E '^(OPENBLAS|GOTO)_' | tr '\n' ' ')
    core=${config##*core }
    if [ -n "$inherited" ]; then
        fix BLAS "$config; inherited: $inherited" \
            "unset these: an inherited core type can halve the speed"
    elif grep -qw avx512f /proc/cpuinfo 2> /dev/null &&
        ! echo "$core" | grep -qiE 'skylakex|cooperlake|sapphire|zen[45]'; then
        fix BLAS "$config: the processor has AVX-512, this kernel does not use it" \
            "OPENBLAS_CORETYPE=SkylakeX ./train_moe ... and compare the sgemm speed that it prints"
    else
        ok BLAS "$config"
    fi
else
    fix BLAS "not found: own matrix product, slower" "make deps"
fi
if has "${PYTHON:-python3}" && ${PYTHON:-python3} -c 'import matplotlib' 2> /dev/null; then
    ok Python "$(first ${PYTHON:-python3} --version) with matplotlib: dev/plot.py draws"
else
    fine Python "no matplotlib: only plots and the comparison with transformers want it"
fi

# ---- many processes -----------------------------------------------------------------------------
if [ -n "$MPI_LIBS" ] && [ -n "$MPIRUN" ]; then
    ok MPI "$(first mpirun --version)"
    line=$(sh dev/mpirun.sh "$NP")
    cat > "$DIR/m.c" << 'END'
#include <mpi.h>
int main(int n, char **v) {
    int one = 1, all = 0, size;
    MPI_Init(&n, &v);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    MPI_Allreduce(&one, &all, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
    MPI_Finalize();
    return all != size;
}
END
    if ! mpicc "$DIR/m.c" -o "$DIR/m" 2> "$DIR/log" ||
        ! timeout 60 $line "$DIR/m" > "$DIR/log" 2>&1; then
        said=$(grep -v '^[- ]*$' "$DIR/log" | head -2 | tr '\n' ' ')
        fix MPI "$NP ranks could not be started: $said" "see the line below"
    elif [ -s "$DIR/log" ]; then
        fix MPI "$NP ranks met, with complaints: $(head -1 "$DIR/log")" \
            "run it to see all: $line ./train_moe --selftest --init model/configs/tiny.json"
    else
        ok MPI "$NP ranks met and added"
    fi
    [ "$NP" -le "$threads" ] ||
        fine MPI "$NP ranks share $threads hardware threads: right, but not fast"
elif [ -n "$MPI_LIBS" ]; then
    fix MPI "there is a library but no mpirun" "make deps"
else
    fix MPI "not found: one process only" "make deps"
fi
[ "$(id -u)" != 0 ] || fine root "you are root: Open MPI wants --allow-run-as-root"
if [ -d /dev/shm ]; then
    shm=$(df -Pk /dev/shm | awk 'NR == 2 { print int($4 / 1024) }')
    if [ "$shm" -lt $((32 * NP)) ]; then
        fix /dev/shm "$shm MiB free; $NP ranks may want $((32 * NP))" \
            "docker run --shm-size=1g, or mpirun --mca btl_vader_backing_directory /tmp"
    else
        ok /dev/shm "$shm MiB free"
    fi
else
    fine /dev/shm "none: MPI takes /tmp"
fi
[ -z "$SLURM_JOB_ID" ] ||
    ok Slurm "job $SLURM_JOB_ID on $SLURM_JOB_NUM_NODES nodes; dev/slurm has the scripts"

# ---- GPUs ---------------------------------------------------------------------------------------
toolkit=$([ -n "$NVCC" ] && "$NVCC" --version 2> /dev/null |
    sed -n 's/.*release \([0-9.]*\).*/\1/p')
gpus=
query=name,memory.total,memory.free,compute_cap,driver_version
has nvidia-smi && gpus=$(nvidia-smi --query-gpu=$query --format=csv,noheader 2> /dev/null)
if [ -n "$gpus" ]; then
    echo "$gpus" > "$DIR/gpus"
    while read -r gpu; do
        ok GPU "$gpu (name, memory, free, compute capability, driver)"
    done < "$DIR/gpus"
    driver=$(nvidia-smi 2> /dev/null | sed -n 's/.*CUDA Version: *\([0-9.]*\).*/\1/p' | head -1)
    if [ -z "$toolkit" ]; then
        fix CUDA "a GPU, but no nvcc: the CPU is used" \
            "install the CUDA toolkit (not above $driver) and put nvcc on PATH"
    elif awk "BEGIN { exit !(${toolkit:-0} > ${driver:-0}) }"; then
        fix CUDA "nvcc $toolkit is newer than the driver's CUDA $driver: programs may not start" \
            "update the driver, or take a toolkit up to $driver"
    else
        ok CUDA "nvcc $toolkit, driver CUDA $driver"
    fi
    nvidia-smi topo -m 2> /dev/null | sed -n '/GPU0/,/^$/p' | sed 's/^/      /' | head -20
    [ -e /usr/include/nccl.h ] || echo '#include <nccl.h>' | $CC -E - > /dev/null 2>&1 ||
        fine NCCL "nccl.h not found: one GPU per run"
elif [ -n "$NVCC" ]; then
    fine CUDA "nvcc ${toolkit:-?}, but no GPU: BACKEND=cpu"
else
    fine CUDA "no GPU, no nvcc: BACKEND=cpu"
fi

# ---- what to type -------------------------------------------------------------------------------
echo
[ -n "$line" ] && cat << END
mpirun line for $NP ranks here:
  $line ./train_moe --ep $NP ...
and first:
  $line ./train_moe --init model/configs/tiny.json --ep $NP --selftest
END
[ "$fixes" != 0 ] || fixes=nothing
echo "$fixes to fix"

#!/bin/sh
# What this machine can build, found by compiling and linking small programs, never by asking a
# package manager.
#   dev/detect.sh CC > build/detected.mk        (make runs it; `make detect` runs it again)
# Writes make variables; a missing optional part leaves its variables empty.
CC=${1:-cc}
DIR=$(mktemp -d) || exit 1
trap 'rm -rf "$DIR"' EXIT

# try NAME "flags" "libraries" "program text": 0 when it compiles and links
try() {
    printf '%s\n' "$3" > "$DIR/t.c"
    $CC $1 "$DIR/t.c" -o "$DIR/t" $2 > "$DIR/log" 2>&1
}

NOTHING='int main(void) { return 0; }'

echo "DETECTED_CC := $CC"
if try "-std=c11" "" "$NOTHING"; then
    echo "HAVE_CC := 1"
else
    echo "HAVE_CC :="
fi

for flags in "" "-I/opt/homebrew/include -L/opt/homebrew/lib" \
    "-I/usr/local/include -L/usr/local/lib"; do
    if try "$flags" "-lcjson" '#include <cjson/cJSON.h>
int main(void) { return cJSON_Parse("{}") == 0; }'; then
        echo "HAVE_CJSON := 1"
        echo "CJSON_CFLAGS := $flags"
        echo "CJSON_LIBS := -lcjson"
        break
    fi
done

if try "-march=native" "" "$NOTHING"; then
    echo "NATIVE := -march=native"
else
    echo "NATIVE :="
fi

brew=/opt/homebrew/opt
for flags in "-fopenmp" \
    "-Xpreprocessor -fopenmp -I$brew/libomp/include -L$brew/libomp/lib -lomp"; do
    if try "$flags" "" '#include <omp.h>
int main(void) { return omp_get_max_threads() < 1; }'; then
        echo "OPENMP_FLAGS := $flags"
        break
    fi
done

for flags in "" "-I/usr/include/openblas" \
    "-I$brew/openblas/include -L$brew/openblas/lib"; do
    if try "$flags" "-lopenblas" '#include <cblas.h>
void openblas_set_num_threads(int);
char *openblas_get_corename(void);
int main(void) {
    float x = 1;
    openblas_set_num_threads(1);
    return cblas_sdot(1, &x, 1, &x, 1) != 1 || !openblas_get_corename();
}'; then
        echo "BLAS_CFLAGS := $flags"
        echo "BLAS_LIBS := -lopenblas"
        break
    fi
done

if command -v mpicc > /dev/null 2>&1; then
    # Open MPI and MPICH spell the question differently
    cflags=$(mpicc --showme:compile 2> /dev/null ||
        mpicc -compile-info 2> /dev/null | cut -d' ' -f2-)
    libs=$(mpicc --showme:link 2> /dev/null || mpicc -link-info 2> /dev/null | cut -d' ' -f2-)
    if try "$cflags" "$libs" '#include <mpi.h>
int main(int n, char **v) {
    MPI_Init(&n, &v);
    return MPI_Finalize();
}'; then
        echo "MPI_CFLAGS := $cflags"
        echo "MPI_LIBS := $libs"
    fi
fi
command -v mpirun > /dev/null 2>&1 && echo "MPIRUN := mpirun"

NVCC=$(command -v nvcc) || for dir in "$CUDA_HOME" /usr/local/cuda; do
    [ -n "$dir" ] && [ -x "$dir/bin/nvcc" ] || continue
    NVCC=$dir/bin/nvcc
    break
done
if [ -n "$NVCC" ]; then
    echo "NVCC := $NVCC"
    home=$(dirname "$(dirname "$(readlink -f "$NVCC")")")
    for dir in "$home/lib64" "$home"/targets/*/lib "$home/lib"; do
        [ -e "$dir/libcudart.so" ] || continue
        echo "CUDA_LIB := $dir"
        lib="-L$dir"
        break
    done
    for dir in "$home/include" "$home"/targets/*/include; do
        [ -e "$dir/cuda_runtime.h" ] || continue
        echo "CUDA_INCLUDE := $dir"
        include="-I$dir"
        break
    done
    archs=$("$NVCC" --list-gpu-arch 2> /dev/null | sed 's/compute_//' | sort -un | tr '\n' ' ')
    echo "CUDA_ARCHS := $archs"
    # library NAME SONAME "program text": sets NAME_CFLAGS and NAME_LIBS where the library is beside
    # the toolkit, or in PyTorch's wheels (site-packages/nvidia/name), which have no plain .so
    library() {
        if try "$include" "$lib -l$2" "$3"; then
            echo "HAVE_$1 := 1"
            echo "$1_LIBS := -l$2"
            return
        fi
        for python in $PYTHON .venv/bin/python python3; do
            command -v "$python" > /dev/null 2>&1 || continue
            for dir in $("$python" -c 'import sys
print(*[p + "/nvidia/" + sys.argv[1] for p in sys.path if p])' "$2" 2> /dev/null); do
                so=$(ls "$dir"/lib/lib"$2".so.[0-9]* 2> /dev/null | head -1)
                [ -n "$so" ] || continue
                if try "$include -I$dir/include" \
                    "$lib $so -Wl,-rpath,$dir/lib -Wl,-rpath-link,$dir/lib" "$3"; then
                    echo "HAVE_$1 := 1"
                    echo "$1_CFLAGS := -isystem $dir/include"
                    echo "$1_LIBS := $so -Wl,-rpath,$dir/lib"
                    return
                fi
            done
        done
    }
    # 2.18: ncclCommSplit
    library NCCL nccl '#include <nccl.h>
#if NCCL_VERSION_CODE < NCCL_VERSION(2, 18, 0)
#error too old
#endif
int main(void) { int v; return ncclGetVersion(&v); }'
    # 9.8: a GPU described by its properties
    library CUDNN cudnn '#include <cudnn.h>
#if CUDNN_VERSION < 90800
#error too old
#endif
int main(void) { return cudnnGetVersion() == 0; }'
    caps=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null |
        grep -E '^[0-9]+\.[0-9]+$' | tr -d . | sort -un | tr '\n' ' ')
    [ -n "$caps" ] && {
        echo "HAVE_GPU := 1"
        echo "GPU_CAPS := $caps"
    }
fi
exit 0

#!/bin/sh
# Installs what this machine lacks to build moe.c, where it may; elsewhere prints the line to type.
#   sh dev/deps.sh [CC]           make deps runs it; CC as in the Makefile
#   DRY=1 sh dev/deps.sh          only says what it would do
# What is missing is found by dev/detect.sh (by compiling and linking). Needed: a C compiler and
# cJSON. The rest makes it faster (OpenBLAS, OpenMP) or makes several ranks possible
# (MPI). Exit status 0 when the needed parts are there afterwards.
cd "$(dirname "$0")/.." || exit 1
CC=${1:-cc}

look() {
    HAVE_CC= HAVE_CJSON= OPENMP_FLAGS= BLAS_LIBS= MPI_LIBS= MPIRUN=
    sh dev/detect.sh "$CC" | sed -n 's/^\([A-Z_]*\) := *\(.*\)$/\1="\2"/p' > "$FOUND"
    . "$FOUND"
    parts=
    [ -n "$HAVE_CC" ] || parts="$parts compiler"
    [ -n "$HAVE_CJSON" ] || parts="$parts cjson"
    [ -n "$BLAS_LIBS" ] || parts="$parts blas"
    [ -n "$OPENMP_FLAGS" ] || parts="$parts openmp"
    { [ -n "$MPI_LIBS" ] && [ -n "$MPIRUN" ]; } || parts="$parts mpi"
}

# names MANAGER: the packages of the missing parts
names() {
    for part in $parts; do
        case $1:$part in
        apt:compiler) echo gcc libc6-dev ;;
        apt:cjson) echo libcjson-dev ;;
        apt:blas) echo libopenblas-dev ;;
        apt:openmp)
            case $CC in
            *clang*) echo libomp-dev ;;
            *) echo libgomp1 ;;
            esac
            ;;
        apt:mpi) echo openmpi-bin libopenmpi-dev ;;
        dnf:compiler) echo gcc glibc-devel ;;
        dnf:cjson) echo cjson-devel ;;
        dnf:blas) echo openblas-devel ;;
        dnf:openmp) echo libgomp ;;
        dnf:mpi) echo openmpi openmpi-devel ;;
        brew:cjson) echo cjson ;;
        brew:blas) echo openblas ;;
        brew:openmp) echo libomp ;;
        brew:mpi) echo open-mpi ;;
        conda:compiler) echo c-compiler ;;
        conda:cjson) echo cjson ;;
        conda:blas) echo openblas ;;
        conda:mpi) echo openmpi ;;
        esac
    done | tr '\n' ' ' | sed 's/ $//'
}

advise() {
    echo "deps: type one of these, then make again:"
    echo "    sudo apt-get install $(names apt)"
    echo "    sudo dnf install $(names dnf)          (then: module load mpi)"
    case $parts in *compiler*) echo "    xcode-select --install" ;; esac
    echo "    brew install $(names brew)"
    echo "    conda install -c conda-forge $(names conda)"
}

FOUND=$(mktemp) || exit 1
trap 'rm -f "$FOUND"' EXIT
look
if [ -z "$parts" ]; then
    echo "deps: nothing is missing"
    exit 0
fi
echo "deps: missing:$parts"

sudo=
[ "$(id -u)" = 0 ] || { sudo -n true 2> /dev/null && sudo=sudo; }
if command -v apt-get > /dev/null 2>&1 && { [ "$(id -u)" = 0 ] || [ -n "$sudo" ]; }; then
    packages=$(names apt)
    echo "deps: $sudo apt-get install --no-install-recommends $packages"
    [ -n "$DRY" ] && exit 0
    log=$(mktemp)
    install() {
        $sudo env DEBIAN_FRONTEND=noninteractive \
            apt-get install -y -qq --no-install-recommends $packages > "$log" 2>&1
    }
    install || {
        $sudo apt-get update -qq >> "$log" 2>&1
        install
    } || {
        echo "deps: apt-get did not succeed:"
        tail -5 "$log" | sed 's/^/    /'
    }
    rm -f "$log"
    look
    rm -f build/detected.mk
    if [ -z "$parts" ]; then
        echo "deps: all there now"
    else
        echo "deps: still missing:$parts"
        advise
    fi
else
    advise
fi
case $parts in *compiler* | *cjson*) exit 1 ;; esac
exit 0

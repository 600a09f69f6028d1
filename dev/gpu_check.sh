#!/bin/bash
# Everything about the CUDA backend that only a card can answer, in one command, without a network,
# in under nine minutes: `make gpu-check`.
#   make gpu-check              on a machine with a GPU and nvcc; BUDGET=540 seconds in all, builds
#                               included
#   ONLY="build bench"          some steps
#   OUT=folder                  where the report goes; default dev/results/GPU-DATE
#   GPU_CHECK_DRY=1             no GPU: kernels and benchmark of the emulator builds, the rest `not
#                               run`: tries the script and the report, nothing else
# Writes OUT/report.md, OUT/report.json and a log of every step. A step that fails, takes too long
# or lacks something does not stop the others; the report says what ran.
# Exit status 0 where no step failed. Steps, by what would change most if it were wrong:
#   build         all programs; what does not compile is missing below. Needs nvcc; cJSON for
#                 train_moe and test_moe, MPI for `ranks`
#   instructions  the emulator's own tests on the card: wgmma, TMA, mbarrier, mma; exact in every
#                 bit; Hopper only
#   libraries     cuDNN and NCCL were found: without them a Hopper build is slow or alone
#   ceilings      copies, host to device and back, launches, cuBLAS
#   cudnn         attention by cuDNN, forward and backward, against the CPU           needs cuDNN
#   kernels-*     every kernel against its CPU twin
#   model-*       test_moe: fixtures of transformers; bf16 at most twice the error of the naive bf16
#                 version, fp32 1e-4
#   bench         every kernel at the shapes of Qwen3-30B-A3B, share of the ceilings measured in the
#                 same run; then torch's own kernels beside them
#   publish       the experts with both ways to publish gathered stages; names the faster
#   update-4      updates of 4 layers at the true widths, phase by phase; update-48: the whole
#                 model, all 30.5B parameters (139 GiB)
#   ladder        the rungs of dev/kernels, checked against the first and timed
#   offsets       indices beyond 2^31 elements in every kernel                        needs 60 GB
#   sanitizer     compute-sanitizer: memory and barriers, two updates of the tiny model; racecheck:
#                 shared memory (hazards inside library kernels are not ours: read the log)
#   nccl          test_moe on one rank that sends to itself through NCCL; with two cards two ranks,
#                 met over TCP
#   ranks         test_moe on 4 ranks that share the card, over MPI
#   curve         60 updates here and by transformers on the same card
# cJSON in another place than the compiler's:
#   make gpu-check HAVE_CJSON=1 CJSON_CFLAGS=-I... CJSON_LIBS=.../libcjson.a
# COMMIT=... where git is not.
cd "$(dirname "$0")/.." || exit 1
BUDGET=${BUDGET:-540} CC=${CC:-cc} DRY=$GPU_CHECK_DRY
# query FIELD: of the first card
query() { nvidia-smi --query-gpu="$1" --format=csv,noheader 2> /dev/null | head -1; }
gpu=$(query name)
[ -z "$DRY" ] || gpu=emulator
[ -n "$gpu" ] || {
    echo "error: no GPU here (nvidia-smi lists none), hint: run it where one is;" \
        "make test-cuemu runs the kernels in the emulator, GPU_CHECK_DRY=1 tries this script"
    exit 1
}
OUT=${OUT:-dev/results/$(echo "$gpu" | sed 's/NVIDIA //' | tr ' /' '--')-$(date +%Y-%m-%d)}
WORK=build/gpu_check begin=$SECONDS jobs=$(nproc 2> /dev/null || echo 2)
rm -rf "$WORK" && mkdir -p "$WORK" "$OUT" && rm -f "$OUT"/*.log "$OUT"/*.jsonl || exit 1
mk() { make --no-print-directory -s CC="$CC" "$@"; }
# have NAME: found, or said on the command line
have() {
    grep -q "^$1 := ." build/detected.mk || case " $MAKEFLAGS" in *" $1="*) ;; *) false ;; esac
}
variant() { mk show-build BACKEND=cuda "$@"; }

# ---- steps --------------------------------------------------------------------------------------
rows="$WORK/rows" steps="$WORK/steps" bad=0
record() { # NAME STATUS SECONDS NOTE
    echo "| $1 | $2 | $3 | $4 |" >> "$rows"
    printf '{"step": "%s", "status": "%s", "seconds": %s, "note": "%s"}\n' "$1" "$2" "$3" \
        "$(echo "$4" | tr -d '"\\\000-\037')" >> "$steps"
    printf '%-13s %-9s %4s s  %s\n' "$1" "$2" "$3" "$4"
}
# step NAME LIMIT RESERVE REASON COMMAND...: at most LIMIT seconds, and RESERVE seconds of the
# budget stay for later steps. REASON: why it cannot run here, or empty.
step() {
    local name=$1 limit=$2 reserve=$3 reason=$4 left from status note
    shift 4
    [ -z "$ONLY" ] || case " $ONLY " in *" $name "*) ;; *) return ;; esac
    left=$((BUDGET - SECONDS + begin - reserve))
    [ "$left" -gt "$limit" ] || limit=$left
    [ -n "$reason" ] || [ "$limit" -ge 5 ] || reason="the budget of $BUDGET s is spent"
    if [ -n "$reason" ]; then
        record "$name" "not run" 0 "$reason"
        return
    fi
    from=$SECONDS
    # a shell, for the functions below
    timeout --kill-after=5 "$limit" bash -c '"$@"' step "$@" > "$OUT/$name.log" 2>&1 < /dev/null
    status=$?
    note=$(grep -E '[0-9]+ passed, [0-9]+ failed$' "$OUT/$name.log" | tail -1 |
        sed 's/.*[^0-9]\([0-9]* passed\)/\1/')
    [ -n "$note" ] || note=$(grep -v '^$' "$OUT/$name.log" | tail -1 | tr '|' '/' | cut -c1-160)
    case $status in
    0) record "$name" ok $((SECONDS - from)) "$note" ;;
    124 | 137)
        record "$name" "too long" $((SECONDS - from)) "stopped after $limit s; $note"
        bad=1
        ;;
    *)
        record "$name" FAILED $((SECONDS - from)) "status $status; $note"
        bad=1
        ;;
    esac
}
# The libraries without which a Hopper build is slow or alone.
libraries() {
    local found=0
    for library in CUDNN NCCL; do
        have "HAVE_$library" && echo "$library found" || {
            echo "$library was not found: make detect says where it is looked for"
            found=1
        }
    done
    return $found
}
# missing PROGRAM: why it cannot run, or nothing
missing() { [ -x "$1" ] || echo "not built, see build.log"; }

# ---- what is here -------------------------------------------------------------------------------
bf16=build/cuemu/plain-bf16 fp32=build/cuemu/plain-fp32 ranks='' tiny=
if [ -z "$DRY" ]; then
    have HAVE_GPU 2> /dev/null || rm -f build/detected.mk # of a time without the GPU
    bf16=$(variant PRECISION=bf16) fp32=$(variant PRECISION=fp32)
    ranks=$(variant PRECISION=fp32 COMM=mpi)
    have NVCC || echo "no nvcc: only programs that are already built can run"
else
    mk show-build > /dev/null
    tiny=--tiny
fi
cjson=
have HAVE_CJSON || cjson="cJSON was not found: make deps"
hopper=$([ -n "$DRY" ] || query compute_cap | grep -q '^9\.' ||
    echo "its instructions are Hopper's")
# of the first card, MiB
memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2> /dev/null |
    head -1 | grep -E '^[0-9]+$')
nogpu=${DRY:+no GPU} mpirun=
have MPI_LIBS && mpirun=$(sh dev/mpirun.sh 4)
nvcc=$(sed -n 's/^NVCC := //p' build/detected.mk)
sanitizer=$(command -v compute-sanitizer ||
    ls "$(dirname "$nvcc")/compute-sanitizer" 2> /dev/null)
for python in $PYTHON .venv/bin/python python3; do
    command -v "$python" > /dev/null 2>&1 && break
    python=
done
torch=$([ -n "$python" ] && "$python" -c 'import torch
print(torch.__version__ if torch.cuda.is_available() else "")' 2> /dev/null)
hf=$([ -n "$torch" ] && "$python" -c 'import numpy, safetensors, transformers
print(transformers.__version__)' 2> /dev/null)
emu="make --no-print-directory -C dev/cuemu BUILD=$PWD/build/cuemu"
emu="$emu CUDA_HOME=$(dirname "$(dirname "$nvcc")")"

# Several makes side by side, one per folder of objects; -k: what fails does not keep the rest from
# being built.
build() {
    if [ -n "$DRY" ]; then
        mk "$bf16/kernels/test_cuda" "$bf16/dev/bench_cuda"
        return
    fi
    mk build/cuemu/twins/ref_bf16.o build/cuemu/twins/ref_fp32.o build/cuemu/twins/true_fp32.o ||
        return
    local pids='' failed=0 pid model=(train_moe test_moe)
    [ -z "$cjson" ] || model=()
    [ -n "$hopper" ] || {
        $emu -k -j "$jobs" gpu-build &
        pids="$pids $!"
    }
    mk -k -j "$jobs" BACKEND=cuda PRECISION=bf16 "$bf16/kernels/test_cuda" \
        "$bf16/kernels/test_offsets" "$bf16/dev/bench_cuda" "$bf16/dev/kernels/ladder" \
        "${model[@]/#/$bf16/}" &
    pids="$pids $!"
    mk -k -j "$jobs" BACKEND=cuda PRECISION=fp32 "$fp32/kernels/test_cuda" \
        "${model[@]/#/$fp32/}" &
    pids="$pids $!"
    [ -n "$cjson" ] || [ "$ranks" = "$fp32" ] || ! have MPI_LIBS || {
        mk -k -j "$jobs" BACKEND=cuda PRECISION=fp32 COMM=mpi "$ranks/test_moe" &
        pids="$pids $!"
    }
    for pid in $pids; do
        wait "$pid" || failed=1
    done
    return $failed
}
bench() {
    "$bf16/dev/bench_cuda" $tiny > "$OUT/bench.jsonl" || return
    if [ -n "$python" ]; then
        "$python" dev/bench_report.py "$OUT/bench.jsonl" --check
    else
        wc -l < "$OUT/bench.jsonl"
    fi
}
# Both ways to publish gathered stages (kernels/cuda/hopper.cuh), and which should be the default.
publish() {
    local how
    for how in wait copies; do
        MOE_EXPERT_PUBLISH=$how "$bf16/dev/bench_cuda" --only experts \
            > "$OUT/publish-$how.jsonl" || return
    done
    [ -z "$python" ] || "$python" dev/bench_report.py "$OUT/publish-wait.jsonl" \
        --beside "$OUT/publish-copies.jsonl"
}
bench_torch() { "$python" dev/bench_torch.py > "$OUT/torch.jsonl"; }
sanitize() { # TOOL...
    local tool failed=0
    for tool in "$@"; do
        echo "---- $tool"
        "$sanitizer" --tool "$tool" --error-exitcode 9 "$bf16/train_moe" \
            --init model/configs/tiny.json --train "$WORK/text/train.txt" --seq-len 64 \
            --batch 2 --steps 2 || failed=1
    done
    return $failed
}
nccl() {
    "$fp32/test_moe" --force-comm --quick || return
    [ "$(nvidia-smi --list-gpus | wc -l)" -ge 2 ] || return 0
    local rank pid pids='' failed=0
    for rank in 0 1; do
        env WORLD_SIZE=2 RANK=$rank MASTER_ADDR=127.0.0.1 MASTER_PORT=29517 "$fp32/train_moe" \
            --init model/configs/tiny.json --ep 2 --timeout 30 --selftest &
        pids="$pids $!"
    done
    for pid in $pids; do
        wait "$pid" || failed=1
    done
    return $failed
}
# SGD, as dev/compare_hf.sh: fp32 within 1e-5 of transformers in every update. bf16: the mean
# distance to transformers in fp32 is at most twice that of transformers in bf16.
curve() {
    local p ours common="--train $WORK/text/train.txt --seq-len 128 --optimizer sgd --lr 0.1"
    common="--model $WORK/init/checkpoints/step_0 $common --batch 2 --steps 60"
    "$fp32/train_moe" --init model/configs/tiny.json --steps 0 --out "$WORK/init" || return
    for p in fp32 bf16; do
        ours=$fp32
        [ $p = fp32 ] || ours=$bf16
        "$ours/train_moe" $common --shuffle off --out "$WORK/ours-$p" \
            > "$OUT/curve-$p.log" || return
        CUBLAS_WORKSPACE_CONFIG=:4096:8 "$python" dev/hf/reference.py --device cuda --dtype $p \
            $common --out "$WORK/hf-$p" > "$OUT/curve-hf-$p.log" || return
    done
    "$python" - "$WORK" << 'PYTHON'
import json
import sys


def losses(name):
    with open(f"{sys.argv[1]}/{name}/log.jsonl") as log:
        return [json.loads(line)["loss"] for line in log if '"loss"' in line]


def apart(a, b):
    return [abs(x - y) for x, y in zip(losses(a), losses(b))]


def mean(d):
    return sum(d) / len(d)


worst = max(apart("ours-fp32", "hf-fp32"))
ours, theirs = mean(apart("ours-bf16", "hf-fp32")), mean(apart("hf-bf16", "hf-fp32"))
print(
    f"fp32: largest difference {worst:.2e}, at most 1e-5; "
    f"bf16: mean difference {ours:.2e}, at most twice {theirs:.2e}"
)
sys.exit(not (worst <= 1e-5 and ours <= 2 * theirs))
PYTHON
}
# update LAYERS OPTIONS: the speed lines are in its log
update() {
    local layers=$1
    shift
    sed "s/\"num_hidden_layers\": 48/\"num_hidden_layers\": $layers/" \
        model/configs/qwen3_30b_a3b.json > "$WORK/layers.json"
    "$bf16/train_moe" --init "$WORK/layers.json" --train "$WORK/text/train.txt" --seq-len 4096 \
        --batch 8 --micro-batch 4 --optimizer adamw8bit --master off --update layer \
        --recompute layer "$@"
}

export CC DRY OUT WORK bf16 fp32 ranks tiny cjson hopper sanitizer python emu jobs
export -f mk have libraries publish build bench bench_torch sanitize nccl curve update

# ---- the steps ----------------------------------------------------------------------------------
echo "$gpu, at most $BUDGET s; report in $OUT"
sh dev/text.sh "$WORK/text" > /dev/null
R=200 bench_seconds=80 # kept for the benchmark and the whole updates
[ -z "$DRY" ] || bench_seconds=240
no_sanitizer=$([ -n "$sanitizer" ] || echo "compute-sanitizer was not found; ")
no_cudnn=$(have HAVE_CUDNN || echo "cuDNN 9.8 was not found; ")
no_nccl=$(have HAVE_NCCL || echo "NCCL was not found; ")
no_mpi=$([ -n "$mpirun" ] || echo "MPI was not found; ")
# below MIB SIZE: says that the card is too small
below() { [ "${memory:-0}" -ge "$1" ] || echo "needs a GPU of $2; "; }
step build 240 $R "" build
step libraries 10 $R "${nogpu:-${hopper:+not a Hopper GPU}}" libraries
step instructions 60 $R "${nogpu:-$hopper}" $emu gpu-run
step ceilings 40 $R "${nogpu:-$(missing build/cuemu/gpu/ceilings)}" build/cuemu/gpu/ceilings
step cudnn 60 $R "${nogpu:-$no_cudnn$(missing "$bf16/kernels/test_cuda")}" \
    "$bf16/kernels/test_cuda" attention
step kernels-bf16 90 $R "$(missing "$bf16/kernels/test_cuda")" \
    "$bf16/kernels/test_cuda" ${DRY:+rows}
step kernels-fp32 90 $R "${nogpu:-$(missing "$fp32/kernels/test_cuda")}" "$fp32/kernels/test_cuda"
step model-fp32 110 $R "${nogpu:-${cjson:-$(missing "$fp32/test_moe")}}" "$fp32/test_moe"
step model-bf16 110 $R "${nogpu:-${cjson:-$(missing "$bf16/test_moe")}}" "$bf16/test_moe"
step bench "$bench_seconds" 110 "$(missing "$bf16/dev/bench_cuda")" bench
step publish 40 0 "${nogpu:-${hopper:-$(missing "$bf16/dev/bench_cuda")}}" publish
step update-4 50 0 "${nogpu:-${cjson:-$(missing "$bf16/train_moe")}}" \
    update 4 --steps 4 --profile 3
step update-48 60 0 \
    "${nogpu:-${cjson:-$(below 140000 "139 GiB")$(missing "$bf16/train_moe")}}" \
    update 48 --steps 3
step bench-torch 60 0 "${nogpu:-$([ -n "$torch" ] || echo "no torch with CUDA")}" bench_torch
step ladder 40 0 "${nogpu:-$(missing "$bf16/dev/kernels/ladder")}" "$bf16/dev/kernels/ladder"
step offsets 60 0 "${nogpu:-$(below 62000 "60 GB")$(missing "$bf16/kernels/test_offsets")}" \
    "$bf16/kernels/test_offsets"
step sanitizer 60 0 "${nogpu:-${cjson:-$no_sanitizer$(missing "$bf16/train_moe")}}" \
    sanitize memcheck synccheck
step racecheck 60 0 "${nogpu:-${cjson:-$no_sanitizer$(missing "$bf16/train_moe")}}" \
    sanitize racecheck
step nccl 40 0 "${nogpu:-${cjson:-$no_nccl$(missing "$fp32/test_moe")}}" nccl
step ranks 100 0 "${nogpu:-${cjson:-$no_mpi$(missing "$ranks/test_moe")}}" \
    $mpirun "$ranks/test_moe"
no_hf=$([ -n "$hf" ] || echo "no torch with CUDA beside transformers")
step curve 80 0 "${nogpu:-${cjson:-$no_hf}}" curve

# ---- the report ---------------------------------------------------------------------------------
lines() { [ -s "$1" ] && grep '^{' "$1" | paste -sd, -; }
machine="$gpu, driver $(query driver_version), power limit $(query power.limit)"
machine="$machine, multiprocessors at $(query clocks.sm) of $(query clocks.max.sm)"
cpu=$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo | head -1)
[ -z "$DRY" ] || machine="the emulator on $cpu: no GPU, times mean nothing"
software=$($nvcc --version 2> /dev/null | sed -n 's/.*release \([^,]*\).*/nvcc \1/p')
software="$software, torch ${torch:-none}, transformers ${hf:-none}"
software="$software, $(have HAVE_CUDNN && echo cuDNN || echo "no cuDNN")"
software="$software, $(have MPI_LIBS && echo MPI || echo "no MPI")"
commit=${COMMIT:-$(git describe --always --dirty 2> /dev/null || echo unknown)}
{
    echo "# make gpu-check"
    echo
    echo "- machine: $machine"
    echo "- software: $software"
    echo "- commit $commit, $(date +%Y-%m-%d), $((SECONDS - begin)) s of at most $BUDGET"
    echo
    echo "| step | result | s | |"
    echo "|---|---|---|---|"
    cat "$rows"
    if [ -s "$OUT/bench.jsonl" ]; then
        printf '\n## Kernels\n\n'
        if [ -n "$python" ]; then
            "$python" dev/bench_report.py "$OUT/bench.jsonl" \
                $([ ! -s "$OUT/torch.jsonl" ] || echo --torch "$OUT/torch.jsonl")
        else
            printf '```\n'
            cat "$OUT/bench.jsonl"
            printf '```\n'
        fi
    fi
    for log in ceilings ladder curve update-4 update-48; do
        [ -s "$OUT/$log.log" ] && {
            printf '\n## %s\n\n```\n' "$log"
            tail -60 "$OUT/$log.log"
            printf '```\n'
        }
    done
} > "$OUT/report.md"
{
    printf '{"machine": "%s", "software": "%s", "commit": "%s", "date": "%s", "seconds": %d,\n' \
        "$machine" "$software" "$commit" "$(date +%Y-%m-%d)" $((SECONDS - begin))
    printf ' "steps": [%s],\n "bench": [%s],\n "torch": [%s]}\n' \
        "$(lines "$steps")" "$(lines "$OUT/bench.jsonl")" "$(lines "$OUT/torch.jsonl")"
} > "$OUT/report.json"
echo "written: $OUT/report.md, $OUT/report.json"
exit $bad

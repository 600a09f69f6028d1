# moe.c. `make` alone prints help. What this machine has is found by compiling small programs
# (dev/detect.sh); `make detect` prints what was found and how to change it.
#
#   CC=clang                       another compiler
#   PRECISION=fp32|bf16|fp64       CPU builds are fp32 unless this says otherwise, GPU builds bf16
#   BACKEND=cpu|cuda               cuda is the default only where nvcc and a GPU are found
#   DEBUG=1                        address and undefined-behaviour sanitizers, NaN-filled memory
#   BLAS=off OPENMP=off MPI=off    leave an optional part out
#   MARCH=-march=x86-64-v3         instruction set of the CPU
#   ARCH="90a 100" COMM=nccl|mpi|none      of CUDA builds: GPU generations, transport
#   V=1 WERROR=-Werror             show the commands; warnings are errors
CC = cc
PRECISION = $(if $(filter cuda,$(BACKEND)),bf16,fp32)
BACKEND = $(if $(and $(NVCC),$(HAVE_GPU)),cuda,cpu)
ROOT_BUILD = build
VARIANT = $(BACKEND)-$(PRECISION)-$(notdir $(CC))$(MARCH_NAME)$(FEATURES)
BUILD = $(ROOT_BUILD)/$(VARIANT)
PYTHON ?= python3
QUIET = $(if $(V),,@)

# Goals that compile nothing look at nothing.
PLAIN_GOALS = help walk deps clean watch quickstart doctor naive compare-hf gpu-check format \
    format-check prose-check parity-kit parity-peers
NO_DETECT := $(if $(filter-out $(PLAIN_GOALS),$(MAKECMDGOALS)),,1)

.PHONY: help walk deps detect watch quickstart doctor naive compare-hf gpu-check bench-cpu clean
.PHONY: FORCE
help:
	@cat dev/mk/help.txt

include dev/mk/detect.mk
include dev/mk/flags.mk

# ---- what is linked -------------------------------------------------------------------------
# The backend is a folder of kernels/, the transport a file or two of parallel/.
KERNELS_COMMON = kernels/arena.c kernels/fail.c
CPU_KERNELS = $(wildcard kernels/cpu/*.c) $(KERNELS_COMMON)
CUDA_SOURCES = $(wildcard kernels/cuda/*.cu kernels/cuda/*.c)
CUDA_KERNELS = $(filter-out $(if $(USE_CUDNN),,%cudnn.c),$(CUDA_SOURCES)) \
    $(KERNELS_COMMON)
KERNELS = $(if $(filter cuda,$(BACKEND)),$(CUDA_KERNELS),$(CPU_KERNELS))

TRANSPORT_none = parallel/comm_none.c
TRANSPORT_mpi = parallel/comm_mpi.c
TRANSPORT_nccl = parallel/comm_nccl.cu parallel/comm_join.c
PARALLEL = $(filter-out parallel/comm_% parallel/test_%,$(wildcard parallel/*.c))
MODEL = $(filter-out model/test_%,$(wildcard model/*.c))
DATA = data/loader.c data/shard.c data/tokens.c data/tokenizer_json.c

LIBRARY = $(KERNELS) $(MODEL) $(PARALLEL) $(TRANSPORT_$(COMM)) $(DATA)
OBJECTS = $(addprefix $(BUILD)/,$(addsuffix .o,$(basename $(LIBRARY))))
TESTS = test_moe kernels/test_kernels kernels/test_experts kernels/test_optimizer \
    kernels/test_gemm_bf16 data/test_data model/test_checkpoint parallel/test_comm \
    parallel/test_dispatch dev/bench_cpu dev/tests/edge dev/tests/reshard dev/tests/test_cli

# ---- programs -------------------------------------------------------------------------------
# They are built in $(BUILD), one folder for each variant; the two at the root are copies of it.
train_moe test_moe: %: say-backend $(BUILD)/% FORCE
	@cmp -s $(BUILD)/$@ $@ || cp $(BUILD)/$@ $@
$(BUILD)/train_moe $(TESTS:%=$(BUILD)/%): %: %.o $(OBJECTS)
	$(if $(HAVE_CJSON),,@echo "cJSON is missing: make deps" && exit 1)
	@echo "  link $@"
	$(QUIET)$(CC) $(CFLAGS) $^ $(LIBS) -o $@
include dev/mk/compile.mk
-include $(OBJECTS:.o=.d) $(BUILD)/train_moe.d $(TESTS:%=$(BUILD)/%.d)

# The model in plain loops, for reading: one compiler line, no detection.
naive: dev/naive/train_naive.c $(wildcard dev/naive/*.h)
	$(CC) -std=c11 -O3 -ffast-math $< -lm -o $@

# ---- tests ----------------------------------------------------------------------------------
include dev/mk/tests.mk
include dev/mk/parity.mk
ifndef NO_DETECT
include dev/mk/cuemu.mk
include dev/mk/gpu.mk
include dev/mk/fuzz.mk
endif

# ---- scripts --------------------------------------------------------------------------------
walk:
	@sh dev/walk.sh
deps:
	@sh dev/deps.sh $(CC)
watch:
	@sh dev/watch.sh "$(RUN)" $(PORT)
quickstart:
	@CC=$(CC) TEXT="$(TEXT)" sh dev/quickstart.sh
doctor:
	@CC=$(CC) sh dev/doctor.sh $(NP)
gpu-check:
	@CC=$(CC) bash dev/gpu_check.sh
compare-hf:
	@CC=$(CC) bash $(if $(filter bf16,$(PRECISION)),dev/hf/compare_bf16.sh,dev/compare_hf.sh)
bench-cpu: train_moe $(BUILD)/dev/bench_cpu
	@BENCH=$(BUILD)/dev/bench_cpu PRECISION=$(PRECISION) bash dev/bench_cpu.sh

clean:
	rm -rf $(ROOT_BUILD) train_moe test_moe naive
FORCE:

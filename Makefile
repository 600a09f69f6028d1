# moe.c. `make` prints help. What the machine has is found by compiling (dev/detect.sh) and can be overridden on the command line:
#   V=1 (show the commands)  CC=clang  PRECISION=fp32|bf16|fp64  DEBUG=1 (ASan, UBSan, NaN-filled memory)  BLAS=off  OPENMP=off  MPI=off  MARCH=-march=x86-64-v3  WERROR=-Werror
#   BACKEND=cuda: PRECISION=bf16|fp32  ARCH="90a 100" (default: the GPUs here, else 80 90a 100)  COMM=nccl|mpi|none  DEBUG=1 (NaN-filled memory, -lineinfo)
CC = cc
PRECISION = $(if $(filter cuda,$(BACKEND)),bf16,fp32)
BACKEND = $(if $(and $(NVCC),$(HAVE_GPU)),cuda,cpu)
ROOT_BUILD = build
ifeq ($(MAKECMDGOALS),)
NO_DETECT = 1
endif
ifeq ($(filter-out help deps clean quickstart doctor compare-hf gpu-check format format-check,$(MAKECMDGOALS)),)
NO_DETECT = 1
endif

.PHONY: help show-build show-detected say-cuda detect deps clean test test-full test-mutations test-mutations-cuda quickstart bench-cpu compare-hf gpu-check doctor format format-check FORCE
help:
	@echo "moe.c: trains Qwen3-MoE, every parameter, forward and backward written by hand"
	@echo
	@echo "  make quickstart     install what is missing, build, tokenize real text, train, show the loss falling (3 minutes, no GPU)"
	@echo "  make test           prove it: kernels, fixtures of Hugging Face transformers, checkpoints, bad inputs (no Python, no network)"
	@echo "  make train_moe      the trainer        ./train_moe --help"
	@echo "  make test_moe       the checks of the whole model, numbered"
	@echo
	@echo "  make detect         what was found here and how to change it"
	@echo "  make deps           install what is missing (asks apt where it may, else prints the line)"
	@echo "  make test-full      make test and the longer suites (sanitizers, more layouts)"
	@echo "  make bench-cpu      tokens/s and share of the sgemm peak, kernels, transformers beside it"
	@echo "  make gpu-check      on a machine with a GPU: correctness, speed of every kernel beside torch's, a report, in under 9 minutes"
	@echo "  make compare-hf     the same 200 steps here and in transformers, curves over one another"
	@echo "  make test-mutations bugs planted one by one, each must be caught; ranks killed 50 times (nightly, half an hour)"
	@echo "  make test-cuemu     the CUDA backend, kernels and whole program, run on the CPU by dev/cuemu (needs CUDA's headers)"
	@echo "  make test-mutations-cuda  mistakes planted in the CUDA backend, each must be caught there (nightly)"
	@echo "  make clean"
	@echo
	@echo "  variables: CC, PRECISION=fp32|bf16|fp64, DEBUG=1, BLAS=off, OPENMP=off, MPI=off, MARCH=..., BACKEND=cpu|cuda (ARCH=, COMM=)"

# ---- detection -----------------------------------------------------------------------------------------------------------------
ifndef NO_DETECT
-include $(ROOT_BUILD)/detected.mk
ifneq ($(DETECTED_CC),$(CC))
$(ROOT_BUILD)/detected.mk: FORCE
endif
endif
$(ROOT_BUILD)/detected.mk: dev/detect.sh
	@mkdir -p $(ROOT_BUILD)
	@sh dev/detect.sh $(CC) > $@

MARCH = $(NATIVE)
FEATURES :=
ifneq ($(OPENMP),off)
ifneq ($(OPENMP_FLAGS),)
USE_OPENMP = 1
FEATURES := $(FEATURES)-omp
endif
endif
ifneq ($(BLAS),off)
ifneq ($(and $(BLAS_LIBS),$(filter cpu,$(BACKEND))),)
USE_BLAS = 1
FEATURES := $(FEATURES)-blas
endif
endif
ifneq ($(MPI),off)
ifneq ($(MPI_LIBS),)
USE_MPI = 1
FEATURES := $(FEATURES)-mpi
endif
endif

comma := ,
empty :=
space := $(empty) $(empty)
detect:
	@rm -f $(ROOT_BUILD)/detected.mk
	@$(MAKE) --no-print-directory show-detected
show-detected:
	@echo "compiler   $(CC)$(if $(HAVE_CC),, -- DOES NOT COMPILE C11: set CC=...)  flags $(MARCH)  (CC=..., MARCH=...)"
	@echo "cJSON      $(if $(HAVE_CJSON),found,MISSING and needed: make deps)"
	@echo "OpenMP     $(if $(OPENMP_FLAGS),found: $(OPENMP_FLAGS),not found (fine: one thread; make deps))  (OPENMP=off)"
	@echo "BLAS       $(if $(BLAS_LIBS),found: $(BLAS_LIBS),not found (fine: own products, slower; make deps))  (BLAS=off)"
	@echo "MPI        $(if $(MPI_LIBS),found: $(MPI_LIBS),not found (fine: one process; make deps))  (MPI=off)"
	@echo "CUDA       $(if $(NVCC),nvcc at $(NVCC)$(if $(HAVE_GPU), and a GPU, but no GPU)$(if $(HAVE_NCCL),$(comma) NCCL found,$(comma) no NCCL: one GPU)$(if $(HAVE_CUDNN),$(comma) cuDNN found),not found (fine))"
	@echo "backend    $(BACKEND)  (BACKEND=cpu|cuda)"

# ---- flags ------------------------------------------------------------------------------------------------------------------------
COMMIT := $(shell git describe --always --dirty 2>/dev/null || echo unknown)
DEFINES_bf16 = -DMOE_BF16
DEFINES_fp64 = -DMOE_FP64
ifeq ($(DEBUG),1)
OPTIMIZE = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -DMOE_DEBUG
FEATURES := $(FEATURES)-debug
else
OPTIMIZE = -O3 -g1
endif
ifeq ($(BACKEND)$(DEBUG),cuda1)
OPTIMIZE = -O1 -g -DMOE_DEBUG
endif
CFLAGS = -std=c11 $(OPTIMIZE) $(MARCH) -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wall -Wextra $(WERROR) $(DEFINES_$(PRECISION)) $(CJSON_CFLAGS)
LIBS = $(CJSON_LIBS) -lm -lpthread
ifdef USE_OPENMP
CFLAGS += $(OPENMP_FLAGS)
endif
ifdef USE_BLAS
CFLAGS += -DMOE_BLAS $(BLAS_CFLAGS)
LIBS += $(BLAS_LIBS)
endif
ifdef USE_MPI
CFLAGS += $(MPI_CFLAGS)
LIBS += $(MPI_LIBS)
endif

# ---- CUDA: kernels, the NCCL transport and train_moe.cu by nvcc, everything else by CC ------------------------------------------------
# The driver library is never linked: the program must start, and explain itself, where there is no driver.
ARCH = $(if $(GPU_CAPS),$(GPU_CAPS),$(filter 80 90 100,$(CUDA_ARCHS)))
CODES = $(patsubst 90,90a,$(patsubst sm_%,%,$(subst .,,$(ARCH))))
CUDA_COMM = $(if $(HAVE_NCCL),nccl,$(if $(USE_MPI),mpi,none))
COMM = $(if $(filter cuda,$(BACKEND)),$(CUDA_COMM),$(if $(USE_MPI),mpi,none))
NVCCFLAGS = -std=c++17 -O3 $(if $(filter 1,$(DEBUG)),-lineinfo -DMOE_DEBUG) $(foreach c,$(CODES),-gencode=arch=compute_$(c),code=sm_$(c)) -Xcompiler=-Wall,-Wextra $(if $(WERROR),-Werror=all-warnings) \
    $(DEFINES_$(PRECISION)) $(USE_CUDNN:1=-DMOE_CUDNN) $(CJSON_CFLAGS)
CUDA_LIBS = $(if $(CUDA_LIB),-L$(CUDA_LIB) -Wl$(comma)-rpath$(comma)$(CUDA_LIB)) $(if $(filter nccl,$(COMM)),-lnccl) $(USE_CUDNN:1=-lcudnn) -lcublasLt -lcublas -lcudart -lstdc++
KERNELS_COMMON = kernels/arena.c kernels/fail.c
CUDA_KERNELS = $(filter-out $(if $(USE_CUDNN),,%cudnn.c),$(wildcard kernels/cuda/*.cu kernels/cuda/*.c)) $(KERNELS_COMMON)
ifneq ($(and $(HAVE_CUDNN),$(filter bf16,$(PRECISION))),)
USE_CUDNN = 1
endif
ifeq ($(BACKEND),cuda)
CFLAGS += $(if $(USE_MPI),-DMOE_MPI) $(USE_CUDNN:1=-DMOE_CUDNN) $(CUDA_INCLUDE:%=-isystem %)
LIBS += $(CUDA_LIBS)
FEATURES := $(FEATURES)-$(COMM)$(subst $(space),,$(CODES:%=-%))
endif

VARIANT = $(BACKEND)-$(PRECISION)-$(notdir $(CC))$(subst /,_,$(subst =,_,$(subst -march,,$(MARCH))))$(FEATURES)
BUILD = $(ROOT_BUILD)/$(VARIANT)
KERNELS = $(if $(filter cuda,$(BACKEND)),$(CUDA_KERNELS),$(wildcard kernels/cpu/*.c) $(KERNELS_COMMON))
TRANSPORT_none = parallel/comm_none.c
TRANSPORT_mpi = parallel/comm_mpi.c parallel/comm_mpi_call.c parallel/comm_watch.c
TRANSPORT_nccl = parallel/comm_nccl.cu parallel/comm_join.c parallel/comm_watch.c
PARALLEL = $(filter-out parallel/comm_% parallel/test_%,$(wildcard parallel/*.c)) parallel/comm_common.c $(TRANSPORT_$(COMM))
LIBRARY = $(KERNELS) $(filter-out model/test_%,$(wildcard model/*.c)) $(PARALLEL) data/loader.c data/tokens.c
OBJECTS = $(addprefix $(BUILD)/,$(addsuffix .o,$(basename $(LIBRARY))))
TESTS = kernels/test_kernels kernels/test_experts kernels/test_optimizer data/test_data model/test_checkpoint
DEPENDS = $(OBJECTS:.o=.d) $(BUILD)/train_moe.d $(BUILD)/test_moe.d $(TESTS:%=$(BUILD)/%.d) $(BUILD)/parallel/test_comm.d $(BUILD)/parallel/test_dispatch.d $(BUILD)/dev/bench_cpu.d $(BUILD)/dev/tests/edge.d $(BUILD)/dev/tests/reshard.d $(BUILD)/dev/tests/test_cli.d

# ---- programs ---------------------------------------------------------------------------------------------------------------------
train_moe test_moe: %: $(if $(filter cuda,$(BACKEND)),say-cuda) $(BUILD)/% FORCE
	@cmp -s $(BUILD)/$@ $@ || cp $(BUILD)/$@ $@
$(BUILD)/train_moe: $(BUILD)/train_moe.o $(OBJECTS)
	$(if $(HAVE_CJSON),,@echo "cJSON is missing: make deps" && exit 1)
	@echo "  link $@"
	$(QUIET)$(CC) $(CFLAGS) $^ $(LIBS) -o $@
$(BUILD)/test_moe $(TESTS:%=$(BUILD)/%) $(BUILD)/parallel/test_comm $(BUILD)/parallel/test_dispatch $(BUILD)/dev/bench_cpu $(BUILD)/dev/tests/edge $(BUILD)/dev/tests/reshard $(BUILD)/dev/tests/test_cli: %: %.o $(OBJECTS)
	@echo "  link $@"
	$(QUIET)$(CC) $(CFLAGS) $^ $(LIBS) -o $@
ifeq ($(BACKEND),cuda)
say-cuda:
	$(if $(NVCC),,@echo "BACKEND=cuda needs nvcc, which is not in PATH  hint: PATH=/usr/local/cuda/bin:\$$PATH make ..., or BACKEND=cpu" && exit 1)
	$(if $(filter fp64,$(PRECISION)),@echo "the CUDA backend has bf16 and fp32 kernels  hint: PRECISION=bf16" && exit 1)
	@echo "cuda: for $(CODES:%=sm_%) $(if $(filter command environment,$(firstword $(origin ARCH))),(ARCH=),$(if $(GPU_CAPS),(the GPUs of this machine; ARCH=... for others),(no GPU seen here; ARCH=...)))," \
	    "$(PRECISION) (PRECISION=), ranks over $(COMM) (COMM=)$(if $(filter none,$(COMM)),: one GPU), attention $(if $(USE_CUDNN),cudnn and flash,flash)"
$(BUILD)/%.o: %.cu $(ROOT_BUILD)/detected.mk
	@mkdir -p $(@D)
	@echo "  nvcc $<"
	$(QUIET)$(NVCC) $(NVCCFLAGS) -MMD -MP -c $< -o $@
else
$(BUILD)/train_moe.o: train_moe.cu $(ROOT_BUILD)/detected.mk
	@mkdir -p $(@D)
	@echo "  cc   $<"
	$(QUIET)$(CC) $(CFLAGS) -MMD -MP -x c -c $< -o $@
endif
$(BUILD)/%.o: %.c $(ROOT_BUILD)/detected.mk
	@mkdir -p $(@D)
	@echo "  cc   $<"
	$(QUIET)$(CC) $(CFLAGS) $(EXTRA_$(basename $(notdir $<))) -MMD -MP -c $< -o $@
QUIET = $(if $(V),,@)
EXTRA_report = -DMOE_COMMIT='"$(COMMIT)"'
$(BUILD)/model/report.o: $(ROOT_BUILD)/commit
$(ROOT_BUILD)/commit: FORCE
	@mkdir -p $(@D)
	@echo '$(COMMIT)' | cmp -s - $@ || echo '$(COMMIT)' > $@
-include $(DEPENDS)

ifndef NO_DETECT
include dev/cuemu.mk
include dev/gpu.mk
endif

# ---- tests: each ends with 'N passed, N failed' -------------------------------------------------------------------------------------
test:
	@CC=$(CC) sh dev/tests/run.sh test
test-full:
	@CC=$(CC) sh dev/tests/run.sh full
test-mutations: train_moe $(BUILD)/dev/tests/reshard
	@sh dev/mutations/run.sh list.txt $(ONLY)
	@sh dev/tests/kill.sh $(BUILD)/train_moe $(BUILD)/dev/tests/reshard 50
test-mutations-cuda:
	@sh dev/mutations/run.sh kernels.txt $(ONLY)
show-build:
	@echo $(BUILD)

# ---- layout of the sources: clang-format 14, and no line above 100 columns -------------------------------------------------------------
FORMATTED = $(shell git ls-files '*.c' '*.h' '*.cu' '*.cuh' '*.cpp')
CLANG_FORMAT = clang-format-14
format:
	@$(CLANG_FORMAT) -i $(FORMATTED)
format-check:
	@sh dev/format_check.sh $(CLANG_FORMAT) $(FORMATTED)

# ---- scripts ----------------------------------------------------------------------------------------------------------------------
deps:
	@sh dev/deps.sh $(CC)
quickstart:
	@CC=$(CC) TEXT="$(TEXT)" sh dev/quickstart.sh
doctor:
	@CC=$(CC) sh dev/doctor.sh $(NP)
gpu-check:
	@CC=$(CC) bash dev/gpu_check.sh
compare-hf:
	@CC=$(CC) bash dev/compare_hf.sh
bench-cpu: train_moe $(BUILD)/dev/bench_cpu
	@BENCH=$(BUILD)/dev/bench_cpu bash dev/bench_cpu.sh

clean:
	rm -rf $(ROOT_BUILD) train_moe test_moe
FORCE:

# The whole CUDA program on machines without a GPU: every .cu of the project compiled by g++ for the
# emulator in dev/cuemu, NCCL over MPI. The Makefile includes this file.
#   build/cuemu/MODE-PRECISION/PROGRAM      MODE plain | asan (with UBSan) | tsan, PRECISION bf16 |
#                                           fp32, PROGRAM train_moe, test_moe, parallel/test_comm,
#                                           ... (any .cu or .c with main)
#                                           PROGRAM_staged: with the MPI transport, staged through
#                                           the host, in place of NCCL: several ranks on one GPU
#                                           (COMM=mpi)
#   make test-cuemu                         kernels against their CPU twins (test-cuemu-kernels),
#                                           the whole program (test-cuemu-program), the emulator's
#                                           own tests (test-cuemu-self),
#                                           planted mistakes (test-cuemu-seeded), the benchmark
#                                           (test-cuemu-bench), the ladder (test-cuemu-ladder),
#                                           cuDNN's attention graphs (test-cudnn-graphs); 'N passed,
#                                           N failed'
#   make test-cuemu-nightly                 the same with every combination: dev/cuemu/README.md
CUEMU_DIR = dev/cuemu
CUEMU_BUILD = $(ROOT_BUILD)/cuemu
TIER = ci

CUEMU_CXX = g++

# Flags by mode: those of dev/cuemu/Makefile, which explains them. Sanitized builds run blocks one
# after another and without OpenMP, whose runtime ThreadSanitizer does not know.
CUEMU_FLAGS_plain = -O2 -g1 -fopenmp
CUEMU_FLAGS_asan = -O1 -g1 -DCUEMU_SEQ -fsanitize=address,undefined \
    -fno-sanitize-recover=undefined -fno-omit-frame-pointer -DMOE_DEBUG
CUEMU_FLAGS_tsan = -O1 -g1 -DCUEMU_SEQ -fsanitize=thread -DMOE_DEBUG
CUEMU_COMMON = -DMOE_MPI $(CJSON_CFLAGS) $(MPI_CFLAGS) -DOMPI_SKIP_MPICXX -Wall -Wextra $(WERROR)
CUEMU_EMULATE = -std=c++17 -x c++ -DCUEMU -include cuemu.h -I$(CUEMU_DIR)/include \
    -isystem $(CUDA_INCLUDE) -fno-strict-aliasing -Wno-attributes -Wno-unknown-pragmas \
    -Wno-sign-compare -Wno-unused-parameter -Wno-unused-function -Wno-psabi
CUEMU_LIBRARY = $(filter-out kernels/cuda/%cudnn.cu kernels/cuda/%cudnn.c,$(CUDA_KERNELS)) \
    $(MODEL) $(PARALLEL) $(TRANSPORT_nccl) $(DATA)
CUEMU_STAGED = $(filter-out parallel/comm_nccl parallel/comm_join,$(basename $(CUEMU_LIBRARY))) \
    parallel/comm_mpi
CUEMU_HEADERS = $(patsubst %,$(CUEMU_BUILD)/source/%,$(wildcard kernels/cuda/*.cuh))
CUEMU_PROGRAMS = train_moe test_moe parallel/test_comm parallel/test_join kernels/test_cuda \
    kernels/test_offsets dev/bench_cuda

# Launches and dynamic shared memory are rewritten to C++; the rewritten files keep their places
# relative to one another, what was not rewritten is found beside the original.
.PRECIOUS: $(CUEMU_BUILD)/%/built $(CUEMU_BUILD)/source/%.cu $(CUEMU_BUILD)/source/%.cuh
$(CUEMU_BUILD)/source/%.cu: %.cu $(CUEMU_DIR)/tools/cuemu_pp.py
	@mkdir -p $(@D)
	@$(PYTHON) $(CUEMU_DIR)/tools/cuemu_pp.py $< > $@.new && mv $@.new $@
$(CUEMU_BUILD)/source/%.cuh: %.cuh $(CUEMU_DIR)/tools/cuemu_pp.py
	@mkdir -p $(@D)
	@$(PYTHON) $(CUEMU_DIR)/tools/cuemu_pp.py $< > $@.new && mv $@.new $@

# The emulator, by its own Makefile.
CUEMU_SUBMAKE = --no-print-directory -C $(CUEMU_DIR) CUDA_HOME=$(CUDA_INCLUDE:/include=) \
    BUILD=$(abspath $(CUEMU_BUILD))
CUEMU_SOURCES = $(wildcard $(addprefix $(CUEMU_DIR)/,src/* include/* include/*/*))
$(CUEMU_BUILD)/%/built: $(CUEMU_SOURCES)
	@mkdir -p $(@D)
	+$(MAKE) $(CUEMU_SUBMAKE) $(abspath $(@D)/libcuemu.a) $(abspath $(@D)/libcuemu_nccl.a)
	@touch $@

CUEMU_LIBS = $(CJSON_LIBS) $(BLAS_LIBS) $(MPI_LIBS) -lpthread -lm
# $(1) mode, $(2) precision
define CUEMU_VARIANT
.PRECIOUS: $(CUEMU_BUILD)/$(1)-$(2)/%.o
$(CUEMU_BUILD)/$(1)-$(2)/%.o: $(CUEMU_BUILD)/source/%.cu $(ROOT_BUILD)/detected.mk \
    | $(CUEMU_HEADERS)
	@mkdir -p $$(@D)
	@echo "cuemu $(1) $(2) $$*.cu"
	@$(CUEMU_CXX) $(CUEMU_FLAGS_$(1)) $(DEFINES_$(2)) $(CUEMU_COMMON) -I$$(dir $$*) \
	    -Ikernels/cuda $(CUEMU_EMULATE) -MMD -MP -c $$< -o $$@
$(CUEMU_BUILD)/$(1)-$(2)/%.o: %.c $(ROOT_BUILD)/detected.mk
	@mkdir -p $$(@D)
	@echo "cuemu $(1) $(2) $$<"
	@$(CC) -std=c11 $(CUEMU_FLAGS_$(1)) $(DEFINES_$(2)) $(CUEMU_COMMON) \
	    $$(EXTRA_$$(basename $$(notdir $$<))) -MMD -MP -c $$< -o $$@
$(CUEMU_PROGRAMS:%=$(CUEMU_BUILD)/$(1)-$(2)/%): %: %.o \
    $(patsubst %,$(CUEMU_BUILD)/$(1)-$(2)/%.o,$(basename $(CUEMU_LIBRARY))) \
    $(CUEMU_BUILD)/$(1)/built
	@$(CUEMU_CXX) $(CUEMU_FLAGS_$(1)) $$(filter %.o,$$^) $(CUEMU_BUILD)/$(1)/libcuemu_nccl.a \
	    $(CUEMU_BUILD)/$(1)/libcuemu.a $(CUEMU_LIBS) -o $$@
$(CUEMU_BUILD)/$(1)-$(2)/%_staged: $(CUEMU_BUILD)/$(1)-$(2)/%.o \
    $(CUEMU_STAGED:%=$(CUEMU_BUILD)/$(1)-$(2)/%.o) $(CUEMU_BUILD)/$(1)/built
	@$(CUEMU_CXX) $(CUEMU_FLAGS_$(1)) $$(filter %.o,$$^) $(CUEMU_BUILD)/$(1)/libcuemu.a \
	    $(CUEMU_LIBS) -o $$@
-include $(wildcard $(addprefix $(CUEMU_BUILD)/$(1)-$(2)/,*.d */*.d */*/*.d))
endef
$(foreach m,plain asan tsan,$(foreach p,bf16 fp32,$(eval $(call CUEMU_VARIANT,$(m),$(p)))))

-include dev/mk/kernel_tests.mk

# ---- tests --------------------------------------------------------------------------------------
CUEMU_TESTED = $(addprefix $(CUEMU_BUILD)/, \
    plain-fp32/train_moe plain-bf16/train_moe asan-bf16/train_moe tsan-bf16/train_moe \
    plain-fp32/test_moe plain-bf16/test_moe plain-fp32/parallel/test_comm \
    plain-fp32/parallel/test_comm_staged asan-bf16/parallel/test_join)
.PHONY: test-cuemu test-cuemu-nightly test-cuemu-build test-cuemu-program test-cuemu-self
.PHONY: test-cuemu-seeded
test-cuemu-program: $(CUEMU_TESTED)
	@fp32=$$($(MAKE) -s show-build BACKEND=cpu PRECISION=fp32)/train_moe; \
	    bf16=$$($(MAKE) -s show-build BACKEND=cpu PRECISION=bf16)/train_moe; \
	    $(MAKE) -s BACKEND=cpu PRECISION=fp32 $$fp32 && \
	    $(MAKE) -s BACKEND=cpu PRECISION=bf16 $$bf16 && \
	    PYTHON="$(PYTHON)" sh dev/tests/test_cuemu_program.sh $(CUEMU_BUILD) $$fp32 $$bf16 \
	        $(if $(QUICK),quick,$(TIER))
# The emulator's own tests, and the errors seeded in them.
CUEMU_SELF = test test-asan test-tsan test-lazy test-mpi test-bugs
test-cuemu-self:
	@mkdir -p $(CUEMU_BUILD)
	@for t in $(CUEMU_SELF); do \
	    echo "---- dev/cuemu: $$t"; \
	    $(MAKE) -s $(CUEMU_SUBMAKE) -j$(CUEMU_JOBS) TIER=$(TIER) $$t \
	        > $(CUEMU_BUILD)/self-$$t.log 2>&1; \
	    cat $(CUEMU_BUILD)/self-$$t.log; \
	done
	@awk -f dev/tests/sum.awk $(CUEMU_SELF:%=$(CUEMU_BUILD)/self-%.log)
# Some mistakes planted in the kernels, which must be found: all of them are make
# test-mutations-cuda. test-cuemu-kernels shows that the unchanged kernels pass.
test-cuemu-seeded:
	@UNCHANGED=passed sh dev/mutations/run.sh kernels.txt '(quick)'
# All: first everything is built, then the parts run beside each other, the long ones first, each
# into its log, and are told as they end; last their sum. A part that ends without its own closing
# line is one failure.
CUEMU_PARTS = test-cuemu-program test-cuemu-kernels test-cuemu-self test-cuemu-seeded \
    test-cuemu-bench test-cuemu-ladder test-cudnn-graphs
CUEMU_LOGS = $(CUEMU_PARTS:%=$(CUEMU_BUILD)/%.log)
CUEMU_JOBS := $(shell nproc 2> /dev/null || echo 2)
$(CUEMU_LOGS): FORCE
	@begin=$$(date +%s); \
	    $(MAKE) -j1 --no-print-directory $(basename $(@F)) > $@ 2>&1; \
	    echo "==== $(basename $(@F)), $$(($$(date +%s) - begin)) s"; \
	    cat $@
test-cuemu-build: $(CUEMU_TESTED) $(KERNEL_TESTS) $(CUEMU_BUILD)/plain-bf16/dev/bench_cuda \
    $(CUEMU_BUILD)/plain-bf16/dev/kernels/ladder
test-cuemu:
	@mkdir -p $(CUEMU_BUILD)
	@$(MAKE) --no-print-directory -j$(CUEMU_JOBS) test-cuemu-build
	@$(MAKE) --no-print-directory -j$(CUEMU_JOBS) $(CUEMU_LOGS)
	@awk -f dev/tests/sum.awk $(CUEMU_LOGS)

test-cuemu-nightly:
	@$(MAKE) --no-print-directory test-cuemu TIER=nightly

# While a kernel is written: every kernel against its CPU twin, plain.
.PHONY: test-cuemu-quick
test-cuemu-quick:
	@$(MAKE) --no-print-directory test-cuemu-kernels KERNEL_MODES=plain

# No kernel may spill registers; needs nvcc, no GPU.
.PHONY: check-spills
check-spills:
	@NVCC="$(NVCC)" sh dev/check_spills.sh $(CODES)

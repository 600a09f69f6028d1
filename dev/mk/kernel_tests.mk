# The tests of the CUDA kernels (after dev/mk/cuemu.mk, whose rules build the emulated objects):
#   make test-cuemu-kernels    every kernel against its CPU twin in the emulator, bf16 and fp32:
#                              plain, AddressSanitizer + UBSan, ThreadSanitizer, and with streams
#                              and copies as late as possible and in random order; 'N passed,
#                              N failed'. KERNEL_MODES="plain asan": some of them (plain:
#                              kernels/test_offsets too, offsets beyond 2^31 elements).
#                              TIER=nightly: more seeds, asan in fp32, early copies under
#                              ThreadSanitizer
#   make test-cuda-gpu         the same programs on the GPU of this machine, with both attention
#                              kernels where make found cuDNN
#   make test-cudnn-graphs     cuDNN's attention without a GPU: what it says of the graphs for
#                              several GPUs, and what the graphs mean, run by an interpreter
# kernels/test_cuda links the CPU kernels beside the CUDA ones: their global names get the prefix
# ref_ (precision under test) or true_ (fp32).
KERNEL_MODES = plain asan tsan lazy
TWINS = $(CUEMU_BUILD)/twins

# $(1): prefix, $(2): precision. All CPU kernels as one object, every global name of theirs renamed.
define TWIN
$(TWINS)/$(1)$(2).o: $(wildcard kernels/cpu/*.c kernels/cpu/*.h kernels/*.h) \
    dev/mk/kernel_tests.mk
	@mkdir -p $(TWINS)/$(1)$(2)
	@echo "twins $(1) $(2)"
	@for f in kernels/cpu/*.c; do \
	    $(CC) -std=c11 -O2 -fno-math-errno $(if $(BLAS_LIBS),-DMOE_BLAS) $(BLAS_CFLAGS) \
	        $(DEFINES_$(2)) -c $$$$f -o $(TWINS)/$(1)$(2)/$$$$(basename $$$$f .c).o || exit 1; \
	done
	@ld -r $(TWINS)/$(1)$(2)/*.o -o $$@.plain
	@nm --defined-only -g $$@.plain | awk '{print $$$$3, "$(1)" $$$$3}' > $$@.names
	@objcopy --redefine-syms=$$@.names $$@.plain $$@
endef
$(eval $(call TWIN,ref_,bf16))
$(eval $(call TWIN,ref_,fp32))
$(eval $(call TWIN,true_,fp32))
# The twins that an emulated test is compared with: $(1) mode, $(2) precision.
define COMPARED
$(CUEMU_BUILD)/$(1)-$(2)/kernels/test_cuda: $(TWINS)/ref_$(2).o $(TWINS)/true_fp32.o
endef
$(foreach m,plain asan tsan,$(foreach p,bf16 fp32,$(eval $(call COMPARED,$(m),$(p)))))

# fp32 builds differ from bf16 ones in the fragments of the products only: their races are those of
# bf16, and ThreadSanitizer looks at bf16.
KERNEL_BUILDS = $(patsubst lazy,plain,$(KERNEL_MODES))
KERNEL_FP32 = $(filter plain $(if $(filter nightly,$(TIER)),asan),$(KERNEL_BUILDS))
KERNEL_TESTS = $(sort $(addprefix $(CUEMU_BUILD)/,$(addsuffix /kernels/test_cuda, \
    $(KERNEL_BUILDS:%=%-bf16) $(KERNEL_FP32:%=%-fp32)) $(if $(filter plain,$(KERNEL_MODES)), \
    plain-bf16/kernels/test_offsets plain-fp32/kernels/test_offsets)))
.PHONY: test-cuemu-kernels test-cuda-gpu test-cudnn-graphs
test-cuemu-kernels: $(KERNEL_TESTS)
	@sh kernels/cuda/test_modes.sh $(CUEMU_BUILD) $(TIER) $(KERNEL_MODES)
test-cuda-gpu:
	@for p in bf16 fp32; do \
	    dir=$$($(MAKE) -s show-build BACKEND=cuda PRECISION=$$p); \
	    for t in test_cuda test_offsets; do \
	        $(MAKE) BACKEND=cuda PRECISION=$$p $$dir/kernels/$$t && $$dir/kernels/$$t || \
	            exit 1; \
	    done; \
	done

# The driver's library is the toolkit's stub, in a folder of its own: cuDNN asks it for the GPU, is
# told there is none, and uses the description instead.
ifdef HAVE_CUDNN
CUDNN_TEST = $(CUEMU_BUILD)/cudnn
CUDNN_BUILD = $(CC) -std=c11 -O2 -Wall -Wextra $(WERROR) -DMOE_BF16 -isystem $(CUDA_INCLUDE) \
    $(CUDNN_CFLAGS) $(filter %.c,$^) -o $@
CUDNN_LINK = -L$(CUDA_LIB) -Wl,-rpath,$(CUDA_LIB) $(CUDNN_LIBS) -lcudart
$(CUDNN_TEST)/test_cudnn $(CUDNN_TEST)/test_cudnn_graph: $(CUDNN_TEST)/%: kernels/%.c \
    kernels/cuda/attention_cudnn.c kernels/fail.c kernels/cuda/attention.h \
    $(wildcard kernels/*.h kernels/cpu/math.h)
	@mkdir -p $(@D)
	@[ ! -e $(CUDA_LIB)/stubs/libcuda.so ] || ln -sf $(CUDA_LIB)/stubs/libcuda.so $(@D)/libcuda.so.1
	@$(CUDNN_BUILD) $(if $(filter %graph,$@),,$(CUDNN_LINK)) -lm
test-cudnn-graphs: $(CUDNN_TEST)/test_cudnn $(CUDNN_TEST)/test_cudnn_graph
	@{ \
	    LD_LIBRARY_PATH=$(abspath $(CUDNN_TEST)):$$LD_LIBRARY_PATH $(CUDNN_TEST)/test_cudnn || \
	        echo "test_cudnn FAILED"; \
	    $(CUDNN_TEST)/test_cudnn_graph || echo "test_cudnn_graph FAILED"; \
	} | awk '/^[0-9]+ passed, [0-9]+ failed$$/ { passed += $$1; failed += $$3; next } \
	    { print } \
	    / FAILED$$/ { bad++ } \
	    END { \
	        if (bad > failed) failed = bad; \
	        print passed + 0 " passed, " failed + 0 " failed"; \
	        exit failed > 0 \
	    }'
else
test-cudnn-graphs:
	@echo "cuDNN 9.8 or newer was not found (make detect): its graphs are not tested"
	@echo "0 passed, 0 failed"
endif

# The ladder of dev/kernels (after dev/mk/gpu.mk): every rung checked against the first.
#   make ladder               on a GPU, with times
#   make test-cuemu-ladder    in the emulator, checks alone; 'N passed, N failed'
LADDER = $(basename $(wildcard dev/kernels/*.cu))
ifeq ($(BACKEND),cuda)
$(BUILD)/dev/kernels/ladder: $(LADDER:%=$(BUILD)/%.o) \
    $(addprefix $(BUILD)/,$(addsuffix .o,$(basename $(CUDA_KERNELS))))
	@echo "  link $@"
	$(QUIET)$(CC) $(CFLAGS) $^ $(CUDA_LIBS) $(BLAS_LIBS) -lm -lpthread -o $@
-include $(LADDER:%=$(BUILD)/%.d)
endif
LADDER_CUEMU = $(LADDER) $(basename $(filter kernels/%,$(CUEMU_LIBRARY)))
$(CUEMU_BUILD)/plain-bf16/dev/kernels/ladder: $(LADDER_CUEMU:%=$(CUEMU_BUILD)/plain-bf16/%.o) \
    $(CUEMU_BUILD)/plain/built
	@$(CUEMU_CXX) $(CUEMU_FLAGS_plain) $(filter %.o,$^) $(CUEMU_BUILD)/plain/libcuemu.a \
	    $(BLAS_LIBS) -lpthread -lm -o $@

.PHONY: ladder test-cuemu-ladder
ladder:
	@dir=$$($(MAKE) -s show-build BACKEND=cuda PRECISION=bf16); \
	    $(MAKE) BACKEND=cuda PRECISION=bf16 $$dir/dev/kernels/ladder && \
	    $$dir/dev/kernels/ladder $(ARGS)
test-cuemu-ladder: $(CUEMU_BUILD)/plain-bf16/dev/kernels/ladder
	@OMP_NUM_THREADS=1 $<

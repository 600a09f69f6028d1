# From a source to an object in $(BUILD).
$(BUILD)/%.o: %.c $(ROOT_BUILD)/detected.mk
	@mkdir -p $(@D)
	@echo "  cc   $<"
	$(QUIET)$(CC) $(CFLAGS) $(EXTRA_$(basename $(notdir $<))) -MMD -MP -c $< -o $@
ifeq ($(BACKEND),cuda)
$(BUILD)/%.o: %.cu $(ROOT_BUILD)/detected.mk
	@mkdir -p $(@D)
	@echo "  nvcc $<"
	$(QUIET)$(NVCC) $(NVCCFLAGS) -MMD -MP -c $< -o $@
else
# The same text, read as C.
$(BUILD)/train_moe.o: train_moe.cu $(ROOT_BUILD)/detected.mk
	@mkdir -p $(@D)
	@echo "  cc   $<"
	$(QUIET)$(CC) $(CFLAGS) -MMD -MP -x c -c $< -o $@
endif

# report.c writes the commit into run.json.
EXTRA_report = -DMOE_COMMIT='"$(COMMIT)"'
$(BUILD)/model/report.o: $(ROOT_BUILD)/commit
$(ROOT_BUILD)/commit: FORCE
	@mkdir -p $(@D)
	@echo '$(COMMIT)' | cmp -s - $@ || echo '$(COMMIT)' > $@

# Says what a CUDA build is for, or why it cannot be.
ARCH_FROM = $(if $(filter command environment,$(firstword $(origin ARCH))),(ARCH=),$(ARCH_SEEN))
ARCH_SEEN = $(if $(GPU_CAPS),(the GPUs of this machine; ARCH=... for others),$(ARCH_NONE))
ARCH_NONE = (no GPU seen here; ARCH=...)
.PHONY: say-backend show-build
ifeq ($(BACKEND),cuda)
say-backend:
	$(if $(NVCC),,@echo "BACKEND=cuda needs nvcc, which is not in PATH " \
	    "hint: PATH=/usr/local/cuda/bin:\$$PATH make ..., or BACKEND=cpu" && exit 1)
	$(if $(filter fp64,$(PRECISION)),@echo "the CUDA backend has bf16 and fp32 kernels " \
	    "hint: PRECISION=bf16" && exit 1)
	@echo "cuda: for $(CODES:%=sm_%) $(ARCH_FROM), $(PRECISION) (PRECISION=)," \
	    "ranks over $(COMM) (COMM=)$(if $(filter none,$(COMM)),: one GPU)," \
	    "attention $(if $(USE_CUDNN),cudnn and flash,flash)"
	$(if $(and $(filter 90a,$(CODES)),$(filter bf16,$(PRECISION))), \
	    $(if $(USE_CUDNN),,@echo "NO cuDNN WAS FOUND: ATTENTION ON AN H100 OR H200 WILL BE SLOW" \
	    "(a layer takes some 40 % longer)  hint: pip install nvidia-cudnn-cu13, make detect"))
	$(if $(filter 90a,$(CODES)),$(if $(HAVE_NCCL),,@echo "NO NCCL WAS FOUND: GPUS EXCHANGE" \
	    "THROUGH THE HOST OR NOT AT ALL  hint: pip install nvidia-nccl-cu13, make detect"))
else
say-backend: ;
endif
show-build:
	@echo $(BUILD)

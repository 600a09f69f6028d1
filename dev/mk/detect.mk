# What the machine has (build/detected.mk, written by dev/detect.sh), and what of it is used.
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
MARCH_NAME = $(subst /,_,$(subst =,_,$(subst -march,,$(MARCH))))
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
ifneq ($(and $(HAVE_CUDNN),$(filter bf16,$(PRECISION))),)
USE_CUDNN = 1
endif

comma := ,
empty :=
space := $(empty) $(empty)

# $(call found,WHAT IT IS,WHAT HAPPENS WITHOUT IT)
found = $(if $(1),found: $(1),not found (fine: $(2); make deps))
NCCL_FOUND = $(if $(HAVE_NCCL),NCCL found,no NCCL: one GPU)
CUDA_FOUND = nvcc at $(NVCC)$(if $(HAVE_GPU), and a GPU,$(comma) but no GPU)$(comma) \
    $(NCCL_FOUND)$(if $(HAVE_CUDNN),$(comma) cuDNN found)

.PHONY: show-detected
detect:
	@rm -f $(ROOT_BUILD)/detected.mk
	@$(MAKE) --no-print-directory show-detected
show-detected:
	@echo "compiler   $(CC)$(if $(HAVE_CC),, -- DOES NOT COMPILE C11: set CC=...)" \
	    " flags $(MARCH)  (CC=..., MARCH=...)"
	@echo "cJSON      $(if $(HAVE_CJSON),found,MISSING and needed: make deps)"
	@echo "OpenMP     $(call found,$(OPENMP_FLAGS),one thread)  (OPENMP=off)"
	@echo "BLAS       $(call found,$(BLAS_LIBS),own products$(comma) slower)  (BLAS=off)"
	@echo "MPI        $(call found,$(MPI_LIBS),one process)  (MPI=off)"
	@echo "CUDA       $(if $(NVCC),$(CUDA_FOUND),not found (fine))"
	@echo "backend    $(BACKEND)  (BACKEND=cpu|cuda)"

# Flags of the compilers and libraries to link. A missing enumerator in a `switch` is an error in
# every build.
COMMIT := $(shell git describe --always --dirty 2>/dev/null || echo unknown)
DEFINES_bf16 = -DMOE_BF16
DEFINES_fp64 = -DMOE_FP64
OPTIMIZE = -O3 -g1
ifeq ($(DEBUG),1)
OPTIMIZE = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined \
    -fno-omit-frame-pointer -DMOE_DEBUG
FEATURES := $(FEATURES)-debug
endif
ifeq ($(BACKEND)$(DEBUG),cuda1)
OPTIMIZE = -O1 -g -DMOE_DEBUG
endif
CFLAGS = -std=c11 $(OPTIMIZE) $(MARCH) -fno-math-errno -fno-trapping-math -ffp-contract=fast \
    -Wall -Wextra -Werror=switch $(WERROR) $(DEFINES_$(PRECISION)) $(CJSON_CFLAGS)
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

# ---- CUDA: kernels, the NCCL transport and train_moe.cu by nvcc, everything else by CC ----------
# The driver library is never linked: the program must start, and explain itself, where there is no
# driver.
ARCH = $(if $(GPU_CAPS),$(GPU_CAPS),$(filter 80 90 100,$(CUDA_ARCHS)))
CODES = $(patsubst 90,90a,$(patsubst sm_%,%,$(subst .,,$(ARCH))))
CUDA_COMM = $(if $(HAVE_NCCL),nccl,$(if $(USE_MPI),mpi,none))
COMM = $(if $(filter cuda,$(BACKEND)),$(CUDA_COMM),$(if $(USE_MPI),mpi,none))
NVCCFLAGS = -std=c++17 -O3 $(if $(filter 1,$(DEBUG)),-lineinfo -DMOE_DEBUG) \
    $(foreach c,$(CODES),-gencode=arch=compute_$(c),code=sm_$(c)) \
    -Xcompiler=-Wall,-Wextra,-Werror=switch $(if $(WERROR),-Werror=all-warnings) \
    $(DEFINES_$(PRECISION)) $(USE_CUDNN:1=-DMOE_CUDNN) $(NCCL_CFLAGS) $(CUDNN_CFLAGS) \
    $(CJSON_CFLAGS)
CUDA_LIBS = $(if $(CUDA_LIB),-L$(CUDA_LIB) -Wl$(comma)-rpath$(comma)$(CUDA_LIB)) \
    $(if $(filter nccl,$(COMM)),$(NCCL_LIBS)) $(if $(USE_CUDNN),$(CUDNN_LIBS)) \
    -lcublasLt -lcublas -lcudart -lstdc++
ifeq ($(BACKEND),cuda)
CFLAGS += $(if $(USE_MPI),-DMOE_MPI) $(USE_CUDNN:1=-DMOE_CUDNN) $(CUDA_INCLUDE:%=-isystem %) \
    $(NCCL_CFLAGS) $(CUDNN_CFLAGS)
LIBS += $(CUDA_LIBS)
FEATURES := $(FEATURES)-$(COMM)$(subst $(space),,$(CODES:%=-%))
endif

# Programs for a machine with a GPU, of the kernels alone: they need neither cJSON nor MPI (after
# dev/mk/cuemu.mk; `make gpu-check` runs everything: dev/gpu_check.sh).
# With BACKEND=cuda, $(BUILD)/kernels/test_cuda compares every kernel with its CPU twin, and
# $(BUILD)/dev/bench_cuda times every kernel against the ceilings of the card.
#   make bench-cuda          the benchmark as a table, beside the predictions of dev/ledger.py
#                            (dev/bench_report.py); ARGS="--only experts"
#   make test-cuemu-bench    the benchmark at toy shapes in the emulator: every kernel of
#                            dev/costs.h is called; 'N passed, N failed'
ifeq ($(BACKEND),cuda)
$(BUILD)/kernels/test_cuda: $(TWINS)/ref_$(PRECISION).o $(TWINS)/true_fp32.o
$(BUILD)/kernels/test_cuda $(BUILD)/kernels/test_offsets $(BUILD)/dev/bench_cuda: %: %.o \
    $(addprefix $(BUILD)/,$(addsuffix .o,$(basename $(CUDA_KERNELS))))
	@echo "  link $@"
	$(QUIET)$(CC) $(CFLAGS) $(filter %.o,$^) $(CUDA_LIBS) $(BLAS_LIBS) -lm -lpthread -o $@
-include $(BUILD)/kernels/test_cuda.d $(BUILD)/kernels/test_offsets.d $(BUILD)/dev/bench_cuda.d
endif

.PHONY: bench-cuda test-cuemu-bench
bench-cuda:
	@dir=$$($(MAKE) -s show-build BACKEND=cuda); \
	    $(MAKE) BACKEND=cuda $$dir/dev/bench_cuda && \
	    $$dir/dev/bench_cuda $(ARGS) > $$dir/bench.jsonl && \
	    $(PYTHON) dev/bench_report.py $$dir/bench.jsonl
test-cuemu-bench: $(CUEMU_BUILD)/plain-bf16/dev/bench_cuda
	@$< --tiny > $(CUEMU_BUILD)/bench.jsonl && \
	    $(PYTHON) dev/bench_report.py $(CUEMU_BUILD)/bench.jsonl --check

include dev/mk/ladder.mk

# Tests that need no GPU: each target ends with 'N passed, N failed'.
.PHONY: test test-full test-nightly test-faults test-power-cut test-mutations test-mutations-cuda
.PHONY: format format-check prose-check
# PRECISION on the command line: everything in that precision alone.
test:
	@CC=$(CC) PRECISION=$(if $(filter command,$(origin PRECISION)),$(PRECISION)) \
	    sh dev/tests/run.sh test
test-full:
	@CC=$(CC) sh dev/tests/run.sh full
# Everything that CI has no time for, some hours. Each part ends with its own 'N passed, N failed'.
NIGHTLY = test-cuemu-nightly test-mutations test-mutations-cuda test-faults test-power-cut \
    test-kills
test-nightly:
	@CC=$(CC) sh dev/tests/run.sh nightly
	@$(MAKE) --no-print-directory fuzz FUZZ_SECONDS=3600
	@for t in $(NIGHTLY); do $(MAKE) --no-print-directory $$t || exit 1; done
test-mutations: train_moe $(BUILD)/dev/tests/reshard
	@sh dev/mutations/run.sh list.txt $(ONLY)
test-kills: train_moe $(BUILD)/dev/tests/reshard
	@sh dev/tests/kill.sh $(BUILD)/train_moe $(BUILD)/dev/tests/reshard 120
# Faults of the file system that must lose nothing: injected into system calls, and power cuts
# (root, ext4). Nightly at these counts, half an hour; make test-full injects FAULTS=40.
FAULTS = 1500
test-faults: $(BUILD)/train_moe
	@bash dev/tests/faults.sh $< $(FAULTS)
test-power-cut: $(BUILD)/train_moe
	@bash dev/tests/power_cut.sh $< 62
test-mutations-cuda:
	@sh dev/mutations/run.sh kernels.txt $(ONLY)

# Layout of the sources: clang-format 14, and no line above 100 columns, scripts and make files too.
FORMATTED = $(shell git ls-files '*.c' '*.h' '*.cu' '*.cuh' '*.cpp')
SCRIPTS = $(shell git ls-files .ci/run '*.sh' '*.sbatch' '*.py' '*.awk' '*.mk' '*Makefile')
CLANG_FORMAT = clang-format-14
format:
	@$(CLANG_FORMAT) -i $(FORMATTED)
format-check:
	@sh dev/format_check.sh $(CLANG_FORMAT) $(FORMATTED) $(SCRIPTS)

# The chapters: width of prose and tables, links, invariants that README.md defines.
PROSE = $(shell git ls-files '*.md' ':!dev/results')
prose-check:
	@sh dev/prose_check.sh $(PROSE)

# Fuzzing of every parser (dev/fuzz): libFuzzer, so clang. A build of its own under build/fuzz,
# without MPI, OpenMP and BLAS, with the address and undefined-behaviour sanitizers.
#   make fuzz [FUZZ_SECONDS=30] [FUZZ_RUNS=1000000] [ONLY=config]
# The last line is 'N passed, N failed', one check a parser.
FUZZ_PARSERS = safetensors index config shard mask vocabulary trainer log checkpoint
FUZZ_WRAPPED = die warn fopen fdopen fclose open_memstream
.PHONY: fuzz fuzz-build
fuzz:
	@SECONDS_EACH="$(FUZZ_SECONDS)" RUNS="$(FUZZ_RUNS)" ONLY="$(ONLY)" \
	    sh dev/fuzz/run.sh $(FUZZ_PARSERS)
fuzz-build: $(FUZZ_PARSERS:%=$(ROOT_BUILD)/fuzz-%)
$(ROOT_BUILD)/fuzz-%: dev/fuzz/fuzz.c $(OBJECTS)
	$(QUIET)$(CC) $(CFLAGS) -DFUZZ_PARSER_$* -fsanitize=fuzzer $^ \
	    $(FUZZ_WRAPPED:%=-Wl,--wrap=%) $(LIBS) -o $@

# The kit for other trainers (dev/parity).
#   make parity-kit        build/parity-kit.tar.gz: adapters, fixtures, what confirms; under 8 MB
#   make parity-peers      runs the adapters on CPUs (needs transformers >= 5.20 with accelerate), a
#                          table in dev/results
.PHONY: parity-kit parity-peers
parity-kit:
	@rm -rf $(ROOT_BUILD)/parity && mkdir -p $(ROOT_BUILD)/parity
	@cp -r dev/parity/*.py dev/parity/README.md dev/hf/compare.py dev/hf/reference.py \
	    dev/fixtures dev/naive $(ROOT_BUILD)/parity
	@tar czf $(ROOT_BUILD)/parity-kit.tar.gz -C $(ROOT_BUILD) parity
	@size=$$(wc -c < $(ROOT_BUILD)/parity-kit.tar.gz); \
	    echo "$(ROOT_BUILD)/parity-kit.tar.gz: $$size bytes"; \
	    [ $$size -lt 8000000 ] || { \
	        echo "error: the kit is larger than 8 MB, hint: smaller fixtures"; \
	        exit 1; \
	    }
parity-peers:
	@python=$$(bash dev/hf/python.sh) && \
	    $$python dev/parity/peers.py --out dev/results/$$(date +%Y-%m-%d)-parity-peers.md

# The verbs of Millrace. `make` alone lists them.
#
# Everything is built with the release profile, tests too, and `test` builds all targets in one go (with the features that
# the tests' own dependencies switch on), so that nothing compiles twice. CARGO_TARGET_DIR and LIBTORCH
# are honoured when set; MILLRACE_MODEL, or MODEL=path, names a model of your own.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test check sim matrix fuzz bench bench-engines bench-load bench-routing cached gpu-check clean clean-cache

cache := $(HOME)/.cache/millrace
own_model := $(abspath $(or $(MODEL),$(MILLRACE_MODEL)))
model := $(or $(own_model),$(cache)/models/smollm2-135m-instruct.gguf)
export MILLRACE_MODEL := $(model)
# Other systems, for `make bench PEERS=1`; made last, so that it is there only when they are.
peers_python := $(cache)/peers/bin/python-with-peers

# Where Cargo puts what it builds: its configuration and CARGO_TARGET_DIR decide, so Cargo is asked.
target_dir = $$(cargo metadata --format-version 1 --no-deps | python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')

# The simulator's first seed, and steps for each; SEEDS=n runs n seeds.
SEED ?= 1
STEPS ?= 10000
# The models with golden rows that gpu-check takes along: those inside the checkout, and what others are beside it.
own_tiny = $(wildcard tests/data/tiny-*)
tiny_models = $(own_tiny) $(filter-out $(own_tiny:tests/data/%=../shared/golden/tiny/%),$(wildcard ../shared/golden/tiny/tiny-*))
# Rounds of the failure matrix.
REPEATS ?= 1

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## fetch LibTorch and the demo's model (once; 640 MB)
	@deploy/check-tools
	@MILLRACE_MODEL='$(own_model)' python3 deploy/fetch.py

demo: setup ## build everything, run a whole cluster on this machine and talk to it (DEMO_ARGS=...)
	cargo build --release
	"$(target_dir)/release/millctl" demo --model '$(model)' $(DEMO_ARGS)

test: setup ## build everything and run every test
	cd deploy && python3 -B -m unittest test_fetch
	cargo build --release --workspace --all-targets
	cargo test --release --workspace --no-fail-fast

check: setup ## formatting and lints; any finding fails
	@cargo fmt --version >/dev/null 2>&1 || { echo "check: rustfmt is missing: rustup component add rustfmt" >&2; exit 1; }
	@cargo clippy --version >/dev/null 2>&1 || { echo "check: clippy is missing: rustup component add clippy" >&2; exit 1; }
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings

sim: ## run the whole cluster in the deterministic simulator (SEED=, SEEDS=, STEPS=; MUTANTS=1: planted bugs; CORRUPTIONS=n: damaged KV)
ifdef MUTANTS
	RUSTFLAGS="--cfg millrace_planted" CARGO_TARGET_DIR="$(target_dir)/planted" cargo run --release -p millrace-sim -- \
		--mutants '$(filter-out 1,$(MUTANTS))' --seed $(SEED) --steps $(STEPS) --seeds $(or $(SEEDS),40) $(SIM_ARGS)
else
	cargo run --release -p millrace-sim -- --seed $(SEED) --steps $(STEPS) $(if $(SEEDS),--seeds $(SEEDS)) \
		$(if $(CORRUPTIONS),--corruptions $(CORRUPTIONS)) $(SIM_ARGS)
endif

matrix: setup ## lose each party of a request in each state, in each way, REPEATS times, and decode nodes at each token (MATRIX_ARGS=...)
	cargo build --release
	"$(target_dir)/release/millmatrix" --repeats $(REPEATS) --model-migrate-each 1 $(MATRIX_ARGS)

fuzz: setup ## spoiled inputs to every parser, for SECONDS=n in all; what breaks a promise is kept in tests/fuzz/corpus (TARGETS=, SEED=)
	cargo run --release -p millrace-fuzz -- run $(TARGETS) --seed $(SEED) --seconds $(or $(SECONDS),600)

bench: setup $(if $(PEERS),$(peers_python)) ## measure a local cluster under load (BENCH_ARGS=...; PEERS=1 measures other systems beside it)
	cargo build --release
	$(if $(PEERS),MILLRACE_PEERS_PYTHON='$(peers_python)') "$(target_dir)/release/millbench" $(BENCH_ARGS)
	$(if $(PEERS),$(if $(BENCH_ARGS),,$(MAKE) bench-engines))

bench-engines: setup ## our engines and other systems', each behind its own server, asked by the same client (ENGINES_ARGS=...; installs 8 GB once)
	cargo build --release
	python3 -B tests/load/peers/install.py --model '$(model)' --cache '$(cache)/peers'
	python3 -B tests/load/peers/engines.py --bin "$(target_dir)/release" --model '$(model)' --cache '$(cache)/peers' $(ENGINES_ARGS)

$(peers_python):
	python3 -m venv '$(cache)/peers'
	'$(cache)/peers/bin/pip' install --quiet mooncake-transfer-engine-non-cuda==0.3.13.post1
	ln -s python3 '$@'

bench-load: ## the load harness itself: its figures against known delays, and its own ceiling; PEERS=1: against AIPerf, vLLM's client and hey, too (a quiet machine; no cluster)
	cargo build --release -p millrace-load
	"$(target_dir)/release/millload" check
	"$(target_dir)/release/millload" ceiling $(CEILING_ARGS)
ifdef PEERS
	python3 -B tests/load/peers/agree.py --millload "$(target_dir)/release/millload" --model '$(model)' --cache '$(cache)/peers' $(PEERS_ARGS)
endif

bench-routing: setup ## ways of placing requests against each other on the traces in the folder TRACES= (REQUESTS=, EXPERIMENT_ARGS=...)
	cargo build --release
	tests/load/routing.sh "$(target_dir)/release" '$(model)' '$(TRACES)' "$(target_dir)/routing" $(EXPERIMENT_ARGS)

cached: setup ## GPT-2 with and without a KV cache: the same tokens, the times, and a plot in cached.svg (CACHED_ARGS=...)
	cargo run --release -p millrace-model --example cached -- --svg cached.svg $(CACHED_ARGS)

gpu-check: setup ## check and measure a CUDA device, where there is one; else put what a machine with one needs into .gpu-check (DEVICE=cpu: the checks here; GPU_ARGS=...)
	cargo build --release --workspace --example gpu-check
	rm -rf .gpu-check
	mkdir -p .gpu-check/bin .gpu-check/tiny
	strip -o .gpu-check/bin/gpu-check "$(target_dir)/release/examples/gpu-check"
	cp deploy/gpu-check .gpu-check/run
	cp -r $(tiny_models) .gpu-check/tiny
ifdef DEVICE
	.gpu-check/bin/gpu-check --models .gpu-check/tiny --device '$(DEVICE)' $(GPU_ARGS)
else
	@if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then .gpu-check/run $(GPU_ARGS); else \
		echo; echo "gpu-check: built, NOT run: this machine has no CUDA device. Carry the folder .gpu-check to one whose Python has torch 2.11,"; \
		echo "and run .gpu-check/run there. DEVICE=cpu runs the checks here, on the processor."; fi
endif

clean: ## remove what was built, and local clusters; the cache stays
	cargo clean
	rm -rf .millrace .gpu-check

clean-cache: ## remove LibTorch, the model and everything else in ~/.cache/millrace
	rm -rf '$(cache)' .cargo/libtorch.toml

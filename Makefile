# Thin calls of the binary. `make help` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/sh

PROFILE ?= default
RESULTS ?= results
CARGO   ?= cargo
REUSE   ?= own
BIN     := $(or $(CARGO_TARGET_DIR),target)/release/minicache
# The models that a profile names and that no hub is needed for.
FETCH   := $(if $(MODELS),,$(if $(filter default,$(PROFILE)),smollm2-135m,\
	$(if $(filter small,$(PROFILE)),smollm2-135m qwen2.5-coder-1.5b-instruct)))

# What is quick and tells most comes first; experiments that are not named here follow.
FIRST = fig1a fig2b fidelity_prompt memory fig2c fig2a fig1b fig4 fig6 table2 tableB tableE tableD ablation table1 tableA tableC \
	tableA_time fig5 frontier_speed calibration fidelity frontier
NAMES = $(FIRST) $(filter-out $(FIRST),$(patsubst experiments/%.toml,%,$(sort $(wildcard experiments/*.toml))))
# TABLE=fig1a, or several: TABLE="fig1a table1"
EXPERIMENTS = $(foreach t,$(or $(TABLE),$(NAMES)),experiments/$(t).toml)
SWEEPS = $(if $(START),--sweep cache.start_layer=$(START)) $(if $(GAMMA),--sweep cache.retention.gamma=$(GAMMA))
INTO = $(RESULTS)
RUN = $(BIN) run --profile $(PROFILE) --results $(INTO) --reuse $(REUSE) \
	$(if $(MODELS),--models $(MODELS)) $(if $(LIMIT),--limit $(LIMIT)) $(if $(DATA),--data $(DATA)) \
	$(if $(DEVICE),--device $(DEVICE)) $(SWEEPS) $(ARGS)

.PHONY: help build fetch reproduce sweep report verify test test-bounds test-crash test-cluster fuzz lint bench

help:
	@echo 'make reproduce                       all experiments in small -> results/sample/ (with DATA: results/)'
	@echo 'make reproduce TABLE=fig1a           one of experiments/*.toml'
	@echo 'make reproduce PROFILE=paper         the models of the paper (DEVICE=cuda:0)'
	@echo 'make sweep START=8,16 GAMMA=0,0.05   start layer and retention threshold -> sweeps/ (TABLE=fig4)'
	@echo 'make verify                          computes rows of results/ a second time and compares (TABLE, DATA)'
	@echo 'make report                          figures and reports again from the CSV'
	@echo 'make test, make lint, make bench'
	@echo 'make test-crash                      runs killed, many at once and on full disks end as undisturbed ones'
	@echo 'make test-cluster                    the same of a sweep on a real Slurm, which it installs (Debian, as root)'
	@echo 'make fuzz                            100,000 damaged files of every format; an hour or two'
	@echo 'make reproduce PROFILE=small         larger samples, and a model of 1.5 billion parameters; hours'
	@echo 'Options: TABLE, PROFILE, MODELS, LIMIT, DATA (folder with data sets), DEVICE, RESULTS, ARGS,'
	@echo '         REUSE=any (finished rows that came with the repository are not computed again)'

build:
	$(CARGO) build --release --bin minicache

fetch:
	$(foreach model,$(FETCH),scripts/fetch-model $(model) &&) true

reproduce: build fetch
	$(RUN) $(EXPERIMENTS)

sweep: RESULTS := sweeps
sweep: TABLE ?= fig4
sweep: reproduce

# What stands in RESULTS is not touched: the second rows are in a folder of their own, which goes whatever happens.
verify: INTO = "$$again"
verify: build fetch
	@again=$$(mktemp -d) && trap 'rm -rf "$$again"' EXIT && trap 'exit 130' INT && trap 'exit 143' TERM && \
	$(RUN) --again $(RESULTS) $(EXPERIMENTS) && \
	$(BIN) compare $(RESULTS) "$$again" $(if $(TABLE),--experiments $(TABLE))

report: build
	$(BIN) report $(RESULTS)

test:
	$(CARGO) test --workspace --features minicache-core/candle

# Caches on the emulated device under the address sanitizer, each block of memory an allocation of its own.
test-bounds:
	MINICACHE_EMULATED_FLAGS="-fsanitize=address -g -O1" LD_PRELOAD= \
	$(CARGO) test --workspace --features minicache-core/candle --test caches_on_device --config \
	"target.'cfg(all())'.runner = ['env', 'ASAN_OPTIONS=detect_leaks=0', 'LD_PRELOAD=$$($(or $(CXX),c++) -print-file-name=libasan.so)']"

test-crash:
	$(CARGO) build --bin minicache
	scripts/crash-test

test-cluster:
	$(CARGO) build --bin minicache
	scripts/test-slurm

# The test profile: optimised, with checks of overflows and assertions that a release build lacks.
fuzz:
	MINICACHE_FUZZ=$(or $(MINICACHE_FUZZ),100000) $(CARGO) test --workspace --test fuzz -- --nocapture

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --features minicache-core/candle -- -D warnings

bench:
	$(CARGO) bench --workspace

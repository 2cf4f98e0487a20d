# Thin calls of the binary. `make help` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/sh

PROFILE ?= default
RESULTS ?= results
CARGO   ?= cargo
BIN     := target/release/minicache
MODEL   := scripts/fetch-default-model

# TABLE=fig1a, or several: TABLE="fig1a table1"
EXPERIMENTS = $(if $(TABLE),$(foreach t,$(TABLE),experiments/$(t).toml),$(sort $(wildcard experiments/*.toml)))
SWEEPS = $(if $(START),--sweep cache.start_layer=$(START)) $(if $(GAMMA),--sweep cache.retention.gamma=$(GAMMA))
RUN = $(BIN) run --profile $(PROFILE) --results $(RESULTS) \
	$(if $(MODELS),--models $(MODELS)) $(if $(LIMIT),--limit $(LIMIT)) $(if $(DATA),--data $(DATA)) \
	$(if $(DEVICE),--device $(DEVICE)) $(SWEEPS) $(ARGS)

.PHONY: help build reproduce sweep report test lint bench

help:
	@echo 'make reproduce                       all experiments that fit this machine -> results/'
	@echo 'make reproduce TABLE=fig1a           one of experiments/*.toml'
	@echo 'make reproduce PROFILE=paper         the models of the paper (DEVICE=cuda:0)'
	@echo 'make sweep START=8,16 GAMMA=0,0.05   start layer and retention threshold -> sweeps/ (TABLE=fig4)'
	@echo 'make report                          figures and reports again from the CSV'
	@echo 'make test, make lint, make bench'
	@echo 'Options: TABLE, PROFILE, MODELS, LIMIT, DATA (folder with data sets), DEVICE, RESULTS, ARGS'

build:
	$(CARGO) build --release --bin minicache

reproduce: build
ifeq ($(PROFILE)$(MODELS),default)
	$(MODEL)
endif
	$(RUN) $(EXPERIMENTS)

sweep: RESULTS := sweeps
sweep: TABLE ?= fig4
sweep: reproduce

report: build
	$(BIN) report $(RESULTS)

test:
	$(CARGO) test --workspace

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

bench:
	$(CARGO) bench --workspace

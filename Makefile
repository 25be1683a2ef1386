# `make train` and `make test` set up everything they need: a virtual environment in .venv with the
# pinned packages, completed when a requirements file changes.

PYTHON ?= python3
VENV := .venv/bin/python

.PHONY: train test gpu results
train: .venv/ready
	$(VENV) train.py judge

test: .venv/ready-dev
	$(VENV) -m pytest

# What there is to run on a GPU, 25 minutes; its header names the settings: PYTHON, OUT, LIMIT_*.
gpu:
	nanorrm/bench/gpu.sh

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install --quiet -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(VENV) -m pip install --quiet -r requirements-dev.txt
	touch $@

# The tables of docs/RESULTS.md, remade under runs/: `make -j2 results`, one thread per run. Seed 2 of the
# judge starts from a base of its own.
SEEDS := 0 1 2
EVALS := $(foreach s,$(SEEDS),runs/judge-$s/eval.json runs/direct-$s/eval.json runs/no-check-$s/eval.json)
TAUGHT := $(foreach s,$(SEEDS),runs/policy-$s/best_of.json runs/dpo-$s/best_of.json)
ONE := --threads 1

results: .venv/ready runs/base/eval.json $(EVALS) $(TAUGHT) runs/scaling/results.json
	$(VENV) docs/results.py

runs/scaling/results.json: | .venv/ready
	$(VENV) eval.py scaling --model toy-judge --out runs/scaling $(ONE)

runs/policy-%/best_of.json: | .venv/ready
	$(VENV) train.py policy --config configs/policy_toy.toml --seed $* --name policy-$* $(ONE)

runs/dpo-%/best_of.json: | .venv/ready
	$(VENV) train.py dpo --config configs/dpo_toy.toml --seed $* --name dpo-$* $(ONE)

runs/base/eval.json: | .venv/ready
	mkdir -p runs/base
	$(VENV) eval.py toy --model toy $(ONE) --json $@

runs/base-1/model: | .venv/ready
	$(VENV) train.py base --seed 1 --name base-1 $(ONE)

runs/base-no-check/model: | .venv/ready
	$(VENV) train.py base --config configs/base_no_check.toml $(ONE)

runs/judge-2/model: runs/base-1/model
runs/judge-2/model: START = --model runs/base-1/model
runs/judge-%/model: | .venv/ready
	$(VENV) train.py judge $(START) --seed $* --name judge-$* $(ONE)

runs/judge-%/eval.json: runs/judge-%/model
	$(VENV) eval.py toy --model $< $(ONE) --json $@

runs/direct-%/model: | .venv/ready
	$(VENV) train.py judge --config configs/direct.toml --seed $* --name direct-$* $(ONE)

runs/direct-%/eval.json: runs/direct-%/model
	$(VENV) eval.py toy --think False --model $< $(ONE) --json $@

runs/no-check-%/model: runs/base-no-check/model
	$(VENV) train.py judge --config configs/no_check.toml --seed $* --name no-check-$* $(ONE)

runs/no-check-%/eval.json: runs/no-check-%/model
	$(VENV) eval.py toy --model $< $(ONE) --json $@

.SECONDARY:

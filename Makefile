# `make train` and `make test` set up everything they need: a virtual environment in .venv with the
# pinned packages, remade when a requirements file changes.

PYTHON ?= python3
VENV := .venv/bin/python

.PHONY: train test
train: .venv/ready
	$(VENV) train.py judge

test: .venv/ready-dev
	$(VENV) -m pytest

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install --quiet -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(VENV) -m pip install --quiet -r requirements-dev.txt
	touch $@

# Every target does its own set-up in $(VENV); a second run finds it done.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: help install studio demo demo-train demo-model smoke-photos test check smoke clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/installed: setup.py constraints.txt $(wildcard mas/step*.[ch])
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[preprocess,train,studio,dev]'
	touch $@

install: $(VENV)/installed  ## install everything into .venv

demo: $(VENV)/installed  ## the main job: park world → scenes → tokens → the shipped model paints, in demo/index.html
	$(BIN)/python tools/demo.py --output demo

studio: $(VENV)/installed  ## draw scenes in the browser: the shipped model at http://127.0.0.1:7860
	$(BIN)/mas studio

demo-train: $(VENV)/installed  ## train a tiny model from nothing: … → tokens → VQ-SEG, VQ-GAN, GPT → pictures, in demo/train/index.html
	$(BIN)/python tools/demo_train.py --output demo/train

demo-model: $(VENV)/installed  ## what another model can do: make demo-model MODEL=DIR, in demo/model-page/index.html
	$(BIN)/python tools/demo.py --model $(MODEL) --output demo/model-page

smoke-photos: $(VENV)/installed  ## the same on real photos: make smoke-photos DATA=DIR (shards + COCO panoptic annotations)
	$(BIN)/python tools/demo_train.py --photos $(DATA) --output demo/photos

test: $(VENV)/installed  ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile tests

check: $(VENV)/installed  ## ruff, mypy, the import rule
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py

smoke: $(VENV)/installed  ## one minute: the command line and the fastest tests
	$(BIN)/mas doctor
	$(BIN)/python -m pytest -x tests/test_cli.py tests/test_imports.py tests/mas/test_scene.py

clean:  ## remove what the targets made (demo/, caches), keep .venv
	rm -rf demo build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

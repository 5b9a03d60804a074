# Two commands do everything on a fresh machine: `make demo` and `make test`. Each makes the .venv it needs.
#
#   make demo                    the whole loop of a tiny model on drawn images, and its report (recipes/demo.yaml)
#   make test                    the fast tests, under 10 minutes on 2 cores
#   make test-slow               the long ones, marked `slow`
#   make bench DATA=vqa_rad      speed (tests/benchmarks) on the folder of VQA-RAD, printed
#   make lint                    ruff
#
# Settings, on the command line or in the environment:
#   PYTHON=python3.12            the interpreter to make .venv with (3.11 or later)
#   TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
#                                where torch comes from, for a small CPU build or a certain CUDA version
#   JOBS=8                       test processes

PYTHON ?= python3
TORCH_INDEX_URL ?=
JOBS ?= 2
BIN := .venv/bin
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test test-slow bench lint format clean
.DEFAULT_GOAL := test

demo: .venv/.ready
	$(BIN)/medst run recipes/demo.yaml
	@echo && $(BIN)/python examples/ask_questions.py runs/demo/dpo
	@echo "All of it is in runs/demo: dpo/ has the aligned adapter, report/index.html what happened."

test: .venv/.ready
	$(PYTEST) -n $(JOBS)

test-slow: .venv/.ready
	$(PYTEST) -m slow --durations 10

bench: .venv/.ready
	@test -n "$(DATA)" || { echo "make bench DATA=path/to/vqa_rad (its JSON file, and images/)"; exit 1; }
	$(BIN)/python tests/benchmarks/bench_prepare.py $(DATA)
	$(BIN)/python tests/benchmarks/bench_collator.py --images $(DATA)/images
	$(BIN)/python tests/benchmarks/bench_judge.py

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info

# torch first and alone: only it has builds of its own for each kind of machine.
.venv/.ready: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "medst_trl needs Python 3.11 or later, $(PYTHON) is older: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) $(TORCH)
	$(BIN)/pip install -c constraints.txt -e ".[dev,dicom]"
	touch $@

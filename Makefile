# Two commands are enough on a fresh machine: `make demo` and `make test`. Each creates the .venv it needs.
#
#   make demo                    the whole loop with a tiny model on synthetic scans, and its report (recipes/demo.yaml)
#   make test                    the fast tests, under 10 minutes on 2 cores
#   make test-slow               the slow tests, with DeepSpeed and bitsandbytes: half an hour
#   make bench                   speed (tests/benchmarks) against stock TRL on this machine's CPU, under 10 minutes
#   make bench DATA=vqa_rad      the same with the real images in VQA-RAD's directory, and the speed of `medst prepare`
#   make bench-gpu               speed of LLaVA-1.5-7B with random weights on a GPU, and the time of the paper's recipe
#   make lint                    ruff
#
# Settings, on the command line or in the environment:
#   PYTHON=python3.12            the interpreter that creates .venv (3.11 or later)
#   TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
#                                where torch comes from, for a small CPU build or another CUDA version
#   JOBS=8                       number of test processes

PYTHON ?= python3
TORCH_INDEX_URL ?=
JOBS ?= 2
BIN := .venv/bin
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test test-slow bench bench-gpu lint format clean
.DEFAULT_GOAL := test

demo: .venv/.ready
	$(BIN)/medst run recipes/demo.yaml
	@echo && $(BIN)/python examples/ask_questions.py runs/demo/dpo
	@echo "Everything is in runs/demo: the aligned adapter in dpo/, the report in report/index.html."

test: .venv/.ready
	$(PYTEST) -n $(JOBS)

test-slow: .venv/.extras
	$(PYTEST) -m slow --durations 10

# Tables on stdout, all figures in runs/bench. Nothing else may run at the same time.
BENCH := TQDM_DISABLE=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/benchmarks
IMAGES := $(if $(DATA),--images $(DATA)/images)

bench: .venv/.ready
	$(BENCH)/bench_dpo.py $(IMAGES) --output runs/bench/cpu/dpo.json
	$(BENCH)/bench_sft.py $(IMAGES) --ways stock ours 'ours, packed' --output runs/bench/cpu/sft.json
	$(BENCH)/bench_sft.py $(IMAGES) --shape cpu_64 --output runs/bench/cpu/sft_64.json
	$(BENCH)/bench_generate.py $(IMAGES) --output runs/bench/cpu/generate.json
	$(BENCH)/bench_collator.py $(IMAGES)
	$(BENCH)/bench_extractor.py
	$(BENCH)/bench_judge.py 500
ifdef DATA
	$(BENCH)/bench_prepare.py $(DATA)
else
	@echo "Skipped without DATA=path/to/vqa_rad (its JSON file, and images/): bench_prepare.py"
endif

bench-gpu: export CUDA_VISIBLE_DEVICES ?= 0
bench-gpu: .venv/.ready
	$(BENCH)/bench_dpo.py --shape llava_7b $(IMAGES) --output runs/bench/gpu/dpo.json
	$(BENCH)/bench_sft.py --shape llava_7b $(IMAGES) --output runs/bench/gpu/sft.json
	$(BENCH)/bench_generate.py --shape llava_7b $(IMAGES) --output runs/bench/gpu/generate.json
	$(BENCH)/whole_recipe.py runs/bench/gpu/dpo.json runs/bench/gpu/sft.json runs/bench/gpu/generate.json

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info

# torch first and alone: only torch has a build for each kind of machine.
.venv/.ready: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "medst_trl needs Python 3.11 or later, $(PYTHON) is older: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) $(TORCH)
	$(BIN)/pip install -c constraints.txt -e ".[dev,dicom]"
	touch $@

.venv/.extras: .venv/.ready
	$(BIN)/pip install -c constraints.txt -e ".[deepspeed,qlora,xlsx]"
	touch $@

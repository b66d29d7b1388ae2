# guildcast: `make` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GUILDS ?= 100
SECONDS ?= 60

.DEFAULT_GOAL := help
.PHONY: help install doctor run check format lint types imports unit test test-newest test-system fuzz interop bench bench-fanout bench-peers bench-seal lock clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' \
	  || { echo "guildcast needs Python 3.11 to 3.14: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "guildcast: this Python cannot make a virtual environment: install its venv package" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

install: $(VENV)/installed ## Make the virtual environment from the lock

.PHONY: redis
redis: install
	@test -n "$$GUILDCAST_REDIS_URL" || $(BIN)/python deploy/embedded_redis.py

doctor: redis ## Say whether this machine has what guildcast needs
	@$(BIN)/python -c 'import sys, resource; print("Python", sys.version.split()[0]); print("open files", resource.getrlimit(resource.RLIMIT_NOFILE)[1])'
	@$(BIN)/python -c 'from shared.cli.redis_server import find_server; print("Redis", find_server())'

run: redis ## Broadcast to the local Discord: make run SOURCE=<file or URL> GUILDS=100 DURATION=20
	@exec $(BIN)/guildcast run --guilds $(GUILDS) $(if $(SOURCE),--source '$(SOURCE)') $(if $(DURATION),--duration $(DURATION))

check: static unit ## Format, lint, types, imports, unit and vector tests

.PHONY: static
static: format lint types imports # all that runs nothing

format: install
	@$(BIN)/ruff format --check --quiet . || { echo "run: $(BIN)/ruff format ." >&2; exit 1; }

lint: install
	@$(BIN)/ruff check --quiet .

types: install
	@$(BIN)/mypy

imports: install
	@$(BIN)/lint-imports --no-logo 2>/dev/null || $(BIN)/lint-imports

unit: redis
	@PYTHONASYNCIODEBUG=1 $(BIN)/pytest -q tests/unit tests/vectors

test: redis ## Every test that needs only the lock
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-parts test-whole
	@$(MAKE) --no-print-directory test-alone

test-newest: install ## Unit, vector and integration tests on the newest promised Python here, where that is another
	@newest=$$($(BIN)/python -m tests.newest_python) || exit; set -- $$newest; \
	  test $$# = 0 || $(MAKE) --no-print-directory VENV=.venv-$$1 PYTHON="$$2" test-promised

.PHONY: test-promised test-pure test-joined
test-promised: redis
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-pure test-joined

test-pure:
	@PYTHONASYNCIODEBUG=1 $(BIN)/pytest -q tests/unit tests/vectors

test-joined:
	@PYTHONASYNCIODEBUG=1 $(BIN)/pytest -q tests/integration

.PHONY: test-parts test-whole test-alone
test-parts: # beside the whole pools, and behind them where the processor is short
	@PYTHONASYNCIODEBUG=1 nice $(BIN)/pytest -q tests/unit tests/vectors tests/integration tests/bench

test-whole:
	@PYTHONASYNCIODEBUG=1 $(BIN)/pytest -q tests/e2e --ignore tests/e2e/test_skew.py

test-alone: # milliseconds between two hosts: with the machine to itself
	@PYTHONASYNCIODEBUG=1 $(BIN)/pytest -q tests/e2e/test_skew.py

test-system: redis peers ## Tests that need the Debian packages of tests/packages.txt; with cargo, go and npm all peers
	@tests/system/packages-present
	@$(BIN)/pytest -q -rs tests/system

fuzz: install ## Spoil inputs of every reader of foreign bytes: make fuzz SECONDS=60
	@$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

INTEROP := .run/interop

$(INTEROP)/python/installed: tests/interop/requirements.lock
	@$(PYTHON) -m venv --clear $(INTEROP)/python
	@$(INTEROP)/python/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r $<
	@touch $@

$(INTEROP)/node/installed: tests/interop/package.json tests/interop/package-lock.json
	@command -v npm >/dev/null || { echo "make interop needs Node.js with npm: install the packages nodejs and npm" >&2; exit 1; }
	@mkdir -p $(INTEROP)/node
	@cp $^ $(INTEROP)/node/
	@cd $(INTEROP)/node && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
	@ln -sf node_modules/node-linux-$$(uname -m | sed 's/x86_64/x64/;s/aarch64/arm64/')/bin/node $(INTEROP)/node/node
	@touch $@

interop: redis $(INTEROP)/python/installed $(INTEROP)/node/installed ## Prove the local Discord with discord.py and @discordjs/voice
	@cp tests/interop/discord_js_client.mjs $(INTEROP)/node/client.mjs
	@$(BIN)/python -m tests.interop --environment $(INTEROP)

bench: redis peers ## Every benchmark, nearly an hour; some with ITEMS="pace skew", the soak with ITEMS=soak
	@$(BIN)/python -m tests.bench $(ITEMS)

bench-fanout: redis ## CPU per packet of a worker with its sender, beside bare sendmmsg: make bench-fanout GUILDS=1000
	@$(BIN)/python -m tests.bench.fanout --guilds $(GUILDS)

PEERS := .run/bench/peers
PEER_SOURCES := tests/bench/peers
# cargo and go also where their own installers put them
WITH_TOOLS := PATH="$$PATH:$$HOME/.cargo/bin:/usr/local/go/bin"
# a peer that cannot be built here is left out: $(1) its name, $(2) its file
attempt = @mkdir -p $(PEERS)/$(1); \
	if $(MAKE) --no-print-directory $(2) >$(PEERS)/$(1)/build.log 2>&1; then rm -f $(PEERS)/$(1)/absent; else \
	  tail -n 4 $(PEERS)/$(1)/build.log >$(PEERS)/$(1)/absent; \
	  echo "left out: $(1) cannot be built: see $(PEERS)/$(1)/build.log" >&2; fi

$(PEERS)/songbird/target/release/songbird-peer: $(addprefix $(PEER_SOURCES)/songbird/,Cargo.toml Cargo.lock src/main.rs) | $(VENV)/installed
	@mkdir -p $(PEERS)/songbird
	@cp -r $(PEER_SOURCES)/songbird/Cargo.toml $(PEER_SOURCES)/songbird/src $(PEERS)/songbird/
	@rm -f $(PEERS)/songbird/Cargo.lock
	@cd $(PEERS)/songbird && $(WITH_TOOLS) cargo generate-lockfile --quiet
	@$(BIN)/python -m tests.bench.peers.cargo_lock dress $(PEERS)/songbird/Cargo.lock
	@cd $(PEERS)/songbird && $(WITH_TOOLS) CARGO_TARGET_DIR=target nice cargo build --release --locked --quiet
	@touch $@

$(PEERS)/disgo/disgo-peer: $(addprefix $(PEER_SOURCES)/disgo/,go.mod go.sum main.go)
	@cd $(PEER_SOURCES)/disgo && $(WITH_TOOLS) CGO_ENABLED=0 GOTOOLCHAIN=local nice go build -trimpath -o $(CURDIR)/$@ .

.PHONY: peers
peers: install # those that can be built here
	+$(call attempt,discord.py,$(INTEROP)/python/installed)
	+$(call attempt,discordjs,$(INTEROP)/node/installed)
	@test -e $(PEERS)/songbird/target/release/songbird-peer || echo "building songbird: some minutes" >&2
	+$(call attempt,songbird,$(PEERS)/songbird/target/release/songbird-peer)
	+$(call attempt,disgo,$(PEERS)/disgo/disgo-peer)

bench-peers: redis peers ## CPU per packet of ours, discord.py, @discordjs/voice, songbird and disgo: make bench-peers GUILDS=200
	@$(BIN)/python -m tests.bench.peers $(if $(filter file,$(origin GUILDS)),,--guilds $(GUILDS))

bench-seal: install ## CPU per packet of each transport mode, beside AES-GCM
	@$(BIN)/python -m tests.bench.seal

LOCK := uv pip compile --universal --generate-hashes --no-header --no-emit-index-url --no-annotate \
	--python-version 3.11 --upgrade --quiet

lock: ## Renew all lock files (needs uv, npm, cargo and go)
	$(LOCK) --extra dev pyproject.toml -o requirements.lock
	$(LOCK) tests/interop/requirements.in -o tests/interop/requirements.lock
	cd tests/interop && npm update --package-lock-only --ignore-scripts
	$(BIN)/python -m tests.interop.bare_lock
	mkdir -p $(PEERS)/songbird
	cp -r $(PEER_SOURCES)/songbird/Cargo.toml $(PEER_SOURCES)/songbird/src $(PEERS)/songbird/
	cd $(PEERS)/songbird && $(WITH_TOOLS) cargo update --quiet
	$(BIN)/python -m tests.bench.peers.cargo_lock strip $(PEERS)/songbird/Cargo.lock
	cd $(PEER_SOURCES)/disgo && $(WITH_TOOLS) go mod tidy

clean: ## Remove everything that can be made again
	rm -rf $(VENV) .venv-3.* .run .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

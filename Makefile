# make demo   extend a small model's context window on real text, two CPU cores, ten minutes
# make test   lint, format check and the CPU tests
# make setup  only the virtual environment that all of these use
# make test-slurm  examples/slurm on a real Slurm of two nodes on this host, three minutes
# make image  the image for CPUs without a daemon, by buildah or podman
# make check  whether the install works, half a minute
# make docs   the documentation site, in build/site
# make test-engines  exports read by transformers 4 and 5, llama.cpp and CTranslate2, which it installs
# make test-attack  damage, kills and wrong command lines drawn by a seed, an hour
# make package  wheel and sdist, in build/dist
VENV ?= .venv
INPUT ?=
ROPE ?= yarn
TEST_PROCESSES ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slurm test-engines image lint format check docs package setup lock

demo: setup
	$(BIN)/python examples/demo/demo.py --rope $(ROPE) $(if $(INPUT),--input $(INPUT))

test: lint
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile

# -rs: says why it was skipped, where Slurm is not installed.
test-slurm: setup
	$(BIN)/python -m pytest -rs -m slow tests/cluster

# As an image of Docker's: hadolint knows the file, and OCI has no SHELL or HEALTHCHECK.
image:
	@builder=$$(command -v buildah || command -v podman) || \
	  { echo "error: make image needs buildah or podman" >&2; exit 2; }; \
	"$$builder" build --format docker --target cpu --tag megatron_cream:cpu .

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck .ci/run $(wildcard tools/*.sh examples/*.sh examples/*/*.sh)
	$(BIN)/hadolint Dockerfile

test-engines: setup
	$(BIN)/python tests/engines/install.py build/engines
	$(BIN)/python -m pytest -m slow -s tests/engines
	PYTHONPATH=build/engines/transformers-lowest $(BIN)/python -m pytest \
	  tests/evaluation/test_hf_loading.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: setup
	$(BIN)/megatron-cream check-install

docs: setup
	$(BIN)/mkdocs build --strict

# The commands of README.md and docs/ as they are printed, ten minutes.
.PHONY: test-docs
test-docs: setup
	$(BIN)/python -m pytest -m slow tests/docs

# Its size and seed are variables, which CONTRIBUTING.md names.
.PHONY: test-attack
test-attack: setup
	$(BIN)/python -m pytest -m slow tests/attack

package: setup
	$(BIN)/python -m build --no-isolation --outdir build/dist

setup: $(READY)

# 6 GB, mostly torch's CUDA libraries. The mark comes last: an interrupted set-up is finished the
# next time.
$(READY): requirements.lock setup.cfg pyproject.toml
	@test -x $(BIN)/python || { python=$$(./tools/find_python.sh) && \
	  echo "setting up $(VENV) with $$python, some minutes" && "$$python" -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint requirements.lock --editable '.[dev]'
	@touch $@

lock:
	$(BIN)/python -m pip freeze --exclude-editable > requirements.lock

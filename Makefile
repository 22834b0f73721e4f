# make demo   extend a small model's context window on real text, two CPU cores, ten minutes
# make test   lint, format check, types and the CPU tests
# make types  mypy, by the settings in pyproject.toml
# make test-repo  what is about the repository: package, image, site, templates, house rules
# make coverage  the CPU tests once more, counting lines; ends badly below the floor
# make setup  only the virtual environment that all of these use
# make test-slurm  examples/slurm on a real Slurm of two nodes on this host, three minutes
# make image  the image for CPUs without a daemon, by buildah or podman
# make launch-scripts  the scripts of examples/ from their plans
# make check  whether the install works, half a minute
# make docs   the documentation site, in build/site
# make test-engines  exports read by transformers 4 and 5, llama.cpp and CTranslate2, which it installs
# make test-attack  damage, kills and wrong command lines drawn by a seed, an hour
# make package  wheel and sdist, in build/dist
VENV ?= .venv
INPUT ?=
ROPE ?= yarn
TEST_PROCESSES ?= 2
# Versions that make setup installs: requirements.lock, requirements.lowest.txt, or /dev/null for the
# newest allowed ones.
CONSTRAINT ?= requirements.lock
PYTEST_RUN = pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Where this is set, every process of the tests would compile the package and the tests anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test cpu-tests test-repo types coverage test-slurm test-engines image lint style format \
  check docs package setup lock

demo: setup
	$(BIN)/python examples/demo/demo.py --rope $(ROPE) $(if $(INPUT),--input $(INPUT))

# mypy beside the tests: one core of two would wait for it.
test: style
	@$(MAKE) --no-print-directory --jobs 2 types cpu-tests

cpu-tests: setup
	$(BIN)/python -m $(PYTEST_RUN)

test-repo: setup
	$(BIN)/python -m $(PYTEST_RUN) -m repository

types: setup
	$(BIN)/mypy

coverage: setup
	@mkdir -p build/coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m $(PYTEST_RUN)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered > build/coverage/report.txt; \
	  status=$$?; cat build/coverage/report.txt; exit $$status

# -rs: says why it was skipped, where Slurm is not installed.
test-slurm: setup
	$(BIN)/python -m pytest -rs -m slow tests/cluster

# As an image of Docker's: hadolint knows the file, and OCI has no SHELL or HEALTHCHECK.
image:
	@builder=$$(command -v buildah || command -v podman) || \
	  { echo "error: make image needs buildah or podman" >&2; exit 2; }; \
	"$$builder" build --format docker --target cpu --tag megatron_cream:cpu .

lint: style types

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck $(wildcard .ci/* tools/*.sh examples/*.sh examples/*/*.sh)
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

.PHONY: launch-scripts
launch-scripts: setup
	$(BIN)/python examples/launch_scripts.py

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
	  --constraint $(CONSTRAINT) --editable '.[dev]'
	@touch $@

lock:
	$(BIN)/python -m pip freeze --exclude-editable > requirements.lock

# make demo   extend a small model's context window on real text, two CPU cores, ten minutes
# make test   lint, format check and the CPU tests
# make setup  only the virtual environment that all of these use
# make check  whether the install works, half a minute
# make docs   the documentation site, in build/site
# make package  wheel and sdist, in build/dist
VENV ?= .venv
INPUT ?=
ROPE ?= yarn
TEST_PROCESSES ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint format check docs package setup lock

demo: setup
	$(BIN)/python examples/demo/demo.py --rope $(ROPE) $(if $(INPUT),--input $(INPUT))

test: lint
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck .ci/run $(wildcard tools/*.sh examples/*.sh examples/*/*.sh)
	$(BIN)/hadolint Dockerfile

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: setup
	$(BIN)/python tools/check_install.py

docs: setup
	$(BIN)/mkdocs build --strict

package: setup
	$(BIN)/python -m build --no-isolation --outdir build/dist

setup: $(READY)

# 6 GB, mostly torch's CUDA libraries. The mark comes last: an interrupted set-up is finished the
# next time.
$(READY): requirements.lock setup.cfg setup.py pyproject.toml
	@test -x $(BIN)/python || { python=$$(./tools/find_python.sh) && \
	  echo "setting up $(VENV) with $$python, some minutes" && "$$python" -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint requirements.lock --editable '.[dev]'
	@touch $@

lock:
	$(BIN)/python -m pip freeze --exclude-editable > requirements.lock

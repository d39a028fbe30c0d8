# Thin on purpose: every line is a command you could type. `make demo` and `make test` need Python 3.11 or later,
# git and make, and set up the rest by themselves in .venv.
PROJECT := {{cookiecutter.project_slug}}
PYTHON  ?= $(shell command -v python3.11 || command -v python3)
BIN     := $(CURDIR)/.venv/bin

# Caches lie outside the project's folder: whatever lies in it, `cookiecutter .` would copy. Without any of Python's own, each
# of some hundred processes would compile torch anew, for twice the time to its first line.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(CURDIR)/build/pycache
export RUFF_CACHE_DIR      := $(CURDIR)/build/ruff
export MYPY_CACHE_DIR      := $(CURDIR)/build/mypy

.PHONY: help setup extras demo test slow slow-template slow-engine check types-template types-project bench golden pairs gauges lock

help:
	@echo "make demo    bake a project and run the whole road on real digits, to a validated submission"
	@echo "make test    lint, format, types, the tests of the template, the project and the engine"
	@echo "make slow    the long checks (up to 40 minutes)"
	@echo "make check   lint, format and types alone"
	@echo "make bench   speed against what users have, into the table of README.md; ten minutes, wants a quiet machine"
	@echo "make golden BASE=COMMIT   nine runs trained by COMMIT and by this checkout: which numbers differ; ten minutes"
	@echo "make pairs BASE=COMMIT    training, loader and inference of COMMIT and of this checkout in turns; five minutes, a quiet machine"
	@echo "make gauges  the structure in numbers: what runs, what a reader has to open; three minutes"
	@echo "make lock    pin the dependencies anew, with hashes"

setup: .venv/installed

# Done again only when the pins change.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --python $(BIN)/python --require-hashes -r requirements.txt
	@touch $@

# What the project only imports when asked: the long checks ask.
extras: .venv/extras

.venv/extras: .venv/installed $(PROJECT)/requirements-extras.txt
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --require-hashes -r "$(PROJECT)/requirements-extras.txt"
	@touch $@

.venv/bench: .venv/installed benchmarks/requirements.txt
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --require-hashes -r benchmarks/requirements.txt
	@touch $@

demo: setup
	$(BIN)/python demo.py

check: setup
	$(BIN)/ruff check --config pyproject.toml .
	$(BIN)/ruff format --config pyproject.toml --check .
	$(MAKE) --jobs 2 types-template types-project

# A cache each: two that write to one break it.
types-template:
	MYPY_CACHE_DIR=$(CURDIR)/build/mypy-template $(BIN)/mypy

types-project:
	cd "$(PROJECT)" && MYPYPATH=. $(BIN)/mypy --config-file ../tests/engine/mypy.ini comp tests ../tests/engine

# The engine's tests run on the project as it lies here, unbaked.
ENGINE := cd "$(PROJECT)" && $(BIN)/python -m pytest -c ../tests/engine/pytest.ini ../tests/engine -o cache_dir=$(CURDIR)/build/pytest-engine \
          -n 2 --durations 15

# One thread a process: two tests side by side with two threads each take ten times as long as with one.
test slow: export OMP_NUM_THREADS := 1
test slow: export OMP_WAIT_POLICY := PASSIVE

test: check
	$(BIN)/python -m pytest -n 2
	cd "$(PROJECT)" && $(BIN)/python -m pytest -n 2 -o cache_dir=$(CURDIR)/build/pytest-project
	$(ENGINE)

# Side by side: the walk through the baked project's README waits for its downloads half of the time.
slow: extras
	$(MAKE) --jobs 2 slow-template slow-engine

slow-template:
	$(BIN)/python -m pytest -m slow

slow-engine:
	$(ENGINE) --dist loadfile --no-loadscope-reorder -m slow

bench: .venv/bench
	$(BIN)/python benchmarks/speed.py

golden: setup
	$(BIN)/python tests/golden.py compare $(BASE)

pairs: .venv/bench
	$(BIN)/python benchmarks/pairs.py compare $(BASE)

gauges: setup
	$(BIN)/python tests/gauges.py

# The project's pins come from a baked project (a placeholder is no project name), the template's from them and from
# what it needs besides. Find-links would bring in hashes of one machine's own wheels.
COMPILE := env -u UV_FIND_LINKS $(BIN)/uv pip compile --universal --fork-strategy fewest --python-version 3.11 \
           --generate-hashes --no-annotate --no-emit-index-url --no-emit-find-links \
           --custom-compile-command "make lock" --quiet

lock: setup
	rm -rf build/lock && $(BIN)/python bake.py build/lock project_slug=project
	$(MAKE) -C build/lock/project pins BIN=$(BIN)
	cp build/lock/project/requirements*.txt "$(PROJECT)/"
	$(COMPILE) --group pyproject.toml:dev --output-file requirements.txt "$(PROJECT)/requirements.txt"
	$(COMPILE) --group pyproject.toml:bench --constraint requirements.txt --output-file benchmarks/requirements.txt \
	  $$(sed -n 's/^\([a-z0-9._-]*\)==[^;]*$$/--no-emit-package \1/p' requirements.txt)

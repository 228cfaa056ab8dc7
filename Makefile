# What `make demo` evaluates, and where the results go.
DEMO_ARGS ?= --digital 0.125 --digital 0.25 --seeds 8 \
	--noise-scale 0 --noise-scale 1 --noise-scale 2 --noise-scale 3 --noise-scale 5 --noise-scale 7.5 --noise-scale 10 \
	--json build/demo/results.json --plot build/demo/demo.png

PYTHON ?= python3
VENV := .venv
TASKS_VENV := .venv-tasks
CLUSTER_VENV := .venv-cluster
INSTALL = $(VENV)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
REQUIREMENTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-browser test-tasks test-cluster lint format clean
.NOTPARALLEL:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed  ## evaluate the embedded model on noisy crossbars: build/demo
	@mkdir -p build/demo
	$(VENV)/bin/hetmoe eval reference $(DEMO_ARGS)

test: $(VENV)/.installed-test  ## run the tests; PYTEST_ARGS are passed on, for example PYTEST_ARGS='-m slow'
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile --max-worker-restart 0 $(PYTEST_ARGS)

test-browser: $(VENV)/.installed-test  ## open a report in headless Chromium (Debian: chromium, chromium-driver): build/browser
	$(VENV)/bin/python -m pytest -m browser tests/browser $(PYTEST_ARGS)

test-tasks:  ## run the tests of `hetmoe tasks`, which need lm-eval, in an environment of their own
	@$(MAKE) --no-print-directory VENV=$(TASKS_VENV) $(TASKS_VENV)/.installed-eval,test
	$(TASKS_VENV)/bin/python -m pytest -m tasks $(PYTEST_ARGS) tests/tasks

test-cluster:  ## run the tests of `hetmoe sweep --ray`, which need Ray, in an environment of their own
	@$(MAKE) --no-print-directory VENV=$(CLUSTER_VENV) $(CLUSTER_VENV)/.installed-cluster,test
	$(CLUSTER_VENV)/bin/python -m pytest -m cluster $(PYTEST_ARGS) tests/sweep

lint: $(VENV)/.installed-test $(VENV)/.installed-dev  ## check style, format and types
	@failed=0; \
	for check in 'ruff check .' 'ruff format --check .' basedpyright; do \
	    echo "$(VENV)/bin/$$check"; \
	    $(VENV)/bin/$$check || failed=1; \
	done; exit $$failed

format: $(VENV)/.installed-dev  ## rewrite the code in the checked format
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .

clean:  ## remove caches and the demo's results; environments (.venv*) and other folders of build/ stay
	rm -rf build/demo build/browser build/lib build/bdist.* dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -path ./$(TASKS_VENV) -prune -o -path ./$(CLUSTER_VENV) -prune -o -path ./.git -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("hetmoe needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + "; choose another one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created $(REQUIREMENTS)
	@echo 'installing hetmoe into $(VENV) (the first time this takes a few minutes)'
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.created $(REQUIREMENTS)
	@echo 'installing hetmoe[$*] into $(VENV) (the first time this takes a few minutes)'
	@$(INSTALL) --editable '.[$*]'
	@touch $@

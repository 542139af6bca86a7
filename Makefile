.PHONY: setup setup-test quickstart test unit lint typecheck docs format clean

setup:
	@python3 scripts/setup.py

setup-test:
	@python3 scripts/setup.py --test

# The main job: a small policy learns to use a calculator in a real NeMo Gym environment.
quickstart: setup
	@.venv/bin/python recipes/grpo.py --config recipes/quickstart.yaml $(ARGS)

test: setup-test
	@.venv/bin/python scripts/run_tests.py $(ARGS)

unit: setup-test
	@.venv/bin/python -m pytest -m "not e2e" $(ARGS)

lint: setup
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .
	@$(MAKE) --no-print-directory typecheck
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build  # not --quiet: it would not count warnings

typecheck: setup
	@.venv/bin/mypy

# What the pages take from the code is written again; then every link and anchor is checked. No network.
docs: setup
	@.venv/bin/python scripts/docs.py
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build && echo "open site/index.html"

format: setup
	@.venv/bin/ruff check --fix . && .venv/bin/ruff format .

# Everything that set-up and runs made. The next `make` builds it again.
clean:
	rm -rf .venv .gym-venv .gym-venv-0.7 .setup runs site

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test docs notebook lint format clean

demo: $(VENV)/installed  ## Trains on the digits that come with scikit-learn
	$(BIN)/python main.py --config=configs/digits.py --workdir=runs/demo

test: $(VENV)/tested  ## Installs what the tests need and runs them all
	$(BIN)/python -m pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder

docs: $(VENV)/installed  ## Writes the table of all keys of a recipe into docs/recipes.md
	$(BIN)/python -c 'from googlenet_jax import recipe; recipe.write_table("docs/recipes.md")'

notebook: $(VENV)/tested  ## Runs docs/quickstart.ipynb, and stores what its cells show
	$(BIN)/python -m experiments.run_notebook

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs/demo

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 demo")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/dev: $(VENV)/installed
	$(PIP) --editable '.[dev]'
	touch $@

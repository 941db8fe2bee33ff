# make demo · make test · make lint. Each is complete on a fresh machine with Python 3.10 to 3.12: it creates .venv when no
# virtual environment is active and installs what it needs.
PYTHON ?= python3
VENV := $(or $(VIRTUAL_ENV),.venv)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.flowctr-installed

WINDOW := kuairand_pure_window

.PHONY: demo test lint

demo: $(INSTALLED) ## Train InterFormer on the embedded data, print its metrics and write a report
	$(BIN)/flowctr prepare $(WINDOW) --raw data/$(WINDOW) --out data/prepared/$(WINDOW)
	$(BIN)/python model_zoo/InterFormer/run_expid.py --expid InterFormer_demo \
		--gpu $$($(BIN)/python -c "import torch; print(torch.cuda.is_available() - 1)")
	$(BIN)/flowctr report model_zoo/InterFormer/results --out report

test: $(INSTALLED) ## Run all tests
	$(BIN)/python -m pytest

lint: $(INSTALLED) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(INSTALLED): setup.cfg constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

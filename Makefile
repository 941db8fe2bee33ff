# make demo · make test · make bench · make lint. Each is complete on a fresh machine with Python 3.10 to 3.12: it creates .venv when no
# virtual environment is active and installs what it needs.
PYTHON ?= python3
VENV := $(or $(VIRTUAL_ENV),.venv)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.flowctr-installed

WINDOW := kuairand_pure_window
DEMO := InterFormer INFNet AutoIFS

.PHONY: demo test bench lint

demo: $(INSTALLED) ## Train three models on the embedded data, print their metrics and compare them in a report
	$(BIN)/flowctr prepare $(WINDOW) --raw data/$(WINDOW) --out data/prepared/$(WINDOW)
	gpu=$$($(BIN)/python -c "import torch; print(torch.cuda.is_available() - 1)"); \
	for model in $(DEMO); do \
		$(BIN)/python model_zoo/$$model/run_expid.py --expid $${model}_demo --gpu $$gpu || exit; \
	done
	$(BIN)/flowctr report $(DEMO:%=model_zoo/%/results/*_demo-*.json) --out report

test: $(INSTALLED) ## Run all tests, a file at a time on up to four cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

bench: $(INSTALLED) ## Measure training on the CPU beside FuxiCTR's trainer; with ZOO=FuxiCTR/model_zoo its models too
	$(BIN)/python benchmarks/speed/training.py $(if $(ZOO),--zoo $(ZOO))

lint: $(INSTALLED) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(INSTALLED): setup.cfg constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

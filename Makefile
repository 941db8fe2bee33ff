# make demo · make test · make lint. Each works on a fresh machine: it makes .venv when no environment is active.
PYTHON ?= python3
ifdef VIRTUAL_ENV
VENV := $(VIRTUAL_ENV)
else
VENV := .venv
endif
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.flowctr-installed

.PHONY: demo test lint

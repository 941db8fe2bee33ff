"""Runs an experiment of this folder: python run_expid.py --config ./config --expid OMoE_test --gpu 0."""

import src
from flowctr.cli import run_expid

if __name__ == "__main__":
    run_expid(src, __file__)

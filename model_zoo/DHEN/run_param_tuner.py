"""Searches hyper-parameters of DHEN: python run_param_tuner.py --config config/TUNER_CONFIG.yaml --gpu 0 1."""

import src
from flowctr.cli import run_param_tuner

if __name__ == "__main__":
    run_param_tuner(src, __file__)

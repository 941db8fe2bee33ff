"""Runs that were never trained, for the tests of submissions: results and logs as `flowctr.experiment` writes them."""

import json
from functools import cache
from pathlib import Path

from flowctr import config
from flowctr.experiment import RESULT_FORMAT, portable
from flowctr.tuning import Ledger, read_space
from flowctr.tuning.outcome import ranked, write_csv
from flowctr.tuning.space import write_configs

INTERFORMER = config.REPOSITORY / "model_zoo" / "InterFormer" / "config"
LABELS = ["is_click", "is_like", "long_view"]
METRICS = ("AUC", "gAUC", "logloss", "NE")
LOG = """\
2026-03-01 10:00:00,000 P1 INFO Params: {{
    "data_root": "{data_root}",
    "model_id": "{expid}-s{seed}",
    "train_data": "{train_data}",
}}
2026-03-01 10:00:01,000 P1 INFO Train loss: 0.654321 @step 20
2026-03-01 10:00:01,000 P1 INFO Evaluation @epoch 1 - step 20:
{first}
2026-03-01 10:00:02,000 P1 INFO Evaluation @epoch 2 - step 40:
{valid}
2026-03-01 10:00:03,000 P1 INFO Evaluation @epoch 3 - step 60:
{first}
2026-03-01 10:00:03,000 P1 INFO ******** Test evaluation ********
{test}
"""


@cache
def interformer() -> dict:
    """The parameters of InterFormer's test experiment."""
    return config.load(INTERFORMER, "InterFormer_test")


def make_metrics(value: float) -> dict[str, float]:
    """Gives every label's metrics and their means, all different."""
    metrics = {
        f"{label}_{name}": value + i / 100 + j / 1000
        for i, label in enumerate(LABELS)
        for j, name in enumerate(METRICS)
    }
    return metrics | {name: sum(metrics[f"{label}_{name}"] for label in LABELS) / len(LABELS) for name in METRICS}


def write_run(folder: Path, expid: str = "InterFormer_test", seed: int = 2025, value: float = 0.6, **settings) -> Path:
    """Writes the result and the log of a run whose metrics are about ``value``.

    Args:
        folder: The model's folder, for ``results`` and ``checkpoints``.
        expid: Experiment id.
        seed: Seed.
        value: The first metric on the test data; on the validation data it is 0.01 more.
        settings: Of the configuration.
    """
    params = interformer() | settings | {"seed": seed, "model_root": str(folder / "checkpoints"), "gpu": -1}
    valid, test = make_metrics(value + 0.01), make_metrics(value)
    result = {
        "format": RESULT_FORMAT,
        "expid": expid,
        "model": "InterFormer",
        "dataset_id": params["dataset_id"],
        "seed": seed,
        "started": f"2026-03-01T10:00:{seed % 60:02d}+00:00",
        "command": f"python {folder}/run_expid.py --config {folder}/config --expid {expid} --seed {seed}",
        "config": portable(params),
        "labels": LABELS,
        "metrics": {"valid": valid, "test": test},
        "curves": {"train": [], "valid": []},
        "hardware": {"cpu": "A CPU", "gpu": None, "memory_bytes": 8 * 2**30},
        "versions": {
            "python": "3.11.7",
            "torch": "2.7.0+cpu",
            "numpy": "2.0.0",
            "flowctr": "0.1.0",
            "fuxictr": "2.3.10",
        },
        "commit": "0123456789abcdef",
        "data": {"manifest": "digest"},
    }
    path = folder / "results" / f"{expid}-s{seed}-20260301-100000-000000.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    log = folder / "checkpoints" / params["dataset_id"] / f"{expid}-s{seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    lines = {"first": _logged(make_metrics(value - 0.2)), "valid": _logged(valid), "test": _logged(test)}
    places = {key: params[key] for key in ("data_root", "train_data")}
    log.write_text(LOG.format(expid=expid, seed=seed, **places, **lines))
    return path


def write_search(folder: Path, seeds: int = 1, name: str = "InterFormer_toy_tuner_config_01") -> Path:
    """Writes a finished search of three trials, of which the second is the best; it has run with ``seeds`` seeds."""
    path = folder / "config" / f"{name}.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(
        f"base_config: {INTERFORMER}\n"
        "base_expid: InterFormer_test\n"
        "tuner_space:\n"
        "    learning_rate: [1.0e-3, 2.0e-3, 3.0e-3] # one of them is too large\n"
    )
    space = read_space(path)
    trials = [space.trial(number) for number in (1, 2, 3)]
    write_configs(space.folder, trials)
    ledger = Ledger(space.folder / "ledger.jsonl", space)
    for trial, value in zip(trials, (0.6, 0.7, 0.5)):
        for i in range(seeds if trial is trials[1] else 1):
            result = write_run(folder, trial.expid, trial.seed + i, value - i / 100, **trial.settings)
            start = {"settings": dict(trial.settings), "attempts": 1, "gpu": -1, "time": "2026-03-01T10:00:00"}
            ledger.record(trial.expid, trial.seed + i, "started", **start)
            metrics = json.loads(result.read_text())["metrics"]
            ledger.record(
                *(trial.expid, trial.seed + i, "finished"),
                exit_code=0,
                seconds=1.0,
                metrics=metrics,
                value=space.value(metrics["valid"]),
                evaluations=[],
                result=f"../../results/{result.name}",
            )
    write_csv(path.with_suffix(".csv"), ranked(ledger, space), space.folder)
    return path


def _logged(metrics: dict[str, float]) -> str:
    lines = [
        f"2026-03-01 10:00:03,000 P1 INFO [Task: {label}][Metrics] "
        + " - ".join(f"{name}: {metrics[f'{label}_{name}']:.6f}" for name in METRICS)
        for label in LABELS
    ]
    return "\n".join(lines)

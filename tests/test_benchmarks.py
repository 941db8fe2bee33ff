"""The published tables are what the result files say."""

import importlib.util
import inspect
import json
import re
import shlex
import sys
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from flowctr import config

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def study(tables):
    return sys.modules["study"]  # which tables.py imports


@pytest.fixture(scope="module")
def tables():
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.syspath_prepend(BENCHMARKS)  # as for a script, tables.py imports study.py
    spec = importlib.util.spec_from_file_location("tables", BENCHMARKS / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.undo()
    return module


def test_the_page_is_what_the_result_files_say(tables):
    page = (BENCHMARKS / "README.md").read_text()
    assert tables.filled(page) == page, "run: python benchmarks/tables.py"
    assert page.count("<!-- table: ") == page.count("<!-- end -->") > 0


def test_what_was_run_from_here_is_not_published(tables, tmp_path, monkeypatch):
    """Runs of the baselines' configurations write to the folder ``results``."""
    result = json.loads(next(BENCHMARKS.glob("STEM/*.json")).read_text())
    for folder, seed in (("STEM", 1), ("results", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "run.json").write_text(json.dumps({**result, "seed": seed}))
    monkeypatch.setattr(tables, "HERE", tmp_path)
    assert f"| {result['expid']} | 1 |" in tables.table(f"experiments {result['dataset_id']}")
    assert tables.table(result["dataset_id"]).count("| STEM |") == 1


def test_a_row_has_the_numbers_of_its_file(tables):
    path = next(iter(sorted(BENCHMARKS.glob("InterFormer/*.json"))))
    result = json.loads(path.read_text())
    valid = result["metrics"]["valid"]
    assert f"| {valid['gAUC']:.4f} | {valid['AUC']:.4f} |" in tables.table(result["dataset_id"])


def test_a_study_has_the_mean_over_its_seeds(tables):
    folder = BENCHMARKS / "INFNet" / "INFNet_v1_kuairand_pure_window"
    results = [json.loads(path.read_text())["metrics"]["test"] for path in folder.glob("results/*.json")]
    assert len(results) == 3
    values = [result["is_like_AUC"] for result in results]
    assert f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" in tables.table("studies kuairand_pure_window")
    lines = (folder / "results.csv").read_text().splitlines()
    assert [f"is_like_AUC: {value:.6f}" in line for line in lines for value in values].count(True) >= 3


def test_every_study_page_is_what_its_lines_say():
    """The best trial comes first, and the experiment has its settings."""
    folders = [path.parent for path in BENCHMARKS.glob("*/*/tuner_config.yaml")]
    assert folders
    for folder in folders:
        study = yaml.safe_load((folder / "tuner_config.yaml").read_text())
        runs = len(study.get("labels", ["all"]))  # of each trial
        trials = (folder / "tuner_config.csv").read_text().splitlines()
        select = re.compile(rf"\[val\].*?\b{study['select']}: ([\d.]+)")
        scores = np.mean(np.reshape([float(select.search(line)[1]) for line in trials], (-1, runs)), axis=1).tolist()
        assert len(scores) == study["trials"] and scores == sorted(scores, reverse=True)
        variants = folder / "variants.csv"
        ran = re.findall(r"\[exp_id\] (\w+)", variants.read_text()) if variants.exists() else []
        for expid in study.get("ablations", []):
            assert ran.count(expid) == len(study["seeds"]) * runs
        params = config.read(BENCHMARKS.parent / study["base_config"], study["base_expid"])
        command = shlex.split(re.search(r"\[command\] (.*?),\[exp_id\]", trials[0])[1])
        best = dict(text.split("=") for option, text in pairwise(command) if option == "--set")
        defaults = {} if params.get("zoo") else _defaults(params["model"])  # the code of a zoo need not be here
        for key in study["tuner_space"]:
            assert json.loads(best[key]) == params.get(key, defaults.get(key)), (folder, key)


def test_every_study_page_is_written_by_what_the_folder_keeps(study):
    for folder in (path.parent for path in BENCHMARKS.glob("*/*/tuner_config.yaml")):
        done = study.all_results(folder)
        assert study.page(folder, done) == (folder / "README.md").read_text(), f"run: study.py write {folder}"
        lines = "".join(f"{study.experiment.result_line(run)}\n" for run in study.runs_of(done["tune"]))
        assert lines == (folder / "tuner_config.csv").read_text()


LABELS = ["is_click", "is_like", "long_view"]
AUCS = {  # of the validation data, by the tuned setting: the second is better for is_click, the first in the mean
    4: {"is_click": 0.5, "is_like": 0.9, "long_view": 0.7},
    8: {"is_click": 0.6, "is_like": 0.6, "long_view": 0.6},
}


@pytest.fixture
def baseline(study, tmp_path, monkeypatch):
    """A study of a model for one label of FuxiCTR, whose code is not there; in a repository of its own."""
    monkeypatch.setattr(study, "REPOSITORY", tmp_path)
    configs, folder = tmp_path / "benchmarks" / "baselines", tmp_path / "benchmarks" / "FM" / "FM_tiny"
    for path in (configs, folder, configs.parent / "results"):
        path.mkdir(parents=True)
    (configs / "README.md").write_text("# Baselines\n\n    git clone URL FuxiCTR\n    flowctr run\n")
    settings = {"zoo": "FuxiCTR/model_zoo/FM", "model": "FM", "dataset_id": "kuairand_tiny", "batch_size": 64}
    (configs / "model_config.yaml").write_text(json.dumps({"FM_tiny": settings}))
    wanted = {"base_config": "benchmarks/baselines", "base_expid": "FM_tiny", "dataset_id": "kuairand_tiny"}
    wanted |= {"labels": LABELS, "tuner_space": {"embedding_dim": [8, 4], "units": [[16, 8]]}, "trials": 2}
    wanted |= {"select": "AUC", "seeds": [1, 2], "sweeps": {"embedding_dim": [8]}}
    (folder / "tuner_config.yaml").write_text(json.dumps(wanted))
    return folder


def _run_as(job, number):
    """Writes a result as a run of a job does, on a GPU of its choice and with a folder of its own for checkpoints."""
    like = json.loads(next(BENCHMARKS.glob("STEM/*.json")).read_text())
    settings = dict(job.overrides)
    label = settings["label"]
    auc = AUCS[settings["embedding_dim"]][label]
    result = {
        **{**like, "expid": job.expid, "model": "FM", "dataset_id": "kuairand_tiny", "seed": job.seed},
        **{"labels": [label], "zoo": {"folder": "model_zoo/FM"}, "attention": None, "users": None},
        "command": f"{shlex.join(job.command)} --gpu 3 --set model_root=elsewhere",
        "config": {**job._config(), "gpu": 3, "model_root": "elsewhere", "zoo": "elsewhere/FM"},
        "metrics": {
            "valid": dict.fromkeys(("AUC", "logloss", "NE"), auc) | {"gAUC": None if label == "is_like" else auc},
            "test": dict.fromkeys(("AUC", "gAUC", "logloss", "NE"), auc + job.seed / 100),
        },
        "parameters": {"total": 1000, "non_embedding": 10},
        "flops_per_row": 7.0,
        "speed": {"train_rows_per_second": {"is_click": 600.0, "is_like": 300.0, "long_view": 200.0}[label]},
        "peak_memory_bytes": {"host": 2**33, "device": 2**30 * (1 + LABELS.index(label))},
    }
    (job.model_dir / "results" / f"{job.expid}-s{job.seed}-{number:03}.json").write_text(json.dumps(result))


def _run_all(study, folder):
    numbers = count(900, -1)  # the files' order is not that of the labels
    for phase in study.PHASES:
        for job in study.jobs(folder, phase):
            if job.result() is None:
                _run_as(job, next(numbers))


def test_models_for_one_label_are_ranked_and_shown_together(study, baseline):
    _run_all(study, baseline)
    study.write(baseline)
    best, trial = study.ranked(baseline)[0]
    assert dict(best.overrides) == {"embedding_dim": 4, "units": [16, 8]}
    assert trial["metrics"]["valid"]["is_like_AUC"] == 0.9
    assert trial["metrics"]["valid"]["AUC"] == pytest.approx(0.7)
    assert trial["metrics"]["valid"]["gAUC"] is None  # it is of one label

    page = (baseline / "README.md").read_text()
    spread = [f"{auc + 0.015:.4f} ± {0.01 / 2**0.5:.4f}" for auc in (0.5, 0.9, 0.7)]
    assert f"| is_like | 0.9000 ± 0.0000 | – | 0.9000 ± 0.0000 | 0.9000 ± 0.0000 | {spread[1]} |" in page
    assert "| 3,000 | 30 | 21 | 100 | 3.00 |" in page  # rows/s: 1 / (1/600 + 1/300 + 1/200)
    assert f"| as tuned | 2 | {' | '.join(spread)} | {spread[2]} | {spread[2]} | 30 |" in page
    assert "| embedding_dim 8 | 2 | 0.6150 ± 0.0071 |" in page
    assert "| 4 | [16, 8] | 0.7000 | – | 0.7000 | 0.7000 |\n| 8 | [16, 8] | 0.6000 |" in page
    settings = "--seed 1 --set embedding_dim=4 --set 'units=[16, 8]'"
    commands = [
        f"    flowctr run --config benchmarks/baselines --expid FM_tiny {settings} --set 'label=\"{label}\"'\n"
        for label in LABELS
    ]
    assert "".join(commands) in page and page.count("flowctr run") == 3
    assert "\n\n    git clone URL FuxiCTR\n    flowctr prepare" in page

    assert [(r["seed"], r["labels"], r["metrics"]) for r in study.final_results(baseline)] == [
        (r["seed"], LABELS, r["metrics"]) for _, r in study.results(baseline, "final")
    ]
    lines = (baseline / "results.csv").read_text().splitlines()
    assert [re.search(r'label="(\w+)"', line)[1] for line in lines] == LABELS * 2


def test_what_the_folder_of_a_baseline_keeps_is_enough(study, baseline):
    _run_all(study, baseline)
    study.write(baseline)
    written = {path: path.read_bytes() for path in baseline.rglob("*") if path.is_file()}
    for path in (baseline.parent.parent / "results").iterdir():
        path.unlink()
    study.write(baseline)
    assert {path: path.read_bytes() for path in baseline.rglob("*") if path.is_file()} == written


def test_a_result_of_another_configuration_is_none(study, baseline):
    _run_all(study, baseline)
    path = baseline.parent.parent / "baselines" / "model_config.yaml"
    path.write_text(path.read_text().replace('"batch_size": 64', '"batch_size": 32'))
    with pytest.raises(SystemExit, match=r"6 of 6 runs of phase tune .* as flowctr run --config benchmarks/baselines"):
        study.write(baseline)


def _defaults(model):
    arguments = inspect.signature(config.model_class(model).__init__).parameters
    return {name: argument.default for name, argument in arguments.items()}


def test_result_files_name_no_path_of_a_machine():
    files = [*BENCHMARKS.glob("*/*.json"), *BENCHMARKS.glob("*/*/results/*.json")]
    files = [path for path in files if path.parent != BENCHMARKS / "results"]  # what was run from here
    assert files
    for path in files:
        config = json.loads(path.read_text())["config"]
        assert not any(str(config[key]).startswith("/") for key in ("data_root", "train_data", "test_data")), path

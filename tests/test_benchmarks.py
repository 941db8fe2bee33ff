"""The published tables are what the result files say."""

import importlib.util
import inspect
import json
import re
import shlex
import sys
from itertools import pairwise
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
    result = json.loads(next(BENCHMARKS.glob("HSTU/*.json")).read_text())
    for folder, seed in (("HSTU", 1), ("results", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "run.json").write_text(json.dumps({**result, "seed": seed}))
    monkeypatch.setattr(tables, "HERE", tmp_path)
    assert f"| {result['expid']} | 1 |" in tables.table(f"experiments {result['dataset_id']}")
    assert tables.table(result["dataset_id"]).count("| HSTU |") == 1


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
        trials = (folder / "tuner_config.csv").read_text().splitlines()
        select = re.compile(rf"\[val\].*?\b{study['select']}: ([\d.]+)")
        scores = [float(select.search(line)[1]) for line in trials]
        assert len(scores) == study["trials"] and scores == sorted(scores, reverse=True)
        variants = folder / "variants.csv"
        ran = re.findall(r"\[exp_id\] (\w+)", variants.read_text()) if variants.exists() else []
        for expid in study.get("ablations", []):
            assert ran.count(expid) == len(study["seeds"])
        params = config.load(Path(study["base_config"]), study["base_expid"])
        command = shlex.split(re.search(r"\[command\] (.*?),\[exp_id\]", trials[0])[1])
        best = dict(text.split("=") for option, text in pairwise(command) if option == "--set")
        defaults = _defaults(study["base_expid"].partition("_")[0])
        for key in study["tuner_space"]:
            assert json.loads(best[key]) == params.get(key, defaults.get(key)), (folder, key)


def test_every_study_page_is_written_by_what_the_folder_keeps(study):
    for folder in (path.parent for path in BENCHMARKS.glob("*/*/tuner_config.yaml")):
        done = study.all_results(folder)
        assert study.page(folder, done) == (folder / "README.md").read_text(), f"run: study.py write {folder}"
        lines = "".join(f"{study.experiment.result_line(result)}\n" for _, result in done["tune"])
        assert lines == (folder / "tuner_config.csv").read_text()


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

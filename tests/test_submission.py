"""Submissions: what `flowctr submit` writes from results and searches, and when it refuses."""

import csv
import json
import re
from pathlib import Path

import bars_runs
import numpy as np
import pytest
import yaml
from filelock import FileLock
from flowctr import bars, cli, config, experiment, validation
from flowctr.experiment import RunningError
from flowctr.submission import submit
from typer.testing import CliRunner

NUMBER = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.])")


@pytest.fixture
def written(tmp_path):
    """Runs of two seeds, submitted."""
    for seed, value in ((2025, 0.6), (2026, 0.63)):
        bars_runs.write_run(tmp_path / "model", seed=seed, value=value)
    return submit(str(tmp_path / "model" / "results"), tmp_path / "out", "Ada L", "https://ada.example")


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def findings_of(folder: Path) -> list[str]:
    return [str(finding) for finding in validation.check_submission(folder)]


def test_a_submission_has_bars_files_and_no_defect(written):
    stem = "InterFormer_kuairand_tiny_tuner_config_01"
    assert files_of(written) == sorted(
        [
            *("README.md", "environments.txt", "leaderboard.csv", "results.csv", "InterFormer_test.log"),
            *(f"{stem}.csv", f"{stem}.yaml", f"{stem}/dataset_config.yaml", f"{stem}/model_config.yaml"),
        ]
    )
    assert findings_of(written) == []
    assert [path.name for path in written.parent.iterdir() if path.name.startswith(".")] == []


def test_the_readme_has_every_run_and_their_mean_and_standard_deviation(written):
    (_, header), *rows = bars.read_results_table((written / "README.md").read_text().splitlines())
    assert header == [
        "Runs",
        *(f"{label}_{name}" for label in bars_runs.LABELS for name in ("gAUC", "AUC", "logloss")),
        *("gAUC", "AUC", "logloss"),
    ]
    table = {cells[0]: cells[1:] for _, cells in rows}
    runs = np.array([[bars_runs.make_metrics(value)[name] for name in header[1:]] for value in (0.6, 0.63)])
    for label, expected in (("1", runs[0]), ("2", runs[1]), ("Avg", runs.mean(axis=0)), ("Std", runs.std(axis=0))):
        shown = [float(cell.replace("&#177;", "")) for cell in table[label]]
        np.testing.assert_allclose(shown, expected, atol=1.1e-6)
    readme = (written / "README.md").read_text()
    assert readme.startswith("## InterFormer_kuairand_tiny\n")
    assert "Author: [Ada L](https://ada.example)" in readme
    stem = "InterFormer_kuairand_tiny_tuner_config_01"
    command = f"--config YOUR_PATH/InterFormer_kuairand_tiny/{stem} --expid InterFormer_test --gpu -1"
    assert f"cd flowctr/model_zoo/InterFormer\n    nohup python run_expid.py {command} > run.log &" in readme


def test_the_leaderboard_row_has_bars_columns_and_the_mean(written):
    with open(written / "leaderboard.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    paper = {"Year": "2025", "Publication": "CIKM'25", "Paper URL": "https://arxiv.org/abs/2411.09852"}
    assert list(row)[:4] == ["Year", "Publication", "Model", "Paper URL"]
    assert list(row)[-5:] == ["gAUC", "AUC", "Logloss", "Running Steps", "Contributor"]
    assert {key: row[key] for key in paper} == paper
    assert float(row["is_like_AUC"]) == pytest.approx(bars_runs.make_metrics(0.615)["is_like_AUC"], abs=1e-6)
    assert row["Running Steps"].endswith("/reczoo/BARS/tree/main/ranking/ctr/InterFormer/InterFormer_kuairand_tiny")
    assert row["Contributor"] == '<a href="https://ada.example">Ada L</a>'


def test_environments_are_the_runs_and_end_with_fuxictr(written):
    lines = (written / "environments.txt").read_text().splitlines()
    assert lines[:4] == ["[Hardware]", "CPU: A CPU", "GPU: None", "RAM: 8G"]
    assert "pytorch: 2.7.0+cpu" in lines and lines[-1] == "fuxictr: 2.3.10"


def test_the_configuration_is_the_runs(written):
    (folder,) = bars.config_folders(written)
    params, original = config.load(folder, "InterFormer_test"), bars_runs.interformer()
    paths = {*config.DATASET_PATHS, "model_root"}
    assert {key: params[key] for key in original if key not in paths} == {
        key: value for key, value in original.items() if key not in paths
    }
    # Below the submission, where the README says to put the data.
    assert params["train_data"] == str(written / "data" / "kuairand_tiny" / "train.parquet")
    search = yaml.safe_load(folder.with_name(f"{folder.name}.yaml").read_text())
    assert search["tuner_space"]["seed"] == [2025, 2026]
    assert search["tuner_space"]["head_hidden_units"] == [[64, 32]]  # one value, which is a list


def test_a_search_is_submitted_as_it_was(tmp_path):
    path = bars_runs.write_search(tmp_path / "model", seeds=2)
    written = submit(str(path), tmp_path / "out", "Ada L")
    ids = [line.expid for line in bars.read_results(path.with_suffix(".csv"), [])]
    assert [expid[-12:-9] for expid in ids] == ["002", "001", "003"]  # the best on the validation data first
    assert findings_of(written) == []
    assert [line.expid for line in bars.read_results(written / path.with_suffix(".csv").name, [])] == ids
    results = bars.read_results(written / "results.csv", [])
    assert [(run.expid, run.test["is_click_AUC"]) for run in results] == [(ids[0], "0.700000"), (ids[0], "0.690000")]
    assert (written / f"{ids[0]}.log").is_file()
    space = yaml.safe_load((written / path.name).read_text())
    assert space["tuner_space"] == {"learning_rate": [1e-3, 2e-3, 3e-3]}
    rates = {expid: config.load(written / path.stem, expid)["learning_rate"] for expid in ids}
    assert rates == dict(zip(sorted(ids), [1e-3, 2e-3, 3e-3]))
    assert config.load(written / path.stem, ids[0])["test_data"] == str(written / "data/kuairand_tiny/test.parquet")


@pytest.mark.parametrize("state", ["failed", "started", "absent"])
def test_an_unfinished_search_is_refused(tmp_path, state):
    path = bars_runs.write_search(tmp_path / "model")
    ledger = path.with_suffix("") / "ledger.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    last = lines[-1]["trial"]
    ended = {"trial": last, "seed": 2025, "state": "failed", "seconds": 1.0, "error": "killed", "exit_code": 1}
    lines = {"failed": [*lines[:-1], ended], "started": lines[:-1], "absent": lines[:-2]}[state]
    ledger.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    said = {"failed": ", seed 2025: failed", "started": ", seed 2025: started", "absent": ": not started"}[state]
    with pytest.raises(ValueError, match=f"is not finished:\n  - {last}{said}\ngo on with: flowctr tune") as error:
        submit(str(path), tmp_path / "out", "Ada L")
    assert str(error.value).count("  - ") == 1
    assert not (tmp_path / "out").exists()


def test_a_search_that_runs_is_refused_and_its_ledger_left_alone(tmp_path):
    path = bars_runs.write_search(tmp_path / "model")
    ledger = path.with_suffix("") / "ledger.jsonl"
    ledger.write_text(ledger.read_text()[:-9])  # the search is writing a line
    content = ledger.read_text()
    with FileLock(path.with_suffix("") / ".ledger.lock"):
        with pytest.raises(RunningError, match="another search is running"):
            submit(str(path), tmp_path / "out", "Ada L")
    assert ledger.read_text() == content


def test_a_ledger_that_was_edited_is_refused(tmp_path):
    path = bars_runs.write_search(tmp_path / "model")
    ledger = path.with_suffix("") / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"value": 1.', '"value": 1.9', 1))
    with pytest.raises(ValueError, match=r"is not as in its result .*: value; put the line back"):
        submit(str(path), tmp_path / "out", "Ada L")


def test_a_search_of_any_name_is_submitted_under_a_name_that_bars_knows(tmp_path):
    path = bars_runs.write_search(tmp_path / "model", name="mine")
    written = submit(str(path), tmp_path / "out", "Ada L")
    assert {name for name in files_of(written) if "mine" in name} == {
        *("mine_tuner_config_01.csv", "mine_tuner_config_01.yaml"),
        *("mine_tuner_config_01/dataset_config.yaml", "mine_tuner_config_01/model_config.yaml"),
    }
    assert findings_of(written) == []


@pytest.mark.parametrize("url", ["", "ada.example", "https://ada.example/(x)"])
def test_a_page_of_the_author_that_is_no_address_is_refused(tmp_path, url):
    with pytest.raises(ValueError, match="--url must be the address of a page"):
        submit(str(bars_runs.write_run(tmp_path)), tmp_path / "out", "Ada L", url)


def test_a_search_that_has_not_run_is_refused(tmp_path):
    path = bars_runs.write_search(tmp_path / "model")
    (path.with_suffix("") / "ledger.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="the search has not run; flowctr tune"):
        submit(str(path), tmp_path / "out", "Ada L")


def test_a_submission_without_a_log_is_refused(tmp_path):
    result = bars_runs.write_run(tmp_path)
    (tmp_path / "checkpoints" / "kuairand_tiny" / "InterFormer_test-s2025.log").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"a submission without a log: there is no .*InterFormer_test-s2025\.log"
    ):
        submit(str(result), tmp_path / "out", "Ada L")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "result format 99; this version of flowctr reads"),
        ({"versions": None}, "lacks versions, which a submission needs"),
        ({"metrics": {"valid": {"AUC": 0.5}}}, "none of gAUC, AUC, logloss on test data"),
    ],
)
def test_a_result_that_does_not_suffice_is_refused(tmp_path, change, message):
    path = bars_runs.write_run(tmp_path)
    result = {key: value for key, value in (json.loads(path.read_text()) | change).items() if value is not None}
    path.write_text(json.dumps(result))
    with pytest.raises(ValueError, match=re.escape(path.name) + ".*" + message):
        submit(str(path), tmp_path / "out", "Ada L")


def test_runs_of_different_settings_are_refused(tmp_path):
    bars_runs.write_run(tmp_path, seed=1)
    bars_runs.write_run(tmp_path, seed=2, learning_rate=0.5)
    with pytest.raises(ValueError, match=r"different settings.*learning_rate"):
        submit(str(tmp_path / "results"), tmp_path / "out", "Ada L")


def test_an_existing_folder_is_refused_and_left_alone(tmp_path):
    result = bars_runs.write_run(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ValueError, match="out exists; name another folder with --out"):
        submit(str(result), tmp_path / "out", "Ada L")
    assert files_of(tmp_path / "out") == ["mine"]


def test_the_log_of_another_run_is_refused_and_nothing_is_left(tmp_path):
    result = bars_runs.write_run(tmp_path / "model")
    log = tmp_path / "model" / "checkpoints" / "kuairand_tiny" / "InterFormer_test-s2025.log"
    log.write_text(log.read_text().replace("AUC: 0.600000", "AUC: 0.700000"))
    line = max(n for n, text in enumerate(log.read_text().splitlines(), 1) if "AUC: 0.700000" in text)
    message = rf"do not fit together; run it again:\n  - InterFormer_test\.log:{line}: is_click_AUC is 0.700000"
    with pytest.raises(ValueError, match=message):
        submit(str(result), tmp_path / "out", "Ada L")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_edited_result_of_another_seed_is_refused_if_its_log_is_there(tmp_path):
    for seed in (2025, 2026):
        bars_runs.write_run(tmp_path / "model", seed=seed)
    (path,) = (tmp_path / "model" / "results").glob("*-s2026-*.json")
    path.write_text(path.read_text().replace("0.6,", "0.61,"))
    log = tmp_path / "model" / "checkpoints" / "kuairand_tiny" / "InterFormer_test-s2026.log"
    message = rf"do not fit together; run it again:\n  - {log.name}:\d+: is_click_AUC is 0.600000; .* has 0.610000"
    with pytest.raises(ValueError, match=message):
        submit(str(path.parent), tmp_path / "out", "Ada L")
    log.unlink()  # from another machine, say
    assert submit(str(path.parent), tmp_path / "out", "Ada L").is_dir()


def test_nothing_of_this_machine_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "ada"))
    home, repository = tmp_path / "home" / "ada", config.REPOSITORY
    climbing = f"../../../../..{home}/search"
    path = bars_runs.write_run(home / "model", data_root=str(repository / "data" / "built"))
    log = home / "model" / "checkpoints" / "kuairand_tiny" / "InterFormer_test-s2025.log"
    places = [
        f"Reading files: {repository}/data/a.csv, and {home}, {home}/b.csv and /mnt/disk/c/d/train.csv at 1.5 steps/s",
        f"    \"config\": \"{{'a': '{home}/c.csv'}}\", see https://example.org/d/e or ../data/f.csv or {climbing}/g",
    ]
    log.write_text("\n".join([*places, log.read_text()]))
    result = json.loads(path.read_text())
    result["command"] = f"python {repository}/x.py --config {climbing}"
    path.write_text(json.dumps(result))
    written = submit(str(path), tmp_path / "out", "Ada L")
    for name in files_of(written):
        text = (written / name).read_text()
        assert str(home) not in text and str(repository) not in text and str(tmp_path) not in text, name
    copied = (written / "InterFormer_test.log").read_text().splitlines()
    assert copied[:2] == [
        "Reading files: data/a.csv, and YOUR_PATH, YOUR_PATH/b.csv and YOUR_PATH/d/train.csv at 1.5 steps/s",
        "    \"config\": \"{'a': 'YOUR_PATH/c.csv'}\", see https://example.org/d/e or ../data/f.csv or "
        "YOUR_PATH/search/g",
    ]
    assert NUMBER.findall("\n".join(copied)) == NUMBER.findall(log.read_text())
    assert "python x.py --config YOUR_PATH/ada/search," in (written / "results.csv").read_text()
    assert f"data_root: {Path('data/built')}" in next(written.glob("*/dataset_config.yaml")).read_text()


def test_the_author_is_gits_user_by_default(tmp_path, monkeypatch):
    result = bars_runs.write_run(tmp_path / "model")
    (tmp_path / "gitconfig").write_text("[user]\n    name = Grace H\n")
    for name, value in (("GLOBAL", tmp_path / "gitconfig"), ("SYSTEM", "/dev/null")):
        monkeypatch.setenv(f"GIT_CONFIG_{name}", str(value))
    monkeypatch.chdir(tmp_path)
    assert "Author: Grace H\n" in (submit(str(result), tmp_path / "out") / "README.md").read_text()
    (tmp_path / "gitconfig").write_text("")
    with pytest.raises(ValueError, match="names its author: give --author"):
        submit(str(result), tmp_path / "other")


def test_a_real_run_is_submitted(tmp_path):
    """With the log that the engine writes."""
    overrides = ["epochs=1", f"data_root={tmp_path / 'data'}"]
    result = experiment.run(
        bars_runs.INTERFORMER, "InterFormer_test", model_dir=tmp_path / "model", overrides=overrides
    )
    written = submit(str(result), tmp_path / "out", "Ada L")
    assert findings_of(written) == []
    (run,) = bars.read_results(written / "results.csv", [])
    test = json.loads(result.read_text())["metrics"]["test"]
    assert run.test == {name: f"{value:.6f}" for name, value in test.items()}
    (_, header), (_, cells) = bars.read_results_table((written / "README.md").read_text().splitlines())
    assert cells == [f"{test[name]:.6f}" for name in header]  # one run: no mean
    log = bars.read_lines(written / "InterFormer_test.log", [])
    assert len(bars.read_evaluations(log)) == 2


def test_every_model_says_where_it_was_published():
    models = sorted(path.parent for path in (config.REPOSITORY / "model_zoo").glob("*/run_expid.py"))
    assert models
    for model in models:
        paper = yaml.safe_load((model / "paper.yaml").read_text())
        assert list(paper) == ["year", "publication", "url"], model
        assert paper["publication"].endswith(f"'{paper['year'] % 100}") and paper["url"].startswith("https://"), model


def test_commands_submit_and_validate(tmp_path):
    path, runner = bars_runs.write_search(tmp_path / "model"), CliRunner()
    out = tmp_path / "out"
    done = runner.invoke(cli.app, ["submit", str(path), "--out", str(out), "--author", "Ada L"])
    assert done.exit_code == 0, done.output
    assert (out / "leaderboard.csv").read_text() in done.output and f"submission: {out}" in done.output
    again = runner.invoke(cli.app, ["submit", str(path), "--out", str(out), "--author", "Ada L"])
    assert again.exit_code == cli.WRONG_INPUT
    assert runner.invoke(cli.app, ["validate", str(out)]).exit_code == 0
    (out / "environments.txt").unlink()
    broken = runner.invoke(cli.app, ["validate", str(out)])
    assert broken.exit_code == cli.FAILED_RUN
    assert f"{out / 'environments.txt'}:1: this file is missing" in broken.stdout
    assert runner.invoke(cli.app, ["validate", str(tmp_path / "nowhere")]).exit_code == cli.WRONG_INPUT

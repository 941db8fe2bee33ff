"""The runner: a small model folder, run in this process and as a script from elsewhere."""

import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import flowctr
import numpy as np
import pytest
import torch
import typer
from flowctr import cli, experiment
from flowctr.config import ConfigError
from flowctr.training import Engine, TrainingError

MODEL = """
import flowctr  # before fuxictr, so that it needs no ray
from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import MultiTaskModel
from torch import nn


class Toy(MultiTaskModel):
    def __init__(self, feature_map, embedding_dim=4, hidden_units=(8,), learning_rate=1e-3, **kwargs):
        super().__init__(feature_map, **kwargs)
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        width = embedding_dim * feature_map.num_fields
        self.towers = nn.ModuleList(
            MLP_Block(width, list(hidden_units), "ReLU", 1, dropout_rates=0.1) for _ in feature_map.labels
        )
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs):
        x = self.embedding_layer(self.get_inputs(inputs)).flatten(start_dim=1)
        outputs = zip(self.feature_map.labels, self.output_activation, self.towers)
        return {f"{label}_pred": activation(tower(x)) for label, activation, tower in outputs}

    def attention_maps(self, batch):
        return {"first": (batch["item"][:2].float().numpy().reshape(2, 1), ["a", "b"], ["c"])}
"""

RUN_EXPID = """
import src
from flowctr.cli import run_expid

if __name__ == "__main__":
    run_expid(src, __file__)
"""

MODEL_CONFIG = """
Base:
    model: Toy
    metrics: [AUC, gAUC, logloss, NE]
    optimizer: adam
    loss: binary_crossentropy
    task: binary_classification
    learning_rate: 2e-2
    embedding_regularizer: 1e-6
    batch_size: 64
    epochs: 3
    shuffle: True
    seed: 1
    monitor: AUC
    verbose: 1

Toy_test:
    dataset_id: two_labels

Toy_one:
    dataset_id: one_label
"""
DATASET_CONFIG = """
two_labels: &data
    data_root: data
    data_format: csv
    train_data: data/train.csv
    valid_data: data/valid.csv
    test_data: data/test.csv
    min_categr_count: 1
    group_id: user
    feature_cols:
        - {name: user, active: True, dtype: int, type: meta, remap: False}
        - {name: [item, cate], active: True, dtype: str, type: categorical}
        - {name: price, active: True, dtype: float, type: numeric}
    label_col: [{name: click, dtype: float}, {name: like, dtype: float}]

one_label:
    <<: *data
    test_data: data/valid.csv
    label_col: {name: click, dtype: float}
"""
RESULT_LINE = re.compile(
    r" (\d{8}-\d{6}),\[command\] (.+),\[exp_id\] (.+),\[dataset_id\] (.+),\[train\] N\.A\.,\[val\] (.*),\[test\] (.*)\n"
)


def write_table(path, rows, seed, click=None):
    random = np.random.default_rng(seed)
    item, cate = random.integers(0, 20, rows), random.integers(0, 5, rows)
    price = random.normal(size=rows)
    label = (item > 9) + price + random.normal(size=rows)
    table = {"user": random.integers(0, 15, rows), "item": item, "cate": cate, "price": price}
    table |= {
        "click": (label > 0.5).astype(int) if click is None else [click] * rows,
        "like": (label > 1.5).astype(int),
    }
    lines = [",".join(table), *(",".join(map(str, row)) for row in zip(*table.values()))]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def folder(tmp_path):
    """A model folder as in model_zoo, with its data."""
    path = tmp_path / "Toy"
    for name in ("src", "config", "data"):
        (path / name).mkdir(parents=True)
    (path / "src" / "__init__.py").write_text(MODEL)
    (path / "run_expid.py").write_text(RUN_EXPID)
    (path / "config" / "model_config.yaml").write_text(MODEL_CONFIG)
    (path / "config" / "dataset_config.yaml").write_text(DATASET_CONFIG)
    for seed, (split, rows) in enumerate({"train": 600, "valid": 300, "test": 200}.items()):
        write_table(path / "data" / f"{split}.csv", rows, seed)
    return path


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    """The module of the model class, as run_expid.py imports it."""
    path = tmp_path_factory.mktemp("src") / "toy_src.py"
    path.write_text(MODEL)
    spec = importlib.util.spec_from_file_location("toy_src", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(folder, *arguments, cwd, **environment):
    command = [sys.executable, str(folder / "run_expid.py"), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env, timeout=120)


def metrics_of(text):
    return {name: float(value) for name, value in (item.split(": ") for item in text.split(" - "))} if text else {}


def test_a_run_from_another_folder(folder, tmp_path):
    (tmp_path / "no_ray").mkdir()
    (tmp_path / "no_ray" / "ray.py").write_text("raise ImportError('a run must not need ray')")
    arguments = ["--seed", "5", "--set", "epochs=2", "--gpu", "-1"]
    done = run_script(folder, *arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path / "no_ray"))
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "results").glob("*.json")
    assert re.fullmatch(r"Toy_test-s5-\d{8}-\d{6}-\d{6}\.json", path.name)
    assert str(path) in done.stdout and "flowctr report" in done.stdout and "click" in done.stdout
    result = json.loads(path.read_text())

    assert set(result) >= {
        *("format", "expid", "model", "dataset_id", "seed", "started", "command", "config", "labels", "metrics"),
        *("ne_base", "curves", "parameters", "speed", "wall_seconds", "peak_memory_bytes", "device", "versions"),
        *("fuxictr", "commit", "data", "attention"),
    }
    assert (result["format"], result["expid"], result["model"], result["dataset_id"]) == (
        1,
        "Toy_test",
        "Toy",
        "two_labels",
    )
    assert result["seed"] == result["config"]["seed"] == 5 and result["config"]["epochs"] == 2
    assert result["labels"] == ["click", "like"] and result["ne_base"] == "train" and result["device"] == "cpu"
    names = [*(f"{label}_{m}" for label in ("click", "like") for m in ("AUC", "gAUC", "logloss", "NE"))]
    for split in ("valid", "test"):
        assert list(result["metrics"][split]) == [*names, "AUC", "gAUC", "logloss", "NE"]
        assert 0.6 < result["metrics"][split]["click_AUC"] < 1
    assert [point["epoch"] for point in result["curves"]["valid"]] == [1, 2]
    best = max(result["curves"]["valid"], key=lambda point: point["AUC"])
    assert {name: best[name] for name in result["metrics"]["valid"]} == result["metrics"]["valid"]
    assert all(set(point) == {"step", "epoch", "loss"} for point in result["curves"]["train"])
    # tables of 20 and 5 values, <PAD> and <OOV>; two towers on 3 fields; the numeric field's own linear map
    assert result["parameters"] == {"total": 29 * 4 + 2 * (12 * 8 + 8 + 8 + 1) + 4, "non_embedding": 2 * 113 + 4}
    assert result["flops_per_row"] == 2 * (2 * (12 * 8 + 8) + 4)
    assert result["speed"]["train_rows_per_second"] > 0 and result["speed"]["evaluate_rows_per_second"] > 0
    assert result["peak_memory_bytes"]["host"] > 50e6 and result["peak_memory_bytes"]["device"] is None
    assert result["versions"]["torch"] == torch.__version__ and result["versions"]["flowctr"] == flowctr.__version__
    assert len(result["fuxictr"]["sha256"]) == 64
    manifest = json.loads((folder / "data" / "two_labels" / "manifest.json").read_text())
    assert result["data"] == {"manifest": manifest["digest"]}

    with np.load(path.with_name(result["attention"]), allow_pickle=False) as arrays:
        assert arrays["first"].shape == (2, 1)
        assert arrays["first__rows"].tolist() == ["a", "b"] and arrays["first__cols"].tolist() == ["c"]

    stamp, command, expid, dataset_id, valid, test = RESULT_LINE.fullmatch((folder / "config.csv").read_text()).groups()
    assert f"-{stamp}-" in path.stem and (expid, dataset_id) == ("Toy_test", "two_labels")
    assert command == result["command"] == f"python {folder}/run_expid.py --seed 5 --set epochs=2 --gpu -1"
    assert metrics_of(valid) == pytest.approx(result["metrics"]["valid"], abs=5e-7)
    assert metrics_of(test) == pytest.approx(result["metrics"]["test"], abs=5e-7)

    log = (folder / "checkpoints" / "two_labels" / "Toy_test-s5.log").read_text()
    assert "[Metrics]" in log and "Train loss" in log and '"seed": "5"' in log
    assert f"Load the best weights, epoch {best['epoch']}, step {best['step']}" in log
    assert (folder / "checkpoints" / "two_labels" / "Toy_test-s5.model").exists()
    assert not any(tmp_path.glob("*.csv")) and not (tmp_path / "checkpoints").exists()


def test_wrong_input_ends_with_one_message_and_code_2(folder, tmp_path):
    done = run_script(folder, "--set", "epoch=1", "--set", "batch_size=0", cwd=tmp_path)
    assert done.returncode == 2
    assert "2 mistakes" in done.stderr and "'epochs'" in done.stderr and "Traceback" not in done.stderr
    assert not (folder / "results").exists() and not (folder / "config.csv").exists()


def test_a_failed_run_ends_with_one_message_and_code_1(folder, tmp_path):
    done = run_script(folder, "--set", "learning_rate=1e30", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: the " in done.stderr and "lower learning_rate" in done.stderr
    assert not (folder / "results").exists()


def record_loading(monkeypatch):
    """Returns a list that gets the split of each loader that is made, and "fit"."""
    events, fit = [], Engine.fit

    class Loader(experiment.H5DataLoader):
        def __init__(self, feature_map, data_path, split, **kwargs):
            events.append(split)
            super().__init__(feature_map, data_path, split, **kwargs)

    monkeypatch.setattr(experiment, "H5DataLoader", Loader)
    monkeypatch.setattr(Engine, "fit", lambda *args, **kwargs: events.append("fit") or fit(*args, **kwargs))
    return events


def test_the_commit_is_that_of_the_code_that_was_loaded(folder, src, monkeypatch):
    commits, train = ["at the start"], experiment._train

    def train_while_the_checkout_changes(*arguments):
        commits[0] = "at the end"
        return train(*arguments)

    monkeypatch.setattr(experiment, "_commit", lambda _: commits[0])
    monkeypatch.setattr(experiment, "_train", train_while_the_checkout_changes)
    monkeypatch.setattr(experiment.config, "REPOSITORY", folder)
    (folder / ".git").mkdir()
    path = experiment.run(folder / "config", "Toy_test", src, overrides=["epochs=1"])
    assert (commits, json.loads(path.read_text())["commit"]) == (["at the end"], "at the start")


def test_all_data_are_loaded_and_checked_before_the_training(folder, src, monkeypatch):
    events = record_loading(monkeypatch)
    experiment.run(folder / "config", "Toy_test", src, overrides=["epochs=1"])
    assert events == ["train", "valid", "test", "fit"]
    events.clear()
    experiment.run(folder / "config", "Toy_one", src, overrides=["epochs=1"])
    assert events == ["train", "valid", "fit"]  # its test data are those of the validation


def test_validation_data_of_one_class_are_refused_before_the_training(folder, src):
    write_table(folder / "data" / "valid.csv", 100, 3, click=1)
    with pytest.raises(ValueError, match=r"the monitored AUC .* validation labels of click are all of one class"):
        experiment.run(folder / "config", "Toy_test", src)
    assert "Train loss" not in (folder / "checkpoints" / "two_labels" / "Toy_test-s1.log").read_text()


def test_one_label_whose_test_is_its_validation(folder, src, monkeypatch):
    evaluated, evaluate = [], Engine._evaluate
    monkeypatch.setattr(Engine, "_evaluate", lambda *args: evaluated.append(args) or evaluate(*args))
    result = json.loads(experiment.run(folder / "config", "Toy_one", src).read_text())
    assert list(result["metrics"]["valid"]) == ["AUC", "gAUC", "logloss", "NE"]
    assert result["metrics"]["test"] == result["metrics"]["valid"]
    assert len(evaluated) == len(result["curves"]["valid"]) == 3


def test_the_test_data_are_predicted_once_for_metrics_and_users(folder, src, monkeypatch):
    collected, collect = [], Engine._collect
    monkeypatch.setattr(Engine, "_collect", lambda *args: collected.append(args) or collect(*args))
    path = experiment.run(folder / "config", "Toy_test", src)
    result = json.loads(path.read_text())
    assert len(collected) == len(result["curves"]["valid"]) + 1
    with np.load(path.with_name(result["users"])) as users:
        for label in ("click", "like"):
            weighted = np.average(users[f"{label}__auc"], weights=users[f"{label}__rows"])
            assert weighted == pytest.approx(result["metrics"]["test"][f"{label}_gAUC"], abs=1e-12)


def test_the_same_seed_gives_the_same_result_and_another_another(folder, src):
    def run(seed):
        return json.loads(experiment.run(folder / "config", "Toy_test", src, overrides=[f"seed={seed}"]).read_text())

    first, again, other = run(1), run(1), run(2)
    assert first["metrics"] == again["metrics"] and first["curves"] == again["curves"]
    assert first["metrics"] != other["metrics"]
    lines = (folder / "config.csv").read_text().splitlines(keepends=True)
    assert len(lines) == 3 and all(RESULT_LINE.fullmatch(line) for line in lines)


def test_valid_metrics_are_those_of_the_saved_weights(folder, src):
    path = experiment.run(folder / "config", "Toy_test", src)
    result = json.loads(path.read_text())
    params = {**result["config"], "verbose": 0}
    feature_map = experiment.load_feature_map(params)
    model = experiment.accelerate(src.Toy)(feature_map, **params)
    model.load_weights(folder / "checkpoints" / "two_labels" / "Toy_test-s1.model")
    train = experiment.H5DataLoader(feature_map, folder / "data" / "two_labels" / "train.h5")
    model.base_rates = train.base_rates
    for split in ("valid", "test"):
        data = experiment.H5DataLoader(feature_map, folder / "data" / "two_labels" / f"{split}.h5", split, batch_size=7)
        assert model.evaluate(data) == pytest.approx(result["metrics"][split], abs=1e-6)


def test_without_validation_and_test_data(folder, src):
    overrides = ["valid_data=null", "test_data=null"]
    result = json.loads(experiment.run(folder / "config", "Toy_test", src, overrides=overrides).read_text())
    assert result["metrics"] == {} and result["attention"] is None and result["curves"]["valid"] == []
    assert RESULT_LINE.fullmatch((folder / "config.csv").read_text()).group(5, 6) == ("", "")


def test_a_metric_without_a_value_is_null(folder, src):
    write_table(folder / "data" / "test.csv", 100, 3, click=1)
    with pytest.warns(UserWarning, match="AUC is undefined"):
        path = experiment.run(folder / "config", "Toy_one", src, overrides=[f"test_data={folder}/data/test.csv"])
    result = json.loads(path.read_text(), parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert result["metrics"]["test"]["AUC"] is None and result["metrics"]["test"]["logloss"] > 0


def test_a_gpu_that_is_not_there_is_warned_of(folder, src, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    experiment.run(folder / "config", "Toy_one", src, gpu=0, overrides=["epochs=1"])
    log = (folder / "checkpoints" / "one_label" / "Toy_one-s1.log").read_text()
    assert "WARNING !!! --gpu 0 was asked for, but there is no GPU" in log


def test_errors_keep_what_was_there(folder, src):
    path = experiment.run(folder / "config", "Toy_test", src)
    before = {
        file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and "checkpoints" not in file.parts
    }
    with pytest.raises(ConfigError, match="unknown data set"):
        experiment.run(folder / "config", "Toy_test", src, overrides=["dataset_id=x"])
    with pytest.raises(TrainingError):
        experiment.run(folder / "config", "Toy_test", src, overrides=["learning_rate=1e30"])
    assert {file: file.read_bytes() for file in before} == before
    assert list((folder / "results").glob("*.json")) == [path]


def test_a_result_that_cannot_be_written_leaves_nothing(tmp_path):
    def fail(file):
        assert file.name.endswith(f"result.json.{os.getpid()}.tmp")  # other processes write their own
        file.write(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "result.json").write_text("old")
    with pytest.raises(OSError, match="No space left"):
        experiment._write(tmp_path / "result.json", fail)
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    assert (tmp_path / "result.json").read_text() == "old"


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("function", "name"), [("_to_json", r"results/Toy_one-s1-.*\.json"), ("print_to_list", "csv")])
def test_a_full_disk_costs_neither_the_numbers_nor_the_checkpoint(folder, src, monkeypatch, capsys, function, name):
    monkeypatch.setattr(experiment, function, full_disk)
    message = (
        rf"{name} cannot be written: .*No space left.*printed above and the checkpoint .*Toy_one-s1\.model is kept"
    )
    with pytest.raises(OSError, match=message):
        experiment.run(folder / "config", "Toy_one", src, overrides=["epochs=1"])
    assert re.search(r"valid +│ click +│ 0\.\d{6}", capsys.readouterr().out)
    assert (folder / "checkpoints" / "one_label" / "Toy_one-s1.model").exists()


def test_a_full_disk_costs_no_more_than_the_attention_maps(folder, src, monkeypatch):
    monkeypatch.setattr(np, "savez_compressed", full_disk)
    path = experiment.run(folder / "config", "Toy_one", src, overrides=["epochs=1"])
    result = json.loads(path.read_text())
    assert result["attention"] is None and 0 < result["metrics"]["valid"]["AUC"] < 1
    assert [file.name for file in path.parent.iterdir() if not file.name.startswith(".")] == [path.name]
    log = (folder / "checkpoints" / "one_label" / "Toy_one-s1.log").read_text()
    assert "WARNING The attention maps are not saved to" in log and "No space left" in log


def test_a_log_that_cannot_grow_is_passed_over(folder, src, monkeypatch, capsys):
    monkeypatch.setattr(logging, "raiseExceptions", True)
    log = folder / "checkpoints" / "one_label" / "Toy_one-s1.log"
    log.parent.mkdir(parents=True)
    log.symlink_to("/dev/full")
    path = experiment.run(folder / "config", "Toy_one", src, overrides=["epochs=1"])
    assert path.exists()
    printed = capsys.readouterr().err
    assert "Train loss" in printed and "Logging error" not in printed


def test_debug_shows_where_an_error_comes_from(monkeypatch):
    with pytest.raises(ConfigError):
        call("run", "InterFormr", "--expid", "InterFormer_test", "--debug")
    monkeypatch.setenv("FLOWCTR_DEBUG", "1")
    with pytest.raises(ConfigError):
        call("run", "InterFormr", "--expid", "InterFormer_test")


def test_where_the_config_folder_is_looked_for(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli._config_dir(None, folder) == folder / "config"
    assert cli._config_dir(Path("config"), folder) == folder / "config"
    (tmp_path / "config").mkdir()
    assert cli._config_dir(Path("config"), folder) == Path("config")
    assert cli._config_dir(None, folder) == folder / "config"
    assert cli._config_dir(None, None) == Path("config")
    with pytest.raises(FileNotFoundError, match=r"no config folder other or .*Toy/other"):
        cli._config_dir(Path("other"), folder)


def call(*arguments):
    """Runs the flowctr command in this process and returns its exit code."""
    try:
        typer.main.get_command(cli.app).main(list(map(str, arguments)), standalone_mode=True)
    except SystemExit as end:
        return end.code


def test_command_build(folder, capsys):
    arguments = ("build", "--dataset", "one_label", "--config", folder / "config")
    assert call(*arguments) == 0
    h5 = folder / "data" / "one_label"
    assert capsys.readouterr().out == f"train: {h5}/train.h5\nvalid: {h5}/valid.h5\ntest: {h5}/valid.h5\n"
    write_table(folder / "data" / "train.csv", 50, 9)
    assert call(*arguments) == 2 and "was built from something else" in capsys.readouterr().err
    assert call(*arguments, "--rebuild") == 0
    assert call("build", "--dataset", "one_lable", "--config", folder / "config") == 2
    assert "the nearest is 'one_label'" in capsys.readouterr().err


def test_command_report(folder, src, tmp_path, capsys):
    path = experiment.run(folder / "config", "Toy_one", src)
    capsys.readouterr()
    assert call("report", path, "--out", tmp_path / "report") == 0
    page = Path(capsys.readouterr().out.strip())
    assert page == tmp_path / "report" / "index.html" and "Toy_one" in page.read_text()
    assert call("report", folder / "run_expid.py", "--out", tmp_path / "report") == 2
    assert call("report", path.parent, folder / "src", "--out", tmp_path / "report") == 2
    assert f"there is no result, no *.json, in the folder {folder}/src" in capsys.readouterr().err


def test_command_prepare(tmp_path, capsys):
    assert call("prepare", "kuairand_pur", "--raw", tmp_path, "--out", tmp_path / "out") == 2
    assert "kuairand_pure" in capsys.readouterr().err
    assert call("prepare", "amazonelectronics_x1", "--raw", tmp_path, "--out", tmp_path / "out") == 2
    assert "train.csv" in capsys.readouterr().err
    assert call("prepare", "--help") == 0
    help_text = " ".join(capsys.readouterr().out.split())
    for dataset_id in ("kuairand_pure_window", "amazon_sports_din", "taobaoad_x1"):
        assert f"{dataset_id}:" in help_text
    assert "https://kuairand.com" in help_text


def test_command_run_knows_the_models(capsys):
    assert call("run", "InterFormr", "--expid", "InterFormer_test") == 2
    assert "unknown model 'InterFormr'; the nearest is 'InterFormer'" in capsys.readouterr().err
    assert call("run", "InterFormer", "--expid", "InterFormer_tst") == 2
    assert "unknown experiment 'InterFormer_tst'; the nearest is 'InterFormer_test'" in capsys.readouterr().err


def test_the_command_line_does_not_wait_for_torch():
    code = (
        "import sys, flowctr.cli; print([name for name in ('torch', 'polars', 'pandas', 'ray') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_model_folder_has_the_same_script():
    paths = sorted(Path(__file__).parents[1].glob("model_zoo/*/run_expid.py"))
    assert paths
    assert len({path.read_text().replace(path.parent.name, "MODEL") for path in paths}) == 1


def test_a_second_run_of_the_same_experiment_is_refused_while_the_first_writes(folder, src, monkeypatch):
    def run_again(self, *args, **kwargs):
        monkeypatch.undo()
        with pytest.raises(experiment.RunningError, match=r"Toy_one with seed 1 .*--set model_root=DIR"):
            experiment.run(folder / "config", "Toy_one", src)
        experiment.run(folder / "config", "Toy_one", src, overrides=[f"model_root={folder / 'elsewhere'}"])
        return fit(self, *args, **kwargs)

    fit = Engine.fit
    monkeypatch.setattr(Engine, "fit", run_again)
    experiment.run(folder / "config", "Toy_one", src)
    assert len(list((folder / "results").glob("*.json"))) == 2


def test_runs_side_by_side_do_not_touch_each_other(folder, src, tmp_path):
    script = [sys.executable, folder / "run_expid.py"]
    variants = [["--seed", "1"], ["--seed", "2"], ["--seed", "2", "--set", f"model_root={tmp_path / 'elsewhere'}"]]
    runs = [subprocess.Popen([*script, *variant]) for variant in variants]
    assert [run.wait() for run in runs] == [0, 0, 0]
    assert len((folder / "config.csv").read_text().splitlines()) == 3
    results = [json.loads(path.read_text()) for path in (folder / "results").glob("*.json")]
    assert sorted(result["seed"] for result in results) == [1, 2, 2]
    alone = {
        seed: json.loads(experiment.run(folder / "config", "Toy_test", src, overrides=[f"seed={seed}"]).read_text())
        for seed in (1, 2)
    }
    assert alone[1]["metrics"] != alone[2]["metrics"]
    for result in results:
        assert result["expid"] == "Toy_test"
        for split, expected in alone[result["seed"]]["metrics"].items():
            assert result["metrics"][split] == pytest.approx(expected, abs=1e-9)


def test_a_report_takes_folders_of_results(folder, src, tmp_path, monkeypatch, capsys):
    experiment.run(folder / "config", "Toy_one", src)
    monkeypatch.setattr(sys, "argv", ["flowctr", "report", str(folder / "results"), "--out", str(tmp_path / "page")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert "Toy_one" in (tmp_path / "page" / "index.html").read_text()
    assert str(tmp_path / "page" / "index.html") in capsys.readouterr().out.replace("\n", "")


def test_paths_in_the_repository_are_given_relative_to_it():
    path = str(experiment.config.REPOSITORY / "data" / "x")
    columns = [{"name": ("item", "cate"), "pretrained_emb": path}]
    inside = {"train_data": path, "feature_cols": columns, "seeds": [1], "other": "/elsewhere/y"}
    assert experiment.portable(inside) == {
        "train_data": "data/x",
        "feature_cols": [{"name": ["item", "cate"], "pretrained_emb": "data/x"}],
        "seeds": [1],
        "other": "/elsewhere/y",
    }

"""Runs that are interrupted, killed at any moment, and resumed: they end as if nothing had happened."""

import json
import logging
import math
import multiprocessing
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from flowctr import cli, config, experiment, resume
from flowctr.data import H5DataLoader, build_h5, data_digest, load_feature_map
from flowctr.resume import ResumeFile
from flowctr.training import Engine, TrainingError
from test_training import SingleTask, TwoTasks, batches_of, build, feature_map_of
from torch import nn

ZOO = config.REPOSITORY / "model_zoo"
KILLS = 20


class Shuffled(list):
    """Batches in an order of each epoch, from ``start_batch`` on, as H5DataLoader gives them."""

    epoch, start_batch, streaming = 0, 0, False

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(len(self))[self.start_batch :]
        self.epoch, self.start_batch = self.epoch + 1, 0
        return iter([self[i] for i in order])


class Scheduled(SingleTask):
    """Has a schedule that counts the epochs, and needs numbers of every generator."""

    def __init__(self, feature_map, **kwargs):
        super().__init__(feature_map, **kwargs)
        self.register_buffer("epochs_begun", torch.zeros(()))

    def start_epoch(self, epoch, epochs):
        self.epochs_begun += 1 + epoch

    def forward(self, inputs):
        outputs = super().forward(inputs)
        if self.training:
            noise = 1e-3 * (random.random() + np.random.normal()) * (1 + self.epochs_begun)
            outputs["y_pred"] = (outputs["y_pred"] + noise).clamp(0.01, 0.99)
        return outputs


def file_of(tmp_path, data="digest", **settings):
    params = {"model_root": str(tmp_path), "dataset_id": "toy", "model_id": "runTrue", **settings}
    return ResumeFile(params, data, time.perf_counter())


def fit(
    tmp_path,
    model_class,
    settings,
    epochs=4,
    batches=7,
    stop_at=None,
    resumed=True,
    validated=True,
    data_class=Shuffled,
):
    """Fits as a run does, with or without an interruption; returns the model."""
    (tmp_path / "toy").mkdir(parents=True, exist_ok=True)
    model = build(model_class, tmp_path, **settings)
    feature_map = model.feature_map
    torch.manual_seed(3)
    data, valid = data_class(batches_of(feature_map, batches)), batches_of(feature_map, 3, first_seed=100)
    file = file_of(tmp_path)
    if resumed:
        file.load()
    step = model.train_step

    def interrupted(batch):
        if model._total_steps == stop_at:
            raise KeyboardInterrupt
        return step(batch)

    model.train_step = interrupted
    random.seed(0), np.random.seed(0), torch.manual_seed(5)
    model.fit(data, epochs=epochs, validation_data=valid if validated else None, resume_file=file)
    return model


def assert_equal(model, expected):
    assert model.history == expected.history and model.restored == expected.restored
    assert model._rows == expected._rows
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    states = [each.optimizer.state_dict() for each in (model, expected)]
    assert [group["lr"] for group in states[0]["param_groups"]] == [group["lr"] for group in states[1]["param_groups"]]
    for i, state in states[1]["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(states[0]["state"][i][name]), torch.as_tensor(value)), name


@pytest.mark.parametrize(
    ("model_class", "settings", "arguments"),
    [
        (SingleTask, {"checkpoint_steps": 2, "learning_rate": 0.3, "early_stop_patience": 2}, {"epochs": 9}),
        (Scheduled, {"checkpoint_steps": 3, "eval_steps": 4, "optimizer": "Adagrad"}, {}),
        (SingleTask, {"checkpoint_steps": 3}, {"epochs": 1, "batches": 25}),  # between two records of the loss
        (Scheduled, {"optimizer": "SGD"}, {"validated": False}),
        (TwoTasks, {"checkpoint_steps": 1, "eval_steps": 5, "loss_weight": "UW", "gradient_accumulation": 2}, {}),
        (TwoTasks, {"checkpoint_steps": 3, "reset_embeddings": True, "ema_decay": 0.8}, {"epochs": 3}),
        (SingleTask, {"checkpoint_steps": 2, "ema_decay": 0.7}, {"validated": False}),
        (TwoTasks, {"checkpoint_steps": 5, "eval_steps": 100, "save_best_only": False}, {"validated": False}),
    ],
)
def test_interrupted_at_any_step_it_ends_the_same(tmp_path, model_class, settings, arguments):
    whole = tmp_path / "whole"
    whole.mkdir()
    expected = fit(whole, model_class, settings, **arguments)
    last = expected._total_steps
    if "early_stop_patience" in settings:
        assert last < 9 * 7 and expected.optimizer.param_groups[0]["lr"] < settings["learning_rate"]
    for stop_at in range(1, last + 1):
        folder = tmp_path / str(stop_at)
        folder.mkdir()
        with pytest.raises(KeyboardInterrupt):
            fit(folder, model_class, settings, stop_at=stop_at, **arguments)
        assert_equal(fit(folder, model_class, settings, **arguments), expected)
    assert_equal(fit(whole, model_class, settings, **arguments), expected)  # the runner removes the file, not fit


def test_the_loader_starts_at_any_batch(built):
    params = config.load(ZOO / "DHEN" / "config", "DHEN_test", [f"data_root={built}"])
    files = build_h5(params)
    feature_map = load_feature_map(params)
    modes = {
        "in memory": {},
        "streaming": {"streaming": True, "buffer_size": 600},
        "ahead": {"num_workers": 1},
        "on the device": {"data_on_device": True},
    }
    for mode, settings in modes.items():
        loader = H5DataLoader(feature_map, files["train"], batch_size=200, shuffle=True, seed=3, **settings)
        loader.epoch = 1
        second, third = list(loader), next(iter(loader))
        for start in (1, 3, 14, len(loader)):
            loader.epoch, loader.start_batch = 1, start
            found = list(loader)
            assert len(found) == len(loader) - start, (mode, start)
            for batch, expected in zip(found, second[start:]):
                assert all(torch.equal(batch[name], values) for name, values in expected.items()), (mode, start)
            assert torch.equal(next(iter(loader))["user_id"], third["user_id"]), "the next epoch is whole"


# Whole runs, killed


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Where the shipped tables are built."""
    return tmp_path_factory.mktemp("built")


@pytest.fixture(scope="module")
def whole_runs(built, tmp_path_factory):
    """What runs leave behind that are not interrupted, and their seconds, by model."""
    outcomes = {}
    for model, overrides in RUNS.items():
        params = config.load(ZOO / model / "config", f"{model}_test", [f"data_root={built}"])
        build_h5(params)
        folder, started = tmp_path_factory.mktemp(model), time.perf_counter()
        run(model, folder, built, overrides)
        outcomes[model] = outcome(folder), time.perf_counter() - started, log_of(folder)
    return outcomes


def run(model, folder, built, overrides):
    """Runs a model's shipped test experiment with its files in ``folder``."""
    places = [f"model_root={folder / 'checkpoints'}", f"data_root={built}"]
    experiment.run(ZOO / model / "config", f"{model}_test", None, folder, -1, [*places, *overrides])


def start(*arguments):
    """Starts a run in a process of its own, which has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flowctr.experiment", "pytest", "sklearn.metrics"])
    process = context.Process(target=run, args=arguments)
    process.start()
    return process


def age(file):
    """Makes a resume file one of a run that has taken 1000 seconds more."""
    content = torch.load(file, weights_only=True)
    torch.save({**content, "wall_seconds": content["wall_seconds"] + 1000}, file)


def wall_seconds(folder):
    (path,) = (folder / "results").glob("*.json")
    return json.loads(path.read_text())["wall_seconds"]


def log_of(folder):
    (path,) = (folder / "checkpoints").glob("*/*.log")
    return path.read_text()


def kill(process):
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def outcome(folder):
    """What a run leaves behind: metrics, curves and weights; it leaves nothing else."""
    results = [json.loads(path.read_text()) for path in (folder / "results").glob("*.json")]
    results = [{key: result[key] for key in ("metrics", "curves", "stages", "kept_flows")} for result in results]
    assert all(result == results[0] for result in results), "a run that was killed after its result writes another"
    (checkpoints,) = (folder / "checkpoints").iterdir()
    weights = {path.name: torch.load(path, weights_only=True) for path in checkpoints.glob("*.model")}
    assert {path.suffix for path in checkpoints.iterdir()} <= {".model", ".log", ".lock", ".json"}
    return results[0], weights


def assert_same_outcome(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for file, weights in expected[1].items():
        for name, weight in weights.items():
            assert torch.equal(found[1][file][name], weight), (file, name)


RUNS = {
    "DHEN": [
        *("net_dropout=0.2", "learning_rate=0.02", "early_stop_patience=2", "epochs=8", "eval_steps=7"),
        *("checkpoint_steps=2", "batch_size=400", "embedding_dim=4", "head_hidden_units=[8]"),
    ],
    "AutoIFS": [
        *("bottom_hidden_units=[8, 6]", "search_learning_rate=0.01", "learning_rate=0.01", "checkpoint_steps=4"),
    ],
}


@pytest.mark.parametrize(("model", "kills"), [("DHEN", KILLS), ("AutoIFS", 6)])
def test_killed_at_random_times_a_run_ends_the_same(tmp_path, built, whole_runs, model, kills):
    expected, seconds, log = whole_runs[model]
    if model == "DHEN":
        assert "Reduce learning rate" in log and "early stop" in log
    chance = random.Random(1)
    arguments = built, [*RUNS[model], "resume=auto"]
    killed = runs = 0
    while killed < kills:
        folder = tmp_path / str(runs)
        finished = False
        while killed < kills and not finished:
            process = start(model, folder, *arguments)
            process.join(chance.uniform(0, 0.6 * seconds))
            finished = not kill(process)
            killed += not finished
        if not finished:
            run(model, folder, *arguments)
        assert_same_outcome(outcome(folder), expected)
        runs += 1


@pytest.mark.parametrize("stage", ["-search", ""])
def test_a_stage_that_was_killed_goes_on(tmp_path, built, whole_runs, stage):
    process = start("AutoIFS", tmp_path, built, RUNS["AutoIFS"])
    file = tmp_path / "checkpoints" / "kuairand_tiny_tabs" / f"AutoIFS_test-s2022{stage}.resume"
    while not file.exists() and process.is_alive():
        time.sleep(0.002)
    assert kill(process) and file.exists()
    age(file)
    run("AutoIFS", tmp_path, built, [*RUNS["AutoIFS"], "resume=auto"])
    log = log_of(tmp_path)
    assert log.count("FuxiCTR version") == 2 and log.count("Resume after step") == 1
    assert wall_seconds(tmp_path) > 1000
    assert ("There is no" in log) == (stage == "-search"), "the retraining has not begun"
    assert_same_outcome(outcome(tmp_path), whole_runs["AutoIFS"][0])


@pytest.fixture
def interrupted(tmp_path, built, monkeypatch):
    """The resume file of a run that was interrupted while it wrote its result."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(experiment, "_append_line", lambda path, result: (_ for _ in ()).throw(KeyboardInterrupt))
        run("DHEN", tmp_path, built, ["epochs=1"])
    (result,) = (tmp_path / "results").glob("*.json")
    result.unlink()
    (file,) = (tmp_path / "checkpoints").glob("*/*.resume")
    return file


def test_a_run_that_had_been_trained_does_not_train_again(tmp_path, built, interrupted, monkeypatch):
    monkeypatch.setattr(Engine, "train_step", lambda self, batch: pytest.fail("it trains"))
    run("DHEN", tmp_path, built, ["epochs=1", "resume=auto"])
    assert outcome(tmp_path)[0]["metrics"]["test"] and not interrupted.exists()


def test_log_and_wall_time_are_those_of_all_starts(tmp_path, built, interrupted):
    age(interrupted)
    first = log_of(tmp_path)
    earlier = torch.load(interrupted, weights_only=True)["wall_seconds"]
    started = time.perf_counter()
    run("DHEN", tmp_path, built, ["epochs=1", "resume=auto"])
    assert earlier < wall_seconds(tmp_path) < earlier + time.perf_counter() - started
    assert log_of(tmp_path).startswith(first) and log_of(tmp_path).count("Epoch=1 start") == 1
    run("DHEN", tmp_path, built, ["epochs=1", "resume=auto"])
    assert log_of(tmp_path).count("FuxiCTR version") == 1, "the run before was done"


def test_without_resume_a_run_starts_anew_and_says_so(tmp_path, built, interrupted, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Engine, "train_step", lambda self, batch: (_ for _ in ()).throw(KeyboardInterrupt))
        run("DHEN", tmp_path, built, ["epochs=1", "net_dropout=0.1"])  # other settings are no obstacle then
    log = log_of(tmp_path)
    assert f"{interrupted} of an interrupted run is removed; --resume would have continued it" in log
    assert log.count("FuxiCTR version") == 1
    assert not interrupted.exists(), "its best weights may be replaced from now on"
    run("DHEN", tmp_path, built, ["epochs=1", "net_dropout=0.1", "resume=auto"])
    assert "Resume after" not in log_of(tmp_path)
    outcome(tmp_path)


def test_a_run_of_another_configuration_is_refused(tmp_path, built, interrupted):
    with pytest.raises(ValueError, match=r"learning_rate was 0\.001 and is 0\.5; net_dropout was not set and is 0\.1;"):
        run("DHEN", tmp_path, built, ["epochs=1", "learning_rate=0.5", "net_dropout=0.1", "resume=auto"])
    assert interrupted.exists(), "the run can still be resumed"


@pytest.mark.parametrize("command", ["run", "run_expid"])
def test_the_command_line_resumes(tmp_path, monkeypatch, command):
    runs = []
    monkeypatch.setattr(experiment, "run", lambda *arguments: runs.append(list(arguments[-1])))
    for arguments in ([], ["--resume"], ["--seed", "3", "--resume", "--set", "epochs=2"]):
        arguments = ["--expid", "DHEN_test", *arguments]
        monkeypatch.setattr("sys.argv", ["flowctr", *(["run", "DHEN"] if command == "run" else []), *arguments])
        with pytest.raises(SystemExit) as done:
            cli.main() if command == "run" else cli.run_expid(None, str(ZOO / "DHEN" / "run_expid.py"))
        assert done.value.code == 0
    assert runs == [[], ["resume=auto"], ["epochs=2", "seed=3", "resume=auto"]]


# What is refused


def test_other_settings_and_other_data_are_refused(tmp_path):
    (tmp_path / "toy").mkdir()
    file_of(tmp_path, learning_rate=0.1, rank=2, gpu=0, epochs=3).save({})
    same = file_of(tmp_path, learning_rate=0.1, rank=2, gpu=-1, resume="auto", checkpoint_steps=5, epochs=3)
    same.load()
    assert same.state == {}
    message = r"runTrue.resume was made with other settings: epochs was 3 and is 4; learning_rate was 0.1 and is 0.2; "
    message += r"rank was 2 and is not set; take its settings, or start anew, without --resume and resume: auto"
    with pytest.raises(ValueError, match=message):
        file_of(tmp_path, learning_rate=0.2, epochs=4).load()
    with pytest.raises(ValueError, match="data was digest and is another"):
        file_of(tmp_path, learning_rate=0.1, rank=2, epochs=3, data="another").load()


def test_h5_files_that_replace_the_built_ones_are_other_data(built, tmp_path):
    params = config.load(ZOO / "DHEN" / "config", "DHEN_test", [f"data_root={built}"])
    files = build_h5(params)
    data_dir = built / "kuairand_tiny"
    digest = json.loads((data_dir / "manifest.json").read_text())["digest"]
    assert data_digest(data_dir, files) == data_digest(data_dir, {**files, "test": None}) == digest
    other = shutil.copy(files["train"], tmp_path / "train.h5")
    assert data_digest(data_dir, {**files, "train": str(other)}) is None
    assert data_digest(data_dir, {**files, "train": files["valid"]}) is None
    assert data_digest(tmp_path, files) is None


def test_rows_in_another_order_are_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, SingleTask, {}, stop_at=9)
    expected = r"the run to resume has streaming=False, here it is True, .*: set streaming=false, or start anew"
    with pytest.raises(ValueError, match=expected):
        fit(tmp_path, SingleTask, {}, data_class=type("Streamed", (Shuffled,), {"streaming": True}))


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "toy").mkdir()
    file = file_of(tmp_path)
    file.save({"weights": torch.arange(10_000.0)})
    whole = file.path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (b"", b"no checkpoint", whole[:-100], whole[: len(whole) // 2], bytes(flipped)):
        file.path.write_bytes(content)
        with pytest.raises(ValueError, match=r"runTrue.resume is damaged .*; start anew, without --resume"):
            file.load()
    torch.save({"weight": torch.zeros(3)}, file.path)
    with pytest.raises(ValueError, match="is no resume checkpoint of format 3"):
        file.load()
    file.path.write_bytes(whole)
    file.load()
    assert torch.equal(file.state["weights"], torch.arange(10_000.0))


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    (tmp_path / "toy").mkdir()
    file = file_of(tmp_path)
    torch.save(Payload(), file.path)
    with pytest.raises(ValueError, match="is damaged"):
        file.load()
    assert not (tmp_path / "executed").exists()


def test_best_weights_that_are_gone_are_missed_at_once(tmp_path):
    model = fit(tmp_path, SingleTask, {}, epochs=1)
    (tmp_path / "toy" / "runTrue.model").unlink()
    with pytest.raises(ValueError, match=r"runTrue.model, the best weights of the run to resume, is gone; start anew"):
        fit(tmp_path, SingleTask, {}, epochs=2)
    assert model.restored


# What goes wrong while training


def test_what_is_not_finite_is_never_kept(tmp_path):
    """The loss of step 35 is NaN, before the loss is recorded, or a weight is after it, that no loss has seen yet."""
    (tmp_path / "toy").mkdir()
    for what, message in {
        "loss": r"loss is nan at step 35 \(epoch 2, rows 289 to 320 in its order\); .*; the best weights, of step",
        "weight": r"weights are nan or inf at step 35 \(epoch 2\); lower learning_rate.*; the best weights, of step 25",
    }.items():
        model = build(SingleTask, tmp_path, checkpoint_steps=5)
        model.spare = nn.Parameter(torch.zeros(2))
        step = model.train_step

        def poisoned(batch, what=what, model=model, step=step):
            loss = step(batch)
            if model._total_steps == 35:
                if what == "loss":
                    return loss * math.nan
                model.spare.data[0] = math.inf
            return loss

        model.train_step = poisoned
        feature_map = feature_map_of(SingleTask)
        data, valid = Shuffled(batches_of(feature_map, 25)), batches_of(feature_map, 3, first_seed=100)
        file = file_of(tmp_path)
        with pytest.raises(TrainingError, match=message):
            model.fit(data, epochs=4, validation_data=valid, resume_file=file)
        file.load()
        assert file.state["_total_steps"] == 30
        weights = [file.state["weights"], torch.load(model.checkpoint, weights_only=True)]
        assert all(weight.isfinite().all() for each in weights for weight in each.values())


def test_a_full_disk_keeps_the_old_file_and_the_run(tmp_path, monkeypatch, caplog):
    expected = fit(tmp_path, SingleTask, {"checkpoint_steps": 2}, epochs=2, resumed=False)
    save, saved = torch.save, []

    def full_disk(content, file):
        if "settings" in content and len(saved) == 3:
            file.write(b"the first bytes")
            raise OSError(28, "No space left on device")
        saved.extend([content] if "settings" in content else [])
        save(content, file)

    monkeypatch.setattr(torch, "save", full_disk)
    with caplog.at_level(logging.WARNING):
        model = fit(tmp_path, SingleTask, {"checkpoint_steps": 2}, epochs=2, resumed=False)
    assert_equal(model, expected)
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "runTrue.resume cannot be written: [Errno 28] No space left" in message
    file = file_of(tmp_path)
    file.load()
    assert file.state["_total_steps"] == 6
    assert {path.name for path in file.path.parent.iterdir()} == {"runTrue.model", "runTrue.resume"}
    assert_equal(fit(tmp_path, SingleTask, {"checkpoint_steps": 2}, epochs=2), expected)


def test_a_file_that_outgrows_the_disk_is_not_written(tmp_path, caplog):
    (tmp_path / "toy").mkdir()
    file = file_of(tmp_path)
    file.save({"weights": torch.zeros(3)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, limits[1]))  # fails midway, for which torch has another error
    try:
        file.save({"weights": torch.zeros(2**20), "more": torch.zeros(2**20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "runTrue.resume cannot be written" in caplog.text
    file.load()
    assert torch.equal(file.state["weights"], torch.zeros(3))
    assert [path.name for path in file.path.parent.iterdir()] == ["runTrue.resume"]


def test_metrics_belong_to_the_weights_that_a_killed_start_left(tmp_path, caplog):
    """It had written better weights but not yet what to resume from, and the run finds no better ones."""
    settings = {"checkpoint_steps": 2, "learning_rate": 0.0}
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, SingleTask, settings, stop_at=9)
    checkpoint = tmp_path / "toy" / "runTrue.model"
    trained = fit(tmp_path / "other", SingleTask, {"learning_rate": 0.1}, resumed=False)
    checkpoint.write_bytes(Path(trained.checkpoint).read_bytes())
    model = fit(tmp_path, SingleTask, settings)
    assert "runTrue.model is newer than what the run was resumed from" in caplog.text
    for name, weight in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert model.restored["AUC"] == trained.restored["AUC"] != model.history["valid"][-1]["AUC"]


def test_writing_it_is_no_time_of_training(tmp_path, monkeypatch):
    clock = iter(range(10**6))
    seconds = [0.0]
    monkeypatch.setattr("flowctr.training.time.perf_counter", lambda: seconds[0] + 1e-9 * next(clock))
    monkeypatch.setattr(ResumeFile, "save", lambda self, state: seconds.__setitem__(0, seconds[0] + 100))
    model = fit(tmp_path, SingleTask, {"checkpoint_steps": 2}, resumed=False)
    assert seconds[0] > 0 and 0 < model._seconds["train"] < 1


def test_random_numbers_go_on_where_they_were():
    device = torch.device("cpu")
    random.gauss(0, 1), np.random.normal()  # both keep a second number
    states = resume.random_state(device)

    def draw():
        return [random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), torch.rand(3).tolist()]

    expected = draw()
    assert draw() != expected
    resume.set_random_state(states, device)
    assert draw() == expected

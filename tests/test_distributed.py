"""Several processes that train one model: the numbers of one process, one writer, errors that reach all.

torchrun launches this file once for most of the tests: ``test_distributed.py FOLDER`` does what they ask about, and
each process writes what came of it.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
from flowctr import distributed
from flowctr.data import H5DataLoader
from flowctr.data.format import H5Writer
from flowctr.metrics import evaluate_metrics
from flowctr.training import accelerate
from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import MultiTaskModel
from fuxictr.pytorch.torch_utils import seed_everything
from torch import nn
from toy import toy_batch, toy_feature_map

REPOSITORY = Path(__file__).parent.parent
PROCESSES = 2
BATCH_SIZE = 16  # of each process
SETTINGS = {
    "verbose": 0,
    "metrics": ["AUC", "gAUC", "logloss"],
    "monitor": "AUC",
    "optimizer": "adam",
    "loss": "binary_crossentropy",
    "embedding_regularizer": 1e-3,
    "net_regularizer": 1e-4,
}
CASES = {  # rows of the training data, settings of the model, of fit and of the loader
    "even": (5 * 32, {}, {}, {}),
    "uneven": (4 * 32 + 21, {}, {}, {}),
    "fewer rows than processes": (3 * 32 + 1, {}, {}, {}),
    "clipped": (4 * 32 + 5, {}, {"max_gradient_norm": 0.05}, {}),
    "accumulated": (5 * 32 + 3, {"gradient_accumulation": 2}, {}, {}),
    "averaged": (4 * 32 + 3, {"ema_decay": 0.8}, {}, {}),
    "learned weights": (4 * 32 + 3, {"loss_weight": "UW", "fused_regularizer": True}, {}, {}),
    "streamed": (4 * 32 + 3, {}, {}, {"streaming": True, "buffer_size": 64}),
    "on the device": (4 * 32 + 3, {}, {}, {"data_on_device": True}),
    "labels missing": (4 * 32 + 3, {"loss_weight": "UW"}, {}, {}),
    "labels missing, accumulated": (5 * 32 + 3, {"gradient_accumulation": 2}, {}, {}),
}
VALID_ROWS = 53


class TwoTasks(MultiTaskModel):
    """An embedding and an MLP with one head per label; as an option a batch norm and dropout between them."""

    def __init__(self, feature_map, learning_rate=0.02, normalised=False, **kwargs):
        super().__init__(feature_map, num_tasks=2, task="binary_classification", **kwargs)
        self.embedding_layer = FeatureEmbedding(feature_map, 4)
        self.mlp = MLP_Block(4 * feature_map.num_fields, [8], "ReLU", None)
        self.between = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5)) if normalised else nn.Identity()
        self.towers = nn.ModuleList(nn.Linear(8, 1) for _ in feature_map.labels)
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs):
        embedded = self.embedding_layer(self.get_inputs(inputs)).flatten(start_dim=1)
        hidden = self.between(self.mlp(embedded))
        outputs = zip(self.feature_map.labels, self.output_activation, self.towers)
        return {f"{label}_pred": activation(tower(hidden)) for label, activation, tower in outputs}


class OwnStep(TwoTasks):
    """A model that trains in a way of its own."""

    def train_step(self, batch):
        return super().train_step(batch)


def feature_map_of(folder):
    """The toy's features without sequences."""
    feature_map = toy_feature_map(labels=["click", "like"])
    feature_map.features = {k: v for k, v in feature_map.features.items() if v["type"] != "sequence"}
    feature_map.num_fields = feature_map.get_num_fields()
    feature_map.data_dir = str(folder)
    return feature_map


def write_rows(folder, split, rows, block_rows=0, missing=False):
    """Writes rows of which three each are a group, maybe many without ``like``, and returns their columns."""
    feature_map = feature_map_of(folder)
    columns = {name: values.numpy() for name, values in toy_batch(feature_map, rows=rows, seed=rows).items()}
    columns["user_group"] = np.arange(rows) // 3
    columns["click"] = (columns["item"] + 10 * columns["age"] > 15).astype(np.float32)
    folder.mkdir(exist_ok=True)
    names = feature_map.features, {}, feature_map.labels
    partial = []
    if missing:
        partial = ["like"]
        columns["like"][np.random.default_rng(0).random(rows) < 0.7] = np.nan
    with H5Writer(folder, split, *names, "", block_rows=block_rows, may_be_missing=partial) as writer:
        writer.append(columns)
    return columns


def load(folder, split, batch_size=BATCH_SIZE, rank=0, world_size=1, **options):
    sharing = {"batch_size": batch_size, "rank": rank, "world_size": world_size}
    return H5DataLoader(feature_map_of(folder), folder / split, split, shuffle=True, **sharing, **options)


def load_part(folder, split, **options):
    """Loads this process's part, so that a step of all processes takes the same rows however many they are."""
    sharing = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    return load(folder, split, PROCESSES * BATCH_SIZE // distributed.world_size(), **sharing, **options)


def build(folder, model_id, model_class=TwoTasks, **settings):
    seed_everything(distributed.rank())  # others than the writer's weights, from which all shall start
    root = str(folder / f"of-{distributed.world_size()}")
    return accelerate(model_class)(
        feature_map_of(folder), model_root=root, model_id=model_id, **{**SETTINGS, **settings}
    )


def train(folder, case):
    _, settings, fitting, loading = CASES[case]
    model, valid = build(folder, case, **settings), load_part(folder, "valid")
    model.fit(load_part(folder / case, "train", **loading), epochs=2, validation_data=valid, **fitting)
    return {
        "history": model.history,
        "weights": {name: weight.tolist() for name, weight in model.state_dict().items()},
        "predictions": {label: values.tolist() for label, values in model.predict(valid).items()},
        "metrics": model.evaluate(valid),
    }


def train_normalised(folder):
    model, valid = build(folder, "normalised", normalised=True), load_part(folder, "valid")
    model.fit(load_part(folder / "even", "train"), validation_data=valid)
    return {"history": model.history, "metrics": model.evaluate(valid), "seed": torch.initial_seed()}


def refusals(folder):
    """What is said to settings that several processes cannot have."""

    def own_step():
        build(folder, "refused", OwnStep)

    def unequal_batches():
        rows = ("even", "fewer rows than processes")[distributed.rank()]
        build(folder, "refused").fit(load_part(folder / rows, "train"))

    messages = {}
    for attempt in (own_step, unequal_batches):
        with pytest.raises(ValueError) as refused:
            attempt()
        messages[attempt.__name__] = str(refused.value)
    return messages


def main(folder):
    with distributed.process_group(-1):
        results = {case: train(folder, case) for case in CASES}
        results |= {"normalised": train_normalised(folder), "refused": refusals(folder)}
        results["from writer"] = distributed.from_writer(lambda: {"rank": distributed.rank(), "nan": float("nan")})
        (folder / f"rank{distributed.rank()}.json").write_text(json.dumps(results))


def evaluate_slowly(folder):
    """One process takes longer to predict its rows than a process may be late for a gather."""
    distributed.COLLECTIVE_TIMEOUT = timedelta(seconds=2)
    with distributed.process_group(-1):
        model, valid = build(folder, "slow"), load_part(folder, "valid")
        if distributed.rank() == 1:
            forward = model._run_forward
            model._run_forward = lambda inputs: (time.sleep(1.5), forward(inputs))[1]
        (folder / f"slow{distributed.rank()}.json").write_text(json.dumps(model.evaluate(valid)))


def environment(**variables):
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}


def torchrun(*arguments, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    command += map(str, arguments)
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment(), timeout=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_rows(path, "valid", VALID_ROWS)
    for case, (rows, *_) in CASES.items():
        write_rows(path / case, "train", rows, missing=case.startswith("labels missing"))
    return path


@pytest.fixture(scope="module")
def results(folder):
    """What came of it in each of two processes."""
    done = torchrun(__file__, folder, cwd=folder)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(PROCESSES)]


# Loading


def joined(batches):
    return {name: np.concatenate([batch[name].numpy() for batch in batches]) for name in batches[0]}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("options", [{}, {"streaming": True, "buffer_size": 50}, {"data_on_device": True}])
def test_each_batch_of_one_process_is_dealt_evenly(tmp_path, options, world_size):
    write_rows(tmp_path, "train", 100, block_rows=37)
    for batch_size in (7, 11, 33):  # 100 rows in batches of 3 * 33: one row is left for three
        whole = load(tmp_path, "train", world_size * batch_size, **options)
        parts = [load(tmp_path, "train", batch_size, rank, world_size, **options) for rank in range(world_size)]
        assert [len(part) for part in parts] == [len(whole)] * world_size
        for start in (0, 1):  # the second epoch, from its second batch on
            for loader in (whole, *parts):
                loader.start_batch = start
            for batch, *dealt in zip(whole, *parts, strict=True):
                sizes = [len(part["item"]) for part in dealt]
                assert max(sizes) - min(sizes) <= 1
                together = joined(dealt)
                for name in batch:
                    np.testing.assert_array_equal(together[name], batch[name].numpy())


@pytest.mark.parametrize("block_rows", [0, 20])
@pytest.mark.parametrize("options", [{}, {"streaming": True, "buffer_size": 10}, {"data_on_device": True}])
def test_evaluation_is_cut_into_parts_in_file_order(tmp_path, options, block_rows):
    columns = write_rows(tmp_path, "valid", VALID_ROWS, block_rows)
    parts = [load(tmp_path, "valid", 8, rank, 4, **options) for rank in range(4)]
    assert [sum(len(batch["item"]) for batch in part) for part in parts] == [13, 13, 13, 14]
    assert [len(part) for part in parts] == [2] * 4
    together = joined([batch for part in parts for batch in part])
    for name, values in columns.items():
        np.testing.assert_array_equal(together[name], values)


def test_a_split_needs_a_row_for_each_process(tmp_path):
    write_rows(tmp_path, "valid", 2)
    load(tmp_path, "valid", rank=1, world_size=2)
    with pytest.raises(ValueError, match="the valid split has 2 rows for 3 processes"):
        load(tmp_path, "valid", rank=1, world_size=3)


# Training


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does(folder, results, case):
    one, (two, other) = train(folder, case), (rank[case] for rank in results)
    assert other == two  # bit by bit
    for point, wanted in zip_longest(two["history"]["train"], one["history"]["train"]):
        assert point == pytest.approx(wanted, rel=1e-5)
    for point, wanted in zip_longest(two["history"]["valid"], one["history"]["valid"]):
        assert point == pytest.approx(wanted, rel=1e-4)
    for name, weights in one["weights"].items():
        np.testing.assert_allclose(two["weights"][name], weights, rtol=1e-3, atol=1e-4, err_msg=name)
    for label, predictions in one["predictions"].items():
        np.testing.assert_allclose(two["predictions"][label], predictions, atol=1e-4)


def test_metrics_are_those_of_all_rows(folder, results):
    rows = joined(list(load(folder, "valid")))
    found = results[0]["uneven"]
    for label in ("click", "like"):
        wanted = evaluate_metrics(
            rows[label].astype(float), np.array(found["predictions"][label]), SETTINGS["metrics"], rows["user_group"]
        )
        for name, value in wanted.items():
            assert found["metrics"][f"{label}_{name}"] == pytest.approx(value, abs=1e-9)


def test_batch_norm_is_evaluated_with_the_statistics_that_are_saved(folder, results):
    model = build(folder, "normalised", normalised=True)
    model.load_weights(folder / "of-2" / "toy" / "normalised.model")
    for rank in results:
        saved = model.evaluate(load(folder, "valid"))
        assert rank["normalised"]["metrics"] == pytest.approx(saved, rel=1e-6)
        assert rank["normalised"]["history"]["valid"] == [pytest.approx({"step": 5, "epoch": 1, **saved}, rel=1e-6)]


def test_a_process_may_take_longer_to_evaluate_its_part(folder):
    done = torchrun(__file__, folder, "slowly", cwd=folder)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((folder / f"slow{rank}.json").read_text()) for rank in range(PROCESSES))
    assert first == second and first["click_AUC"] > 0


def test_processes_drop_out_different_units(results):
    assert [rank["normalised"]["seed"] for rank in results] == [0, 2]  # of seed + rank


def test_what_several_processes_cannot_do_is_refused(results):
    first, second = (rank["refused"] for rank in results)
    assert first == second
    assert "OwnStep has a train_step of its own" in first["own_step"]
    assert "the processes have [5, 4] training batches" in first["unequal_batches"]


def test_the_writer_decides(results):
    for rank in results:
        assert rank["from writer"]["rank"] == 0 and np.isnan(rank["from writer"]["nan"])


# Failures: two processes without torchrun, which would end the other one itself

SCRIPT = """
import os, signal, sys
import torch
from flowctr import distributed

def fail():
    raise ValueError("no such column")

def end():
    os.kill(os.getpid(), signal.SIGKILL)

how, meeting, failing = {"fails": fail, "ends": end}[sys.argv[1]], sys.argv[2], int(sys.argv[3])
meet = {
    "barrier": distributed.barrier,
    "writer": lambda: distributed.from_writer(lambda: "done"),
    "step": lambda: distributed.mean_over_rows([torch.ones(3)], 1),
}[meeting]
with distributed.process_group(-1):
    distributed.barrier()
    if distributed.rank() == failing:
        how()
    meet()
"""


@pytest.mark.parametrize(
    "how, meeting, failing",
    [
        ("fails", "barrier", 1),
        ("fails", "step", 1),
        ("ends", "barrier", 1),
        ("ends", "writer", 0),
    ],
)
def test_the_others_stop_with_the_error_of_one(tmp_path, how, meeting, failing):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, how, meeting, str(failing)],
            cwd=tmp_path,
            env=environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2"),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=60)[1] for process in ranks]
    own, (last, *_) = errors.pop(failing), [text.splitlines()[-1] for text in errors]
    if how == "fails":
        assert own.splitlines()[-1].endswith(" ValueError: no such column")
        assert last.endswith(f"ProcessError: process {failing} of 2 failed: no such column")
    else:
        assert "ProcessError: another process of this run has ended or does not answer: " in last


@pytest.fixture
def alone(monkeypatch):
    """The environment of a run of one process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_more_processes_than_gpus_are_refused(alone):
    alone.setattr(torch.cuda, "device_count", lambda: 2)
    alone.setenv("LOCAL_WORLD_SIZE", "2")
    message = "--gpu 1 with 2 processes on this machine takes GPUs 1 to 2, but it has 2"
    with pytest.raises(ValueError, match=message), distributed.process_group(1):
        raise AssertionError("this has to be refused before")


def test_a_process_takes_part_in_one_run_after_the_other(alone):
    for _ in range(2):
        with distributed.process_group(-1) as gpu:
            tensors = [torch.tensor([1.0, 2.0]), torch.tensor(3.0)]
            distributed.mean_over_rows(tensors, 5)
            assert gpu == -1 and distributed.gather("here") == ["here"]
            assert [tensor.tolist() for tensor in tensors] == [[1.0, 2.0], 3.0]
    assert (distributed.rank(), distributed.world_size()) == (0, 1)


# A run from the command line


def test_a_run_in_two_stages(tmp_path):
    """AutoIFS by torchrun: the result of one process with the whole batch, and one writer."""
    for name in ("model_zoo/AutoIFS/config", "model_zoo/AutoIFS/src", "data/kuairand_tiny_tabs", "data_configs"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    model = tmp_path / "model_zoo" / "AutoIFS"
    shutil.copy(REPOSITORY / "model_zoo" / "AutoIFS" / "run_expid.py", model)
    done = torchrun(model / "run_expid.py", "--set", "batch_size=128", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = (model / "results").glob("*.json")
    two = json.loads(path.read_text())
    assert len((model / "config.csv").read_text().splitlines()) == 1
    assert done.stdout.count("result: ") == 1 and done.stdout.count("NE base") == 1
    log = (model / "checkpoints" / "kuairand_tiny_tabs" / "AutoIFS_test-s2022.log").read_text()
    line = "2 processes: a step takes 256 rows (2 processes x 1 batches x 128 rows); the learning rate stays 0.0001"
    for text in (log, done.stderr):
        assert text.count(line) == 1 and text.count("Stage retrain") == text.count("Test evaluation") == 1

    command = [sys.executable, model / "run_expid.py", "--set", "batch_size=256", "--set", "model_root=one"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment(), check=True, timeout=120)
    (other,) = set((model / "results").glob("*.json")) - {path}
    one = json.loads(other.read_text())
    assert two["config"]["world_size"] == 2 and "world_size" not in one["config"]
    assert [point["loss"] for point in two["stages"]["search"]["curves"]["train"]] == pytest.approx(
        [point["loss"] for point in one["stages"]["search"]["curves"]["train"]], rel=1e-4
    )
    for split, metrics in one["metrics"].items():
        assert two["metrics"][split] == pytest.approx(metrics, abs=1e-3, nan_ok=True)
    np.testing.assert_allclose(two["kept_flows"]["kept"], one["kept_flows"]["kept"], atol=0.02)


if __name__ == "__main__":
    (evaluate_slowly if sys.argv[2:] else main)(Path(sys.argv[1]))

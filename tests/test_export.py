"""Exports: what a file alone predicts, against the model it was made from."""

import json
import logging
import sys
from dataclasses import replace

import flowctr.export
import numpy as np
import onnxruntime
import pytest
import torch
from flowctr import cli, experiment
from flowctr.config import REPOSITORY
from flowctr.data.format import H5Writer
from flowctr.export import ExportError, export
from flowctr.trained import TrainedModel, load_trained
from test_model_contract import build
from torch import nn
from toy import toy_batch, toy_feature_map

ONE, TWO = ("click",), ("click", "like")
MODELS = {
    "InterFormer": ("InterFormer", TWO, {}),
    "INFNet v1": ("INFNet", ONE, {"version": "v1", "num_blocks": 1}),
    "INFNet v2": ("INFNet", TWO, {"version": "v2", "num_blocks": 1}),
    "DHEN": ("DHEN", ONE, {}),
    "AutoIFS": ("AutoIFS", TWO, {"stage": "retrain"}),
}
CONFIG = REPOSITORY / "model_zoo" / "DHEN" / "config"
EXPID = "DHEN_test"
SETTINGS = ("epochs=1", "verbose=0", "head_activation=ReLU")


def as_trained(model, folder, rows=300, seed=3) -> TrainedModel:
    """Wraps a model on the toy data; these are its validation rows."""
    feature_map = model.feature_map
    batch = {name: values.numpy() for name, values in toy_batch(feature_map, rows=rows, seed=seed).items()}
    with H5Writer(folder, "valid", feature_map.features, {}, feature_map.labels, digest="") as writer:
        writer.append({name: v.astype(np.int32) if v.dtype == np.int64 else v for name, v in batch.items()})
    params = {"model": type(model).__name__, "dataset_id": "toy", "seed": 7}
    return TrainedModel("toy_exp", params, feature_map, {"valid": folder / "valid.h5"}, "abc", model.eval())


def columns_of(feature_map, rows, seed):
    batch = toy_batch(feature_map, rows=rows, seed=seed)
    columns = {name: values for name, values in batch.items() if name not in ("user_group", *feature_map.labels)}
    return {name: v.int() if v.dtype == torch.long else v for name, v in columns.items()}


def run_alone(format, path, columns):
    if format == "torch_export":
        with open(path, "rb") as file:
            return torch.export.load(file).module()(**columns)
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    arrays = session.run(None, {name: values.numpy() for name, values in columns.items()})
    return {name: torch.from_numpy(array) for name, array in zip(names, arrays)}


@pytest.mark.parametrize("name", MODELS)
def test_a_file_alone_predicts_what_the_model_does(name, tmp_path, monkeypatch):
    model_name, labels, options = MODELS[name]
    model = build(model_name, labels, **options)
    trained = as_trained(model, tmp_path)
    program = flowctr.export._trace(trained, columns_of(model.feature_map, 4, seed=0))
    monkeypatch.setattr(flowctr.export, "_trace", lambda *_: program)  # most of the time, and the same for both
    for format in ("torch_export", "onnx"):
        exported = export(trained, format, tmp_path / format / "model")
        assert exported.rows == [1, 1, 2, 37, 256]  # the first with empty histories
        assert exported.difference <= 1e-5
        for rows in (1, 5, 411):
            columns = columns_of(model.feature_map, rows, seed=rows)
            expected = model(columns)
            found = run_alone(format, exported.path, columns)
            assert set(found) == {f"{label}_pred" for label in labels} | ({"y_pred"} if len(labels) == 1 else set())
            for output, values in found.items():
                torch.testing.assert_close(values, expected[output].detach(), atol=1e-5, rtol=0)
        assert [path.name for path in exported.path.parent.iterdir()] == ["model"]


def test_onnx_names_columns_types_and_origin(tmp_path):
    model = build("DOT", TWO)
    exported = export(as_trained(model, tmp_path), "onnx", tmp_path / "model.onnx")
    columns = columns_of(model.feature_map, 50, seed=1)
    for name, values in run_alone("onnx", exported.path, columns).items():
        torch.testing.assert_close(values, model(columns)[name].detach(), atol=1e-5, rtol=0)
    session = onnxruntime.InferenceSession(exported.path)
    inputs = {value.name: (value.type, value.shape) for value in session.get_inputs()}
    assert inputs["item"] == ("tensor(int32)", ["batch"])
    assert inputs["age"] == ("tensor(float)", ["batch"])
    assert inputs["watch_item"] == ("tensor(int32)", ["batch", 8])
    assert list(inputs) == ["item", "author", "user", "age", "hour", "watch_item", "watch_author", "like_item"]
    assert {value.name: value.shape[0] for value in session.get_outputs()} == dict.fromkeys(
        ("click_pred", "like_pred"), "batch"
    )
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata.pop("labels")) == list(TWO)
    assert metadata.pop("flowctr")
    assert metadata == {"expid": "toy_exp", "seed": "7", "dataset_id": "toy", "dataset_digest": "abc"}


class Odd(nn.Module):
    """A model that computes one thing that some way of exporting cannot."""

    def __init__(self, compute):
        super().__init__()
        self.feature_map = toy_feature_map()
        self.compute = compute

    def forward(self, columns):
        return {"y_pred": self.compute(columns["age"].view(-1, 1))}


@pytest.mark.filterwarnings("error::UserWarning", "error::FutureWarning")
def test_a_graph_takes_what_the_model_reads_and_torch_does_not_warn(tmp_path):
    trained = as_trained(Odd(torch.sigmoid), tmp_path)
    path = export(trained, "onnx", tmp_path / "model.onnx").path
    inputs = onnxruntime.InferenceSession(path).get_inputs()
    assert [(value.name, value.shape) for value in inputs] == [("age", ["batch"])]
    columns = columns_of(trained.feature_map, 5, seed=1)
    found = run_alone("onnx", path, {"age": columns["age"]})["click_pred"]
    torch.testing.assert_close(found, columns["age"].sigmoid().view(-1, 1))


class MeanOfHistory(Odd):
    """Averages a history as FuxiCTR's MaskedAveragePooling does."""

    def forward(self, columns):
        steps = columns["watch_item"]
        mean = steps.sum(dim=1, keepdim=True) / ((steps > 0).sum(dim=1, keepdim=True) + 1e-12)
        return {"y_pred": torch.sigmoid(mean / 30)}


def test_an_empty_history_is_no_nan(tmp_path):
    trained = as_trained(MeanOfHistory(None), tmp_path)
    exported = export(trained, "onnx", tmp_path / "model.onnx")
    assert exported.rows[0] == 1 and exported.difference <= 1e-5
    empty = {"watch_item": torch.zeros(3, 8, dtype=torch.int32)}
    torch.testing.assert_close(run_alone("onnx", exported.path, empty)["click_pred"], torch.full((3, 1), 0.5))


def branches(x):
    return x if x.sum() > 3 else -x


@pytest.mark.parametrize(
    "compute, format, message",
    [
        (torch.special.bessel_j0, "onnx", "bessel_j0"),
        (branches, "torch_export", r"Odd as torch_export: .*[Dd]ata-dependent.*, in line \d+ of .*test_export.py"),
        (lambda x: x.reshape(2, 1), "torch_export", r"batch.*, in line \d+ of .*test_export.py"),
        (
            lambda x: x + 1 * torch.compiler.is_compiling(),
            "torch_export",
            "click_pred differs by up to 1 on a batch of 1 rows, at most 1e-05 is allowed; no file was written",
        ),
        (lambda x: x / (0 * x), "onnx", "differs by up to nan"),
    ],
    ids=["operator", "branch", "fixed batch", "other values", "nan"],
)
def test_what_cannot_be_exported_is_one_error_and_no_file(compute, format, message, tmp_path):
    trained = as_trained(Odd(compute), tmp_path)
    with pytest.raises(ExportError, match=message):
        export(trained, format, tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []
    assert logging.root.manager.disable == 0


def test_few_validation_rows(tmp_path):
    trained = as_trained(Odd(torch.sigmoid), tmp_path, rows=1)
    assert export(trained, "torch_export", tmp_path / "model.pt2").rows == [1, 1]
    test_only = replace(trained, files={"valid": None, "test": trained.files["valid"]})
    assert export(test_only, "torch_export", tmp_path / "model.pt2").rows == [1, 1]


def test_onnx_that_is_not_installed(tmp_path, monkeypatch):
    trained = as_trained(Odd(torch.sigmoid), tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r"onnxruntime; install it with: pip install 'flowctr\[export\]'"):
        export(trained, "onnx", tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="'pickle' is unknown; it is one of torch_export, onnx"):
        export(trained, "pickle", tmp_path / "model")


# A trained experiment


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a trained experiment, with a data set of its own."""
    folder = tmp_path_factory.mktemp("DHEN")
    experiment.run(CONFIG, EXPID, None, folder, -1, [*SETTINGS, f"data_root={folder / 'data'}"])
    return folder


def load(folder, *overrides):
    return load_trained(CONFIG, EXPID, None, folder, -1, [*SETTINGS, f"data_root={folder / 'data'}", *overrides])


def test_the_command_exports_a_trained_experiment(folder, tmp_path, capsys):
    out = tmp_path / "model.pt2"
    settings = [f"data_root={folder / 'data'}", f"model_root={folder / 'checkpoints'}", *SETTINGS]
    settings.append("activation_checkpointing=true")  # a way to train, which an export does without
    command = ["export", "DHEN", "--expid", EXPID, "--format", "torch_export", "--out", str(out)]
    cli.app([*command, *(word for text in settings for word in ("--set", text))], standalone_mode=False)
    checked, path = capsys.readouterr().out.splitlines()[-2:]
    assert checked.startswith("checked on batches of 1, 1, 2, 37, 256 rows: predictions differ by at most ")
    assert path == str(out)

    trained = load(folder)
    origin = {"metadata.json": ""}
    with open(out, "rb") as file:
        program = torch.export.load(file, extra_files=origin)
    manifest = json.loads((folder / "data" / "kuairand_tiny" / "manifest.json").read_text())
    assert json.loads(origin["metadata.json"])["dataset_digest"] == manifest["digest"]
    batch = next(iter(trained.loader(trained.files["test"], 100)))
    predictions = program.module()(**dict(reversed(batch.items())))
    for name, values in trained.score(batch).items():
        torch.testing.assert_close(predictions[name], values.detach(), atol=1e-5, rtol=0)
    assert values.std() > 0


def test_an_untrained_experiment_is_told_how_to_train(folder):
    with pytest.raises(FileNotFoundError, match=r"train it with: flowctr run DHEN .* --set seed=3$"):
        load(folder, "seed=3")


@pytest.mark.parametrize(
    "override, message",
    [
        ("embedding_dim=4", "does not fit DHEN .* is .* there and .* here"),
        ("use_features=[group_id, video_id, user_id, tag, author_id, watch_video]", "does not fit|names"),
    ],
)
def test_weights_of_other_shapes_are_refused(folder, override, message):
    with pytest.raises(ValueError, match=message):
        load(folder, override, "behaviors={watch: [watch_video]}")


def test_weights_of_other_settings(folder, caplog):
    caplog.set_level(logging.WARNING)
    load(folder, "epochs=5")
    assert caplog.messages == []
    load(folder, "head_activation=SiLU")
    assert caplog.messages[-1] == f"{EXPID} was trained with head_activation='ReLU', here it is 'SiLU'"


def test_weights_of_another_build_of_the_data_are_refused(folder):
    result = next((folder / "results").glob("*.json"))
    content = result.read_text()
    try:
        changed = json.loads(content)
        changed["data"]["manifest"] = "another"
        result.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="kuairand_tiny was built anew since DHEN_test was trained"):
            load(folder)
        changed["dataset_id"] = "elsewhere"  # another run of the same experiment and seed, maybe a later one
        result.write_text(json.dumps(changed))
        load(folder)
    finally:
        result.write_text(content)


def test_a_gpu_that_does_not_exist(folder):
    with pytest.raises(ValueError, match="--gpu 99 does not exist"):
        load_trained(CONFIG, EXPID, None, folder, 99, SETTINGS)

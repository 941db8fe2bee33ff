"""The engine against FuxiCTR's own training, and what it adds: curves, checkpoints, clear stops."""

import gc
import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flowctr import config, distributed, weights
from flowctr.acceleration import CapturedStep, GraphedStep
from flowctr.losses import KnownLoss
from flowctr.metrics import evaluate_metrics
from flowctr.training import TrainingError, accelerate
from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel, MultiTaskModel
from fuxictr.pytorch.torch_utils import seed_everything
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toy import toy_batch, toy_feature_map

SETTINGS = {
    "model_root": "checkpoints",
    "verbose": 0,
    "metrics": ["AUC", "logloss"],
    "monitor": "AUC",
    "optimizer": "adam",
    "loss": "binary_crossentropy",
}


class SingleTask(BaseModel):
    """An embedding, dropout and an MLP from FuxiCTR's layers."""

    def __init__(self, feature_map, learning_rate=0.02, **kwargs):
        super().__init__(feature_map, **kwargs)
        self.embedding_layer = FeatureEmbedding(feature_map, 4)
        self.mlp = MLP_Block(4 * feature_map.num_fields, [8], "ReLU", 1, dropout_rates=0.2, batch_norm=True)
        self.scale = nn.Parameter(torch.ones(1))
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs):
        embeddings = self.embedding_layer(self.get_inputs(inputs)).flatten(start_dim=1)
        return {"y_pred": self.output_activation(self.mlp(embeddings) * self.scale)}


class TwoTasks(MultiTaskModel):
    """The same with one head per label."""

    def __init__(self, feature_map, learning_rate=0.02, **kwargs):
        super().__init__(feature_map, num_tasks=len(feature_map.labels), task="binary_classification", **kwargs)
        self.embedding_layer = FeatureEmbedding(feature_map, 4)
        self.mlp = MLP_Block(4 * feature_map.num_fields, [8], "ReLU", None, dropout_rates=0.2)
        self.towers = nn.ModuleList(nn.Linear(8, 1) for _ in feature_map.labels)
        self.scale = nn.Parameter(torch.full((1,), 0.5))
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs):
        hidden = self.mlp(self.embedding_layer(self.get_inputs(inputs)).flatten(start_dim=1)) * self.scale
        outputs = zip(self.feature_map.labels, self.output_activation, self.towers)
        return {f"{label}_pred": activation(tower(hidden)) for label, activation, tower in outputs}


class Loader(list):
    """Batches with the base rates that the data loader has."""

    @property
    def base_rates(self):
        return {
            label: float(torch.cat([b[label] for b in self]).mean()) for label in ("click", "like") if label in self[0]
        }


def feature_map_of(model_class):
    """Non-sequence features, so that FuxiCTR's FeatureEmbedding stacks them."""
    feature_map = toy_feature_map(labels=["click", "like"] if model_class is TwoTasks else ["click"])
    feature_map.features = {k: v for k, v in feature_map.features.items() if v["type"] != "sequence"}
    feature_map.num_fields = feature_map.get_num_fields()
    return feature_map


def batches_of(feature_map, count, first_seed=0, rows=32):
    """Batches with labels that depend on the inputs."""
    batches = Loader(toy_batch(feature_map, rows=rows, seed=first_seed + i) for i in range(count))
    for batch in batches:
        batch["click"] = (batch["item"] + 10 * batch["age"] + 8 * torch.randn(rows) > 15).float()
    return batches


def build(model_class, tmp_path, accelerated=True, feature_map=None, **settings):
    feature_map = feature_map or feature_map_of(model_class)
    seed_everything(7)
    cls = accelerate(model_class) if accelerated else model_class
    return cls(feature_map, **{**SETTINGS, "model_root": str(tmp_path), "model_id": f"run{accelerated}", **settings})


def train(model, epochs=6, **kwargs):
    """Fits on the same 7 batches each time and returns the loss of every step."""
    torch.manual_seed(3)
    feature_map = model.feature_map
    train_batches, valid_batches = batches_of(feature_map, 7), batches_of(feature_map, 3, first_seed=100)
    losses, step = [], model.train_step
    model.train_step = lambda batch: losses.append(step(batch)) or losses[-1]
    model.fit(train_batches, validation_data=valid_batches, epochs=epochs, **kwargs)
    return [loss.item() for loss in losses]


@pytest.mark.parametrize(
    ("model_class", "settings"),
    [
        (SingleTask, {}),
        (SingleTask, {"embedding_regularizer": 0.005, "net_regularizer": "l1_l2(1e-4,1e-3)", "eval_steps": 3}),
        (SingleTask, {"monitor": {"logloss": 1}, "monitor_mode": "min", "optimizer": "SGD", "save_best_only": False}),
        (TwoTasks, {}),
        (TwoTasks, {"eval_steps": 5, "early_stop_patience": 3}),
    ],
)
def test_training_is_bit_equal_to_fuxictr(tmp_path, model_class, settings):
    expected_model = build(model_class, tmp_path, accelerated=False, **settings)
    (tmp_path / "toy").mkdir()
    expected = train(expected_model)
    model = build(model_class, tmp_path, **settings)
    losses = train(model)

    assert losses == expected
    for name, weight in expected_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert model._best_metric == pytest.approx(expected_model._best_metric, abs=1e-12)
    assert model.optimizer.param_groups[0]["lr"] == expected_model.optimizer.param_groups[0]["lr"]

    data = batches_of(model.feature_map, 3, first_seed=100)
    scores, expected_scores = model.evaluate(data), expected_model.evaluate(data)
    assert list(scores) == list(expected_scores)
    assert scores == pytest.approx(expected_scores, abs=1e-12)
    predictions, expected_predictions = model.predict(data), expected_model.predict(data)
    if model_class is SingleTask:
        np.testing.assert_array_equal(predictions, expected_predictions)
    else:
        for label in ("click", "like"):
            np.testing.assert_array_equal(predictions[label], expected_predictions[label])


def test_early_stopping_stops_where_fuxictr_does(tmp_path):
    settings = {"learning_rate": 0.5, "early_stop_patience": 2}
    (tmp_path / "toy").mkdir()
    expected = train(build(SingleTask, tmp_path, accelerated=False, **settings), epochs=50)
    model = build(SingleTask, tmp_path, **settings)
    assert train(model, epochs=50) == expected
    assert len(expected) < 50 * 7
    assert len(model.history["valid"]) == len(expected) // 7
    assert model.restored == model.history["valid"][-3]


def test_multi_task_regularisation_reaches_every_parameter(tmp_path):
    model = build(TwoTasks, tmp_path, embedding_regularizer=0.3, net_regularizer=0.2)
    embeddings = {id(parameter) for parameter in model.embedding_layer.parameters()}
    squares = {True: 0.0, False: 0.0}
    for parameter in model.parameters():
        squares[id(parameter) in embeddings] += (parameter.double() ** 2).sum().item()
    assert squares[True] > 0
    expected = 0.3 / 2 * squares[True] + 0.2 / 2 * squares[False]
    assert model.regularization_loss().item() == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(model.regularization_loss(), model.scale)
    assert gradient.item() == pytest.approx(0.2 * 0.5)


def test_own_regularisation_of_a_model_is_kept(tmp_path):
    class Own(TwoTasks):
        def regularization_loss(self):
            return 7 * self.scale.sum()

    assert build(Own, tmp_path, feature_map=feature_map_of(TwoTasks)).regularization_loss().item() == 3.5


def test_curves_are_means_over_intervals(tmp_path):
    model = build(SingleTask, tmp_path)
    losses = train(model, epochs=2)
    assert [point["step"] for point in model.history["train"]] == list(range(1, 15))
    assert [point["loss"] for point in model.history["train"]] == losses

    model = build(SingleTask, tmp_path, eval_steps=30)
    model.fit(batches_of(model.feature_map, 25), validation_data=batches_of(model.feature_map, 3), epochs=2)
    train_points, valid_points = model.history["train"], model.history["valid"]
    steps = [point["step"] for point in train_points]
    assert steps == [*range(2, 25, 2), 25, *range(26, 51, 2)]
    assert [point["epoch"] for point in train_points] == [1 if step <= 25 else 2 for step in steps]
    assert [(point["step"], point["epoch"]) for point in valid_points] == [(30, 2)]
    assert set(valid_points[0]) == {"step", "epoch", "AUC", "logloss"}

    model = build(SingleTask, tmp_path)
    losses, step = [], model.train_step
    model.train_step = lambda batch: losses.append(step(batch)) or losses[-1]
    model.fit(batches_of(model.feature_map, 25), epochs=1)
    means = [np.mean([loss.item() for loss in losses[start : start + 2]]) for start in range(0, 25, 2)]
    assert [point["loss"] for point in model.history["train"]] == pytest.approx(means, rel=1e-12)


def test_loss_is_read_once_per_interval(tmp_path, monkeypatch):
    model = build(SingleTask, tmp_path, optimizer="SGD")  # Adam reads its step counter by item() on the CPU
    data = batches_of(model.feature_map, 40)
    reads = []
    for name in ("item", "tolist"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, read=read: reads.append(tensor) or read(tensor))
    model.fit(data, epochs=1)
    assert len(reads) == len(model.history["train"]) == 10


def test_weights_left_in_place_are_those_of_the_restored_evaluation(tmp_path):
    model = build(SingleTask, tmp_path, learning_rate=0.3, early_stop_patience=20, reduce_lr_on_plateau=False)
    train(model, epochs=8)
    valid = batches_of(model.feature_map, 3, first_seed=100)
    best = max(model.history["valid"], key=lambda record: record["AUC"])
    assert model.restored == best != model.history["valid"][-1]
    torch.manual_seed(3)
    batches_of(model.feature_map, 7)  # the labels' noise is drawn as in train()
    valid = batches_of(model.feature_map, 3, first_seed=100)
    scores = model.evaluate(valid)
    assert scores == {name: best[name] for name in ("AUC", "logloss")}


def test_fit_without_validation_keeps_the_last_weights(tmp_path):
    model = build(SingleTask, tmp_path)
    model.fit(batches_of(model.feature_map, 7), epochs=2)
    assert model.history["valid"] == [] and model.restored is None
    trained = {name: weight.clone() for name, weight in model.state_dict().items()}
    again = build(SingleTask, tmp_path)
    again.load_weights(model.checkpoint)
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, trained[name])


def test_an_evaluation_happens_even_if_eval_steps_is_never_reached(tmp_path):
    model = build(SingleTask, tmp_path, eval_steps=1000)
    train(model, epochs=2)
    assert [record["step"] for record in model.history["valid"]] == [14]
    assert model.restored == model.history["valid"][0]


def test_evaluate_scores_each_label_with_its_training_base_rate(tmp_path):
    model = build(TwoTasks, tmp_path, metrics=["NE", "AUC", "gAUC"])
    data = batches_of(model.feature_map, 3, first_seed=50)
    train_data = batches_of(model.feature_map, 7)
    model.fit(train_data, epochs=1)
    scores = model.evaluate(data)

    predictions = model.predict(data)
    groups = torch.cat([batch["user_group"] for batch in data]).numpy()
    for label in ("click", "like"):
        truth = torch.cat([batch[label] for batch in data]).numpy()
        rate = train_data.base_rates[label]
        expected = evaluate_metrics(truth, predictions[label], ["NE", "AUC", "gAUC"], groups, rate)
        assert {name: scores[f"{label}_{name}"] for name in expected} == expected
        assert expected["NE"] != evaluate_metrics(truth, predictions[label], ["NE"])["NE"]
    assert scores["AUC"] == pytest.approx((scores["click_AUC"] + scores["like_AUC"]) / 2, abs=1e-15)


def test_one_label_of_a_multi_task_model_has_plain_metric_names(tmp_path):
    model = build(TwoTasks, tmp_path, feature_map=feature_map_of(SingleTask))
    assert list(model.evaluate(batches_of(model.feature_map, 2))) == ["AUC", "logloss"]


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path):
    model = build(SingleTask, tmp_path)
    data = batches_of(model.feature_map, 40)
    data[14]["age"][:] = math.nan
    with pytest.raises(TrainingError, match=r"training predictions are nan at step 15 \(epoch 1, rows 449 to 480"):
        model.fit(data, epochs=3)
    assert [point["step"] for point in model.history["train"]] == [4, 8, 12]

    model = build(SingleTask, tmp_path)  # a loss that torch does not look into
    model.loss_fn = lambda y_pred, y_true, reduction: (y_pred / 0 if model._total_steps == 15 else y_pred).mean()
    with pytest.raises(TrainingError, match=r"training loss is inf at step 15 \(epoch 1, rows 449 to 480"):
        model.fit(batches_of(model.feature_map, 40), epochs=3)


def one_class_of_like(feature_map, value):
    batches = batches_of(feature_map, 3)
    for batch in batches:
        batch["like"] = torch.full_like(batch["like"], value)
    return batches


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("monitor", ["AUC", "gAUC", "like_AUC", {"click_logloss": -1, "like_avgAUC": 1}])
def test_a_monitor_that_needs_both_classes_is_refused_before_training(tmp_path, monitor, value):
    model = build(TwoTasks, tmp_path, monitor=monitor, metrics=["AUC", "gAUC", "avgAUC", "logloss"])
    model.train_step = lambda batch: pytest.fail("it trains")
    valid = one_class_of_like(model.feature_map, value)
    message = r"the monitored \w+ needs both classes, but the validation labels of like are.*monitor a metric.*logloss"
    with pytest.raises(ValueError, match=message):
        model.fit(batches_of(model.feature_map, 7), validation_data=valid)


@pytest.mark.parametrize("monitor", ["click_AUC", {"logloss": -1}])
def test_a_monitor_of_the_other_label_is_taken(tmp_path, monitor):
    model = build(TwoTasks, tmp_path, monitor=monitor)
    valid = one_class_of_like(model.feature_map, 1)
    with pytest.warns(UserWarning, match="AUC"):
        model.fit(batches_of(model.feature_map, 7), validation_data=valid)
    assert len(model.history["valid"]) == 1


def test_validation_labels_of_one_class_are_named(tmp_path):
    model = build(TwoTasks, tmp_path)
    valid = list(one_class_of_like(model.feature_map, 0))  # a list says nothing of its labels before
    message = "monitored AUC is nan at step 7: the validation labels of like are all of one class"
    with pytest.warns(UserWarning, match="AUC"), pytest.raises(TrainingError, match=message):
        model.fit(batches_of(model.feature_map, 7), validation_data=valid, epochs=3)


def ending_in_one_row(feature_map):
    *whole, last = batches_of(feature_map, 3)
    return Loader([*whole, {name: values[:1] for name, values in last.items()}])


def test_a_last_batch_of_one_row_is_named_where_batch_normalisation_needs_several(tmp_path):
    model = build(SingleTask, tmp_path)
    with pytest.raises(ValueError, match=r"step 3 has one row, batch normalisation needs .*change batch_size"):
        model.fit(ending_in_one_row(model.feature_map))
    model = build(TwoTasks, tmp_path)  # which has no batch normalisation
    model.fit(ending_in_one_row(model.feature_map))
    assert model.history["train"][-1]["step"] == 3


def test_cuda_graphs_have_no_effect_on_the_cpu(tmp_path):
    settings = {"optimizer": "Adagrad"}  # which a graph could not capture
    model, graphed = build(SingleTask, tmp_path, **settings), build(SingleTask, tmp_path, cuda_graphs=True, **settings)
    assert train(graphed) == train(model)
    assert graphed.history == model.history
    for name, weight in model.state_dict().items():
        assert torch.equal(graphed.state_dict()[name], weight), name


class RecordedStep(GraphedStep):
    """Stands in for the GPU: what is captured is recorded, its replay computes on the captured inputs."""

    captures = ()

    def _capture(self, step):
        self.captures = (*self.captures, len(step.inputs["item"]))
        step.graph = Replay(self.model, step)


class Replay:
    def __init__(self, model, step):
        self.model, self.step = model, step

    def replay(self):
        self.step.loss = self.model.train_step(self.step.inputs).detach()


@pytest.mark.parametrize("optimizer", ["adam", "SGD"])
def test_a_captured_step_sees_each_batch_and_learning_rate(tmp_path, optimizer):
    model, graphed = (build(SingleTask, tmp_path, optimizer=optimizer) for _ in range(2))
    # Two shapes in turns, and one that is too rare to be captured.
    rows = [32, 8, 32, 8, 32, 5, 32, 8, 8, 32, 32, 8, 32, 8, 5, 32]
    batches = [toy_batch(model.feature_map, rows=count, seed=i) for i, count in enumerate(rows)]
    step = RecordedStep(graphed)
    addresses, train_step = set(), graphed.train_step
    graphed.train_step = lambda batch: (
        addresses.add((len(batch["item"]), batch["item"].data_ptr())) or train_step(batch)
    )
    for each in (model, graphed):
        each._max_gradient_norm = 10.0
        for group in each.optimizer.param_groups:
            group["capturable"] = False  # the CPU's optimisers refuse it
    for i, batch in enumerate(batches):
        for each in (model, graphed):
            if i == 10:
                each.lr_decay()
        torch.manual_seed(i)
        expected = model.train_step(batch)
        torch.manual_seed(i)
        assert step(batch).item() == expected.item(), i
    assert step.captures == (32, 8, 32, 8)  # after three steps as they are, and for the lower learning rate
    assert len(addresses) == 3  # warm-up and replay of a shape read the same memory


@pytest.fixture
def capturing(tmp_path, monkeypatch):
    """A step to be captured, and its model; stand-ins take the place of CUDA's graphs."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(pool=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **kwargs: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    model = build(SingleTask, tmp_path)
    return model, CapturedStep(toy_batch(model.feature_map, rows=8))


@pytest.mark.parametrize("fails", [False, True])
def test_no_garbage_is_collected_while_a_step_is_captured(capturing, fails):
    """An older graph freed there would spoil the capture: torch refuses what CUDA forbids meanwhile."""
    model, step = capturing
    seen = []

    def train_step(batch):
        seen.append(gc.isenabled())
        if fails:
            raise RuntimeError("of the step")
        return torch.zeros(1)

    model.train_step = train_step
    with pytest.raises(RuntimeError, match=r"^of the step$") if fails else nullcontext():
        GraphedStep(model)._capture(step)
    assert seen == [False]
    assert gc.isenabled()


def test_a_refused_capture_says_what_to_do(capturing):
    model, step = capturing

    def train_step(batch):
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nCompile with ...")

    model.train_step = train_step
    message = r"could not capture a step of 8 rows \(CUDA error: .* during capture\)\. .* smaller batch_size"
    with pytest.raises(RuntimeError, match=message):
        GraphedStep(model)._capture(step)


@pytest.mark.parametrize("makes_its_mask_on_the_host", [True, False])
def test_what_a_step_to_be_captured_makes_lies_on_the_models_device(tmp_path, makes_its_mask_on_the_host):
    """As BST's mask: a step that is captured cannot copy it from the host. Other steps are left as they are."""
    model = build(SingleTask, tmp_path)
    device = model.device = torch.device("meta")  # stands in for a GPU
    made_on = "cpu" if makes_its_mask_on_the_host else device
    model.forward = lambda batch: {"y_pred": batch["item"] * torch.ones(3, device=made_on).to(device)}
    model.train_step = lambda batch: torch.zeros(len(batch["item"]))
    step = RecordedStep(model)
    for _ in range(GraphedStep.WARM_UP_STEPS):
        loss = step({"item": torch.ones(3, device=device)})
        assert loss.device == (device if makes_its_mask_on_the_host else torch.device("cpu"))
    assert model.training and torch.zeros(1).device == torch.device("cpu")


def test_several_processes_train_without_captured_steps(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    model = build(SingleTask, tmp_path, cuda_graphs=True)
    assert not model.cuda_graphs
    assert "cuda_graphs cannot capture a step that several processes take together: it is off" in caplog.text


def test_an_optimizer_that_counts_steps_on_the_host_is_not_captured(tmp_path):
    with pytest.raises(ValueError, match="cuda_graphs cannot capture Adagrad; use adam or SGD"):
        GraphedStep(build(SingleTask, tmp_path, optimizer="Adagrad"))


def test_meta_columns_stay_on_the_host(tmp_path):
    model = build(SingleTask, tmp_path)
    model.device = torch.device("meta")
    batch = toy_batch(model.feature_map)
    on_device = model._on_device(batch)
    assert list(on_device) == list(batch)
    assert [name for name, values in on_device.items() if values.device.type == "cpu"] == ["user_group"]


def test_predictions_that_are_not_numbers_are_an_error(tmp_path):
    model = build(SingleTask, tmp_path)
    with torch.no_grad():
        model.scale.fill_(math.nan)
    with pytest.raises(TrainingError, match="predicts nan or inf for click"):
        model.evaluate(batches_of(model.feature_map, 2))


def test_checkpoint_round_trip_and_fuxictr_reads_it(tmp_path):
    model = build(SingleTask, tmp_path)
    train(model, epochs=1)
    path = tmp_path / "elsewhere" / "weights.model"
    model.save_weights(path)
    data = batches_of(model.feature_map, 2)
    other = build(SingleTask, tmp_path, accelerated=False)
    assert not np.array_equal(other.predict(data), model.predict(data))
    other.load_weights(path)
    np.testing.assert_array_equal(other.predict(data), model.predict(data))
    assert [file.name for file in path.parent.iterdir()] == ["weights.model"]


def test_a_checkpoint_of_another_feature_map_is_refused(tmp_path):
    model = build(SingleTask, tmp_path)
    model.save_weights(model.checkpoint)
    feature_map = feature_map_of(SingleTask)
    feature_map.features["item"]["vocab_size"] = 31
    changed = build(SingleTask, tmp_path, feature_map=feature_map)
    with pytest.raises(
        ValueError, match=r"does not fit SingleTask.*feature map.*\n?.*item.*\(30, 4\) there and \(31, 4\)"
    ):
        changed.load_weights(model.checkpoint)

    broken = tmp_path / "broken.model"
    broken.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="is not a file of model weights"):
        model.load_weights(broken)
    whole = (tmp_path / "toy" / "runTrue.model").read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(next(model.parameters()).detach().numpy().tobytes()) + 1] ^= 1
    for content in (*(whole[:stop] for stop in range(0, len(whole), 97)), bytes(flipped)):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.model is not a file of model weights: "):
            model.load_weights(broken)
    with pytest.raises(FileNotFoundError):
        model.load_weights(tmp_path / "absent.model")


def test_a_file_of_something_else_is_no_checkpoint(tmp_path):
    model = build(SingleTask, tmp_path)
    for content in ({"weights": model.state_dict(), "epoch": 3}, torch.ones(2), []):
        torch.save(content, tmp_path / "other")
        with pytest.raises(ValueError, match="other is not a file of model weights"):
            model.load_weights(tmp_path / "other")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"weight": Payload()}, tmp_path / "evil.model")
    with pytest.raises(ValueError, match="is not a file of model weights"):
        build(SingleTask, tmp_path).load_weights(tmp_path / "evil.model")
    assert not (tmp_path / "executed").exists()


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    model = build(SingleTask, tmp_path)
    model.save_weights(model.checkpoint)
    before = (tmp_path / "toy" / "runTrue.model").read_bytes()

    def full_disk(state, path):
        path.write_bytes(b"half a file")
        raise RuntimeError("PytorchStreamWriter failed writing file data/1")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="is the disk full"):
        model.save_weights(model.checkpoint)
    assert [file.name for file in (tmp_path / "toy").iterdir()] == ["runTrue.model"]
    assert (tmp_path / "toy" / "runTrue.model").read_bytes() == before


def test_rates_count_rows(tmp_path):
    model = build(SingleTask, tmp_path)
    train(model, epochs=2)
    assert dict(model._rows) == {"train": 2 * 7 * 32, "evaluate": 2 * 3 * 32}
    assert all(rate > 0 for rate in model.rows_per_second().values())


# Schedules


class Scheduled(SingleTask):
    """Records its epochs."""

    def __init__(self, feature_map, **kwargs):
        super().__init__(feature_map, **kwargs)
        self.epochs = []

    def start_epoch(self, epoch, epochs):
        self.epochs.append((epoch, epochs, self._total_steps))


def test_a_model_hears_of_each_epoch_before_it(tmp_path):
    model = build(Scheduled, tmp_path)
    train(model, epochs=3)
    assert model.epochs == [(0, 3, 0), (1, 3, 7), (2, 3, 14)]
    stopped = build(Scheduled, tmp_path, learning_rate=0.5, early_stop_patience=1)
    train(stopped, epochs=50)
    assert 1 < len(stopped.epochs) == len(stopped.history["valid"]) < 50


# New embedding tables


class Remembering(SingleTask):
    """Remembers at the start of each epoch its weights, and what the optimiser knows of the tables."""

    def __init__(self, feature_map, **kwargs):
        super().__init__(feature_map, **kwargs)
        self.starts = []

    def start_epoch(self, epoch, epochs):
        tables = [module.weight for module in self.modules() if isinstance(module, nn.Embedding)]
        known = [value for table in tables for value in self.optimizer.state.get(table, {}).values()]
        self.starts.append(({name: value.clone() for name, value in self.state_dict().items()}, sum_of_squares(known)))


def sum_of_squares(tensors):
    return sum(float(torch.as_tensor(tensor).double().square().sum()) for tensor in tensors)


@pytest.mark.parametrize("reset", [False, True])
def test_reset_embeddings_draws_the_tables_anew_for_each_later_epoch(tmp_path, reset):
    model = build(Remembering, tmp_path, reset_embeddings=reset, save_best_only=False, learning_rate=0.05)
    ended, train_epoch = [], model.train_epoch

    def remember_end(data):
        train_epoch(data)
        ended.append({name: value.clone() for name, value in model.state_dict().items()})

    model.train_epoch = remember_end
    train(model, epochs=3)
    tables = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    assert len(model.starts) == 3 == len(tables)
    for (started, known), before in zip(model.starts[1:], ended):
        assert (known == 0) is reset
        for name, value in started.items():
            is_new = reset and name in tables
            assert torch.equal(value, before[name]) is not is_new, name
            if is_new:  # as at first: FuxiCTR's N(0, 1e-4), and zero for the padding
                assert not torch.equal(value, model.starts[0][0][name]) and value[0].count_nonzero() == 0
                assert 0.5e-4 < value[1:].std() < 2e-4 < before[name].std()


def test_reset_embeddings_draws_tables_anew_that_could_be_shared_and_are_not(tmp_path):
    """As FuxiCTR's linear parts have: their sequences get tables of their own, which it never initialises."""

    class Wide(Remembering):
        def __init__(self, feature_map, **kwargs):
            super().__init__(feature_map, **kwargs)
            self.wide = FeatureEmbedding(feature_map, 1, use_sharing=False)

    feature_map = feature_map_of(SingleTask)
    name = next(name for name, spec in feature_map.features.items() if spec["type"] == "categorical")
    feature_map.features["again"] = {**feature_map.features[name], "share_embedding": name}
    model = build(Wide, tmp_path, feature_map=feature_map, reset_embeddings=True)
    table = model.wide.embedding_layer.embedding_layers["again"].weight
    before = table.detach().clone()
    weights.redraw_embeddings(model, in_place=False)
    assert not torch.equal(table[1:], before[1:]) and 0.5 < table.std() < 2


def test_reset_embeddings_needs_tables(tmp_path):
    with pytest.raises(ValueError, match="reset_embeddings: Tableless has no embedding tables; turn it off"):
        build(Tableless, tmp_path, feature_map=feature_map_of(SingleTask), reset_embeddings=True)


@pytest.mark.parametrize("optimizer", ["adam", "NAdam", "Rprop", "Adagrad"])
def test_reset_embeddings_starts_any_optimiser_anew(tmp_path, optimizer):
    model = build(Remembering, tmp_path, reset_embeddings=True, optimizer=optimizer)
    redraw, states = weights.redraw_embeddings, []

    def remember(model, in_place):
        redraw(model, in_place)
        states.append([table in model.optimizer.state for table in weights.embedding_tables(model)])
        assert not in_place

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(weights, "redraw_embeddings", remember)
        train(model, epochs=2)
    assert states == [[False] * 3] and all(table in model.optimizer.state for table in weights.embedding_tables(model))


def test_reset_embeddings_refuses_pretrained_tables(tmp_path, monkeypatch):
    class Pretrained(nn.Module):
        """Stands for FuxiCTR's, which reads a file."""

    class WithPretrained(SingleTask):
        def __init__(self, feature_map, **kwargs):
            super().__init__(feature_map, **kwargs)
            self.pretrained = Pretrained()

    monkeypatch.setattr(weights, "PretrainedEmbedding", Pretrained)
    build(WithPretrained, tmp_path)
    with pytest.raises(ValueError, match="reset_embeddings: WithPretrained has pretrained tables"):
        build(WithPretrained, tmp_path, reset_embeddings=True)


def test_a_captured_step_starts_only_optimisers_anew_whose_state_begins_at_zero(tmp_path):
    for optimizer in ("adam", "AdamW"):
        model = build(SingleTask, tmp_path, reset_embeddings=True, cuda_graphs=True, optimizer=optimizer)
        train(model, epochs=1)
        weights.redraw_embeddings(model, in_place=True)
        for table in weights.embedding_tables(model):
            assert model.optimizer.state[table] and sum_of_squares(model.optimizer.state[table].values()) == 0
    with pytest.raises(ValueError, match="reset_embeddings with cuda_graphs cannot start NAdam anew in place"):
        build(SingleTask, tmp_path, reset_embeddings=True, cuda_graphs=True, optimizer="NAdam")


class Tableless(BaseModel):
    """Reads a number."""

    def __init__(self, feature_map, **kwargs):
        super().__init__(feature_map, gpu=-1, **kwargs)
        self.linear = nn.Linear(1, 1)
        self.compile("adam", "binary_crossentropy", 0.01)


# Averaged weights

AVERAGING = {"ema_decay": 0.5, "reduce_lr_on_plateau": False, "early_stop_patience": 100}


class Stepwise(SingleTask):
    """Remembers all it has after each step, and at the start of each epoch; has a schedule and a mask."""

    def __init__(self, feature_map, **kwargs):
        super().__init__(feature_map, **kwargs)
        self.mask = nn.Parameter(torch.tensor([True, False]), requires_grad=False)  # as some layers of FuxiCTR's have
        self.register_buffer("temperature", torch.ones(()))
        self.seen, self.begun = [], {}

    def remember(self):
        return {name: value.clone().double() for name, value in self.state_dict().items()}

    def start_epoch(self, epoch, epochs):
        self.temperature.fill_(0.5**epoch)
        self.begun[len(self.seen)] = self.remember()

    def train_step(self, batch):
        loss = super().train_step(batch)
        self.seen.append(self.remember())
        return loss


def averaged(model, decay, redrawn=()):
    """The moving average after every step, by its definition; redrawn tables start anew at the start of an epoch."""
    average, averages = model.begun[0], []
    for t, state in enumerate(model.seen, start=1):
        average = {**average, **{name: model.begun[t - 1][name] for name in redrawn if t - 1 in model.begun}}
        d = min(decay, (1 + t) / (10 + t))
        average = {name: d * value + (1 - d) * state[name] for name, value in average.items()}
        kept = ("mask", "temperature", "num_batches_tracked")
        averages.append({name: state[name] if name.endswith(kept) else value for name, value in average.items()})
    return averages


def assert_weights(model, expected):
    for name, value in expected.items():
        torch.testing.assert_close(model.state_dict()[name].double(), value, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_the_average_of_the_weights_is_evaluated_saved_and_kept(tmp_path, decay, reset):
    settings = {**AVERAGING, "ema_decay": decay, "reset_embeddings": reset, "save_best_only": False}
    model = build(Stepwise, tmp_path, **settings)
    losses = train(model, epochs=4)
    tables = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    averages = averaged(model, decay, tables if reset else ())
    assert len(averages) == 28
    assert_weights(model, averages[-1])
    assert any((model.seen[-1][name] - value).abs().max() > 1e-3 for name, value in averages[-1].items())
    other = build(Stepwise, tmp_path)
    for record in model.history["valid"]:
        other.load_state_dict(averages[record["step"] - 1])
        scores = other.evaluate(model.valid_gen)
        assert {name: record[name] for name in scores} == pytest.approx(scores, abs=1e-6)
    plain = build(Stepwise, tmp_path, **{**settings, "ema_decay": None})
    assert losses == train(plain, epochs=4)  # what is trained are the weights themselves


def test_the_best_average_is_restored(tmp_path):
    model = build(Stepwise, tmp_path, **AVERAGING)
    train(model, epochs=8)
    best = max(model.history["valid"], key=lambda record: record["AUC"])
    assert model.restored == best and best["step"] < 56
    assert_weights(model, averaged(model, 0.5)[best["step"] - 1])


def test_without_validation_data_the_last_average_is_kept(tmp_path):
    model = build(Stepwise, tmp_path, **AVERAGING)
    model.fit(batches_of(model.feature_map, 7), epochs=2)
    last = averaged(model, 0.5)[-1]
    assert_weights(model, last)
    other = build(Stepwise, tmp_path)
    other.load_weights(model.checkpoint)
    assert_weights(other, last)


def test_an_evaluation_that_fails_leaves_the_trained_weights(tmp_path):
    def fail(curve):
        raise KeyboardInterrupt

    model = build(Stepwise, tmp_path, **AVERAGING)
    model.on_evaluation = fail
    with pytest.raises(KeyboardInterrupt):
        train(model)
    assert_weights(model, model.seen[-1])


# Learning rates


@pytest.mark.parametrize(("settings", "factor"), [({}, 0.1), ({"lr_decay_factor": 0.5}, 0.5)])
def test_the_learning_rate_is_cut_by_a_factor_after_each_evaluation_that_is_not_the_best(tmp_path, settings, factor):
    model = build(SingleTask, tmp_path, early_stop_patience=3, **settings)
    rates = [model.optimizer.param_groups[0]["lr"]]
    model.on_evaluation = lambda curve: rates.append(model.optimizer.param_groups[0]["lr"])
    train(model, epochs=100)
    expected, best = rates[:1], -math.inf
    for record in model.history["valid"]:
        expected.append(expected[-1] * (1 if record["AUC"] > best else factor))
        best = max(best, record["AUC"])
    assert rates[1:] == pytest.approx(expected[:-1])  # an evaluation is reported before it has its effect
    assert model.optimizer.param_groups[0]["lr"] == pytest.approx(expected[-1]) != rates[0]


@pytest.mark.parametrize("key", ["ema_decay", "lr_decay_factor"])
@pytest.mark.parametrize("value", [0, 1, 1.5])
def test_a_decay_is_between_0_and_1(tmp_path, key, value):
    with pytest.raises(ValueError, match=f"{key}={value}; it lies between 0 and 1"):
        build(SingleTask, tmp_path, **{key: value})
    folder = config.REPOSITORY / "model_zoo" / "InterFormer" / "config"
    with pytest.raises(config.ConfigError, match=f"'{key}' must be a number between 0 and 1; got {value}"):
        config.load(folder, "InterFormer_test", [f"{key}={value}"])


# Loss weights


def losses_by_label(model, batch):
    """The two losses with FuxiCTR's own loss function, in eval mode: without dropout."""
    predictions = model.eval().forward(batch)
    return [
        nn.functional.binary_cross_entropy(predictions[f"{label}_pred"], batch[label].view(-1, 1))
        for label in ("click", "like")
    ]


def total_loss(model, batch):
    return model.compute_loss(model.forward(batch), model.get_labels(batch))


def test_equal_weights_are_bit_equal_to_the_sum(tmp_path):
    model, weighted = build(TwoTasks, tmp_path), build(TwoTasks, tmp_path, loss_weight=[1, 1.0])
    assert train(weighted) == train(model)
    for name, weight in model.state_dict().items():
        assert torch.equal(weighted.state_dict()[name], weight), name


def test_fixed_weights_multiply_the_losses(tmp_path):
    model = build(TwoTasks, tmp_path, loss_weight=[0.25, 3], net_regularizer=0.1)
    (batch,) = batches_of(model.feature_map, 1)
    click, like = losses_by_label(model, batch)
    expected = 0.25 * click + 3 * like + model.regularization_loss()
    assert total_loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-6)


def test_uncertainty_weights_are_those_of_the_paper(tmp_path):
    model = build(TwoTasks, tmp_path, loss_weight="UW")
    (batch,) = batches_of(model.feature_map, 1)
    with torch.no_grad():
        model.loss_log_variances.copy_(torch.tensor([0.5, -1.0]))
    click, like = (loss.item() for loss in losses_by_label(model, batch))
    loss = total_loss(model, batch)
    assert loss.item() == pytest.approx(math.exp(-0.5) * click + 0.25 + math.exp(1) * like - 0.5, rel=1e-6)
    loss.backward()
    expected = [-math.exp(-0.5) * click + 0.5, -math.exp(1) * like + 0.5]
    assert model.loss_log_variances.grad.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "AdamW", "SGD"])
def test_uncertainty_weights_are_learned_and_restored(tmp_path, caplog, optimizer):
    caplog.set_level("INFO")
    model = build(TwoTasks, tmp_path, loss_weight="UW", optimizer=optimizer)
    assert model.loss_log_variances.tolist() == [0, 0]
    train(model, epochs=2)
    learned = model.loss_log_variances.tolist()
    assert 0 not in learned and learned[0] != learned[1]
    assert caplog.text.count("Loss weights: click ") == len(model.history["valid"])
    again = build(TwoTasks, tmp_path, loss_weight="UW")
    again.load_weights(model.checkpoint)
    assert again.loss_log_variances.tolist() == learned
    with pytest.raises(ValueError, match="loss_log_variances is missing there"):
        plain = build(TwoTasks, tmp_path)
        plain.save_weights(tmp_path / "plain.model")
        again.load_weights(tmp_path / "plain.model")


def test_uncertainty_at_a_minimum_is_the_loss(tmp_path):
    """Where the gradient of s vanishes, exp(s) = 2 * loss: the learned variance follows the loss."""
    model = build(TwoTasks, tmp_path, loss_weight="UW", learning_rate=1e-12)
    (batch,) = batches_of(model.feature_map, 1)
    model.optimizer.param_groups[-1]["lr"] = 0.05  # the weights alone are trained
    model._max_gradient_norm = 10.0
    model.eval()
    for _ in range(150):
        model.train_step(batch)
    losses = [loss.item() for loss in losses_by_label(model, batch)]
    assert model.loss_log_variances.exp().tolist() == pytest.approx([2 * loss for loss in losses], rel=1e-3)


def test_regularisation_leaves_learned_weights_alone(tmp_path):
    settings = {"net_regularizer": 0.2, "embedding_regularizer": 0.1}
    model, plain = build(TwoTasks, tmp_path, loss_weight="UW", **settings), build(TwoTasks, tmp_path, **settings)
    with torch.no_grad():
        model.loss_log_variances.fill_(100)
    assert torch.equal(model.regularization_loss(), plain.regularization_loss())
    assert model.loss_log_variances.requires_grad


class OwnGroupsAndTerm(TwoTasks):
    """A model with parameter groups and a loss term of its own, as MultiTaskModel lets one have them."""

    def compile(self, optimizer, loss, lr):
        super().compile(optimizer, loss, lr)
        scale, others = [self.scale], [*self.embedding_layer.parameters(), *self.mlp.parameters()]
        others += self.towers.parameters()
        self.optimizer = type(self.optimizer)([{"params": scale, "lr": lr / 2}, {"params": others}], lr=lr)

    def add_loss(self, return_dict, y_true):
        return super().add_loss(return_dict, y_true) + 7 * self.scale.sum()


@pytest.mark.parametrize("loss_weight", ["EQ", "UW", [2, 0.5]])
def test_own_parameter_groups_and_loss_terms_of_a_model_stay(tmp_path, loss_weight):
    feature_map = feature_map_of(TwoTasks)
    model = build(OwnGroupsAndTerm, tmp_path, feature_map=feature_map, loss_weight=loss_weight)
    (batch,) = batches_of(feature_map, 1)
    click, like = losses_by_label(model, batch)
    first, second = (1, 1) if isinstance(loss_weight, str) else loss_weight
    assert total_loss(model, batch).item() == pytest.approx((first * click + second * like + 3.5).item(), rel=1e-6)
    groups = [(len(group["params"]), group["lr"]) for group in model.optimizer.param_groups]
    rest = len(list(model.parameters())) - (2 if loss_weight == "UW" else 1)
    assert groups == [(1, 0.01), (rest, 0.02), *([(1, 0.02)] if loss_weight == "UW" else [])]


def test_a_model_compiled_again_goes_on_with_its_learned_weights(tmp_path):
    model = build(TwoTasks, tmp_path, loss_weight="UW")
    with torch.no_grad():
        model.loss_log_variances.fill_(0.5)
    model.compile("adam", "binary_crossentropy", 0.02)
    trained = [weight for group in model.optimizer.param_groups for weight in group["params"]]
    assert len(trained) == len({id(weight) for weight in trained}) == len(list(model.parameters()))
    train(model, epochs=1)
    assert 0.5 not in model.loss_log_variances.tolist()


@pytest.mark.parametrize("loss_weight", [[1], [1, 2, 3], "uw", None, 0.5])
def test_loss_weights_that_do_not_fit_the_labels_are_refused(tmp_path, loss_weight):
    with pytest.raises(ValueError, match="must be EQ, UW or one weight for each of the 2 labels click, like"):
        build(TwoTasks, tmp_path, loss_weight=loss_weight)
    with pytest.raises(ValueError, match=r"loss_weight=.* weighs several labels; SingleTask predicts one"):
        build(SingleTask, tmp_path, loss_weight=loss_weight)


# Missing labels


class Partial(Loader):
    """Batches that say of ``like`` that it may be missing, as the data loader does."""

    may_be_missing = ("like",)

    @property
    def base_rates(self):
        return {label: float(torch.cat([b[label] for b in self]).nanmean()) for label in ("click", "like")}


def partial_batches(feature_map, count, first_seed=0, known=0.5):
    """Batches of which a share has ``like``."""
    batches = Partial(batches_of(feature_map, count, first_seed))
    for batch in batches:
        batch["like"][torch.rand(len(batch["like"])) >= known] = math.nan
    return batches


@pytest.mark.parametrize("loss_weight", ["EQ", [2, 0.5], "UW"])
def test_missing_labels_have_no_part_in_the_loss(tmp_path, loss_weight):
    model = build(TwoTasks, tmp_path, loss_weight=loss_weight)
    data = partial_batches(model.feature_map, 3)
    model.fit(data, epochs=1)
    model.eval()
    batch = data[0]
    known = ~batch["like"].isnan()
    assert 0 < known.sum() < 32
    predictions = model.forward(batch)
    click = nn.functional.binary_cross_entropy(predictions["click_pred"].flatten(), batch["click"])
    like = nn.functional.binary_cross_entropy(predictions["like_pred"].flatten()[known], batch["like"][known])
    if loss_weight == "UW":
        s = model.loss_log_variances
        expected = (torch.exp(-s) * torch.stack([click, like]) + s / 2).sum()
    else:
        first, second = (1, 1) if loss_weight == "EQ" else loss_weight
        expected = first * click + second * like
    loss = total_loss(model, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    weights = list(model.parameters())
    for found, wanted in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights)):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss_weight", ["EQ", "UW"])
def test_a_batch_without_a_known_label_adds_nothing(tmp_path, loss_weight):
    model = build(TwoTasks, tmp_path, loss_weight=loss_weight)
    data = partial_batches(model.feature_map, 2)
    model.fit(data, epochs=1)
    click = losses_by_label(model, {**data[0], "like": data[0]["like"].nan_to_num()})[0]
    data[0]["like"][:] = math.nan
    model.zero_grad()
    loss = total_loss(model, data[0])
    if loss_weight == "UW":
        click = torch.exp(-model.loss_log_variances[0]) * click + model.loss_log_variances[0] / 2
    assert loss.item() == pytest.approx(click.item(), rel=1e-6)
    loss.backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    assert model.towers[1].weight.grad.abs().sum() == 0
    if loss_weight == "UW":
        assert model.loss_log_variances.grad[1] == 0


class NoReads(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: reading a value, and shapes that depend on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss_weight", [[2, 0.5], "UW"])
def test_weights_and_missing_labels_need_no_value_on_the_host(tmp_path, loss_weight):
    model = build(TwoTasks, tmp_path, loss_weight=loss_weight, net_regularizer=0.1)
    data = partial_batches(model.feature_map, 2)
    model.fit(data, epochs=1)
    with NoReads():
        total_loss(model, data[0]).backward()
    with NoReads(), pytest.raises(AssertionError):
        model.scale.item()


def test_marked_labels_that_are_all_there_train_as_others(tmp_path):
    model, marked = build(TwoTasks, tmp_path), build(TwoTasks, tmp_path)
    data = batches_of(model.feature_map, 7)
    for each, batches in ((model, data), (marked, Partial(data))):
        torch.manual_seed(3)
        each.fit(batches, epochs=3)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(marked.state_dict()[name], weight, rtol=1e-4, atol=1e-6)
    marked.fit(Partial(data), epochs=1)  # a second fit masks no second time
    assert marked.loss_fn == [model.loss_fn[0], KnownLoss(model.loss_fn[1])]


def test_a_single_label_may_be_missing(tmp_path):
    model = build(SingleTask, tmp_path)
    batches = batches_of(model.feature_map, 3)
    data = type("Clicks", (Loader,), {"may_be_missing": ["click"]})(batches)
    data[0]["click"][:10] = math.nan
    model.fit(data, epochs=1)
    model.eval()
    y_pred = model.forward(data[0])["y_pred"].flatten()
    expected = nn.functional.binary_cross_entropy(y_pred[10:], data[0]["click"][10:])
    assert total_loss(model, data[0]).item() == pytest.approx(expected.item(), rel=1e-6)


def test_metrics_leave_missing_labels_out(tmp_path):
    model = build(TwoTasks, tmp_path, metrics=["AUC", "gAUC", "logloss", "NE"])
    train_data, valid = partial_batches(model.feature_map, 7), partial_batches(model.feature_map, 3, 100)
    model.fit(train_data, validation_data=valid, epochs=1)
    predictions = model.predict(valid)
    groups = torch.cat([batch["user_group"] for batch in valid]).numpy()
    for label in ("click", "like"):
        truth = torch.cat([batch[label] for batch in valid]).numpy()
        known = ~np.isnan(truth)
        rate = train_data.base_rates[label]
        arguments = truth[known], predictions[label][known], ["AUC", "gAUC", "logloss", "NE"], groups[known], rate
        expected = evaluate_metrics(*arguments)
        assert {name: model.restored[f"{label}_{name}"] for name in expected} == expected
    assert model._rows["evaluate"] == 3 * 32


def test_missing_labels_must_be_announced(tmp_path):
    model = build(TwoTasks, tmp_path)
    data = partial_batches(model.feature_map, 2)
    with pytest.raises(ValueError, match="needs y_true 0 or 1"):
        model.evaluate(list(data))


@pytest.mark.parametrize("monitor", ["AUC", {"click_AUC": 0.5, "like_AUC": 0.5}])
def test_known_labels_of_one_class_are_refused_before_training(tmp_path, monitor):
    model = build(TwoTasks, tmp_path, monitor=monitor)
    valid = partial_batches(model.feature_map, 3)
    for batch in valid:
        batch["like"][batch["like"] == 1] = math.nan
    with pytest.raises(ValueError, match="the validation labels of like are all of one class"):
        model.fit(batches_of(model.feature_map, 7), validation_data=valid)


def test_a_combination_of_metrics_chooses_the_weights(tmp_path):
    weights = {"click_AUC": 0.5, "like_AUC": 0.25, "logloss": -1}
    model = build(TwoTasks, tmp_path, monitor=weights, learning_rate=0.2, early_stop_patience=3)
    train(model, epochs=8)
    values = [sum(w * record[name] for name, w in weights.items()) for record in model.history["valid"]]
    assert model.restored == model.history["valid"][int(np.argmax(values))]
    assert model._best_metric == pytest.approx(max(values), abs=1e-12)


# Scenarios


def scenario_data(feature_map, count=4, first_seed=0):
    """Batches whose ``item`` is a scenario: 1 to 3, 0 (padding) and 29, the id of what training lacks."""
    batches = batches_of(feature_map, count, first_seed, rows=200)
    for batch in batches:
        batch["item"] = torch.tensor([0, 1, 2, 3, 29])[torch.randint(0, 5, (200,))]
    return batches


def expected_within(model, data, label, predictions, names, metrics, rate):
    """Metrics of a label from a loop over scenarios, with every row whose label is not NaN."""
    truth, groups, item = (torch.cat([b[c] for b in data]).numpy() for c in (label, "user_group", "item"))
    scores = {}
    for i, name in names.items():
        rows = (item == i) & ~np.isnan(truth)
        values = evaluate_metrics(truth[rows], predictions[rows], metrics, groups[rows], rate)
        scores |= {f"{metric}@item={name}": value for metric, value in values.items()}
    for metric in metrics:
        scores[f"{metric}@item"] = np.mean([scores[f"{metric}@item={name}"] for name in ("1", "2", "3")])
    return scores


NAMES = {1: "1", 2: "2", 3: "3", 29: "unseen"}


@pytest.mark.parametrize("model_class", [SingleTask, TwoTasks])
def test_metrics_within_scenarios(tmp_path, caplog, model_class):
    metrics = ["AUC", "gAUC", "logloss", "NE", "NDCG@5"]
    model = build(model_class, tmp_path, metrics=metrics, scenario="item", monitor="AUC@item")
    train_data, data = scenario_data(model.feature_map), scenario_data(model.feature_map, 3, first_seed=50)
    model.fit(train_data, validation_data=data, epochs=2)
    scores = model.evaluate(data)
    unseen = sum(int((batch["item"] == 29).sum()) for batch in data)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith(f"{unseen} of 600 rows have an unknown item (missing, rare or not in training); item=")

    predictions = model.predict(data)
    plain = build(model_class, tmp_path, metrics=metrics)
    plain.load_weights(model.checkpoint)
    plain.base_rates = train_data.base_rates
    expected = plain.evaluate(data)
    labels = ["click"] if model_class is SingleTask else ["click", "like"]
    within = {}
    for label in labels:
        y_pred = predictions if model_class is SingleTask else predictions[label]
        values = expected_within(model, data, label, y_pred, NAMES, metrics, train_data.base_rates[label])
        within |= values if model_class is SingleTask else {f"{label}_{name}": v for name, v in values.items()}
    if model_class is TwoTasks:
        for name in values:
            within[name] = (within[f"click_{name}"] + within[f"like_{name}"]) / 2
    assert scores == pytest.approx({**expected, **within}, rel=1e-12)
    assert list(scores) == list(model.restored)[2:]
    best = max(record["AUC@item"] for record in model.history["valid"])
    assert model.restored["AUC@item"] == best == pytest.approx(model._best_metric, abs=1e-12)


def test_the_model_is_given_the_scenario_that_it_takes(tmp_path):
    class Taking(SingleTask):
        def __init__(self, feature_map, scenario="none", **kwargs):
            super().__init__(feature_map, **kwargs)
            self.given = scenario

    feature_map = feature_map_of(SingleTask)
    assert build(Taking, tmp_path, feature_map=feature_map, scenario="author").given == "author"
    assert build(Taking, tmp_path, feature_map=feature_map, scenario=None).given == "none"
    with pytest.raises(ValueError, match=r"scenario 'itm' is no feature \(did you mean 'item'\?\)"):
        build(SingleTask, tmp_path, scenario="itm")


def test_scenarios_leave_missing_labels_and_undefined_values_out(tmp_path):
    model = build(TwoTasks, tmp_path, scenario="item", monitor={"click_AUC@item": 1, "AUC@item=2": 1})
    train_data, data = (Partial(scenario_data(model.feature_map, 3, seed)) for seed in (0, 50))
    for batch in (*train_data, *data):
        batch["like"][torch.rand(200) < 0.5] = math.nan
        batch["like"][batch["item"] == 1] = math.nan  # no row of scenario 1 has the label
        batch["click"][batch["item"] == 3] = 0.0  # AUC is undefined
    model.fit(train_data, validation_data=data, epochs=1)
    scores, predictions = model.restored, model.predict(data)
    for label, defined in (("click", (1, 2)), ("like", (2, 3))):
        truth, item = (torch.cat([b[c] for b in data]).numpy() for c in (label, "item"))
        aucs = []
        for i in defined:
            rows = (item == i) & ~np.isnan(truth)
            aucs.append(evaluate_metrics(truth[rows], predictions[label][rows], ["AUC"])["AUC"])
            assert scores[f"{label}_AUC@item={i}"] == aucs[-1]
        assert scores[f"{label}_AUC@item"] == pytest.approx(np.mean(aucs), abs=1e-15)
    assert math.isnan(scores["click_AUC@item=3"]) and math.isnan(scores["like_AUC@item=1"])
    assert not math.isnan(scores["click_logloss@item=3"]) and math.isnan(scores["like_logloss@item=1"])
    assert scores["AUC@item"] == pytest.approx((scores["click_AUC@item"] + scores["like_AUC@item"]) / 2, abs=1e-15)


@pytest.mark.parametrize("monitor", ["AUC@item", {"click_AUC": 1, "like_AUC@item=2": 1}])
def test_a_scenario_monitor_that_needs_both_classes_is_refused_before_training(tmp_path, monitor):
    model = build(TwoTasks, tmp_path, scenario="item", monitor=monitor)
    valid = Loader(scenario_data(model.feature_map))
    for batch in valid:
        batch["like"][:] = 0
    with pytest.raises(ValueError, match=r"the monitored \w+@item.* needs both classes.* labels of like are"):
        model.fit(scenario_data(model.feature_map), validation_data=valid)


@pytest.mark.parametrize(
    ("monitor", "message"),
    [
        ("like_AUC@item=2", "no scenario of like_AUC@item=2 has both classes among its validation labels"),
        ({"AUC": 1, "AUC@item=2": 1}, "no scenario of AUC@item=2 has both classes"),
        ("AUC@item=4", "these validation data have no AUC@item=4, the nearest is AUC@item="),
        ("gAUC", "these validation data have no gAUC, the nearest is AUC"),
    ],
)
def test_a_monitor_that_validation_leaves_undefined_is_explained(tmp_path, monitor, message):
    model = build(TwoTasks, tmp_path, scenario="item", monitor=monitor)
    valid = scenario_data(model.feature_map)
    for batch in valid:
        batch["like"][batch["item"] == 2] = 1
    with pytest.raises(TrainingError, match=message):
        model.fit(scenario_data(model.feature_map), validation_data=valid)


@pytest.mark.parametrize("value", ["31", "unseen", "0", ""])
def test_a_monitored_scenario_that_training_lacks_is_refused(tmp_path, value):
    model = build(TwoTasks, tmp_path, scenario="item", monitor=f"AUC@item={value}")
    data = scenario_data(model.feature_map)
    with pytest.raises(ValueError, match="is of a item that training has not seen; the nearest is '"):
        model.fit(data, validation_data=data)


def test_scenarios_have_the_names_of_the_vocabulary(tmp_path):
    feature_map = feature_map_of(SingleTask)
    feature_map.data_dir = str(tmp_path)
    (tmp_path / "feature_vocab.json").write_text(
        json.dumps({"item": {"__PAD__": 0, "home": 2, "feed": 1, "__OOV__": 3}})
    )
    model = build(SingleTask, tmp_path, feature_map=feature_map, scenario="item", metrics=["AUC"])
    data = scenario_data(feature_map)
    names = ["AUC", *(f"AUC@item={name}" for name in ("feed", "home", "unseen")), "AUC@item"]
    assert list(model.evaluate(data)) == names

"""What every model folder must keep: found by looking, so that a new folder is tested from its first day."""

import copy
import importlib
import inspect
from pathlib import Path

import pytest
import torch
import yaml
from flowctr.acceleration import check_padding_invariance
from fuxictr.pytorch.models import MultiTaskModel
from torch import nn
from toy import BEHAVIORS, MODEL_ARGUMENTS, WIDE_INITIALIZER, toy_batch, toy_feature_map

ZOO = Path(__file__).parent.parent / "model_zoo"
MODELS = sorted(folder.parent.name for folder in ZOO.glob("*/src"))
LABELS = {"one label": ("click",), "three labels": ("click", "like", "long_view")}


def test_the_zoo_is_found():
    assert {"AutoIFS", "DHEN", "DOT", "INFNet", "InterFormer"} <= set(MODELS)
    assert not (ZOO / "__init__.py").exists(), "fuxictr's wheel owns the package name model_zoo"


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def build(name, labels=("click",), feature_map=None, **options):
    """Builds a model with the architecture of its ``<Model>_test`` experiment on the toy data."""
    model_class = getattr(importlib.import_module(f"flowctr.models.{name}"), name)
    config = yaml.safe_load((ZOO / name / "config" / "model_config.yaml").read_text())
    arguments = {**config["Base"], **config[f"{name}_test"]}
    accepted = inspect.signature(model_class.__init__).parameters
    arguments = {key: value for key, value in arguments.items() if key in accepted}
    torch.manual_seed(5)
    given = {"behaviors": BEHAVIORS, "embedding_initializer": WIDE_INITIALIZER, **MODEL_ARGUMENTS, **options}
    return model_class(feature_map or toy_feature_map(labels), **{**arguments, **given})


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_predictions_are_probabilities_per_label(name, labels):
    model, batch = build(name, labels).eval(), toy_batch(toy_feature_map(labels))
    assert isinstance(model, MultiTaskModel)
    predictions = model(batch)
    for label in labels:
        prediction = predictions[f"{label}_pred"]
        assert prediction.shape == (12, 1)
        assert ((prediction > 0) & (prediction < 1)).all()
        assert prediction.std() > 0
    assert ("y_pred" in predictions) == (len(labels) == 1)


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_the_loss_reaches_every_parameter(name, labels):
    model, batch = build(name, labels, learning_rate=0.01), toy_batch(toy_feature_map(labels), rows=64)
    model._max_gradient_norm = 10.0
    model.train_step(batch)  # a LoRA unit's A waits for its B, which starts at zero
    model.zero_grad()
    model.compute_loss(model(batch), model.get_labels(batch)).backward()
    unreached = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unreached == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_target_softmax_joins_the_losses_of_the_labels():
    """And not those of an evaluation."""
    having = []
    for name in MODELS:
        model_class = getattr(importlib.import_module(f"flowctr.models.{name}"), name)
        if "target_softmax" not in inspect.signature(model_class.__init__).parameters:
            continue
        having.append(name)
        labels = LABELS["three labels"]
        batch = toy_batch(toy_feature_map(labels), rows=64)
        model = build(name, labels, target_softmax=0.5, net_dropout=0.0).train()
        truth = model.get_labels(batch)
        outputs = model(batch)
        model(toy_batch(toy_feature_map(labels), rows=8))  # each loss is of its own outputs
        of_target = model.tokens.target_loss(outputs, truth)
        assert of_target > 0.1
        of_labels = model.add_loss(model.eval()(batch), truth)
        torch.testing.assert_close(model.add_loss(outputs, truth), of_labels + of_target)
        assert copy.deepcopy(model.train()).add_loss(outputs, truth) > of_labels
    assert {"HSTU", "INFNet", "InterFormer"} <= set(having)


def test_padding_does_not_matter(name):
    model = build(name).eval()
    reference = model(toy_batch(toy_feature_map(), padding="post"))["y_pred"]
    for max_len, padding in ((8, "pre"), (30, "post"), (30, "pre")):
        other = model(toy_batch(toy_feature_map(max_len=max_len), padding=padding))["y_pred"]
        torch.testing.assert_close(other, reference, atol=1e-5, rtol=0)


class Buckets(list):
    """Batches whose padding is cut off, as ``bucket_by_length`` gives them."""

    epoch, start_batch, streaming = 0, 0, False

    def padded(self, batch):
        sequences = [column for columns in BEHAVIORS.values() for column in columns]
        return {**batch, **{column: nn.functional.pad(batch[column], (0, 10)) for column in sequences}}


def test_batches_of_similar_length_are_as_good_as_whole_ones(name):
    model = build(name, ("click", "like"), embedding_initializer="partial(nn.init.normal_, std=1e-4)")
    check_padding_invariance(model, Buckets([toy_batch(toy_feature_map(("click", "like")), rows=64)]))


def test_the_order_of_columns_in_a_batch_does_not_matter(name):
    model, batch = build(name).eval(), toy_batch(toy_feature_map())
    torch.testing.assert_close(model(dict(reversed(batch.items())))["y_pred"], model(batch)["y_pred"])


def test_narrow_ids_are_enough(name):
    model, batch = build(name).eval(), toy_batch(toy_feature_map())
    narrow = {key: values.int() if values.dtype == torch.long else values for key, values in batch.items()}
    torch.testing.assert_close(model(narrow)["y_pred"], model(batch)["y_pred"])


@pytest.mark.filterwarnings("ignore:num_field_hubs")
@pytest.mark.parametrize("missing", [("age", "hour"), ("user", "age", "hour"), ("user_group",)])
def test_data_with_fewer_columns(name, missing):
    feature_map, batch = toy_feature_map(), toy_batch(toy_feature_map())
    for column in missing:
        del feature_map.features[column], batch[column]
    model = build(name, feature_map=feature_map).eval()
    assert torch.isfinite(model(batch)["y_pred"]).all() and model(batch)["y_pred"].std() > 0


def test_data_without_sequences(name):
    """Works, or says that a sequence is needed."""
    feature_map, batch = toy_feature_map(), toy_batch(toy_feature_map())
    for column in [column for columns in BEHAVIORS.values() for column in columns]:
        del feature_map.features[column], batch[column]
    if name == "InterFormer":
        with pytest.raises(ValueError, match="needs a sequence feature"):
            build(name, feature_map=feature_map, behaviors=None)
        return
    prediction = build(name, feature_map=feature_map, behaviors=None).eval()(batch)["y_pred"]
    assert torch.isfinite(prediction).all() and prediction.std() > 0


def test_an_event_is_real_when_any_of_its_columns_is(name):
    """A first column that is padding in the middle of a history does not end it."""
    model, batch = build(name).eval(), toy_batch(toy_feature_map())
    row = int((batch["watch_item"] != 0).sum(dim=1).argmax())
    batch["watch_item"][row, 1] = 0
    reference = model(batch)["y_pred"]
    batch["watch_author"][row, 1] = 1 + batch["watch_author"][row, 1] % 20
    assert not torch.equal(model(batch)["y_pred"][row], reference[row])


def test_data_without_behaviors_given(name):
    """Every sequence column is then a behaviour of its own."""
    model = build(name, behaviors=None).eval()
    assert list(model.tokens.behaviors) == ["watch_item", "watch_author", "like_item"]
    assert torch.isfinite(model(toy_batch(toy_feature_map()))["y_pred"]).all()


def test_saved_and_loaded_weights_predict_the_same(name, tmp_path):
    model, batch = build(name).eval(), toy_batch(toy_feature_map())
    model.save_weights(tmp_path / "model")
    other = build(name, embedding_initializer="partial(nn.init.normal_, std=0.9)").eval()
    assert not torch.allclose(other(batch)["y_pred"], model(batch)["y_pred"])
    other.load_weights(tmp_path / "model")
    assert torch.equal(other(batch)["y_pred"], model(batch)["y_pred"])


def test_custom_initialisation_survives_a_reset(name):
    """FuxiCTR re-initialises every Linear after the constructor; what a layer wants otherwise is in init_weights."""
    layers = {}

    def remember(model):
        for key, module in model.named_modules():
            if hasattr(module, "init_weights"):
                torch.manual_seed(0)
                module.init_weights()
                layers[key] = {n: p.detach().clone() for n, p in module.named_parameters()}

    model = build(name)
    remember(model)  # what the layers themselves ask for
    torch.manual_seed(0)
    model.reset_parameters()
    assert layers
    for key, module in model.named_modules():
        for parameter_name, wanted in layers.get(key, {}).items():
            found = dict(module.named_parameters())[parameter_name]
            assert (found == found.flatten()[0]).all() == (wanted == wanted.flatten()[0]).all(), (key, parameter_name)
            assert found.abs().max().item() == pytest.approx(wanted.abs().max().item(), rel=0.8), (key, parameter_name)


def test_optimiser_loss_and_learning_rate_are_used(name):
    model = build(name, optimizer="SGD", loss="mse_loss", learning_rate=0.25)
    assert isinstance(model.optimizer, torch.optim.SGD)
    assert model.optimizer.param_groups[0]["lr"] == 0.25
    assert model.loss_fn == [torch.nn.functional.mse_loss]


def test_fuxictrs_own_fit_trains_it(name, tmp_path):
    """Without flowctr's engine: the model alone keeps FuxiCTR's contract."""
    feature_map = toy_feature_map()
    batches = [toy_batch(feature_map, rows=32, seed=seed) for seed in range(3)]
    model = build(name, model_root=str(tmp_path), monitor={"logloss": 1}, monitor_mode="min", metrics=["logloss"])
    (tmp_path / "toy").mkdir()
    before = model.evaluate(batches)["logloss"]
    model.fit(batches, validation_data=batches, epochs=8)
    assert model.evaluate(batches)["logloss"] < before


def test_twenty_steps_overfit_a_batch(name):
    labels = ("click", "like")
    model, batch = build(name, labels, learning_rate=0.01), toy_batch(toy_feature_map(labels), rows=32)
    model._max_gradient_norm = 10.0
    model.train()
    losses = [model.train_step(batch).item() for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]

"""Every acceleration against the plain engine: the same numbers, exactly or within a tolerance that is stated."""

import copy
import functools
import importlib
import math
import platform
import subprocess
import sys
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from flowctr import acceleration, config
from flowctr.training import Engine, accelerate
from flowctr.weights import AveragedWeights
from fuxictr.pytorch.layers import FeatureEmbedding
from fuxictr.pytorch.models import BaseModel
from test_training import (
    Loader,
    OwnGroupsAndTerm,
    SingleTask,
    TwoTasks,
    batches_of,
    build,
    feature_map_of,
    partial_batches,
    train,
)
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from toy import BEHAVIORS, MODEL_ARGUMENTS, WIDE_INITIALIZER, toy_batch, toy_feature_map


class Logistic(BaseModel):
    """A linear model: without dropout, whose random numbers some accelerations draw otherwise, and batch statistics."""

    def __init__(self, feature_map, learning_rate=0.05, **kwargs):
        super().__init__(feature_map, **kwargs)
        self.embedding_layer = FeatureEmbedding(feature_map, 4)
        self.linear = nn.Linear(4 * feature_map.num_fields, 1)
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs):
        embeddings = self.embedding_layer(self.get_inputs(inputs)).flatten(start_dim=1)
        return {"y_pred": self.output_activation(self.linear(embeddings))}


def assert_close_weights(model, other, **tolerance):
    for name, weight in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, **tolerance)


# Precision


@pytest.mark.parametrize(("precision", "tolerance"), [("tf32", 2e-3), ("bf16", 2e-2)])
@pytest.mark.parametrize("model_class", [SingleTask, TwoTasks])
def test_lower_precision_is_close(tmp_path, model_class, precision, tolerance):
    model, lower = build(model_class, tmp_path), build(model_class, tmp_path, precision=precision)
    assert train(lower, epochs=3) == pytest.approx(train(model, epochs=3), rel=tolerance)
    scores, expected = lower.history["valid"][-1], model.history["valid"][-1]
    assert scores["AUC"] == pytest.approx(expected["AUC"], abs=tolerance)


def test_tf32_is_set_while_the_engine_works(tmp_path):
    model = build(SingleTask, tmp_path, precision="tf32")
    data, found = batches_of(model.feature_map, 2), []
    model.mlp.register_forward_hook(lambda *_: found.append(torch.get_float32_matmul_precision()))
    for work in (model.fit, model.evaluate, model.predict):
        work(data)
        assert torch.get_float32_matmul_precision() == "highest"
    assert set(found) == {"high"}
    model.train_step = lambda batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model.fit(data)
    assert torch.get_float32_matmul_precision() == "highest"


def test_fp32_is_that_whatever_the_program_has_set(tmp_path):
    model = build(SingleTask, tmp_path)
    data, found = batches_of(model.feature_map, 2), []
    model.mlp.register_forward_hook(lambda *_: found.append(torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision("high")
    try:
        model.fit(data)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(found) == {"highest"}


@pytest.mark.parametrize("model_class", [SingleTask, TwoTasks])
def test_bf16_is_for_matrix_products_alone(tmp_path, model_class):
    model = build(model_class, tmp_path, precision="bf16")
    data, inside, losses = batches_of(model.feature_map, 2), [], []
    model.mlp.register_forward_hook(lambda _, inputs, output: inside.append(output.dtype))
    step = model.train_step
    model.train_step = lambda batch: losses.append(step(batch)) or losses[-1]
    model.fit(data)
    trained = len(inside)
    predictions = model.predict(data)
    assert trained < len(inside) and set(inside) == {torch.bfloat16}
    assert {loss.dtype for loss in losses} == {torch.float32}
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    for values in predictions.values() if model_class is TwoTasks else [predictions]:
        assert values.dtype == float
        assert (torch.tensor(values).bfloat16() != torch.tensor(values)).any()  # finer than bfloat16


def test_bf16_tells_probabilities_near_one_apart(tmp_path):
    """In bfloat16, sigmoid(6.5) is 1, and the loss of a negative row infinite."""
    model = build(Logistic, tmp_path, precision="bf16").train()
    with torch.no_grad():
        model.linear.weight.zero_()
        model.linear.bias.fill_(6.5)
    (batch,) = batches_of(model.feature_map, 1)
    assert model(batch)["y_pred"].unique().item() == pytest.approx(1 / (1 + math.exp(-6.5)), abs=1e-7)


def test_bf16_takes_models_with_an_activation_of_their_own(tmp_path):
    class Own(Logistic):
        def forward(self, inputs):
            embeddings = self.embedding_layer(self.get_inputs(inputs)).flatten(start_dim=1)
            return {"y_pred": torch.sigmoid(self.linear(embeddings)), "steps": 3}

    own = build(Own, tmp_path, feature_map=feature_map_of(SingleTask), precision="bf16")
    assert train(own, epochs=2) == pytest.approx(train(build(Logistic, tmp_path), epochs=2), rel=2e-2)


def test_an_impossible_precision_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="precision='fp16' must be one of fp32, tf32, bf16"):
        build(SingleTask, tmp_path, precision="fp16")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(ValueError, match=r"precision=bf16 needs a GPU .* cuda:0 has none: use fp32"):
        acceleration.check_precision("bf16", torch.device("cuda:0"))
    acceleration.check_precision("bf16", torch.device("cpu"))


def test_keys_of_a_configuration_are_checked():
    folder = Path(__file__).parent.parent / "model_zoo" / "InterFormer" / "config"
    settings = ["precision=bf16", "gradient_accumulation=4", "data_on_device=true", "compile=true", "cuda_graphs=true"]
    settings += ["fused_optimizer=true", "fused_regularizer=true", "activation_checkpointing=true"]
    assert config.load(folder, "InterFormer_test", settings)["compile"] is True
    with pytest.raises(config.ConfigError) as error:
        config.load(folder, "InterFormer_test", ["precision=half", "gradient_accumulation=0", "fused_regularizer=0.1"])
    for rule in (
        "'precision' must be one of fp32, tf32, bf16; got 'half'",
        "'gradient_accumulation' must be an integer above 0; got 0",
        "'fused_regularizer' must be true or false; got 0.1",
    ):
        assert rule in str(error.value)


# Compilation


@pytest.fixture
def counter(monkeypatch):
    """Counts what is compiled; what is compiled runs as it is."""
    counter = CompileCounter()
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    return counter


def test_one_shape_is_compiled_in_training_and_one_in_evaluation(tmp_path, counter):
    model, compiled = build(SingleTask, tmp_path), build(SingleTask, tmp_path, compile=True)
    smaller = batches_of(model.feature_map, 1, first_seed=50, rows=5)
    data = Loader([*batches_of(model.feature_map, 3), *smaller])
    valid = Loader([*batches_of(model.feature_map, 2, first_seed=100), *smaller])
    for each in (model, compiled):
        torch.manual_seed(3)
        each.fit(data, validation_data=valid, epochs=3)
    assert compiled.history == model.history
    assert_close_weights(compiled, model, rtol=0, atol=0)
    assert counter.frame_count == 2
    compiled.predict(data)
    assert counter.frame_count == 2
    larger = batches_of(model.feature_map, 1, rows=64)
    assert compiled.predict(larger) == pytest.approx(model.predict(larger), abs=0)
    assert counter.frame_count == 3  # a small split came first


def test_a_look_at_a_models_devices_leaves_it_compilable(tmp_path, counter):
    """Torch never compiles what it first sees while operations are watched."""
    model = build(SingleTask, tmp_path, compile=True)
    (batch,) = batches_of(model.feature_map, 1)
    assert not acceleration.makes_host_tensors(model, batch)
    assert model.training and counter.frame_count == 0
    model(batch)
    assert counter.frame_count == 1


def test_a_compiled_model_computes_the_same(tmp_path):
    """With torch's own compiler."""
    model, compiled = build(Logistic, tmp_path), build(Logistic, tmp_path, compile=True)
    assert train(compiled, epochs=2) == pytest.approx(train(model, epochs=2), rel=1e-5)
    assert_close_weights(compiled, model, rtol=1e-4, atol=1e-6)
    assert compiled.history["valid"][-1] == pytest.approx(model.history["valid"][-1], abs=1e-5)


def test_a_machine_that_cannot_compile_is_told_so(tmp_path, monkeypatch):
    def without_compiler(graph, inputs):
        raise RuntimeError("No working C++ compiler found")

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=without_compiler))
    model = build(SingleTask, tmp_path, compile=True)
    message = (
        r"compile: true does not work for SingleTask on this machine \(No working C\+\+ comp.*turn it off, or .*g\+\+"
    )
    with pytest.raises(RuntimeError, match=message):
        model.fit(batches_of(model.feature_map, 2))


# Captured steps


class NoReads(TorchDispatchMode):
    """Refuses what would wait for a GPU: values read back, shapes that depend on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique"), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss_weight", ["EQ", "UW", [2, 0.5]])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("gradient_accumulation", [1, 2])
def test_a_step_never_waits_for_the_device(tmp_path, loss_weight, precision, gradient_accumulation):
    """So that it can be captured: with learned weights of the losses, labels that are missing, all accelerations."""
    model = build(
        TwoTasks,
        tmp_path,
        loss_weight=loss_weight,
        precision=precision,
        gradient_accumulation=gradient_accumulation,
        fused_optimizer=True,
        fused_regularizer=True,
        embedding_regularizer="l1_l2(0.01, 0.1)",
        net_regularizer=0.1,
    )
    data = partial_batches(model.feature_map, 4)
    model.fit(data)
    average = AveragedWeights(model, 0.9)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.train()
    with NoReads():
        model.train_step(data[0])
        average.update()
    assert not [name for name, weight in model.state_dict().items() if torch.equal(weight, before[name])]


# Update and penalty


@pytest.mark.parametrize("optimizer", ["adam", "AdamW", "SGD"])
def test_a_fused_optimizer_computes_the_same(tmp_path, optimizer):
    model, fused = (build(Logistic, tmp_path, optimizer=optimizer, fused_optimizer=f) for f in (False, True))
    assert all(group["fused"] for group in fused.optimizer.param_groups)
    assert train(fused, epochs=3) == pytest.approx(train(model, epochs=3), rel=1e-5)
    assert_close_weights(fused, model, rtol=1e-4, atol=1e-5)


def test_a_fused_optimizer_keeps_groups(tmp_path):
    for loss_weight in ("EQ", "UW"):
        settings = {"feature_map": feature_map_of(TwoTasks), "loss_weight": loss_weight}
        model, fused = (build(OwnGroupsAndTerm, tmp_path, fused_optimizer=f, **settings) for f in (False, True))
        groups = [
            [{**group, "params": len(group["params"])} for group in m.optimizer.param_groups] for m in (model, fused)
        ]
        assert groups[1] == [{**group, "fused": True} for group in groups[0]]


def test_an_optimizer_without_a_fused_form_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fused_optimizer: torch has no fused Adadelta; use adam, or turn it off"):
        build(SingleTask, tmp_path, optimizer="Adadelta", fused_optimizer=True)


@pytest.mark.parametrize("model_class", [SingleTask, TwoTasks, OwnGroupsAndTerm])
@pytest.mark.parametrize("embedding_regularizer", [None, 0.3, "l1(0.2)"])
@pytest.mark.parametrize("net_regularizer", [0.2, "l1_l2(0.1, 0.05)"])
def test_the_fused_penalty_is_fuxictrs(tmp_path, monkeypatch, model_class, embedding_regularizer, net_regularizer):
    settings = {
        "feature_map": feature_map_of(TwoTasks if model_class is OwnGroupsAndTerm else model_class),
        "embedding_regularizer": embedding_regularizer,
        "net_regularizer": net_regularizer,
        **({} if model_class is SingleTask else {"loss_weight": "UW"}),
    }
    model, fused = (build(model_class, tmp_path, fused_regularizer=f, **settings) for f in (False, True))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.linspace(-1, 1, weight.numel()).view_as(weight))
            fused.get_parameter(name).copy_(weight)
    expected = model.regularization_loss()
    monkeypatch.setattr(torch, "norm", None)  # which FuxiCTR calls for every parameter
    found = fused.regularization_loss()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    weights = [list(m.parameters()) for m in (fused, model)]
    gradients = [torch.autograd.grad(3 * loss, w, allow_unused=True) for loss, w in zip((found, expected), weights)]
    for (name, _), ours, theirs in zip(model.named_parameters(), *gradients):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_training_with_the_fused_penalty_is_close(tmp_path):
    settings = {"embedding_regularizer": 0.01, "net_regularizer": 0.001}
    model, fused = (build(SingleTask, tmp_path, fused_regularizer=f, **settings) for f in (False, True))
    assert train(fused, epochs=3) == pytest.approx(train(model, epochs=3), rel=1e-4)
    no_penalty = build(SingleTask, tmp_path, fused_regularizer=True)
    assert train(no_penalty, epochs=1) == train(build(SingleTask, tmp_path), epochs=1)


def test_a_regularisation_of_its_own_is_not_fused(tmp_path):
    class Own(TwoTasks):
        def regularization_loss(self):
            return 7 * self.scale.sum()

    with pytest.raises(ValueError, match="fused_regularizer: Own has a regularization_loss of its own; turn it off"):
        build(Own, tmp_path, feature_map=feature_map_of(TwoTasks), fused_regularizer=True)


# Accumulation


@pytest.mark.parametrize(("eval_steps", "evaluated"), [(None, [(3, 1), (6, 2)]), (2, [(2, 1), (4, 2), (6, 2)])])
def test_accumulated_batches_are_one_large_batch(tmp_path, eval_steps, evaluated):
    """Seven batches in steps of three, the last step has one batch, which is smaller too."""
    settings = {"embedding_regularizer": 0.01, "net_regularizer": 0.001, "optimizer": "SGD", "learning_rate": 0.5}
    large = build(Logistic, tmp_path, **settings)
    small = build(Logistic, tmp_path, gradient_accumulation=3, eval_steps=eval_steps, **settings)
    batches = batches_of(large.feature_map, 7)
    batches[-1] = {name: values[:11] for name, values in batches[-1].items()}
    batches[4] = {name: values[:20] for name, values in batches[4].items()}
    joined = Loader(
        {name: torch.cat([batch[name] for batch in batches[i : i + 3]]) for name in batches[0]} for i in (0, 3, 6)
    )
    valid = batches_of(large.feature_map, 2, first_seed=100)
    large.fit(joined, validation_data=valid, epochs=2)
    small.fit(batches, validation_data=valid, epochs=2)
    losses = [[point["loss"] for point in model.history["train"]] for model in (small, large)]
    assert len(losses[1]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert [(record["step"], record["epoch"]) for record in small.history["valid"]] == evaluated
    assert small.history["valid"][-1]["logloss"] == pytest.approx(large.history["valid"][-1]["logloss"], rel=1e-6)
    assert small._rows["train"] == large._rows["train"]


def test_labels_known_in_few_rows_count_the_same_in_all_batches_of_a_step(tmp_path):
    settings = {"net_regularizer": 0.001, "optimizer": "SGD", "learning_rate": 0.5}
    large, small = (build(Logistic, tmp_path, gradient_accumulation=n, **settings) for n in (1, 3))
    batches = batches_of(large.feature_map, 6)
    for batch, known in zip(batches, (0, 2, 30, 17, 5, 0)):
        batch["click"][known:] = math.nan
    joined = [{name: torch.cat([batch[name] for batch in batches[i : i + 3]]) for name in batches[0]} for i in (0, 3)]
    for model, data in ((large, joined), (small, batches)):
        model.fit(type("Clicks", (Loader,), {"may_be_missing": ["click"]})(data), epochs=3)
    losses = [[point["loss"] for point in model.history["train"]] for model in (small, large)]
    assert len(losses[1]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, weight in large.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], weight, rtol=1e-5, atol=1e-7)


def test_accumulation_is_exactly_the_mean_of_the_batches(tmp_path):
    """Bit-equal to a loop over the batches, with dropout and batch statistics of each."""
    settings = {"optimizer": "SGD", "net_regularizer": 0.01}
    model, loop = (
        build(SingleTask, tmp_path, gradient_accumulation=4, **settings),
        build(SingleTask, tmp_path, **settings),
    )
    batches = batches_of(model.feature_map, 8)
    torch.manual_seed(5)
    model.fit(batches)
    torch.manual_seed(5)
    loop.train()
    losses = []
    for step in (0, 4):
        loop.optimizer.zero_grad()
        losses.append(0.0)
        for batch in batches[step : step + 4]:
            loss = loop.compute_loss(loop(batch), loop.get_labels(batch)) / 4
            loss.backward()
            losses[-1] += loss.item()
        nn.utils.clip_grad_norm_(loop.parameters(), 10.0)
        loop.optimizer.step()
    assert_close_weights(model, loop, rtol=0, atol=0)
    assert [point["loss"] for point in model.history["train"]] == pytest.approx(losses, rel=1e-6)


def test_an_impossible_accumulation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gradient_accumulation=0; a step takes at least 1 batch"):
        build(SingleTask, tmp_path, gradient_accumulation=0)

    class OwnStep(SingleTask):
        def train_step(self, batch):
            return super().train_step(batch)

    with pytest.raises(ValueError, match="gradient_accumulation=2: OwnStep has a train_step of its own"):
        build(OwnStep, tmp_path, feature_map=feature_map_of(SingleTask), gradient_accumulation=2)
    own = build(OwnStep, tmp_path, feature_map=feature_map_of(SingleTask))
    assert train(own, epochs=1) == train(build(SingleTask, tmp_path), epochs=1)


# Checkpointed activations


def zoo_model(name, **options):
    model_class = getattr(importlib.import_module(f"flowctr.models.{name}"), name)
    torch.manual_seed(5)
    arguments = {"embedding_dim": 8, "head_hidden_units": [16], "attention_dropout": 0.2, **MODEL_ARGUMENTS}
    arguments |= {"behaviors": BEHAVIORS, "embedding_initializer": WIDE_INITIALIZER}
    arguments |= {"num_field_hubs": 2} if name == "INFNet" else {}
    del arguments["scenario"]
    return accelerate(model_class)(toy_feature_map(("click", "like")), **arguments, **options)


@pytest.mark.parametrize("name", ["InterFormer", "INFNet"])
def test_checkpointed_activations_give_the_same_gradients(name):
    """With dropout: what is computed again draws the same numbers."""
    batch = toy_batch(toy_feature_map(("click", "like")), rows=16)
    gradients, saved = [], []
    for checkpointing in (False, True):
        model, sizes = zoo_model(name, activation_checkpointing=checkpointing).train(), {}

        def save(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        torch.manual_seed(9)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            loss = model.compute_loss(model(batch), model.get_labels(batch))
        loss.backward()
        gradients.append({key: weight.grad for key, weight in model.named_parameters()})
        saved.append(sum(sizes.values()))
    assert saved[1] < 0.6 * saved[0]
    for key, gradient in gradients[0].items():
        assert torch.equal(gradients[1][key], gradient), key


def test_checkpointed_batch_norms_see_each_batch_once():
    norms = nn.ModuleList([nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))])
    model = nn.Module()
    model.blocks = norms
    plain = copy.deepcopy(norms)
    acceleration.checkpoint_activations(model)
    x = torch.randn(8, 3)
    for blocks in (norms, plain):
        blocks[0](x.clone().requires_grad_()).sum().backward()
    for name, value in plain.state_dict().items():
        assert torch.equal(norms.state_dict()[name], value), name


def test_checkpoints_need_blocks_and_no_captured_steps(tmp_path):
    with pytest.raises(ValueError, match="activation_checkpointing: SingleTask has no ModuleList of blocks"):
        build(SingleTask, tmp_path, activation_checkpointing=True)
    with pytest.raises(ValueError, match="cuda_graphs cannot capture activation_checkpointing"):
        build(TwoTasks, tmp_path, activation_checkpointing=True, cuda_graphs=True)


# All together, and what is not done twice


def test_all_accelerations_together_are_close(tmp_path, counter):
    model = build(TwoTasks, tmp_path, net_regularizer=0.01)
    fast = build(
        TwoTasks,
        tmp_path,
        net_regularizer=0.01,
        precision="bf16",
        compile=True,
        cuda_graphs=True,
        fused_optimizer=True,
        fused_regularizer=True,
    )
    assert train(fast, epochs=3) == pytest.approx(train(model, epochs=3), rel=2e-2)
    assert fast.history["valid"][-1]["AUC"] == pytest.approx(model.history["valid"][-1]["AUC"], abs=2e-2)


def test_an_evaluation_keeps_no_batch(tmp_path):
    """Columns that are views of one buffer, as the data loader's are, do not keep it in memory."""
    model, buffers = build(TwoTasks, tmp_path, scenario="author"), []

    class Views:
        def __iter__(self):
            for batch in batches_of(model.feature_map, 6):
                buffer = torch.stack([values.double() for values in batch.values()])
                buffers.append(weakref.ref(buffer))
                yield dict(zip(batch, buffer))
                del buffer
                assert sum(ref() is not None for ref in buffers) <= 1  # the batch that the caller still has

    model.evaluate(Views())
    assert len(buffers) == 6


@pytest.mark.parametrize("eval_steps", [None, 1, 7, 14])
def test_the_same_weights_are_validated_once(tmp_path, monkeypatch, eval_steps):
    """Also when an evaluation falls on the end of an epoch, and on that of the training."""
    seen, evaluate = [], Engine._evaluate

    def remember(model, *args):
        seen.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
        return evaluate(model, *args)

    monkeypatch.setattr(Engine, "_evaluate", remember)
    model = build(SingleTask, tmp_path, eval_steps=eval_steps, early_stop_patience=100)
    train(model, epochs=2)
    assert len(seen) == 14 // (eval_steps or 7)
    assert not any(torch.equal(a, b) for a, b in pairwise(seen))


# Memory

FREED = """
from pathlib import Path
import resource, sys, torch
from flowctr.acceleration import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

if sys.argv[1] == "kept":
    keep_freed_memory()
before = resident()
block = torch.ones(2**27, dtype=torch.uint8)
del block
print(resident() - before > 2**26)
"""


def test_freed_memory_is_kept_where_the_c_library_can(tmp_path):
    def keeps(how):
        done = subprocess.run([sys.executable, "-c", FREED, how], capture_output=True, text=True, check=True)
        return done.stdout.strip() == "True"

    assert not keeps("as ever")
    assert keeps("kept") is (platform.libc_ver()[0] == "glibc")


@pytest.mark.parametrize("accelerated", [False, True])
def test_training_on_the_cpu_keeps_freed_memory(tmp_path, monkeypatch, accelerated):
    called = []
    monkeypatch.setattr(acceleration, "keep_freed_memory", lambda: called.append(True))
    (tmp_path / "toy").mkdir()
    train(build(SingleTask, tmp_path, accelerated=accelerated), epochs=1)
    assert bool(called) is accelerated

"""HSTU against a loop over its equations, its causality, and what its options must change."""

import inspect

import pytest
import torch
from flowctr.models.HSTU import HSTU
from torch import nn
from toy import BEHAVIORS, MODEL_ARGUMENTS, WIDE_INITIALIZER, toy_batch, toy_feature_map

SMALL = {
    "embedding_dim": 8,
    "num_layers": 2,
    "num_heads": 2,
    "head_hidden_units": [6],
    "behaviors": BEHAVIORS,
    "embedding_initializer": WIDE_INITIALIZER,
}
TIME_COLUMNS = ["watch_author", "like_item"]  # stand for gap columns: a bias by the id of a column


def build(feature_map=None, **options):
    torch.manual_seed(3)
    model = HSTU(feature_map or toy_feature_map(), **{**MODEL_ARGUMENTS, **SMALL, **options})
    with torch.no_grad():  # zero biases and unit norms would hide terms from the comparisons below
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def predict(model, batch):
    with torch.no_grad():
        return model(batch)["y_pred"]


def linear(module, x):
    return x @ module.weight.T + (module.bias if module.bias is not None else 0)


def norm(module, x):
    centred = x - x.mean()
    return centred / (centred.pow(2).mean() + module.eps).sqrt() * module.weight + module.bias


def silu(x):
    return x / (1 + (-x).exp())


def loop_reference(model, batch, row):
    """The paper's equations for one row over its real events only, without any padding."""
    fields, columns, masks = model.tokens(model.get_inputs(batch))
    sequence = []  # (token, age, embedded gap)
    for number, (behavior, mask) in enumerate(masks.items()):
        real = columns[behavior][row][mask[row]]
        for step, event in enumerate(real):
            place = model.time_places[number] if model.time_places else 0
            gap = event[8 * place : 8 * place + 8]
            sequence.append((linear(model.events[number], event), len(real) - step, gap))
    sequence.append((linear(model.target, fields[row].flatten()), 0, torch.zeros(8)))
    ages = [age for _, age, _ in sequence]
    gaps = [gap for _, _, gap in sequence]
    x = [token for token, _, _ in sequence]
    for layer in model.layers:
        u, v, q, k = zip(*(silu(linear(layer.f1, norm(layer.norm, token))).split(8) for token in x))
        out = []
        for i in range(len(x)):
            heads = []
            for h in (slice(0, 4), slice(4, 8)):
                total = torch.zeros(4)
                for j in range(len(x)):
                    if ages[j] < ages[i]:
                        continue
                    bias = layer.position_bias[ages[j] - ages[i]]
                    if layer.time_bias is not None:
                        bias = bias + layer.time_bias.weight[0] @ gaps[j]
                    total = total + silu(q[i][h] @ k[j][h] + bias) * v[j][h]
                heads.append(total / (8 + 8 + 1))  # both behaviours' max_len, and the target
            out.append(x[i] + linear(layer.f2, norm(layer.norm_attention, torch.cat(heads)) * u[i]))
        x = out
    first, last = (module for module in model.heads.towers[0].mlp if isinstance(module, nn.Linear))
    return torch.sigmoid(linear(last, silu(linear(first, norm(model.norm, x[-1])))))


@pytest.mark.parametrize("options", [{}, {"time_columns": TIME_COLUMNS}, {"num_layers": 1}, {"num_layers": 3}], ids=str)
def test_forward_equals_a_loop_over_the_equations(options):
    torch.set_default_dtype(torch.float64)
    try:
        model, batch = build(**options).double(), toy_batch(toy_feature_map())
        out = predict(model, batch)
        with torch.no_grad():
            for row in (0, 1, 2, 5):
                torch.testing.assert_close(out[row], loop_reference(model, batch, row))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("time_columns", [[], TIME_COLUMNS])
def test_padding_side_and_length_do_not_matter(time_columns):
    model = build(time_columns=time_columns)
    reference = predict(model, toy_batch(toy_feature_map(), padding="post"))
    longer = toy_feature_map(max_len=21)
    for batch in (
        toy_batch(toy_feature_map(), padding="pre"),
        toy_batch(longer, padding="post"),
        toy_batch(longer, padding="pre"),
    ):
        torch.testing.assert_close(predict(model, batch), reference, atol=1e-6, rtol=0)


def test_events_beyond_the_data_sets_length_share_the_last_position_bias():
    """A model of histories up to 3 on longer ones: position 3 stands for all that is older."""
    feature_map = toy_feature_map(max_len=3)
    model, batch = build(feature_map=feature_map), toy_batch(toy_feature_map())
    reference = predict(model, batch)
    with torch.no_grad():
        for layer in model.layers:
            layer.position_bias[3] += 1
    moved = predict(model, batch) - reference
    lengths = (batch["watch_item"] != 0).sum(dim=1)
    assert (moved.abs() > 1e-6).flatten().tolist() == (lengths >= 3).tolist()


def test_an_event_reads_no_newer_event_and_not_the_target():
    model, batch = build(), toy_batch(toy_feature_map(), padding="pre")
    seen = []
    model.layers[0].register_forward_hook(lambda _, __, x: seen.append(x))
    predict(model, batch)
    changed = {name: values.clone() for name, values in batch.items()}
    changed["watch_item"][:, -2] = 1 + changed["watch_item"][:, -2] % 29  # age 2 of watch: column 6 of its 8
    changed["user"] = 1 + changed["user"] % 29
    predict(model, changed)
    row = int((batch["watch_item"] != 0).sum(dim=1).argmax())
    moved = (seen[0] - seen[1])[row].abs().amax(dim=-1) > 1e-7
    ages = torch.tensor([*range(8, 0, -1), *range(8, 0, -1), 0])
    real = torch.cat([(batch[column][row] != 0) for column in ("watch_item", "like_item")] + [torch.ones(1).bool()])
    assert not moved[real & (ages > 2)].any()
    assert moved[real & (ages <= 2)].all() and (real & (ages > 2)).sum() > 3


def test_rows_do_not_influence_each_other_and_an_empty_history_is_finite():
    model, batch = build(), toy_batch(toy_feature_map())
    together = predict(model, batch)
    assert torch.isfinite(together).all()
    first = predict(model, {name: values[:1] for name, values in batch.items()})  # its history is empty
    torch.testing.assert_close(together[:1], first, atol=1e-6, rtol=0)


def test_the_number_of_events_is_felt():
    """Attention without softmax: the same event twice is not the same as once."""
    model, batch = build(num_layers=1), toy_batch(toy_feature_map(), padding="pre")
    states = []
    model.layers[0].norm_attention.register_forward_hook(lambda _, args, __: states.append(args[0][:, -1]))
    with torch.no_grad():
        model.layers[0].position_bias.zero_()
    for copies in (0, 1, 2):
        for column in ("watch_item", "watch_author", "like_item"):
            batch[column].zero_()
            batch[column][:, 8 - copies :] = 5
        predict(model, batch)
    target_alone, once, twice = states
    torch.testing.assert_close(twice - target_alone, 2 * (once - target_alone))


def test_a_time_bias_acts_on_the_gap_column_alone():
    model, batch = build(time_columns=TIME_COLUMNS), toy_batch(toy_feature_map())
    seen = []
    model.layers[0].time_bias.register_forward_hook(lambda _, args, bias: seen.append(bias))
    for column in (None, "watch_item", "watch_author"):
        changed = {n: torch.where(v != 0, 1 + v % 29, 0) if n == column else v for n, v in batch.items()}
        predict(model, changed)
    plain, other_item, other_author = seen
    assert torch.equal(plain, other_item)
    assert not torch.equal(plain[:, :8], other_author[:, :8])  # watch
    assert torch.equal(plain[:, 8:], other_author[:, 8:])  # like and the target
    assert not plain[:, -1].any()


def test_the_number_of_parameters():
    """Per layer: two norms, f1 without bias, f2, a bias for each of max_len + 1 distances and the time map."""
    model = build(time_columns=TIME_COLUMNS)
    layer = 2 * 16 + 8 * 32 + (8 * 8 + 8) + 9 + 8
    assert [sum(p.numel() for p in module.parameters()) for module in model.layers] == [layer, layer]
    assert sum(p.numel() for p in model.events.parameters()) == (16 * 8 + 8) + (8 * 8 + 8)
    assert sum(p.numel() for p in model.target.parameters()) == 4 * 8 * 8 + 8


CHANGES = {
    "behaviors": {"watch": ["watch_item", "watch_author"]},
    "embedding_dim": 12,
    "embedding_initializer": "partial(nn.init.normal_, std=0.1)",
    "target_softmax": 0.1,
    "num_layers": 1,
    "num_heads": 1,
    "time_columns": TIME_COLUMNS,
    "head_hidden_units": [6, 6],
    "head_activation": "ReLU",
    "batch_norm": True,
    "task": "regression",
}
TRAINING_CHANGES = {"layer_dropout": 0.5, "net_dropout": 0.5}
OPTIMISER_CHANGES = {"optimizer", "learning_rate", "loss"}  # tested for every model by its contract
BASE_ARGUMENTS = {"self", "feature_map", "model_id", "gpu", "kwargs"}  # FuxiCTR's own


@pytest.mark.parametrize("argument", CHANGES)
def test_every_architecture_argument_changes_the_function(argument):
    batch = toy_batch(toy_feature_map())
    assert not torch.allclose(predict(build(), batch), predict(build(**{argument: CHANGES[argument]}), batch))


@pytest.mark.parametrize("argument", TRAINING_CHANGES)
def test_every_dropout_acts_while_training_only(argument):
    batch, plain, dropping = toy_batch(toy_feature_map()), build(), build(**{argument: TRAINING_CHANGES[argument]})
    torch.testing.assert_close(predict(plain, batch), predict(dropping, batch))
    assert not torch.allclose(predict(plain.train(), batch), predict(dropping.train(), batch))


def test_no_argument_is_left_untested():
    arguments = set(inspect.signature(HSTU.__init__).parameters) - BASE_ARGUMENTS
    assert arguments == {*CHANGES, *TRAINING_CHANGES, *OPTIMISER_CHANGES}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers must be a whole number of at least 1; got 0"),
        ({"num_heads": 3}, "num_heads must divide embedding_dim; got num_heads=3, embedding_dim=8"),
        ({"time_columns": ["watch_author"]}, "must name one column of each behavior; got ['watch_author'] for"),
        ({"time_columns": ["watch_author", "watch_item"]}, "must name one column of each behavior"),
        ({"time_columns": ["watch_author", "hour"]}, "must name one column of each behavior"),
        ({"time_columns": ["hour"], "behaviors": {}}, "got ['hour'] for behaviors {}"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError) as error:
        build(**options)
    assert message in str(error.value)


@pytest.mark.parametrize("options", [{"num_layers": 1}, {"time_columns": TIME_COLUMNS}], ids=str)
def test_the_loss_reaches_every_parameter(options):
    model, batch = build(head_hidden_units=[32], **options), toy_batch(toy_feature_map(), rows=64)
    model.compute_loss(model(batch), model.get_labels(batch)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_forward_compiles_without_graph_breaks():
    model, batch = build(time_columns=TIME_COLUMNS), toy_batch(toy_feature_map())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(predict(compiled, batch), predict(model, batch))

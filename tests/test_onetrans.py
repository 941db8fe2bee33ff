"""OneTrans against a loop over its equations, its causality and pyramid, and what its options must change."""

import inspect
import math

import pytest
import torch
from flowctr.models.OneTrans import OneTrans
from flowctr.models.OneTrans.OneTrans import OneTransBlock, s_queries
from torch import nn
from toy import BEHAVIORS, MODEL_ARGUMENTS, WIDE_INITIALIZER, toy_batch, toy_feature_map

SMALL = {
    "embedding_dim": 6,
    "num_layers": 3,
    "num_ns_tokens": 3,
    "token_dim": 8,
    "num_heads": 2,
    "ffn_expansion": 2,
    "head_hidden_units": [6],
    "behaviors": BEHAVIORS,
    "embedding_initializer": WIDE_INITIALIZER,
}
PLE_HEAD = {"head": "ple", "ple_hidden_units": [7]}
LABELS = ("click", "like")


def build(feature_map=None, **options):
    torch.manual_seed(3)
    model = OneTrans(feature_map or toy_feature_map(), **{**MODEL_ARGUMENTS, **SMALL, **options})
    with torch.no_grad():  # zero biases and unit norms would hide terms from the comparisons below
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def predict(model, batch):
    with torch.no_grad():
        return torch.cat([value for name, value in model(batch).items() if name != "y_pred"], dim=1)


def linear(module, x):
    return x @ module.weight.T + (module.bias if module.bias is not None else 0)


def norm(module, x):
    return x / (x.pow(2).mean() + module.eps).sqrt() * module.weight


def mixed(module, x, place, num_s):
    """W_i x: the shared W before position num_s, then each NS-token's own."""
    return linear(module.shared, x) if place < num_s else x @ module.specific.weight[place - num_s]


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def loop_reference(model, batch, row, queries):
    """The paper's equations for one row over its real tokens only; the final NS-tokens.

    ``queries`` are the S-queries of each block; shorter histories have fewer than that.
    """
    fields, events, masks = model.tokens(model.get_inputs(batch))
    watch, like = (events[name][row][masks[name][row]] for name in ("watch", "like"))
    s = [linear(model.events[0], e) for e in watch] + [*model.separators.weight]
    s += [linear(model.events[1], e) for e in like]
    x = s + list(linear(model.auto_split, fields[row].flatten()).split(8))
    num_s = len(s)
    for block, count in zip(model.blocks, queries):
        normed = [norm(block.norm_attention, token) for token in x]
        k, v = zip(*(mixed(block.key_value, token, i, num_s).split(8) for i, token in enumerate(normed)))
        kept = min(count, num_s)
        out = []
        for i in range(num_s - kept, len(x)):
            q, heads = mixed(block.query, normed[i], i, num_s), []
            for h in (slice(0, 4), slice(4, 8)):
                scores = [(q[h] @ k[j][h] / 2).exp() for j in range(i + 1)]
                heads.append(sum(score * v[j][h] for j, score in enumerate(scores)) / sum(scores))
            z = linear(block.out, torch.cat(heads)) + x[i]
            up, _, down = block.ffn
            hidden = gelu(mixed(up, norm(block.norm_ffn, z), i, num_s))
            out.append(mixed(down, hidden, i, num_s) + z)
        x, num_s = out, kept
    assert num_s == 0
    return torch.cat([norm(model.norm, token) for token in x])


@pytest.mark.parametrize(
    ("options", "queries"),
    [
        ({}, [17, 8, 0]),
        (PLE_HEAD, [17, 8, 0]),
        ({"pyramid": False}, [17, 17, 0]),
        ({"num_layers": 1}, [0]),
        ({"num_layers": 4}, [17, 11, 6, 0]),
    ],
    ids=str,
)
def test_forward_equals_a_loop_over_the_equations(options, queries):
    torch.set_default_dtype(torch.float64)
    try:
        feature_map = toy_feature_map(LABELS)
        model, batch = build(feature_map, **options).double(), toy_batch(feature_map, rows=20)
        longest = int(((batch["watch_item"] != 0).sum(dim=1) + (batch["like_item"] != 0).sum(dim=1)).argmax())
        out = predict(model, batch)
        with torch.no_grad():
            for row in (0, 1, longest):
                representation = loop_reference(model, batch, row, queries)
                inputs = model.extraction(representation[None])[0] if options is PLE_HEAD else [representation] * 2
                for k, tower in enumerate(model.heads.towers):
                    first, last = (module for module in tower.mlp if isinstance(module, nn.Linear))
                    hidden = linear(first, inputs[k])
                    torch.testing.assert_close(out[row, k : k + 1], linear(last, hidden * hidden.sigmoid()).sigmoid())
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_pyramid_falls_linearly_from_all_tokens_to_none():
    assert s_queries(1190, 6, pyramid=True) == [1190, 952, 714, 476, 238, 0]
    assert s_queries(1190, 6, pyramid=False) == [1190] * 5 + [0]
    assert s_queries(100, 2, pyramid=True) == [100, 0]
    assert s_queries(100, 1, pyramid=True) == [0]
    assert s_queries(0, 3, pyramid=True) == [0, 0, 0]


def test_blocks_shrink_to_the_ns_tokens():
    model, lengths = build(num_layers=4), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, x: lengths.append(x.shape[1]))
    predict(model, toy_batch(toy_feature_map()))
    assert lengths == [17 + 3, 11 + 3, 6 + 3, 3]


@pytest.mark.parametrize("pyramid", [True, False])
def test_padding_side_and_length_do_not_matter(pyramid):
    model = build(pyramid=pyramid)
    reference = predict(model, toy_batch(toy_feature_map(), padding="post"))
    longer = toy_feature_map(max_len=21)
    for batch in (
        toy_batch(toy_feature_map(), padding="pre"),
        toy_batch(longer, padding="post"),
        toy_batch(longer, padding="pre"),
    ):
        torch.testing.assert_close(predict(model, batch), reference, atol=1e-6, rtol=0)


def test_tokens_are_the_events_of_each_behaviour_then_the_ns_tokens():
    model, batch = build(), toy_batch(toy_feature_map(), padding="post")
    x, real = model.tokenize(model.get_inputs(batch))
    _, events, masks = model.tokens(model.get_inputs(batch))
    for row in range(len(x)):
        watch, like = (events[name][row][masks[name][row]] for name in ("watch", "like"))
        expected = torch.cat([model.events[0](watch), model.separators.weight, model.events[1](like)])
        assert real[row].tolist() == [False] * (16 - len(watch) - len(like)) + [True] * (len(expected) + 3)
        torch.testing.assert_close(x[row][real[row]][:-3], expected)


def test_a_token_reads_no_later_token():
    model, batch = build(), toy_batch(toy_feature_map())
    x, real = model.tokenize(model.get_inputs(batch))
    row = int(real.sum(dim=1).argmax())
    allowed = torch.tril(real[row] | torch.eye(20, dtype=torch.bool))[None]
    with torch.no_grad():
        before = model.blocks[0](x[row : row + 1], allowed)
        for place in (12, 18):  # an S-token, the second NS-token
            changed = x[row : row + 1].clone()
            changed[0, place] += 1
            moved = (model.blocks[0](changed, allowed) - before).abs().amax(dim=-1)[0] > 1e-6
            assert moved.tolist() == [False] * place + [True] * (20 - place)


def test_rows_do_not_influence_each_other_and_an_empty_history_is_finite():
    model, batch = build(), toy_batch(toy_feature_map())
    together = predict(model, batch)
    assert torch.isfinite(together).all()
    first = predict(model, {name: values[:1] for name, values in batch.items()})  # its history is empty
    torch.testing.assert_close(together[:1], first, atol=1e-6, rtol=0)


def test_the_order_of_events_matters():
    model, batch = build(), toy_batch(toy_feature_map())
    row = int((batch["watch_item"] != 0).sum(dim=1).argmax())
    length = int((batch["watch_item"][row] != 0).sum())
    swapped = {name: values.clone() for name, values in batch.items()}
    for column in BEHAVIORS["watch"]:
        swapped[column][row, :length] = batch[column][row, :length].flip(0)
    assert (predict(model, batch) - predict(model, swapped)).abs()[row] > 1e-5


def test_the_number_of_parameters():
    """A block: (1 + N) of Q, K, V and of the FFN's two maps, one output map, two norms; at the top no S-queries."""
    d, n = 8, 3
    block = OneTransBlock(d, 2, n, 4, has_s=True, num_s_queries=5)
    assert sum(p.numel() for p in block.parameters()) == (1 + n) * (3 + 8) * d * d + d * d + 2 * d
    top = OneTransBlock(d, 2, n, 4, has_s=True, num_s_queries=0)
    assert sum(p.numel() for p in top.parameters()) == n * (3 + 8) * d * d + 2 * d * d + d * d + 2 * d


CHANGES = {
    "behaviors": {"watch": ["watch_item", "watch_author"]},
    "embedding_dim": 10,
    "embedding_initializer": "partial(nn.init.normal_, std=0.1)",
    "num_layers": 2,
    "num_ns_tokens": 2,
    "token_dim": 12,
    "num_heads": 1,
    "ffn_expansion": 3,
    "pyramid": False,
    "head": "ple",
    "head_hidden_units": [6, 6],
    "head_activation": "ReLU",
    "batch_norm": True,
    "task": "regression",
}
PLE_CHANGES = {"ple_num_levels": 1, "ple_num_experts": 1, "ple_hidden_units": [7, 7]}
TRAINING_CHANGES = {"net_dropout": 0.5}
OPTIMISER_CHANGES = {"optimizer", "learning_rate", "loss"}  # tested for every model by its contract
BASE_ARGUMENTS = {"self", "feature_map", "model_id", "gpu", "kwargs"}  # FuxiCTR's own


@pytest.mark.parametrize("argument", [*CHANGES, *PLE_CHANGES])
def test_every_architecture_argument_changes_the_function(argument):
    batch, common = toy_batch(toy_feature_map()), PLE_HEAD if argument in PLE_CHANGES else {}
    changed = {**common, argument: {**CHANGES, **PLE_CHANGES}[argument]}
    plain, other = build(**common), build(**changed)
    if argument == "pyramid":
        other.load_state_dict(plain.state_dict())  # both have the same weights
    assert not torch.allclose(predict(plain, batch), predict(other, batch))


@pytest.mark.parametrize("common", [{}, {**PLE_HEAD, "head_hidden_units": []}], ids=["mlp", "ple"])
def test_dropout_acts_while_training_only(common):
    batch = toy_batch(toy_feature_map())
    plain, dropping = build(**common), build(**common, **TRAINING_CHANGES)
    torch.testing.assert_close(predict(plain, batch), predict(dropping, batch))
    assert not torch.allclose(predict(plain.train(), batch), predict(dropping.train(), batch))


def test_no_argument_is_left_untested():
    arguments = set(inspect.signature(OneTrans.__init__).parameters) - BASE_ARGUMENTS
    assert arguments == {*CHANGES, *PLE_CHANGES, *TRAINING_CHANGES, *OPTIMISER_CHANGES}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers must be a whole number of at least 1; got 0"),
        ({"num_ns_tokens": 0}, "num_ns_tokens must be a whole number of at least 1; got 0"),
        ({"token_dim": 0}, "token_dim must be a whole number of at least 1; got 0"),
        ({"num_heads": 3}, "num_heads must divide token_dim; got num_heads=3, token_dim=8"),
        ({"head": "mmoe"}, "head must be one of mlp, ple; got 'mmoe'"),
        ({**PLE_HEAD, "ple_num_levels": 0}, "ple_num_levels must be a whole number of at least 1; got 0"),
        ({**PLE_HEAD, "ple_hidden_units": []}, "experts need at least one layer"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError) as error:
        build(**options)
    assert message in str(error.value)


@pytest.mark.parametrize("options", [{"num_layers": 1}, {"num_layers": 4}, {"pyramid": False}, PLE_HEAD], ids=str)
@pytest.mark.parametrize("longest", [7, 1])
def test_the_loss_reaches_every_parameter(options, longest):
    model = build(head_hidden_units=[32], **options)
    batch = toy_batch(toy_feature_map(), rows=64, longest=longest)
    model.compute_loss(model(batch), model.get_labels(batch)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_forward_compiles_without_graph_breaks():
    model, batch = build(**PLE_HEAD), toy_batch(toy_feature_map())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(predict(compiled, batch), predict(model, batch))

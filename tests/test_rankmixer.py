"""RankMixer against a loop over its equations, and what its options must change."""

import inspect
import math

import pytest
import torch
from flowctr.models.RankMixer import RankMixer
from flowctr.models.RankMixer.RankMixer import RankMixerBlock, SlicedTokens, mix_tokens
from torch import nn
from toy import BEHAVIORS, MODEL_ARGUMENTS, WIDE_INITIALIZER, toy_batch, toy_feature_map

SMALL = {
    "embedding_dim": 8,
    "num_layers": 2,
    "num_tokens": 5,
    "token_dim": 10,
    "ffn_expansion": 2,
    "head_hidden_units": [6],
    "behaviors": BEHAVIORS,
    "embedding_initializer": WIDE_INITIALIZER,
}
PLE_HEAD = {"head": "ple", "ple_hidden_units": [7]}
LABELS = ("click", "like")


def build(feature_map=None, **options):
    torch.manual_seed(3)
    model = RankMixer(feature_map or toy_feature_map(), **{**MODEL_ARGUMENTS, **SMALL, **options})
    with torch.no_grad():  # zero biases and unit norms would hide terms from the comparisons below
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def predict(model, batch):
    with torch.no_grad():
        return torch.cat([value for name, value in model(batch).items() if name != "y_pred"], dim=1)


def test_token_mixing_gives_each_token_one_head_of_every_token():
    """Two tokens of width 4: the first halves of both, then the second halves."""
    x = torch.tensor([[[1, 2, 3, 4], [5, 6, 7, 8]]])
    assert mix_tokens(x).tolist() == [[[1, 2, 5, 6], [3, 4, 7, 8]]]
    random = torch.randn(3, 5, 10)
    torch.testing.assert_close(mix_tokens(mix_tokens(random)), random)


def test_slices_are_of_equal_width_and_the_last_is_filled_up():
    tokens, e = SlicedTokens(width=10, num_tokens=4, token_dim=3), torch.arange(1.0, 11.0).unsqueeze(0)
    nn.init.ones_(tokens.project.weight)
    assert tokens(e).tolist() == [[[6.0] * 3, [15.0] * 3, [24.0] * 3, [10.0] * 3]]


def linear(module, x):
    return x @ module.weight.T + module.bias


def norm(module, x):
    centred = x - x.mean()
    return centred / (centred.pow(2).mean() + module.eps).sqrt() * module.weight + module.bias


def own_map(module, token, x):
    return x @ module.weight[token] + module.bias[token]


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def interest(module, fields, events):
    """Attention of the projected fields over the real events of one behaviour."""
    if not len(events):
        return torch.zeros(8)
    query = linear(module.query, fields.flatten())
    mapped = [linear(module.event, event) for event in events]
    scores = torch.stack([query @ (module.attention.key.weight @ event) / math.sqrt(8) for event in mapped])
    weights = scores.exp() / scores.exp().sum()
    return linear(module.attention.out, sum(w * linear(module.attention.value, e) for w, e in zip(weights, mapped)))


def loop_reference(model, batch, row):
    """The paper's equations for one row, token by token and head by head; the pooled representation."""
    fields, events, masks = model.tokens(model.get_inputs(batch))
    parts = [*fields[row]]
    for module, (behavior, mask) in zip(model.interests, masks.items()):
        parts.append(interest(module, fields[row], events[behavior][row][mask[row]]))
    e = torch.cat(parts)  # (4 + 2) * 8 values in 5 slices of 10: two zeros at the end
    e = torch.cat([e, torch.zeros(2)])
    x = [own_map(model.tokenizer.project, t, e[10 * t : 10 * t + 10]) for t in range(5)]
    for layer in model.layers:
        mixed = [torch.cat([token[2 * h : 2 * h + 2] for token in x]) for h in range(5)]
        s = [norm(layer.norm_mixing, m + token) for m, token in zip(mixed, x)]
        up, _, down = layer.ffn
        x = [norm(layer.norm_ffn, own_map(down, t, gelu(own_map(up, t, v))) + v) for t, v in enumerate(s)]
    return sum(x) / 5


@pytest.mark.parametrize("head", ["mlp", "ple"])
def test_forward_equals_a_loop_over_the_equations(head):
    torch.set_default_dtype(torch.float64)
    try:
        feature_map = toy_feature_map(LABELS)
        options = PLE_HEAD if head == "ple" else {}
        model, batch = build(feature_map, **options).double(), toy_batch(feature_map)
        out = predict(model, batch)
        with torch.no_grad():
            for row in (0, 1, 2, 5):
                pooled = loop_reference(model, batch, row)
                inputs = model.extraction(pooled[None])[0] if head == "ple" else [pooled] * 2
                for k, tower in enumerate(model.heads.towers):
                    first, last = (module for module in tower.mlp if isinstance(module, nn.Linear))
                    hidden = linear(first, inputs[k])
                    torch.testing.assert_close(out[row, k : k + 1], linear(last, hidden * hidden.sigmoid()).sigmoid())
    finally:
        torch.set_default_dtype(torch.float32)


def test_padding_side_and_length_do_not_matter():
    model = build()
    reference = predict(model, toy_batch(toy_feature_map(), padding="post"))
    longer = toy_feature_map(max_len=21)
    for batch in (
        toy_batch(toy_feature_map(), padding="pre"),
        toy_batch(longer, padding="post"),
        toy_batch(longer, padding="pre"),
    ):
        torch.testing.assert_close(predict(model, batch), reference, atol=1e-6, rtol=0)


def test_rows_do_not_influence_each_other_and_an_empty_history_is_finite():
    model, batch = build(), toy_batch(toy_feature_map())
    together = predict(model, batch)
    assert torch.isfinite(together).all()
    first = predict(model, {name: values[:1] for name, values in batch.items()})  # its history is empty
    torch.testing.assert_close(together[:1], first, atol=1e-6, rtol=0)


def test_ple_gives_each_task_its_own_representation():
    feature_map = toy_feature_map(LABELS)
    batch = toy_batch(feature_map)
    for options, separate in (({}, False), (PLE_HEAD, True)):
        model = build(feature_map, **options)
        with torch.no_grad():
            first, last = (module for module in model.heads.towers[0].mlp if isinstance(module, nn.Linear))
            for own, other in zip((first, last), model.heads.towers[1].mlp[::2]):
                other.load_state_dict(own.state_dict())
        click, like = predict(model, batch).T
        assert (not torch.equal(click, like)) == separate


def test_a_block_of_the_paper_has_its_number_of_parameters():
    """2 T k D^2 weights in the FFNs: with T = 16, D = 768 and k = 4, about 75M a block."""
    with torch.device("meta"):
        block = RankMixerBlock(16, 768, 4 * 768)
    weights = sum(p.numel() for p in block.parameters() if p.dim() == 3)
    assert weights == 2 * 16 * 4 * 768**2
    biases = sum(p.numel() for p in block.parameters() if p.dim() < 3)
    assert biases == 16 * (4 * 768 + 768) + 2 * 2 * 768


CHANGES = {
    "behaviors": {"watch": ["watch_item", "watch_author"]},
    "embedding_dim": 10,
    "embedding_initializer": "partial(nn.init.normal_, std=0.1)",
    "num_layers": 1,
    "num_tokens": 2,
    "token_dim": 20,
    "ffn_expansion": 3,
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
    assert not torch.allclose(predict(build(**common), batch), predict(build(**changed), batch))


@pytest.mark.parametrize("common", [{}, {**PLE_HEAD, "head_hidden_units": []}], ids=["mlp", "ple"])
def test_dropout_acts_while_training_only(common):
    batch = toy_batch(toy_feature_map())
    plain, dropping = build(**common), build(**common, **TRAINING_CHANGES)
    torch.testing.assert_close(predict(plain, batch), predict(dropping, batch))
    assert not torch.allclose(predict(plain.train(), batch), predict(dropping.train(), batch))


def test_no_argument_is_left_untested():
    arguments = set(inspect.signature(RankMixer.__init__).parameters) - BASE_ARGUMENTS
    assert arguments == {*CHANGES, *PLE_CHANGES, *TRAINING_CHANGES, *OPTIMISER_CHANGES}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers must be a whole number of at least 1; got 0"),
        ({"num_tokens": 4}, "num_tokens must divide token_dim; got num_tokens=4, token_dim=10"),
        ({"num_tokens": 10, "embedding_dim": 2}, "set num_tokens to 6 or raise embedding_dim"),
        ({"head": "mmoe"}, "head must be one of mlp, ple; got 'mmoe'"),
        ({**PLE_HEAD, "ple_num_experts": 0}, "ple_num_experts must be a whole number of at least 1; got 0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError) as error:
        build(**options)
    assert message in str(error.value)


@pytest.mark.parametrize("labels", [("click",), LABELS])
def test_the_loss_reaches_every_parameter_of_the_ple_head(labels):
    feature_map = toy_feature_map(labels)
    model, batch = build(feature_map, **PLE_HEAD), toy_batch(feature_map, rows=64)
    model.compute_loss(model(batch), model.get_labels(batch)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_forward_compiles_without_graph_breaks():
    model, batch = build(**PLE_HEAD), toy_batch(toy_feature_map())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(predict(compiled, batch), predict(model, batch))

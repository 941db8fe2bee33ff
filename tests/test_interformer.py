"""InterFormer against a loop over its equations, and what its options and studies must change."""

import math
import re

import pytest
import torch
from flowctr import config
from flowctr.models.InterFormer import InterFormer
from torch import nn
from toy import BEHAVIORS, MODEL_ARGUMENTS, WIDE_INITIALIZER, toy_batch, toy_feature_map

SMALL = {
    "embedding_dim": 8,
    "num_layers": 2,
    "num_cls": 3,
    "num_heads": 2,
    "cross_rank": 4,
    "head_hidden_units": [6],
    "behaviors": BEHAVIORS,
    "embedding_initializer": WIDE_INITIALIZER,
}


def build(feature_map=None, **options):
    torch.manual_seed(3)
    model = InterFormer(feature_map or toy_feature_map(), **{**MODEL_ARGUMENTS, **SMALL, **options})
    with torch.no_grad():  # zero biases and unit norms would hide terms from the comparisons below
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def predict(model, batch):
    with torch.no_grad():
        return model(batch)["y_pred"]


@pytest.mark.parametrize("flow", ["sole", "sep", "n2s", "s2n", "int"])
@pytest.mark.parametrize("aggregation", ["selective", "avg", "mlp", "mha"])
def test_padding_side_and_length_do_not_matter(flow, aggregation):
    model = build(flow=flow, aggregation=aggregation)
    reference = predict(model, toy_batch(toy_feature_map(), padding="post"))
    longer = toy_feature_map(max_len=21)
    for batch in (
        toy_batch(toy_feature_map(), padding="pre"),
        toy_batch(longer, padding="post"),
        toy_batch(longer, padding="pre"),
    ):
        torch.testing.assert_close(predict(model, batch), reference, atol=1e-5, rtol=0)


def test_rows_do_not_influence_each_other_and_an_empty_history_is_finite():
    model, batch = build(), toy_batch(toy_feature_map())
    together = predict(model, batch)
    assert torch.isfinite(together).all()
    first = predict(model, {name: values[:1] for name, values in batch.items()})  # its history is empty
    torch.testing.assert_close(together[:1], first, atol=1e-6, rtol=0)


def test_the_order_of_events_matters():
    model, batch = build(), toy_batch(toy_feature_map())
    row = max(range(12), key=lambda r: (batch["watch_item"][r] != 0).sum())
    length = int((batch["watch_item"][row] != 0).sum())
    swapped = {name: values.clone() for name, values in batch.items()}
    for column in BEHAVIORS["watch"]:
        swapped[column][row, :length] = batch[column][row, :length].flip(0)
    assert (predict(model, batch) - predict(model, swapped)).abs()[row] > 1e-4


@pytest.mark.parametrize("padding", ["pre", "post"])
def test_recent_tokens_are_the_last_real_events(padding):
    model, batch = build(), toy_batch(toy_feature_map(), padding=padding)
    seen = {}
    model.sequence_summaries[0].gate.register_forward_hook(lambda _, args, __: seen.update(tokens=args[0]))
    predict(model, batch)
    _, s, mask = model.preprocess(model.get_inputs(batch))
    for row in range(len(s)):
        real = s[row][mask[row]]
        expected = torch.cat([torch.zeros(2, 8), real])[-2:]
        torch.testing.assert_close(seen["tokens"][row, -2:], expected)
    assert mask.sum(dim=1).tolist() == [(batch["watch_item"][row] != 0).sum().item() for row in range(len(s))]


def dense(module, x):
    return x @ module.weight.T + (module.bias if module.bias is not None else 0)


def norm(module, x):
    centred = x - x.mean()
    return centred / (centred.pow(2).mean() + module.eps).sqrt() * module.weight + module.bias


def silu(x):
    return x / (1 + (-x).exp())


def two_layers(mlp, x):
    return dense(mlp[2], silu(dense(mlp[0], x)))


def gate(module, x):
    return x / (1 + (-two_layers(module.mlp, x)).exp())


def rotated(vector, position):
    half = len(vector) // 2
    angles = torch.tensor([position * 10000 ** (-i / half) for i in range(half)])
    a, b = vector[:half], vector[half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()])


def attend(module, query, tokens, position=None):
    """One query over the real tokens; positions count them from 0."""
    heads, width = [], len(query) // module.num_heads
    for h in range(module.num_heads):
        cut = slice(h * width, (h + 1) * width)
        q = dense(module.query, query)[cut]
        ks = [dense(module.key, token)[cut] for token in tokens]
        if position is not None:
            q, ks = rotated(q, position), [rotated(k, i) for i, k in enumerate(ks)]
        scores = torch.stack([q @ k for k in ks]) / math.sqrt(width)
        weights = scores.exp() / scores.exp().sum()
        heads.append(sum(w * dense(module.value, token)[cut] for w, token in zip(weights, tokens)))
    return dense(module.out, torch.cat(heads))


def loop_reference(model, batch, row):
    """The paper's equations for one row, token by token."""
    tables = model.tokens.embedding.embedding_layers
    values = torch.stack([batch["age"][row], batch["hour"][row]])
    x = [dense(model.tokens.dense, values)] + [tables[f].weight[batch[f][row]] for f in ("item", "author", "user")]
    watched = [t for t in range(8) if batch["watch_item"][row, t]]
    liked = [t for t in range(8) if batch["like_item"][row, t]]
    events = []
    for back in range(max(len(watched), len(liked)), 0, -1):  # aligned at the most recent event
        columns = [torch.zeros(8)] * 3
        if back <= len(watched):
            step = watched[-back]
            columns[:2] = [tables[c].weight[batch[c][row, step]] for c in BEHAVIORS["watch"]]
        if back <= len(liked):
            columns[2] = tables["like_item"].weight[batch["like_item"][row, liked[-back]]]
        event = torch.cat(columns)
        events.append(dense(model.masknet.lce, event * two_layers(model.masknet.mask, event)))

    def field_summary(layer, x):
        field = model.field_summaries[layer]
        mixed = [sum(w * token for w, token in zip(weights, x)) for weights in field.lce.mix.weight]
        return [gate(field.gate, token) for token in mixed]

    def sequence_summary(layer, s):
        sequence = model.sequence_summaries[layer]
        pooled = [attend(sequence.pma.attention, query, s) for query in sequence.pma.queries.weight]
        recent = ([torch.zeros(8)] * 2 + s[3:])[-2:]
        return [gate(sequence.gate, token) for token in s[:3] + pooled + recent]

    x_sum = field_summary(0, x)
    s = x_sum + events
    s_sum = sequence_summary(0, s)
    for layer in range(model.num_layers):
        interaction, arch = model.interaction_archs[layer], model.sequence_archs[layer]
        z = x + s_sum
        flat = torch.cat(z)
        dots = torch.stack([z[i] @ z[j] for i in range(len(z)) for j in range(i + 1, len(z))])
        dhen = interaction.interaction
        ensemble = dense(dhen.dot.to_tokens, dots) + flat * dense(dhen.dcn.up, dense(dhen.dcn.down, flat)) + flat
        x = list(dense(interaction.to_fields[1], torch.cat([norm(dhen.norm, t) for t in ensemble.split(8)])).split(8))
        w = sum(torch.outer(token, weight) for token, weight in zip(x_sum, arch.ffn.weight))
        s = [token + w @ norm(arch.norm_ffn, token) for token in s]
        normed = [norm(arch.norm_attention, token) for token in s]
        s = [token + attend(arch.attention, q, normed, i) for i, (token, q) in enumerate(zip(s, normed))]
        x_sum, s_sum = field_summary(layer + 1, x), sequence_summary(layer + 1, s)
    head = torch.cat(x_sum + s_sum)
    layers = model.heads.towers[0].mlp
    return torch.sigmoid(dense(layers[2], silu(dense(layers[0], head))))


def test_forward_equals_a_loop_over_the_equations():
    torch.set_default_dtype(torch.float64)
    try:
        model, batch = build().double(), toy_batch(toy_feature_map())
        out = predict(model, batch)
        with torch.no_grad():
            for row in (0, 1, 2, 5):
                torch.testing.assert_close(out[row], loop_reference(model, batch, row), atol=1e-6, rtol=0)
    finally:
        torch.set_default_dtype(torch.float32)


def with_new_values(model, batch, columns):
    generator = torch.Generator().manual_seed(11)
    return {
        name: torch.where(values != 0, torch.randint(1, 30, values.shape, generator=generator), 0).to(values.dtype)
        if name in columns
        else values
        for name, values in batch.items()
    }


@pytest.mark.parametrize("interaction", ["dot", "dcnv2", "dhen"])
@pytest.mark.parametrize(
    ("flow", "fields_read_sequence", "sequence_reads_fields"),
    [("sep", False, False), ("n2s", False, True), ("s2n", True, False), ("int", True, True)],
)
def test_each_flow_passes_exactly_its_own_information(flow, interaction, fields_read_sequence, sequence_reads_fields):
    model, batch = build(flow=flow, interaction=interaction), toy_batch(toy_feature_map())
    states = []
    last = model.num_layers - 1
    model.interaction_archs[last].register_forward_hook(lambda _, __, x: states.append(x))
    model.sequence_archs[last].register_forward_hook(lambda _, __, s: states.append(s))
    predict(model, batch)
    predict(model, with_new_values(model, batch, ["watch_item", "watch_author", "like_item"]))
    predict(model, with_new_values(model, batch, ["user"]))
    x, s, x_other_history, _, _, s_other_field = states
    assert (not torch.equal(x, x_other_history)) == fields_read_sequence
    assert (not torch.equal(s, s_other_field)) == sequence_reads_fields


def test_a_removed_flow_drops_its_tokens():
    """Without sequence summaries the Interaction Arch is smaller; it is not fed zeros in their place."""
    inputs = {flow: build(flow=flow).interaction_archs[0].to_fields[1].in_features // 8 for flow in ("sep", "int")}
    assert inputs == {"sep": 4, "int": 4 + 3 + 2 + 2}
    sole = build(flow="sole")
    assert sole.interaction_archs[0].to_fields[1].in_features // 8 == 4 + 3
    assert not hasattr(sole, "masknet") and not hasattr(sole, "sequence_archs")


def test_one_layer_depends_on_both_archs():
    model, batch = build(num_layers=1), toy_batch(toy_feature_map())
    reference = predict(model, batch)
    for arch in (model.interaction_archs[0], model.sequence_archs[0]):
        for name, parameter in arch.named_parameters():
            kept = parameter.detach().clone()
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter))
                assert not torch.allclose(predict(model, batch), reference, atol=1e-6), name
                parameter.copy_(kept)


def test_the_field_summary_carries_a_signal_at_fuxictrs_initialisation():
    feature_map = toy_feature_map()
    for name in ("age", "hour"):
        feature_map.features.pop(name)
    torch.manual_seed(3)
    model = InterFormer(feature_map, **{**MODEL_ARGUMENTS, "behaviors": BEHAVIORS})
    x, s, mask = model.preprocess(model.get_inputs(toy_batch(feature_map, rows=64)))
    ratio = (model.field_summaries[0](x).std() / x.std()).item()
    assert 0.1 < ratio < 10
    assert 0.1 < (s[mask].std() / x.std()).item() < 10  # MaskNet does not extinguish the sequence either


def feature_map_of(categorical, columns, numeric):
    feature_map = toy_feature_map()
    categorical_spec, sequence_spec = feature_map.features["item"], dict(feature_map.features["like_item"])
    del sequence_spec["share_embedding"]
    feature_map.features.clear()
    for i in range(categorical):
        feature_map.features[f"field_{i}"] = dict(categorical_spec)
    for i in range(numeric):
        feature_map.features[f"number_{i}"] = {"type": "numeric", "source": ""}
    for i in range(columns):
        feature_map.features[f"history_{i}"] = dict(sequence_spec)
    return feature_map


@pytest.mark.parametrize(
    ("categorical", "columns", "numeric", "dim", "published"), [(16, 3, 1, 32, 3.29e6), (3, 4, 0, 64, 2.50e6)]
)
def test_non_embedding_parameters_of_the_default_model(categorical, columns, numeric, dim, published):
    """TaobaoAd's and KuaiVideo's shapes: the paper's totals less the embedding tables."""
    model = InterFormer(feature_map_of(categorical, columns, numeric), embedding_dim=dim, **MODEL_ARGUMENTS)
    counted = sum(p.numel() for name, p in model.named_parameters() if "embedding_layers" not in name)
    assert counted == pytest.approx(published, rel=0.05)


CHANGES = {
    "target_matches": True,
    "target_attention": [6],
    "target_softmax": 0.1,
    "behaviors": {"watch": ["watch_item", "watch_author"]},
    "embedding_dim": 12,
    "embedding_initializer": "partial(nn.init.normal_, std=0.1)",
    "num_layers": 1,
    "num_cls": 2,
    "num_pma": 1,
    "num_recent": 1,
    "num_heads": 1,
    "interaction": "dot",
    "cross_rank": 3,
    "flow": "sep",
    "aggregation": "avg",
    "gating": "tanh",
    "pffn": "hyper",
    "pma_reads_cls": False,
    "sequence_residual": False,
    "field_map": "lce",
    "use_pma": False,
    "use_recent": False,
    "use_gating": False,
    "use_pffn": False,
    "use_mha": False,
    "head_hidden_units": [6, 6],
    "head_activation": "ReLU",
    "batch_norm": True,
    "task": "regression",
}
TRAINING_CHANGES = {"attention_dropout": 0.5, "net_dropout": 0.5}
OPTIMISER_CHANGES = {"optimizer": "sgd", "learning_rate": 0.5, "loss": "mse_loss"}
BASE_ARGUMENTS = {"self", "feature_map", "model_id", "gpu", "kwargs"}  # FuxiCTR's own


@pytest.mark.parametrize("argument", CHANGES)
def test_every_architecture_argument_changes_the_function(argument):
    batch = toy_batch(toy_feature_map())
    assert not torch.allclose(predict(build(), batch), predict(build(**{argument: CHANGES[argument]}), batch))


@pytest.mark.parametrize("argument", TRAINING_CHANGES)
def test_every_dropout_acts_while_training_only(argument):
    batch, plain, dropping = toy_batch(toy_feature_map()), build(), build(**{argument: 0.5})
    torch.testing.assert_close(predict(plain, batch), predict(dropping, batch))
    assert not torch.allclose(predict(plain.train(), batch), predict(dropping.train(), batch))


def test_optimiser_loss_and_learning_rate_are_used():
    assert isinstance(build(optimizer="SGD").optimizer, torch.optim.SGD)
    assert build(learning_rate=0.5).optimizer.param_groups[0]["lr"] == 0.5
    assert build(loss="mse_loss").loss_fn == [nn.functional.mse_loss]


def test_no_argument_is_left_untested():
    import inspect

    arguments = set(inspect.signature(InterFormer.__init__).parameters) - BASE_ARGUMENTS
    assert arguments == {*CHANGES, *TRAINING_CHANGES, *OPTIMISER_CHANGES}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flow": "both"}, "flow must be one of sole, sep, n2s, s2n, int; got 'both'"),
        ({"num_heads": 3}, "num_heads must divide dim; got num_heads=3, dim=8"),
        ({"num_heads": 8}, "even width per head; got embedding_dim=8, num_heads=8"),
        ({"aggregation": "avg", "use_mha": False}, "switches of aggregation='selective'; got aggregation='avg'"),
        ({"num_cls": 0}, "num_cls must be a whole number of at least 1; got 0"),
        ({"aggregation": "sum"}, "aggregation must be one of"),
        ({"gating": "none", "use_gating": False}, "gating must be one of"),
        ({"pffn": "plain", "use_pffn": False}, "pffn must be one of"),
        ({"behaviors": {}}, "needs a sequence feature"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError) as error:
        build(**options)
    assert message in str(error.value)


def test_attention_maps_are_averages_over_real_queries():
    model, batch = build(), toy_batch(toy_feature_map())
    maps = model.attention_maps(batch)
    weights, rows, columns = maps["self-attention, layer 1"]
    assert rows == columns == ["CLS 1", "CLS 2", "CLS 3", *(str(step) for step in range(-8, 0))]
    assert weights[:3].sum(axis=1) == pytest.approx([1, 1, 1], abs=1e-5)  # CLS are real in every row
    assert maps["PMA before layer 1"][0].sum(axis=1) == pytest.approx([1, 1], abs=1e-5)
    never_reached = weights[:, 3]  # 8 events back: histories have at most 7
    assert never_reached == pytest.approx(0)


@pytest.mark.parametrize("options", [{"pma_reads_cls": False}, {"aggregation": "mha"}, {"num_pma": 11}])
def test_attention_maps_have_a_name_for_every_row_and_column(options):
    maps = build(**options).attention_maps(toy_batch(toy_feature_map()))
    assert "self-attention, layer 1" in maps
    assert any(name.startswith("PMA") for name in maps) == ("aggregation" not in options)
    for weights, rows, columns in maps.values():
        assert weights.shape == (len(rows), len(columns))


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("interaction", ["dot", "dcnv2", "dhen"])
@pytest.mark.parametrize(
    "options",
    [
        *(
            {"flow": flow, "aggregation": a}
            for flow in ("sole", "sep", "n2s", "s2n", "int")
            for a in ("selective", "mha")
        ),
        *({name: False} for name in ("use_pma", "use_recent", "use_gating", "use_pffn", "use_mha")),
        *({"flow": flow, "use_mha": False, "use_pffn": False} for flow in ("sep", "n2s", "s2n")),
        {"aggregation": "avg"},
        {"aggregation": "mlp"},
        {"field_map": "lce", "pma_reads_cls": False, "sequence_residual": False},
        {"target_softmax": 0.1},
    ],
    ids=str,
)
def test_the_loss_reaches_every_parameter(options, interaction, num_layers):
    model = build(interaction=interaction, num_layers=num_layers, head_hidden_units=[32], **options)
    batch = toy_batch(toy_feature_map(), rows=64)
    model.compute_loss(model(batch), model.get_labels(batch)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_forward_compiles_without_graph_breaks():
    model, batch = build(), toy_batch(toy_feature_map())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(predict(compiled, batch), predict(model, batch))


@pytest.mark.parametrize(
    ("expid", "option", "left_out"),
    [
        ("InterFormer_kuairand_pure_window_extended{_no_matches}", "target_matches", False),
        ("InterFormer_kuairand_pure_window_extended{_no_attention}", "target_attention", None),
        ("InterFormer_kuairand_pure_window_extended{_no_reset}", "reset_embeddings", False),
        ("InterFormer_amazon_sports_din_ema{_no_attention}_holdout", "target_attention", None),
        ("InterFormer_amazon_sports_din_ema{_no_ema}_holdout", "ema_decay", None),
        ("InterFormer_amazon_sports_din_softmax{_no_softmax}_holdout", "target_softmax", None),
    ],
)
def test_what_goes_beyond_the_paper_can_be_left_out_one_by_one(expid, option, left_out):
    folder = config.REPOSITORY / "model_zoo" / "InterFormer" / "config"
    whole = config.load(folder, re.sub("{.*}", "", expid))
    ablated = re.sub("[{}]", "", expid)
    assert config.load(folder, ablated) == {**whole, option: left_out, "model_id": ablated} != whole

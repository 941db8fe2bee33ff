"""INFNet against loops over both papers' equations, and what its options and studies must change."""

import inspect
import math

import pytest
import torch
from flowctr.models.INFNet import INFNet
from toy import BEHAVIORS, MODEL_ARGUMENTS, WIDE_INITIALIZER, toy_batch, toy_feature_map

LABELS = ("click", "like", "long_view")
SMALL = {
    "embedding_dim": 8,
    "num_blocks": 2,
    "num_field_hubs": 3,
    "num_task_hubs": 2,
    "hub_hidden_units": 10,
    "head_hidden_units": [16],
    "behaviors": BEHAVIORS,
    "embedding_initializer": WIDE_INITIALIZER,
}


def build(labels=LABELS, max_len=8, **options):
    torch.manual_seed(4)
    model = INFNet(toy_feature_map(labels, max_len), **{**MODEL_ARGUMENTS, **SMALL, **options})
    with torch.no_grad():  # zero biases and unit norms would hide terms from the comparisons below
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def predict(model, batch):
    with torch.no_grad():
        out = model(batch)
    return torch.cat([out[f"{label}_pred"] for label in model.feature_map.labels], dim=1)


VARIANTS = [
    {"version": "v1"},
    {"version": "v2"},
    {"version": "v1", "gate_hubs": "previous"},
    {"version": "v1", "residual": False},
    {"version": "v1", "task_blind": True},
    {"version": "v1", "broadcast": "none"},
    {"version": "v1", "aggregation": "none"},
    {"version": "v2", "hub_init": "random"},
    {"version": "v2", "hub_init": "mean"},
    {"version": "v2", "aggregation": "all_to_all"},
    {"version": "v2", "aggregation": "views_sum"},
    {"version": "v2", "aggregation": "union"},
    {"version": "v2", "aggregation": "none"},
    {"version": "v2", "broadcast": "none", "head_input": "hub"},
    {"version": "v2", "task_blind": True},
    {"version": "v2", "head_input": "both"},
    {"version": "v2", "bgu_expansion": 0},
    {"version": "v2", "hubs_per_behavior": 2},
]
NAMES = [", ".join(str(value) for value in variant.values()) for variant in VARIANTS]


@pytest.mark.parametrize("labels", [("click",), LABELS], ids=["one label", "three labels"])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4])
@pytest.mark.parametrize("variant", VARIANTS, ids=NAMES)
def test_the_loss_reaches_every_parameter(variant, num_blocks, labels):
    model, batch = build(labels, num_blocks=num_blocks, **variant), toy_batch(toy_feature_map(labels), rows=64)
    model.compute_loss(model(batch), model.get_labels(batch)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("variant", VARIANTS, ids=NAMES)
def test_padding_side_and_length_do_not_matter(variant):
    model = build(**variant)
    reference = predict(model, toy_batch(toy_feature_map(LABELS)))
    assert torch.isfinite(reference).all()  # the first row's histories are empty
    for max_len, padding in ((8, "pre"), (50, "post"), (200, "pre")):
        batch = toy_batch(toy_feature_map(LABELS, max_len), padding=padding)
        torch.testing.assert_close(predict(model, batch), reference, atol=1e-5, rtol=0)


def permuted_events(batch):
    """Reverses the real events of every watch history."""
    out = {name: values.clone() for name, values in batch.items()}
    for row in range(len(batch["item"])):
        length = int((batch["watch_item"][row] != 0).sum())
        for column in BEHAVIORS["watch"]:
            out[column][row, :length] = batch[column][row, :length].flip(0)
    return out


def test_v1_ignores_the_order_of_events_and_v2_does_not():
    batch = toy_batch(toy_feature_map(LABELS))
    v1, v2 = build(version="v1"), build(version="v2")
    torch.testing.assert_close(predict(v1, permuted_events(batch)), predict(v1, batch), atol=1e-5, rtol=0)
    assert (predict(v2, permuted_events(batch)) - predict(v2, batch)).abs().max() > 1e-4


def dense(module, x):
    return x @ module.weight.T + module.bias


def mlp(sequential, x):
    return dense(sequential[2], dense(sequential[0], x).clamp(min=0))


def layer_norm(module, x):
    centred = x - x.mean()
    return centred / (centred.pow(2).mean() + module.norm.eps).sqrt() * module.norm.weight + module.norm.bias


def attend(module, queries, tokens):
    """``softmax(Q K^T / sqrt(d)) V`` for each query, token by token; zeros over nothing."""
    out = []
    for query in queries:
        q = dense(module.query, query) if hasattr(module.query, "weight") else query
        scores = [math.exp((q @ (module.key.weight @ token)).item() / math.sqrt(8)) for token in tokens]
        values = [score / sum(scores) * dense(module.value, token) for score, token in zip(scores, tokens)]
        out.append(sum(values) if values else torch.zeros(8))
    return out


def groups_of(model, batch, row):
    """C, S by behaviour and T of one row."""
    tables = model.tokens.embedding.embedding_layers
    values = torch.stack([batch["age"][row], batch["hour"][row]])
    fields = [dense(model.tokens.dense, values)] + [tables[f].weight[batch[f][row]] for f in ("item", "author", "user")]
    events = {}
    for behavior, columns in BEHAVIORS.items():
        real = [t for t in range(8) if batch[columns[0]][row, t]]
        steps = [torch.cat([tables[c].weight[batch[c][row, t]] for c in columns]) for t in real]
        if len(columns) > 1:
            steps = [dense(model.event_tokens.project[list(BEHAVIORS).index(behavior)], step) for step in steps]
        if model.event_tokens.positions is not None:
            positions = model.event_tokens.positions.weight
            steps = [step + positions[index - len(steps)] for index, step in enumerate(steps)]
        events[behavior] = steps
    return fields, events, list(model.task_tokens.weight)


def add(*lists):
    return [sum(items) for items in zip(*lists)]


def v1_reference(model, batch, row):
    c, events, t = groups_of(model, batch, row)
    s = events["watch"] + events["like"]
    hubs = {"tasks": list(model.initial_hubs["tasks"].shared.weight)}
    if len(model.blocks) > 1:  # a single block reads no other hubs
        hubs["fields"] = list(mlp(model.initial_hubs["fields"].mlp, torch.cat(c)).split(8))
        phi = model.initial_hubs["sequence"].shared
        hubs["sequence"] = [sum((dense(phi, e) for e in steps), torch.zeros(8)) for steps in events.values()]
    tokens = {"fields": c, "sequence": s, "tasks": t}
    for block in model.blocks:
        flows, norms = block.aggregation.flows, block.aggregation.norms
        refined = {}
        for group in hubs:
            if f"{group}_hubs" not in flows:
                continue
            others = [g for g in ("tasks", "fields", "sequence") if g != group]
            update = add(*(attend(flows[f"{group}_hubs"][o], hubs[group], tokens[o]) for o in others))
            refined[group] = [layer_norm(norms[f"{group}_hubs"], x) for x in add(hubs[group], update)]
        update = add(*(attend(flows["tasks"][o], tokens["tasks"], tokens[o]) for o in ("fields", "sequence")))
        t_hat = [layer_norm(norms["tasks"], x) for x in add(tokens["tasks"], update)]
        tokens, hubs = {**tokens, "tasks": t_hat}, refined
        for group, unit in block.broadcast.units.items():
            gate = torch.sigmoid(mlp(unit.mlp, torch.cat(hubs[group])))
            tokens[group] = [layer_norm(block.broadcast.norms[group], x + x * gate) for x in tokens[group]]
    return tokens["tasks"]


def v2_reference(model, batch, row):
    c, events, t = groups_of(model, batch, row)
    tokens = {"tasks": t, "fields": c, "sequence": events["watch"] + events["like"]}
    hubs = {"tasks": t + list(model.initial_hubs["tasks"].shared.weight)}
    if len(model.blocks) > 1:  # a single block reads no other hubs
        hubs["fields"] = list(mlp(model.initial_hubs["fields"].mlp, torch.cat(c)).split(8))
        typed = model.initial_hubs["sequence"].typed
        sums = {
            name: sum((mlp(phi, e) for e in steps), torch.zeros(8)) for phi, (name, steps) in zip(typed, events.items())
        }
        hubs["sequence"] = [total / (len(events[name]) or 1) for name, total in sums.items()]
    for block in model.blocks:
        aggregation, refined = block.aggregation, {}
        for group, query in aggregation.queries.items():
            queries = [dense(query, hub) for hub in hubs[group]]
            views = [attend(aggregation.views[source], queries, tokens[source]) for source in tokens]
            update = [dense(aggregation.fuse[group], torch.cat(z)) for z in zip(*views)]
            refined[group] = [layer_norm(aggregation.norms[group], x) for x in add(hubs[group], update)]
        hubs = refined
        for group, unit in block.broadcast.units.items():
            alpha, beta = mlp(unit.mlp, torch.cat(hubs[group])).split(8)
            norm = block.broadcast.norms[group]
            tokens[group] = [layer_norm(norm, x + x * torch.sigmoid(alpha) + beta) for x in tokens[group]]
    return tokens["tasks"]


@pytest.mark.parametrize(("version", "reference"), [("v1", v1_reference), ("v2", v2_reference)])
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_forward_equals_a_loop_over_the_equations(version, reference, num_blocks):
    torch.set_default_dtype(torch.float64)
    try:
        model, batch = build(version=version, num_blocks=num_blocks), toy_batch(toy_feature_map(LABELS))
        out = predict(model, batch)
        with torch.no_grad():
            for row in (0, 1, 4):
                representations = reference(model, batch, row)
                expected = [torch.sigmoid(mlp(h.mlp, x)) for h, x in zip(model.heads.towers, representations)]
                torch.testing.assert_close(out[row], torch.cat(expected), atol=1e-9, rtol=0)
    finally:
        torch.set_default_dtype(torch.float32)


def test_blocks_keep_the_shapes_of_the_groups():
    model, batch = build(num_blocks=3), toy_batch(toy_feature_map(LABELS))
    shapes = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, inputs, out: shapes.append((inputs[0], out[0])))
    predict(model, batch)
    for before, after in shapes:
        assert {g: x.shape for g, x in before.items()} == {g: x.shape for g, x in after.items()}
    assert shapes[0][0]["sequence"].shape == (12, 16, 8)  # both behaviours end to end


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_last_block_builds_only_what_the_head_reads(version):
    blocks = build(version=version, num_blocks=2).blocks
    assert [list(block.broadcast.units) for block in blocks] == [["tasks", "fields", "sequence"], ["tasks"]]


def test_previous_gates_leave_the_first_flows_of_fields_and_events_unused_before_block_three():
    """With the gates driven by the block's incoming hubs, refined ones matter from the third block on."""
    refined = {
        n: [list(b.aggregation.flows) for b in build(version="v1", gate_hubs="previous", num_blocks=n).blocks]
        for n in (2, 3)
    }
    assert "fields_hubs" not in refined[2][0]
    assert "fields_hubs" in refined[3][0]


def test_without_a_residual_the_equations_are_literal():
    model, batch = build(version="v1", residual=False, num_blocks=1), toy_batch(toy_feature_map(LABELS))
    seen = []
    model.blocks[0].register_forward_hook(lambda _, inputs, out: seen.append((inputs, out)))
    predict(model, batch)
    (tokens, _, masks), (after, hubs) = seen[0]
    flows = model.blocks[0].aggregation.flows["tasks"]
    with torch.no_grad():
        t_hat = sum(flows[g](tokens["tasks"], tokens[g], masks[g]) for g in ("fields", "sequence"))
        gate = model.blocks[0].broadcast.units["tasks"].mlp(hubs["tasks"].flatten(1)).sigmoid()
        torch.testing.assert_close(after["tasks"], t_hat * gate.unsqueeze(1))


CHANGES = {
    "task": "regression",
    "behaviors": {"watch": ["watch_item", "watch_author"]},
    "embedding_dim": 12,
    "embedding_initializer": "partial(nn.init.normal_, std=0.1)",
    "version": "v1",
    "num_blocks": 1,
    "num_heads": 2,
    "aggregation": "union",
    "broadcast": "pgu",
    "hub_init": "random",
    "num_field_hubs": 2,
    "num_task_hubs": 1,
    "hubs_per_behavior": 2,
    "hub_hidden_units": 4,
    "sequence_pooling": "shared_sum",
    "positions": False,
    "bgu_expansion": 0,
    "residual": False,
    "head_input": "both",
    "task_blind": True,
    "head_hidden_units": [16, 6],
    "head_activation": "SiLU",
    "batch_norm": True,
}
V1_CHANGES = {"gate_hubs": "previous"}
TRAINING_CHANGES = ("attention_dropout", "net_dropout")
OPTIMISER_ARGUMENTS = {"optimizer", "learning_rate", "loss"}  # the model contract tests these
BASE_ARGUMENTS = {"self", "feature_map", "model_id", "gpu", "kwargs"}


@pytest.mark.parametrize("argument", CHANGES)
def test_every_architecture_argument_changes_the_function(argument):
    batch = toy_batch(toy_feature_map(LABELS))
    changed = build(**{"num_blocks": 3, argument: CHANGES[argument]})
    assert not torch.allclose(predict(build(num_blocks=3), batch), predict(changed, batch), atol=1e-6)


@pytest.mark.parametrize("argument", V1_CHANGES)
def test_every_v1_argument_changes_the_function(argument):
    batch = toy_batch(toy_feature_map(LABELS))
    changed = build(num_blocks=3, version="v1", **{argument: V1_CHANGES[argument]})
    assert not torch.allclose(predict(build(num_blocks=3, version="v1"), batch), predict(changed, batch), atol=1e-6)


@pytest.mark.parametrize("argument", TRAINING_CHANGES)
def test_every_dropout_acts_while_training_only(argument):
    batch, plain, dropping = toy_batch(toy_feature_map(LABELS)), build(), build(**{argument: 0.5})
    torch.testing.assert_close(predict(plain, batch), predict(dropping, batch))
    assert not torch.allclose(predict(plain.train(), batch), predict(dropping.train(), batch))


def test_no_argument_is_left_untested():
    arguments = set(inspect.signature(INFNet.__init__).parameters) - BASE_ARGUMENTS
    assert arguments == {*CHANGES, *V1_CHANGES, *TRAINING_CHANGES, *OPTIMISER_ARGUMENTS}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "v3"}, "version must be one of v1, v2; got 'v3'"),
        ({"num_field_hubs": 0}, "num_field_hubs must be a whole number of at least 1; got 0"),
        ({"num_task_hubs": 0}, "num_task_hubs must be a whole number of at least 1; got 0"),
        ({"broadcast": "none"}, "set head_input='hub'"),
        ({"version": "v1", "head_input": "hub"}, "head_input='hub' needs v2's task hubs"),
        ({"gate_hubs": "previous"}, "gate_hubs='previous' is v1's formula"),
        ({"aggregation": "all_to_all", "task_blind": True}, "use another aggregation"),
        ({"behaviors": {"share": ["share_item"]}}, "'share_item', which is not a sequence"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError) as error:
        build(**options)
    assert message in str(error.value)


def test_more_hubs_than_tokens_is_a_warning():
    with pytest.warns(UserWarning, match="num_field_hubs=9 exceeds the 4 field tokens"):
        build(num_field_hubs=9)


def feature_map_with(fields, behaviors, labels=LABELS, max_len=8):
    """The toy data with some of its columns only."""
    feature_map = toy_feature_map(labels, max_len)
    keep = {*fields, *(column for columns in behaviors.values() for column in columns)}
    for name in set(feature_map.features) - keep:
        del feature_map.features[name]
    return feature_map


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("labels", [("click",), LABELS], ids=["one label", "three labels"])
@pytest.mark.parametrize(
    ("fields", "behaviors", "max_len"),
    [
        (["item", "user"], {}, 8),
        (["item"], {"watch": ["watch_item"]}, 8),
        (["item", "user"], {"keys": ["watch_item"], "a.b": ["like_item"]}, 8),
    ],
)
def test_small_data_sets_work_and_every_parameter_is_reached(version, labels, fields, behaviors, max_len):
    feature_map = feature_map_with(fields, behaviors, labels, max_len)
    torch.manual_seed(4)
    options = {**MODEL_ARGUMENTS, **SMALL, "behaviors": behaviors, "num_field_hubs": 1}
    model = INFNet(feature_map, version=version, **options)
    batch = toy_batch(feature_map, rows=64, longest=max_len)
    model.compute_loss(model(batch), model.get_labels(batch)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("behaviors", [{"watch": ["watch_item"]}, {"watch": ["watch_item"], "like": ["like_item"]}])
def test_histories_of_one_event(version, behaviors):
    """A real event counts, an empty history does not, and longer padding changes nothing."""
    options = {**MODEL_ARGUMENTS, **SMALL, "behaviors": behaviors, "num_field_hubs": 1}
    model = INFNet(feature_map_with(["item"], behaviors, max_len=1), version=version, **options).eval()
    batch = toy_batch(feature_map_with(["item"], behaviors, max_len=1), longest=1)
    longer = toy_batch(feature_map_with(["item"], behaviors, max_len=8), longest=1, padding="pre")
    torch.testing.assert_close(predict(model, longer), predict(model, batch), atol=1e-5, rtol=0)
    maps = model.attention_maps(batch)
    assert all(weights.shape == (len(rows), len(columns)) for weights, rows, columns in maps.values())


def test_data_with_nothing_to_exchange_is_refused():
    feature_map = feature_map_with(["item"], {}, ("click",))
    with pytest.raises(ValueError, match="nothing to exchange"):
        INFNet(feature_map, **{**MODEL_ARGUMENTS, **SMALL, "behaviors": None, "num_field_hubs": 1})


@pytest.mark.parametrize("variant", [{"version": "v1"}, {"version": "v2"}, {"aggregation": "all_to_all"}])
def test_attention_of_tasks_over_inputs_can_be_read_out(variant):
    model, batch = build(**variant), toy_batch(toy_feature_map(LABELS))
    keep = (batch["watch_item"] != 0).any(dim=1)
    batch = {name: values[keep] for name, values in batch.items()}
    maps = model.attention_maps(batch)
    assert list(maps) == ["tasks over inputs, block 1", "tasks over inputs, block 2"]
    weights, rows, columns = maps["tasks over inputs, block 1"]
    assert rows == list(LABELS)
    assert columns == ["dense", "item", "author", "user", "watch", "like"]
    if "aggregation" not in variant:
        assert weights[:, :4].sum(axis=1) == pytest.approx([1, 1, 1], abs=1e-5)
        assert weights[:, 4:].sum(axis=1) == pytest.approx([1, 1, 1], abs=1e-5)
    else:
        assert (weights.sum(axis=1) < 1).all()  # the rest of this softmax lies on the tasks themselves


def test_attention_readout_follows_the_attention():
    """Events of one behaviour that the tasks cannot tell from padding get no weight; all of it goes to the other."""
    model, batch = build(version="v1"), toy_batch(toy_feature_map(LABELS))
    keep = (batch["watch_item"] != 0).any(dim=1)
    batch = {name: values[keep] for name, values in batch.items()}
    batch["like_item"] = torch.zeros_like(batch["like_item"])
    weights, _, _ = model.attention_maps(batch)["tasks over inputs, block 1"]
    assert weights[:, 4] == pytest.approx([1, 1, 1], abs=1e-5)
    assert weights[:, 5] == pytest.approx([0, 0, 0], abs=1e-6)


def test_forward_compiles_without_graph_breaks():
    model, batch = build(), toy_batch(toy_feature_map(LABELS))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(batch)["like_pred"], model(batch)["like_pred"])

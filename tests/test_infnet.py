"""INFNet against loops over both papers' equations, and what its options and studies must change."""

import inspect
import math
from pathlib import Path

import pytest
import torch
import yaml
from flowctr import config
from flowctr.models.INFNet import INFNet
from toy import BEHAVIORS, MODEL_ARGUMENTS, WIDE_INITIALIZER, toy_batch, toy_feature_map

CONFIG = Path(__file__).parent.parent / "model_zoo/INFNet/config"
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
    "token_std": 0.4,
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
    {"version": "v1", "head_input": "all"},
    {"version": "v2", "head_input": "all"},
    {"version": "v2", "broadcast": "none", "head_input": "all"},
    {"version": "v2", "bgu_expansion": 0},
    {"version": "v2", "hubs_per_behavior": 2},
    {"version": "v1", "head_input": "all", "target_matches": True},
    {"version": "v1", "head_input": "all", "cross_rank": 5},
    {"version": "v1", "task_blind": True, "cross_rank": 5},
    {"version": "v2", "aggregation": "all_to_all", "cross_rank": 5},
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


def long_batch(max_len, lengths):
    """The toy batch with histories of the given ``lengths`` per row, at the front of ``max_len`` steps."""
    batch = toy_batch(toy_feature_map(LABELS, max_len), rows=len(lengths))
    generator = torch.Generator().manual_seed(1)
    real = torch.arange(max_len) < torch.tensor(lengths)[:, None]
    for column in (column for columns in BEHAVIORS.values() for column in columns):
        batch[column] = torch.randint(1, 30, (len(lengths), max_len), generator=generator) * real
    return batch


def rearranged(batch, order):
    """Puts the steps of every history into the order that ``order(row, length)`` gives, the same for all columns."""
    out = dict(batch)
    for columns in BEHAVIORS.values():
        lengths = (batch[columns[0]] != 0).sum(dim=1).tolist()
        steps = torch.stack([order(row, length) for row, length in enumerate(lengths)])
        out.update((column, batch[column].gather(1, steps)) for column in columns)
    return out


@pytest.mark.parametrize("variant", VARIANTS, ids=NAMES)
def test_padding_to_50_and_to_200_is_the_same(variant):
    """Histories fill the 50 steps of one model's data; the other 150 are the padding of the other's."""
    lengths = [0, 1, 23, 49, 50, 50]
    short, long = long_batch(50, lengths), long_batch(50, lengths)
    for column in (column for columns in BEHAVIORS.values() for column in columns):
        long[column] = torch.nn.functional.pad(short[column], (0, 150))
    model, longer = build(max_len=50, **variant), build(max_len=200, **variant)
    weights = model.state_dict()
    if "event_tokens.positions.weight" in weights:  # the most recent event is the last position
        padding = torch.randn(150, SMALL["embedding_dim"])
        weights["event_tokens.positions.weight"] = torch.cat([padding, weights["event_tokens.positions.weight"]])
    longer.load_state_dict(weights)
    torch.testing.assert_close(predict(longer, long), predict(model, short), atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS, ids=NAMES)
def test_where_the_padding_stands_and_what_is_in_it_do_not_matter(variant):
    batch, generator = long_batch(200, [0, 1, 7, 60, 199, 200]), torch.Generator().manual_seed(2)

    def scattered(row, length):  # the events in their order, anywhere among the padding
        places = torch.randperm(200, generator=generator)[:length].sort().values
        steps = torch.full((200,), min(length, 199))  # the first padded step, if there is any
        return steps.scatter(0, places, torch.arange(length))

    model = build(max_len=200, **variant)
    reference = predict(model, batch)
    torch.testing.assert_close(predict(model, rearranged(batch, scattered)), reference, atol=1e-5, rtol=0)

    def with_noise(module, inputs, out):
        _, _, masks = model.tokens(batch)
        return {name: torch.where(masks[name].unsqueeze(-1), s, torch.randn_like(s)) for name, s in out.items()}

    model.event_tokens.register_forward_hook(with_noise)
    torch.testing.assert_close(predict(model, batch), reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("max_len", [50, 200])
def test_v1_ignores_the_order_of_events_inside_a_behavior_and_v2_does_not(max_len):
    batch, generator = long_batch(max_len, [0, 1, 2, 30, max_len]), torch.Generator().manual_seed(2)

    def shuffled(row, length):
        return torch.cat([torch.randperm(length, generator=generator), torch.arange(length, max_len)])

    permuted = rearranged(batch, shuffled)
    v1, v2 = build(version="v1", max_len=max_len), build(version="v2", max_len=max_len)
    torch.testing.assert_close(predict(v1, permuted), predict(v1, batch), atol=1e-5, rtol=0)
    assert (predict(v2, permuted) - predict(v2, batch)).abs().max() > 1e-4


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
    if "fields" in model.initial_hubs:  # a single block reads no other hubs
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
    return with_hubs(tokens["tasks"], hubs) if model.head_input == "all" else tokens["tasks"]


def with_hubs(tokens, hubs):
    return [torch.cat([token, *hubs["fields"], *hubs["sequence"]]) for token in tokens]


def v2_first_hubs(model, fields, events):
    if hasattr(model.initial_hubs["fields"], "mlp"):
        hubs = list(mlp(model.initial_hubs["fields"].mlp, torch.cat(fields)).split(8))
        of_behaviors = [
            sum((mlp(phi, step) for step in steps), torch.zeros(8)) / (len(steps) or 1)
            for phi, steps in zip(model.initial_hubs["sequence"].typed, events.values())
        ]
        return {"fields": hubs, "sequence": of_behaviors}
    learned = {group: list(model.initial_hubs[group].learned.weight) for group in ("fields", "sequence")}
    if model.initial_hubs["fields"].kind == "random":
        return learned
    means = [sum(steps, torch.zeros(8)) / (len(steps) or 1) for steps in events.values()]
    return {
        "fields": [hub + sum(fields) / len(fields) for hub in learned["fields"]],
        "sequence": add(learned["sequence"], means),
    }


def v2_views(aggregation, queries, tokens):
    """What the fusion of each query gets: three views concatenated or summed, or one view of all tokens."""
    if "all" in aggregation.views:
        return attend(aggregation.views["all"], queries, [token for group in tokens.values() for token in group])
    views = zip(*(attend(aggregation.views[source], queries, tokens[source]) for source in tokens))
    return [torch.cat(z) if aggregation.concatenates else sum(z) for z in views]


def v2_reference(model, batch, row):
    c, events, t = groups_of(model, batch, row)
    tokens = {"tasks": t, "fields": c, "sequence": events["watch"] + events["like"]}
    shared = model.initial_hubs["tasks"].shared
    hubs = {"tasks": t + ([] if shared is None else list(shared.weight))}
    if "fields" in model.initial_hubs:  # a single block reads no other hubs
        hubs.update(v2_first_hubs(model, c, events))
    for block in model.blocks:
        aggregation, refined = block.aggregation, {}
        for group, query in aggregation.queries.items():
            queries = [dense(query, hub) for hub in hubs[group]]
            update = [dense(aggregation.fuse[group], z) for z in v2_views(aggregation, queries, tokens)]
            refined[group] = [layer_norm(aggregation.norms[group], x) for x in add(hubs[group], update)]
        hubs = refined
        for group, unit in block.broadcast.units.items():
            alpha, beta = mlp(unit.mlp, torch.cat(hubs[group])).split(8)
            norm = block.broadcast.norms[group]
            tokens[group] = [layer_norm(norm, x + x * torch.sigmoid(alpha) + beta) for x in tokens[group]]
    if model.head_input == "all":
        return with_hubs(tokens["tasks"], hubs)
    return hubs["tasks"][: len(t)] if model.head_input == "hub" else tokens["tasks"]


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({"version": "v1"}, v1_reference),
        ({"version": "v2"}, v2_reference),
        ({"version": "v2", "hub_init": "random"}, v2_reference),
        ({"version": "v2", "hub_init": "mean"}, v2_reference),
        ({"version": "v2", "aggregation": "views_sum"}, v2_reference),
        ({"version": "v2", "aggregation": "union"}, v2_reference),
        ({"version": "v2", "broadcast": "none", "head_input": "hub"}, v2_reference),
        ({"version": "v1", "head_input": "all"}, v1_reference),
        ({"version": "v2", "head_input": "all"}, v2_reference),
    ],
    ids=lambda value: ", ".join(value.values()) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_forward_equals_a_loop_over_the_equations(options, reference, num_blocks):
    torch.set_default_dtype(torch.float64)
    try:
        model, batch = build(num_blocks=num_blocks, **options), toy_batch(toy_feature_map(LABELS))
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


@pytest.mark.parametrize(
    ("version", "token_std", "smallest", "largest"),
    [("v2", None, 0.8e-4, 1.2e-4), ("v1", None, 0.05, 1), ("v1", 0.01, 0.008, 0.012), ("v2", 0.01, 0.008, 0.012)],
)
def test_learned_tokens_start_as_small_as_embeddings_in_v2_and_as_large_as_weights_in_v1(
    version, token_std, smallest, largest
):
    torch.manual_seed(0)
    model = INFNet(
        toy_feature_map(LABELS, 50),
        **{**MODEL_ARGUMENTS, **SMALL, "embedding_dim": 64, "version": version, "token_std": token_std},
    )
    tokens = [model.task_tokens, model.initial_hubs["tasks"].shared, model.event_tokens.positions]
    assert [token is None for token in tokens] == [False, False, version == "v1"]
    for token in filter(None, tokens):
        assert smallest < token.weight.std() < largest


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


def test_without_hubs_a_block_is_torchs_transformer_layer():
    model, batch = build(aggregation="all_to_all", num_heads=2), toy_batch(toy_feature_map(LABELS))
    seen = []
    model.blocks[0].register_forward_hook(lambda _, inputs, out: seen.append((inputs, out[0])))
    predict(model, batch)
    (tokens, _, masks), after = seen[0]
    layer = model.blocks[0].aggregation
    attention = layer.views["all"]
    reference = torch.nn.TransformerEncoderLayer(8, 2, dim_feedforward=32, dropout=0.0, batch_first=True)
    projections = torch.cat([attention.query.weight, attention.key.weight, attention.value.weight])
    biases = torch.cat([attention.query.bias, torch.zeros(8), attention.value.bias])
    parts = {"self_attn.out_proj": attention.out, "linear1": layer.ffn[0], "linear2": layer.ffn[2]}
    parts.update({"norm1": layer.norm_attention, "norm2": layer.norm_ffn})
    weights = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    reference.load_state_dict({**weights, "self_attn.in_proj_weight": projections, "self_attn.in_proj_bias": biases})
    x = torch.cat(list(tokens.values()), dim=1)
    real = [
        torch.ones(group.shape[:2], dtype=torch.bool) if masks[g] is None else masks[g] for g, group in tokens.items()
    ]
    with torch.no_grad():  # in training mode: the inference path leaves padded tokens out
        expected = reference(x, src_key_padding_mask=~torch.cat(real, dim=1))
    torch.testing.assert_close(torch.cat(list(after.values()), dim=1), expected, atol=1e-5, rtol=0)


def test_without_aggregation_the_head_reads_the_task_token_and_the_first_hubs():
    model, batch = build(aggregation="none"), toy_batch(toy_feature_map(LABELS))
    out, first = predict(model, batch), model.initial_hubs
    with torch.no_grad():
        for row in (0, 1, 4):
            fields, events, tasks = groups_of(model, batch, row)
            hubs = v2_first_hubs(model, fields, events)
            assert set(first) == set(hubs)
            pooled = torch.cat(hubs["fields"] + hubs["sequence"])
            expected = [torch.sigmoid(mlp(h.mlp, torch.cat([t, pooled]))) for h, t in zip(model.heads.towers, tasks)]
            torch.testing.assert_close(out[row], torch.cat(expected), atol=1e-5, rtol=0)


def crossed(model, fields, events):
    """``Gating(W (z + z * (U V z + b)))`` of one row, flattened; z are the field tokens and each behaviour's mean."""
    layers = model.crosses
    z = torch.cat([*fields, *(sum(steps, torch.zeros(8)) / (len(steps) or 1) for steps in events.values())])
    z = z + z * dense(layers.cross.up, layers.cross.down.weight @ z)
    tokens = dense(layers.compress, z).split(8)
    gates = [dense(layers.gate.mlp[2], torch.nn.functional.silu(dense(layers.gate.mlp[0], token))) for token in tokens]
    return torch.cat([token * torch.sigmoid(gate) for token, gate in zip(tokens, gates)])


@pytest.mark.parametrize("options", [{"version": "v1", "head_input": "all"}, {"version": "v2"}], ids=["v1", "v2"])
def test_heads_read_the_cross_beside_what_they_read_without_it(options):
    model, batch = build(cross_rank=5, **options), toy_batch(toy_feature_map(LABELS))
    out, reference = predict(model, batch), v1_reference if options["version"] == "v1" else v2_reference
    with torch.no_grad():
        for row in (0, 1, 4):
            fields, events, _ = groups_of(model, batch, row)
            inputs = [torch.cat([x, crossed(model, fields, events)]) for x in reference(model, batch, row)]
            expected = [torch.sigmoid(mlp(h.mlp, x)) for h, x in zip(model.heads.towers, inputs)]
            torch.testing.assert_close(out[row], torch.cat(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"task_blind": True}], ids=["a head's own input", "one input of all heads"])
def test_heads_that_do_not_weigh_the_cross_predict_as_without_it(options):
    plain, model, batch = build(**options), build(cross_rank=5, **options), toy_batch(toy_feature_map(LABELS))
    assert not any(name.startswith("crosses") for name in plain.state_dict())
    weights = plain.state_dict()
    for name, weight in model.state_dict().items():
        if name.endswith("mlp.0.weight") and name.startswith("heads"):  # columns of the cross are the last ones
            weights[name] = torch.nn.functional.pad(weights[name], (0, weight.shape[1] - weights[name].shape[1]))
        weights.setdefault(name, weight)
    model.load_state_dict(weights)
    torch.testing.assert_close(predict(model, batch), predict(plain, batch))


EXPERIMENTS = [expid for expid in yaml.safe_load((CONFIG / "model_config.yaml").read_text()) if expid != "Base"]
ABLATED = {f"INFNet_{version}_kuairand_pure_window": version for version in ("v1", "v2")}
EXTENDED, AVERAGED = "INFNet_v1_kuairand_pure_window_extended", "INFNet_v1_kuairand_pure_window_ema"
ABLATIONS = [
    (base, expid)
    for base in ABLATED
    for expid in EXPERIMENTS
    if expid.startswith(f"{base}_") and not expid.startswith((EXTENDED, AVERAGED))
]


def test_every_ablation_of_the_papers_is_there():
    assert len([base for base, _ in ABLATIONS if ABLATED[base] == "v1"]) == 3
    assert len([base for base, _ in ABLATIONS if ABLATED[base] == "v2"]) == 8


@pytest.mark.parametrize(("base", "expid"), ABLATIONS, ids=[expid for _, expid in ABLATIONS])
def test_an_ablation_changes_the_architecture_and_nothing_else(base, expid):
    whole, ablated = config.load(CONFIG, base), config.load(CONFIG, expid)
    changes = {key: value for key, value in ablated.items() if whole.get(key) != value and key != "model_id"}
    assert {**whole, **changes, "model_id": expid} == ablated
    assert changes.keys() <= {"aggregation", "broadcast", "head_input", "hub_init", "task_blind"}
    batch, version = toy_batch(toy_feature_map(LABELS)), ABLATED[base]
    predictions = [predict(build(version=version, **options), batch) for options in ({}, changes)]
    assert (predictions[0] - predictions[1]).abs().max() > 1e-3


def test_what_goes_beyond_the_paper_can_be_left_out_one_by_one():
    extended = config.load(CONFIG, EXTENDED)
    without = {"head_token": {"head_input": "token"}, "no_reset": {"reset_embeddings": False}}
    for name, change in without.items():
        expid = f"{EXTENDED}_{name}"
        assert config.load(CONFIG, expid) == {**extended, **change, "model_id": expid} != extended
    crossed = config.load(CONFIG, f"{EXTENDED}_cross")
    without_cross = {**crossed, "cross_rank": None, "model_id": f"{EXTENDED}_cross_no_cross"}
    assert config.load(CONFIG, f"{EXTENDED}_cross_no_cross") == without_cross != crossed
    compared = config.load(CONFIG, "INFNet_v1_amazon_sports_din_softmax_holdout")
    ablated = "INFNet_v1_amazon_sports_din_softmax_no_softmax_holdout"
    assert config.load(CONFIG, ablated) == {**compared, "target_softmax": None, "model_id": ablated} != compared


CHANGES = {
    "target_matches": True,
    "target_attention": [6],
    "target_softmax": 0.1,
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
    "token_std": 0.2,
    "bgu_expansion": 0,
    "residual": False,
    "head_input": "both",
    "cross_rank": 5,
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
        ({"hubs_per_behavior": 0}, "hubs_per_behavior must be a whole number of at least 1; got 0"),
        ({"cross_rank": 0}, "cross_rank must be a whole number of at least 1; got 0"),
        ({"num_blocks": 0}, "num_blocks must be a whole number of at least 1; got 0"),
        ({"token_std": 0}, "token_std must be a number above 0; got 0"),
        ({"token_std": "small"}, "token_std must be a number above 0; got 'small'"),
        ({"bgu_expansion": -1}, "bgu_expansion must be a whole number of at least 1; got -1"),
        (
            {"aggregation": "hubs"},
            "aggregation must be one of cross, views, views_sum, union, all_to_all, none; got 'hubs'",
        ),
        ({"broadcast": "film"}, "broadcast must be one of pgu, bgu, none; got 'film'"),
        ({"hub_init": "zero"}, "hub_init must be one of mlp, mean, random; got 'zero'"),
        ({"num_heads": 3}, "num_heads must divide dim; got num_heads=3, dim=8"),
        ({"broadcast": "none"}, "set head_input='hub'"),
        ({"version": "v1", "head_input": "hub"}, "head_input='hub' needs v2's task hubs"),
        ({"head_input": "all", "aggregation": "all_to_all"}, "head_input='all' adds hubs to the task tokens"),
        ({"head_input": "all", "aggregation": "none"}, "got aggregation='none', task_blind=False"),
        ({"head_input": "all", "task_blind": True}, "task_blind=True"),
        ({"gate_hubs": "previous"}, "gate_hubs='previous' is v1's formula"),
        ({"aggregation": "all_to_all", "task_blind": True}, "use another aggregation"),
        ({"behaviors": {"share": ["share_item"]}}, "'share_item', which is not a sequence"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError) as error:
        build(**options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_field_hubs": 9}, "num_field_hubs=9 exceeds the 4 field tokens; set it to at most 4"),
        ({"hubs_per_behavior": 9}, "hubs_per_behavior=9 exceeds the 8 events; set it to at most 8"),
    ],
)
def test_more_hubs_than_tokens_is_a_warning(options, message):
    with pytest.warns(UserWarning, match=message):
        build(**options)


def test_as_many_hubs_as_tokens_and_more_task_hubs_than_tasks_are_fine(recwarn):
    build(num_field_hubs=4, hubs_per_behavior=8, num_task_hubs=4)
    assert not recwarn.list


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


def test_blocks_in_which_no_task_reads_have_no_map():
    model = build(version="v2", broadcast="none", head_input="all")
    assert model.attention_maps(toy_batch(toy_feature_map(LABELS))) == {}


def test_attention_readout_follows_the_attention():
    """Events of one behaviour that the tasks cannot tell from padding get no weight; all of it goes to the other."""
    model, batch = build(version="v1"), toy_batch(toy_feature_map(LABELS))
    keep = (batch["watch_item"] != 0).any(dim=1)
    batch = {name: values[keep] for name, values in batch.items()}
    batch["like_item"] = torch.zeros_like(batch["like_item"])
    weights, _, _ = model.attention_maps(batch)["tasks over inputs, block 1"]
    assert weights[:, 4] == pytest.approx([1, 1, 1], abs=1e-5)
    assert weights[:, 5] == pytest.approx([0, 0, 0], abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"version": "v1", "cross_rank": 5}], ids=["plain", "cross"])
def test_forward_compiles_without_graph_breaks(options):
    model, batch = build(**options), toy_batch(toy_feature_map(LABELS))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(batch)["like_pred"], model(batch)["like_pred"])

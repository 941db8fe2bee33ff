"""Every layer against a plain loop in float64, and the invariances that its users rely on."""

import math

import pytest
import torch
from flowctr import layers
from flowctr.layers.gating import GATING_KINDS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy import BEHAVIORS, VOCABULARY, toy_batch, toy_feature_map

B, T, N, D, H = 4, 6, 3, 8, 2


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def random_mask():
    mask = torch.rand(B, T) < 0.6
    mask[0] = False
    mask[1] = True
    return mask


def linear(module, vector):
    """A Linear layer written out."""
    bias = module.bias if module.bias is not None else torch.zeros(module.out_features)
    return torch.stack([sum(w * v for w, v in zip(row, vector)) + b for row, b in zip(module.weight, bias)])


def mlp(sequential, vector):
    for module in sequential:
        vector = linear(module, vector) if isinstance(module, nn.Linear) else module(vector)
    return vector


@given(st.lists(st.lists(st.integers(0, 5), min_size=5, max_size=5), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_right_align_keeps_the_real_events_in_order(rows):
    ids = torch.tensor(rows)
    aligned = layers.right_align(ids, ids != 0).tolist()
    for row, out in zip(rows, aligned):
        real = [value for value in row if value]
        assert out == [0] * (5 - len(real)) + real


def test_masked_mean_of_real_steps_and_zeros_for_none():
    x, mask = torch.randn(B, T, D), random_mask()
    out = layers.masked_mean(x, mask)
    for row in range(B):
        real = [x[row, t] for t in range(T) if mask[row, t]]
        expected = sum(real) / len(real) if real else torch.zeros(D)
        torch.testing.assert_close(out[row], expected)


def rotated(vector, position):
    half = len(vector) // 2
    out = vector.clone()
    for i in range(half):
        angle = torch.tensor(position * 10000.0 ** (-i / half), dtype=torch.float32)
        cos, sin = angle.cos().double(), angle.sin().double()
        out[i] = vector[i] * cos - vector[i + half] * sin
        out[i + half] = vector[i] * sin + vector[i + half] * cos
    return out


def test_rotate_turns_channel_pairs():
    x, positions = torch.randn(B, H, T, D), torch.randint(0, 9, (B, T))
    out = layers.rotate(x, positions)
    for row in range(B):
        for step in range(T):
            expected = rotated(x[row, 1, step], positions[row, step].item())
            torch.testing.assert_close(out[row, 1, step], expected, rtol=1e-6, atol=1e-6)


def test_rotary_products_depend_on_the_distance_only():
    q, k = torch.randn(1, 1, 1, D), torch.randn(1, 1, 1, D)

    def product(i, j):
        return (layers.rotate(q, torch.tensor([[i]])) * layers.rotate(k, torch.tensor([[j]]))).sum().item()

    assert product(3, 1) == pytest.approx(product(53, 51), abs=1e-5)
    assert product(3, 1) != pytest.approx(product(3, 2), abs=1e-3)


@pytest.mark.parametrize("rotary", ["", "queries", "queries and tokens"])
@pytest.mark.parametrize("num_queries", [1, 3, 4])  # few of them are computed in another order
def test_attention_equals_a_loop(num_queries, rotary):
    attention = layers.MultiHeadAttention(D, H)
    queries, tokens, mask = torch.randn(B, num_queries, D), torch.randn(B, T, D), random_mask()
    positions = (
        2 + torch.arange(num_queries).expand(B, -1) if "queries" in rotary else None,
        torch.randint(0, 9, (B, T)) if "tokens" in rotary else None,
    )
    out, weights = attention(queries, tokens, mask, *positions), attention.weights(queries, tokens, mask, *positions)
    width = D // H
    for row in range(B):
        keys = [t for t in range(T) if mask[row, t]]
        for n in range(num_queries):
            heads = []
            for h in range(H):
                cut = slice(h * width, (h + 1) * width)
                q = linear(attention.query, queries[row, n])[cut]
                ks = {t: linear(attention.key, tokens[row, t])[cut] for t in keys}
                if "queries" in rotary:
                    q = rotated(q, positions[0][row, n].item())
                if "tokens" in rotary:
                    ks = {t: rotated(k, positions[1][row, t].item()) for t, k in ks.items()}
                scores = {t: math.exp((q @ k).item() / math.sqrt(width)) for t, k in ks.items()}
                total = sum(scores.values())
                for t in range(T):
                    assert weights[row, h, n, t].item() == pytest.approx(scores.get(t, 0.0) / (total or 1), abs=1e-6)
                values = [scores[t] / total * linear(attention.value, tokens[row, t])[cut] for t in keys]
                heads.append(sum(values) if keys else torch.zeros(width))
            expected = linear(attention.out, torch.cat(heads)) if keys else torch.zeros(D)
            torch.testing.assert_close(out[row, n], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tokens", [T, layers.attention.SHORT + 1])
def test_compiled_attention_is_the_same_over_few_and_many_tokens(tokens):
    attention = layers.MultiHeadAttention(D, H)
    x, mask = torch.randn(B, tokens, D), torch.rand(B, tokens) < 0.7
    mask[0] = False
    compiled_code = []

    def backend(graph, _):
        compiled_code.append(graph.code)
        return graph.forward

    torch.testing.assert_close(torch.compile(attention, backend=backend)(x, x, mask), attention(x, x, mask))
    assert ["scaled_dot_product_attention" in code for code in compiled_code] == [tokens > layers.attention.SHORT]


def test_attention_ignores_what_padded_tokens_hold():
    attention, mask = layers.MultiHeadAttention(D, H), random_mask()
    queries, tokens = torch.randn(B, N, D), torch.randn(B, T, D)
    noise = torch.randn(B, T, D) * ~mask.unsqueeze(-1)
    torch.testing.assert_close(attention(queries, tokens, mask), attention(queries, tokens + noise, mask))


def test_pooling_reads_with_its_own_queries():
    pooling, tokens, mask = layers.AttentionPooling(2, D, H), torch.randn(B, T, D), random_mask()
    expected = pooling.attention(torch.stack([pooling.queries.weight] * B), tokens, mask)
    torch.testing.assert_close(pooling(tokens, mask), expected)


def test_record_attention_sees_each_module_and_leaves_none_behind():
    model = nn.ModuleDict({"pool": layers.AttentionPooling(2, D, H)})
    tokens, mask = torch.randn(B, T, D), random_mask()
    with layers.record_attention(model) as recorded:
        model["pool"](tokens, mask)
    queries = model["pool"].queries(B)
    expected = model["pool"].attention.weights(queries, tokens, mask).mean(dim=1)
    assert list(recorded) == ["pool.attention"]
    torch.testing.assert_close(recorded["pool.attention"], expected)
    recorded.clear()
    model["pool"](tokens, mask)
    assert recorded == {}


@pytest.mark.parametrize("kind", GATING_KINDS)
def test_gating_equals_its_formula(kind):
    gating, y = layers.Gating(D, kind), torch.randn(B, N, D)
    out = gating(y)
    forms = {
        "self": lambda v, m: v / (1 + (-m).exp()),
        "identity": lambda v, m: v * m,
        "tanh": lambda v, m: (v * m).tanh(),
        "sigmoid": lambda v, m: 1 / (1 + (-v * m).exp()),
    }
    for row in range(B):
        for n in range(N):
            torch.testing.assert_close(out[row, n], forms[kind](y[row, n], mlp(gating.mlp, y[row, n])))


def test_lce_mixes_tokens_not_channels():
    lce, x = layers.LinearCompressedEmbedding(N, 5), torch.randn(B, N, D)
    out = lce(x)
    for m in range(5):
        torch.testing.assert_close(out[:, m], sum(lce.mix.weight[m, n] * x[:, n] for n in range(N)))


def test_masknet_equals_its_formula_and_starts_open():
    masknet, x = layers.MaskNet(D, 4), torch.randn(B, T, D)
    expected = linear(masknet.lce, x[2, 3] * mlp(masknet.mask, x[2, 3]))
    torch.testing.assert_close(masknet(x)[2, 3], expected)
    assert torch.equal(masknet.mask[-1].bias, torch.ones(D))


@pytest.mark.parametrize("kind", ["literal", "hyper"])
def test_pffn_applies_one_map_per_sample(kind):
    pffn, x_sum, s = layers.PersonalizedFFN(N, D, kind), torch.randn(B, N, D), torch.randn(B, T, D)
    out = pffn(x_sum, s)
    for row in range(B):
        if kind == "literal":
            w = sum(torch.outer(x_sum[row, n], pffn.weight[n]) for n in range(N))
        else:
            w = mlp(pffn.hyper, x_sum[row].flatten()).reshape(D, D)
        for t in range(T):
            torch.testing.assert_close(out[row, t], w @ s[row, t])


def test_dot_cross_and_dhen_equal_their_formulas():
    z = torch.randn(B, N, D)
    pairs = [(i, j) for i in range(N) for j in range(i + 1, N)]
    dots = torch.stack([(z[:, i] * z[:, j]).sum(-1) for i, j in pairs], dim=1)
    torch.testing.assert_close(layers.pairwise_dots(z), dots)

    dhen = layers.DHENLayer(N, D, cross_rank=2)
    for row in range(B):
        dot = linear(dhen.dot.to_tokens, dots[row]).reshape(N, D)
        flat = z[row].flatten()
        cross = (flat * linear(dhen.dcn.up, linear(dhen.dcn.down, flat))).reshape(N, D)
        ensemble = dot + cross + z[row]
        centred = ensemble - ensemble.mean(dim=-1, keepdim=True)
        expected = centred / (centred.pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(dhen(z)[row], expected)


def test_dhen_with_silent_modules_is_the_norm_of_its_input():
    dhen, z = layers.DHENLayer(N, D, cross_rank=2), torch.randn(B, N, D)
    for parameter in [*dhen.dot.parameters(), *dhen.dcn.parameters()]:
        nn.init.zeros_(parameter)
    torch.testing.assert_close(dhen(z), dhen.norm(z))


def test_heads_are_separate_and_one_label_is_also_y_pred():
    x = torch.randn(B, D)
    two = layers.TaskHeads(D, ["a", "b"], [5], [nn.Sigmoid(), nn.Identity()])
    out = two(x)
    assert set(out) == {"a_pred", "b_pred"}
    for index, (label, activation) in enumerate([("a", torch.sigmoid), ("b", lambda v: v)]):
        torch.testing.assert_close(out[f"{label}_pred"][1], activation(mlp(two.towers[index].mlp, x[1])))
    one = layers.TaskHeads(D, ["a"], [5], [nn.Sigmoid()])(x)
    assert torch.equal(one["y_pred"], one["a_pred"])


def embedded(tokens, name, index):
    return tokens.embedding.embedding_layers[name].weight[index]


def test_tokens_are_what_the_tables_hold():
    feature_map = toy_feature_map()
    tokens = layers.FeatureTokens(feature_map, D, BEHAVIORS, "partial(nn.init.normal_, std=0.5)")
    batch = toy_batch(feature_map)
    fields, events, masks = tokens(batch)
    assert tokens.field_names == ["dense", "item", "author", "user"]
    for row in range(len(fields)):
        values = torch.stack([batch["age"][row], batch["hour"][row]]).double()
        expected = [linear(tokens.dense, values)]
        expected += [embedded(tokens, name, batch[name][row]) for name in ("item", "author", "user")]
        torch.testing.assert_close(fields[row], torch.stack(expected))
        for behavior, columns in BEHAVIORS.items():
            real = [t for t in range(8) if batch[columns[0]][row, t] != 0]
            steps = [torch.cat([embedded(tokens, c, batch[c][row, t]) for c in columns]) for t in real]
            assert masks[behavior][row].tolist() == [False] * (8 - len(real)) + [True] * len(real)
            if steps:
                torch.testing.assert_close(events[behavior][row, 8 - len(real) :], torch.stack(steps))
            assert events[behavior][row, : 8 - len(real)].abs().sum() == 0
    means = [layers.masked_mean(events[b], masks[b]).unflatten(1, (-1, D)) for b in BEHAVIORS]
    torch.testing.assert_close(tokens.append_pooled(fields, events, masks), torch.cat([fields, *means], dim=1))


@pytest.mark.parametrize("padding", ["pre", "post"])
def test_target_matches_count_the_events_that_have_the_target(padding):
    feature_map = toy_feature_map()
    tokens = layers.FeatureTokens(feature_map, D, BEHAVIORS, target_matches=True)
    batch = toy_batch(feature_map, rows=200, padding=padding)
    for name in ("item", "author"):  # as many matches as there are in earnest
        column = batch[f"watch_{name}"]
        picked = column.gather(1, (torch.arange(200) % 8)[:, None])[:, 0]
        batch[name] = torch.where((torch.arange(200) % 3 > 0) & (picked > 0), picked, batch[name])
    rare = VOCABULARY - 1  # one id for all that are rare
    batch["item"][1] = batch["watch_item"][1, -1] = batch["watch_item"][1, 0] = rare
    fields, _, _ = tokens(batch)
    assert tokens.field_names == ["dense", "item", "author", "user", "watch matches", "like matches"]
    assert fields.shape[1] == tokens.num_fields == 6
    matched = 0
    for row in range(200):
        for place, columns in zip((4, 5), BEHAVIORS.values()):
            real = [t for t in range(8) if any(batch[column][row, t] for column in columns)]
            counts, latest = [math.log1p(len(real))], []
            for column in columns:
                target = batch[column.partition("_")[2]][row]
                ages = [len(real) - k for k, t in enumerate(real) if batch[column][row, t] == target != rare]
                matched += len(ages) > 1
                counts.append(math.log1p(len(ages)))
                latest.append(1 / min(ages) if ages else 0)
            expected = linear(tokens.matches[place - 4].linear, torch.tensor(counts + latest, dtype=torch.float64))
            torch.testing.assert_close(fields[row, place].double(), expected, atol=1e-6, rtol=1e-5)
    assert matched > 10


@pytest.mark.parametrize("padding", ["pre", "post"])
def test_target_attention_sums_the_events_with_dins_weights(padding):
    feature_map = toy_feature_map()
    initializer = "partial(nn.init.normal_, std=1)"
    tokens = layers.FeatureTokens(feature_map, D, BEHAVIORS, initializer, target_attention=[6]).eval()
    batch = toy_batch(feature_map, rows=30, padding=padding)
    fields, _, _ = tokens(batch)
    own = [column for columns in BEHAVIORS.values() for column in columns]
    assert tokens.field_names == ["dense", "item", "author", "user", *(f"{column} attended to" for column in own)]
    assert fields.shape[1] == tokens.num_fields == 4 + len(own)
    table = {name: embedding.weight for name, embedding in tokens.embedding.embedding_layers.items()}
    for row in range(30):
        place = 4
        for columns, attention in zip(BEHAVIORS.values(), tokens.attentions):
            names = [column.partition("_")[2] for column in columns]
            target = torch.cat([table[name][batch[name][row]] for name in names])
            steps = [t for t in range(8) if any(batch[column][row, t] for column in columns)]
            events = [torch.cat([table[c][batch[c][row, t]] for c in columns]) for t in steps]
            inputs = [torch.cat([target, e, target - e, target * e]) for e in events]
            weights = attention.attention_layer(torch.stack(inputs))[:, 0].softmax(dim=0) if events else []
            expected = sum((w * e for w, e in zip(weights, events)), torch.zeros(len(columns) * D))
            for part in expected.split(D):
                torch.testing.assert_close(fields[row, place], part, atol=1e-6, rtol=1e-5)
                place += 1


@pytest.mark.parametrize("units", [32, "32", [], [0], [8, "4"]])
def test_target_attention_lists_its_hidden_units(units):
    with pytest.raises(
        ValueError, match=r"target_attention=.* must list the hidden units of its network, such as \[32\]"
    ):
        layers.FeatureTokens(toy_feature_map(), D, BEHAVIORS, target_attention=units)


def test_targets_are_the_categorical_fields_of_a_table_whoever_owns_it():
    feature_map = toy_feature_map()
    feature_map.features["item"]["share_embedding"] = "watch_item"
    del feature_map.features["watch_item"]["share_embedding"]
    feature_map.features["like_item"]["share_embedding"] = "watch_item"
    feature_map.features["item"]["oov_idx"] = 3  # pretrained ids come behind it
    behaviors = {"items": ["like_item"]}  # a name that a module's own attribute has
    tokens = layers.FeatureTokens(feature_map, D, behaviors, target_matches=True)
    assert tokens.targets == {"items": {"like_item": "item"}}  # not the pooled watch_item, which owns the table
    batch = toy_batch(feature_map)
    matched = batch["like_item"].max(dim=1).values
    batch["like_item"][batch["like_item"] == 3] = 4
    for target, matches in ((matched, matched > 3), (torch.full_like(matched, 3), torch.zeros(len(matched)).bool())):
        batch["item"] = torch.where(matched > 3, target, 3)
        found = tokens._matches("items", {"like_item": batch["like_item"]}, batch).any(dim=1)[:, 0]
        assert torch.equal(found, matches)


@pytest.mark.parametrize("padding", ["pre", "post"])
def test_target_softmax_tells_a_target_from_the_others_of_the_batch(padding):
    feature_map = toy_feature_map()
    initializer = "partial(nn.init.normal_, std=1)"
    tokens = layers.FeatureTokens(feature_map, D, BEHAVIORS, initializer, target_softmax=0.3)
    batch = toy_batch(feature_map, rows=30, padding=padding)
    batch["item"], batch["author"] = batch["item"] % 3 + 1, batch["author"] % 2 + 1  # some rows share target or item
    fields, _, _ = tokens(batch)
    assert tokens.field_names == ["dense", "item", "author", "user", "histories and target"]
    table = {name: embedding.weight for name, embedding in tokens.embedding.embedding_layers.items()}
    users, items = [], []
    for row in range(30):
        parts = []
        for columns in BEHAVIORS.values():
            steps = [t for t in range(8) if any(batch[column][row, t] for column in columns)]
            events = [torch.cat([table[c][batch[c][row, t]] for c in columns]) for t in steps]
            nothing = torch.zeros(len(columns) * D)
            parts += [sum(events, nothing) / max(len(events), 1), events[-1] if events else nothing]
        user = tokens.towers.history.weight @ torch.cat(parts)
        item = tokens.towers.target.weight @ torch.cat([table[name][batch[name][row]] for name in ("item", "author")])
        users.append(user / user.norm() if user.norm() > 0 else user)
        items.append(item / item.norm())
        token = tokens.towers.token.weight[:, 0] * (users[row] @ items[row]) + tokens.towers.token.bias
        torch.testing.assert_close(fields[row, -1], token, atol=1e-5, rtol=1e-5)
    labels = [torch.tensor([[cut > k % 4] for k in range(30)]).float() for cut in (1, 2, 0)]
    labels[0][3], labels[1][0], labels[1][1] = 0.4, 0.6, torch.nan  # one half divides; what is not known is no positive
    expected = []
    for label in labels:
        losses = []
        for i in range(30):
            if label[i] > 0.5:
                same = [
                    batch["item"][j] == batch["item"][i] and batch["author"][j] == batch["author"][i] for j in range(30)
                ]
                others = [j for j in range(30) if j == i or not same[j]]
                scores = torch.stack([users[i] @ items[j] / 0.1 for j in others])
                losses.append(-scores.log_softmax(dim=0)[others.index(i)])
        expected.append(sum(losses) / max(len(losses), 1))
    outputs = tokens.take_compared()
    loss, expected = tokens.target_loss(outputs, labels), 0.3 * sum(expected) / 3
    torch.testing.assert_close(loss, expected)
    learning = [table[c] for c in ("item", "author")] + [tokens.towers.history.weight, tokens.towers.target.weight]
    gradients = torch.autograd.grad(loss, learning)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, learning)):
        torch.testing.assert_close(gradient, reference)
        assert gradient.abs().max() > 1e-3
    assert tokens.take_compared() == {}  # handed over once
    tokens.eval()(batch)
    assert tokens.take_compared() == {} and tokens.target_loss({}, labels) == 0


def test_target_softmax_is_as_exact_as_float32_under_autocast():
    feature_map = toy_feature_map()
    initializer = "partial(nn.init.normal_, std=1)"
    tokens = layers.FeatureTokens(feature_map, D, BEHAVIORS, initializer, target_softmax=0.3).float()
    with torch.autocast("cpu", torch.bfloat16):
        tokens(toy_batch(feature_map))
    u, v, _ = tokens.take_compared()["compared"]
    assert u.dtype == v.dtype == torch.float32
    torch.testing.assert_close(v.norm(dim=1), torch.ones(len(v), dtype=v.dtype))


@pytest.mark.parametrize("weight", [0, -0.1, "0.1", True, math.inf])
def test_target_softmax_is_a_weight(weight):
    with pytest.raises(ValueError, match=f"target_softmax={weight!r} must be a weight above 0, such as 0.1"):
        layers.FeatureTokens(toy_feature_map(), D, BEHAVIORS, target_softmax=weight)


@pytest.mark.parametrize("option", [{"target_matches": True}, {"target_attention": [4]}, {"target_softmax": 0.1}])
def test_the_target_needs_a_history_that_shares_a_table(option):
    feature_map = toy_feature_map()
    for spec in feature_map.features.values():
        if spec["type"] == "sequence":
            del spec["share_embedding"]
    with pytest.raises(ValueError, match=f"{next(iter(option))}: no sequence of data set 'toy' shares the embedding"):
        layers.FeatureTokens(feature_map, D, BEHAVIORS, **option)


def test_shared_tables_are_shared_whatever_the_order_of_the_feature_map():
    feature_map = toy_feature_map()
    feature_map.features = type(feature_map.features)(reversed(feature_map.features.items()))
    tables = layers.FeatureTokens(feature_map, D, BEHAVIORS).embedding.embedding_layers
    assert tables["watch_item"] is tables["item"] and tables["like_item"] is tables["item"]
    assert tables["item"].weight.std().item() == pytest.approx(1e-4, rel=0.3)


def test_a_linear_encoder_of_a_history_is_kept_and_a_pooling_one_is_not():
    feature_map = toy_feature_map()
    feature_map.features["watch_item"]["feature_encoder"] = f"nn.Linear({D}, {D}, bias=False)"
    feature_map.features["like_item"]["feature_encoder"] = "layers.MaskedSumPooling()"
    tokens = layers.FeatureTokens(feature_map, D, BEHAVIORS)
    batch = toy_batch(feature_map)
    _, events, masks = tokens(batch)
    assert list(tokens.embedding.feature_encoders) == ["watch_item"]
    row = int(masks["watch"].sum(dim=1).argmax())
    latest = batch["watch_item"][row][batch["watch_item"][row] != 0][-1]
    expected = linear(tokens.embedding.feature_encoders["watch_item"], embedded(tokens, "item", latest))
    torch.testing.assert_close(events["watch"][row, -1, :D], expected)


def test_columns_that_share_a_table_take_its_width_and_find_its_owner():
    feature_map = toy_feature_map()
    feature_map.features["item"]["embedding_dim"] = 3
    feature_map.features["like_item"]["share_embedding"] = "watch_item"  # which itself shares with item
    tokens = layers.FeatureTokens(feature_map, D, BEHAVIORS)
    tables = tokens.embedding.embedding_layers
    assert tables["like_item"] is tables["watch_item"] is tables["item"] and tables["item"].embedding_dim == 3
    _, events, _ = tokens(toy_batch(feature_map))
    assert events["watch"].shape[-1] == 2 * D

    feature_map.features["watch_item"]["share_embedding"] = "video"
    with pytest.raises(ValueError, match="shares the embedding of 'video', which is not a feature"):
        layers.FeatureTokens(feature_map, D, BEHAVIORS)


def test_columns_outside_the_behaviors_are_pooled_and_widths_resized():
    feature_map = toy_feature_map()
    feature_map.features["user"]["embedding_dim"] = 3
    tokens = layers.FeatureTokens(feature_map, D, {"watch": ["watch_item", "watch_author"]})
    batch = toy_batch(feature_map)
    fields, events, _ = tokens(batch)
    assert list(events) == ["watch"] and tokens.field_names[-1] == "like_item"
    liked = batch["like_item"][5]
    mean = tokens.embedding.embedding_layers["like_item"].weight[liked[liked != 0]].mean(dim=0)
    torch.testing.assert_close(fields[5, -1], mean)
    user = embedded(tokens, "user", batch["user"][5])
    torch.testing.assert_close(fields[5, 3], linear(tokens.resize["user"], user))


@pytest.mark.parametrize(
    ("behaviors", "message"),
    [
        ({"watch": ["watched"]}, "'watched', which is not a sequence"),
        ({"watch": ["user"]}, "'user', which is not a sequence"),
        ({"a": ["like_item"], "b": ["like_item"]}, "named by behaviors 'a' and 'b'"),
        ({"watch": []}, "names no columns"),
        ({"watch": ["watch_item", "like_item"]}, "different max_len: {'watch_item': 8, 'like_item': 9}"),
    ],
)
def test_wrong_behaviors_are_named(behaviors, message):
    feature_map = toy_feature_map()
    feature_map.features["like_item"]["max_len"] = 9
    with pytest.raises(ValueError, match="behavior") as error:
        layers.FeatureTokens(feature_map, D, behaviors)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: layers.MultiHeadAttention(64, 3), "num_heads must divide dim; got num_heads=3, dim=64"),
        (lambda: layers.Gating(D, "relu"), "gating must be one of self, identity, tanh, sigmoid; got 'relu'"),
        (lambda: layers.PersonalizedFFN(N, D, "mlp"), "pffn must be one of literal, hyper; got 'mlp'"),
        (lambda: layers.DotInteraction(1, 1, D), "at least two tokens; got num_inputs=1"),
        (lambda: layers.check_positive(num_layers=0), "num_layers must be a whole number of at least 1; got 0"),
    ],
)
def test_wrong_options_are_named(build, message):
    with pytest.raises(ValueError) as error:
        build()
    assert message in str(error.value)


def test_odd_widths_cannot_be_rotated():
    with pytest.raises(ValueError, match="even width per head; got 3"):
        layers.rotate(torch.randn(1, 1, 2, 3), torch.zeros(1, 2))


def test_heads_widen_half_precision_logits():
    heads = layers.TaskHeads(D, ["a"], [5], [nn.Sigmoid()]).bfloat16()
    assert heads(torch.randn(B, D, dtype=torch.bfloat16))["a_pred"].dtype == torch.float32


def test_the_vocabulary_of_the_toy_data_is_covered():
    """Guards the other tests: ids reach the last row of the tables and row 0 (padding) stays zero."""
    feature_map = toy_feature_map()
    tokens = layers.FeatureTokens(feature_map, D, BEHAVIORS)
    assert toy_batch(feature_map, rows=400)["item"].max() == VOCABULARY - 1
    assert tokens.embedding.embedding_layers["item"].weight[0].abs().sum() == 0

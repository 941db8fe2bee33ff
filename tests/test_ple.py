"""PLE and token-specific maps against plain loops in float64, and what their options must change."""

import pytest
import torch
from flowctr.layers import PLE, PerTokenLinear
from torch import nn

B, K, WIDTH = 4, 3, 6
COUNTS = {"num_tasks": K, "num_levels": 2, "num_experts": 2, "hidden_units": [5, 4]}


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def mixture(logits, experts):
    weights = [logit.exp() for logit in logits]
    return sum(weight * expert for weight, expert in zip(weights, experts)) / sum(weights)


def expert_outputs(experts, x):
    for_each = []
    for block in experts.mlps:
        hidden = x
        for module in block.mlp:
            hidden = module.weight @ hidden + module.bias if isinstance(module, nn.Linear) else hidden.clamp(min=0)
        for_each.append(hidden)
    return for_each


def gate_logits(gate, x):
    (linear,) = gate.logits.mlp
    return linear.weight @ x + linear.bias


def loop_reference(ple, x):
    """The paper's equations for one row: per level, each task's gate over its own and the shared experts."""
    tasks, shared = [x] * K, x
    for number, level in enumerate(ple.levels):
        own = [expert_outputs(level.groups[k], tasks[k]) for k in range(K)]
        common = expert_outputs(level.groups[K], shared)
        if number < len(ple.levels) - 1:
            everything = [expert for experts in own for expert in experts] + common
            shared = mixture(gate_logits(level.gates[K], shared), everything)
        tasks = [mixture(gate_logits(level.gates[k], tasks[k]), own[k] + common) for k in range(K)]
    return torch.stack(tasks)


@pytest.mark.parametrize("num_levels", [1, 2, 3])
def test_ple_equals_a_loop_over_its_equations(num_levels):
    ple, x = PLE(WIDTH, **{**COUNTS, "num_levels": num_levels}), torch.randn(B, WIDTH)
    out = ple(x)
    assert out.shape == (B, K, 4) and ple.output_dim == 4
    for row in range(B):
        torch.testing.assert_close(out[row], loop_reference(ple, x[row]))


def test_a_task_reads_other_tasks_experts_through_the_shared_stream_of_an_earlier_level_only():
    x = torch.randn(B, WIDTH)
    for num_levels, reads_others in ((1, False), (2, True)):
        ple = PLE(WIDTH, **{**COUNTS, "num_levels": num_levels})
        before = ple(x)
        with torch.no_grad():
            for parameter in ple.levels[0].groups[1].parameters():
                parameter.add_(torch.randn_like(parameter))
        after = ple(x)
        assert not torch.equal(after[:, 1], before[:, 1])
        assert (not torch.equal(after[:, 0], before[:, 0])) == reads_others


def test_the_number_of_parameters():
    """Of WIDTH -> 5 -> 4: (3 + 1) * 2 experts and gates of 3 tasks and the shared one; then 4 -> 5 -> 4 without it."""
    expert, upper = (6 * 5 + 5) + (5 * 4 + 4), (4 * 5 + 5) + (5 * 4 + 4)
    gates, upper_gates = 3 * (6 * 4 + 4) + (6 * 8 + 8), 3 * (4 * 4 + 4)
    counted = sum(parameter.numel() for parameter in PLE(WIDTH, **COUNTS).parameters())
    assert counted == 8 * expert + gates + 8 * upper + upper_gates


@pytest.mark.parametrize("num_tasks", [1, 3])
def test_the_loss_reaches_every_parameter(num_tasks):
    ple = PLE(WIDTH, **{**COUNTS, "num_tasks": num_tasks})
    (ple(torch.randn(64, WIDTH)) * torch.randn(num_tasks, 4)).sum().backward()
    assert [name for name, p in ple.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(
    ("option", "value"),
    [("num_levels", 3), ("num_experts", 1), ("hidden_units", [4]), ("activation", "Tanh"), ("batch_norm", True)],
)
def test_every_option_changes_the_function(option, value):
    x = torch.randn(B, WIDTH)
    torch.manual_seed(1)
    plain = PLE(WIDTH, **COUNTS)
    torch.manual_seed(1)
    assert not torch.allclose(plain(x), PLE(WIDTH, **{**COUNTS, option: value})(x))


def test_dropout_acts_while_training_only():
    ple, x = PLE(WIDTH, **COUNTS, dropout=0.5), torch.randn(B, WIDTH)
    assert not torch.equal(ple(x), ple(x))
    assert torch.equal(ple.eval()(x), ple(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_levels": 0}, "num_levels must be a whole number of at least 1; got 0"),
        ({"num_experts": 0}, "num_experts must be a whole number of at least 1; got 0"),
        ({"hidden_units": []}, "experts need at least one layer"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PLE(WIDTH, **{**COUNTS, **options})


@pytest.mark.parametrize("bias", [True, False])
def test_every_token_has_its_own_map(bias):
    layer, x = PerTokenLinear(3, 5, 4, bias), torch.randn(B, 3, 5)
    if bias:
        nn.init.normal_(layer.bias)
    out = layer(x)
    for row in range(B):
        for n in range(3):
            expected = sum(x[row, n, i] * layer.weight[n, i] for i in range(5)) + (layer.bias[n] if bias else 0)
            torch.testing.assert_close(out[row, n], expected)
    assert sum(p.numel() for p in layer.parameters()) == 3 * (5 * 4 + 4 * bias)


def test_maps_of_tokens_are_drawn_as_linear_ones_are():
    """Xavier's variance is that of one token's map, whatever the number of tokens."""
    layer = PerTokenLinear(50, 30, 20)
    assert layer.weight.std().item() == pytest.approx((2 / (30 + 20)) ** 0.5, rel=0.05)
    assert not layer.bias.any()

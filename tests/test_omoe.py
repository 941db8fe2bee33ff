"""OMoE against loops over its equations."""

import pytest
import torch
from flowctr.models.OMoE import OMoE
from flowctr.models.OMoE.OMoE import gram_schmidt
from loops import experts, mixture, mlp, sigmoid
from toy import BEHAVIORS, MODEL_ARGUMENTS, WIDE_INITIALIZER, toy_batch, toy_feature_map

LABELS = ("click", "like")
SMALL = {
    "behaviors": BEHAVIORS,
    "embedding_dim": 4,
    "embedding_initializer": WIDE_INITIALIZER,
    "num_experts": 3,
    "expert_hidden_units": (6, 5),
    "gate_hidden_units": (4,),
    "head_hidden_units": (8,),
}


def build(**options):
    torch.manual_seed(3)
    arguments = {key: value for key, value in MODEL_ARGUMENTS.items() if key != "scenario"}
    return OMoE(toy_feature_map(LABELS), **{**arguments, **SMALL, **options})


def perturbed(model):
    """Gives every bias, zero at the start, something to say."""
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def classical_gram_schmidt(vectors):
    basis = []
    for vector in vectors:
        dots = [sum(a * b for a, b in zip(vector, unit)) for unit in basis]
        rest = [v - sum(dot * unit[i] for dot, unit in zip(dots, basis)) for i, v in enumerate(vector)]
        length = sum(v * v for v in rest) ** 0.5
        basis.append([v / length if length else 0.0 for v in rest])
    return basis


@pytest.mark.parametrize("gate_hidden_units", [(4,), ()])
@pytest.mark.parametrize("orthogonal", [False, True])
def test_predictions_equal_a_loop_over_the_equations(orthogonal, gate_hidden_units):
    model = perturbed(build(orthogonal=orthogonal, gate_hidden_units=gate_hidden_units))
    batch = toy_batch(toy_feature_map(LABELS))
    predictions = model(batch)
    for row, x in enumerate(model.tokens.append_pooled(*model.tokens(batch)).flatten(1).tolist()):
        outputs = experts(model.experts, x)
        if orthogonal:
            outputs = classical_gram_schmidt(outputs)
        h = mixture(model.gate, x, outputs)
        for label, tower in zip(LABELS, model.heads.towers):
            assert predictions[f"{label}_pred"][row].item() == pytest.approx(sigmoid(mlp(tower, h)[0]), abs=1e-9)


def test_all_tasks_read_one_mixture():
    model, batch = perturbed(build()), toy_batch(toy_feature_map(LABELS))
    assert not torch.allclose(model(batch)["click_pred"], model(batch)["like_pred"])
    model.heads.towers[1].load_state_dict(model.heads.towers[0].state_dict())
    assert torch.equal(model(batch)["click_pred"], model(batch)["like_pred"])


def test_gram_schmidt_is_orthonormal_and_keeps_the_span_of_every_prefix():
    vectors = torch.randn(7, 4, 6, dtype=torch.double)
    vectors[:, 2] = vectors[:, 0] + 1e-4 * vectors[:, 2]  # almost a repetition
    units = gram_schmidt(vectors)
    torch.testing.assert_close(
        units @ units.transpose(1, 2), torch.eye(4).double().expand(7, -1, -1), atol=1e-9, rtol=0
    )
    coordinates = vectors @ units.transpose(1, 2)  # (B, E, E)
    torch.testing.assert_close(coordinates, coordinates.tril(), atol=1e-9, rtol=0)
    assert (coordinates.diagonal(dim1=1, dim2=2) > 0).all()
    torch.testing.assert_close(coordinates @ units, vectors)


def test_gram_schmidt_leaves_zeros_and_widens_half_precision():
    vectors = torch.randn(5, 3, 8)
    vectors[0, 1] = 0
    vectors.requires_grad_()
    units = gram_schmidt(vectors)
    assert (units[0, 1] == 0).all()
    assert (units[0, 2] * units[0, 0]).sum().abs() < 1e-6
    units.sum().backward()
    assert torch.isfinite(vectors.grad).all()
    half = gram_schmidt(vectors.detach().bfloat16())
    assert half.dtype == torch.float32
    assert (half[1:] @ half[1:].transpose(1, 2) - torch.eye(3)).abs().max() < 1e-5


def test_dropout_and_batch_norm_reach_experts_gate_and_heads():
    model = build(net_dropout=0.5, batch_norm=True)
    for part in (model.experts.mlps[0], model.gate.logits, model.heads.towers[0]):
        kinds = {type(layer) for layer in part.modules()}
        assert {torch.nn.Dropout, torch.nn.BatchNorm1d} <= kinds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts must be a whole number of at least 1; got 0"),
        ({"expert_hidden_units": []}, r"experts need at least one layer: list its width; got \[\]"),
        ({"orthogonal": True, "num_experts": 6}, r"got num_experts=6, expert_hidden_units=\[6, 5\]"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)

"""STEM against loops over its equations, and what each task's loss trains."""

import pytest
import torch
from flowctr.models.STEM import STEM
from loops import experts, mixture, mlp, sigmoid
from toy import BEHAVIORS, MODEL_ARGUMENTS, WIDE_INITIALIZER, toy_batch, toy_feature_map

LABELS = ("click", "like", "long_view")
SMALL = {
    "behaviors": BEHAVIORS,
    "embedding_dim": 4,
    "embedding_initializer": WIDE_INITIALIZER,
    "num_shared_experts": 2,
    "num_specific_experts": 2,
    "expert_hidden_units": (6, 5),
    "gate_hidden_units": (4,),
    "head_hidden_units": (8,),
}


def build(**options):
    torch.manual_seed(3)
    arguments = {key: value for key, value in MODEL_ARGUMENTS.items() if key != "scenario"}
    model = STEM(toy_feature_map(LABELS), **{**arguments, **SMALL, **options})
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero at the start
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def embedded(tokens, batch):
    return tokens.append_pooled(*tokens(batch)).flatten(1).tolist()


def reference(model, shared, tasks):
    """The equations for one row."""
    for layer in model.layers:
        of_shared = experts(layer.shared_experts, shared)
        of_all = [output for module, x in zip(layer.task_experts, tasks) for output in experts(module, x)] + of_shared
        mixed = [mixture(gate, [a + b for a, b in zip(x, shared)], of_all) for gate, x in zip(layer.task_gates, tasks)]
        if layer.shared_gate is not None:
            shared = mixture(layer.shared_gate, shared, of_all)
        tasks = mixed
    return [sigmoid(mlp(tower, x)[0]) for tower, x in zip(model.heads.towers, tasks)]


@pytest.mark.parametrize("num_layers", [1, 2])
def test_predictions_equal_a_loop_over_the_equations(num_layers):
    model, batch = build(num_layers=num_layers), toy_batch(toy_feature_map(LABELS))
    predictions = model(batch)
    shared = embedded(model.tokens, batch)
    tasks = [embedded(tokens, batch) for tokens in model.task_tokens]
    for row in range(12):
        expected = reference(model, shared[row], [x[row] for x in tasks])
        found = [predictions[f"{label}_pred"][row].item() for label in LABELS]
        assert found == pytest.approx(expected, abs=1e-9)


def specific(model, task):
    """The parameters that belong to one task."""
    modules = [model.task_tokens[task], model.heads.towers[task]]
    for layer in model.layers:
        modules += [layer.task_experts[task], layer.task_gates[task]]
    return [parameter for module in modules for parameter in module.parameters()]


def common(model):
    """The parameters that belong to no task."""
    owned = {id(parameter) for task in range(len(LABELS)) for parameter in specific(model, task)}
    return [parameter for parameter in model.parameters() if id(parameter) not in owned]


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("task", range(3))
def test_a_task_trains_its_own_and_the_shared_parameters_alone(task, num_layers):
    model, batch = build(num_layers=num_layers), toy_batch(toy_feature_map(LABELS), rows=64)
    model(batch)[f"{LABELS[task]}_pred"].sum().backward()
    for other in range(3):
        reached = [p.grad is not None and bool(p.grad.any()) for p in specific(model, other)]
        assert all(reached) if other == task else not any(reached)
    assert all(p.grad.any() for p in common(model))


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_task_reads_what_the_others_have_learned(num_layers):
    model, batch = build(num_layers=num_layers), toy_batch(toy_feature_map(LABELS))
    before = model(batch)["click_pred"]
    with torch.no_grad():
        for table in model.task_tokens[2].embedding.embedding_layers.values():
            table.weight[1:] += torch.randn_like(table.weight[1:])
    assert (model(batch)["click_pred"] - before).abs().min() > 1e-6


def test_the_losses_of_all_tasks_train_their_embeddings_as_each_alone_would():
    """The gradient of a task's tables in the sum of the losses is that of its own loss."""
    model, batch = build(), toy_batch(toy_feature_map(LABELS))
    tables = list(model.task_tokens[1].parameters())
    losses = [model(batch)[f"{label}_pred"].log().mean() for label in LABELS]
    alone = torch.autograd.grad(losses[1], tables, retain_graph=True)
    together = torch.autograd.grad(sum(losses), tables)
    for a, b in zip(alone, together):
        torch.testing.assert_close(a, b)


def test_every_set_of_tables_starts_with_numbers_of_its_own():
    model = build()
    tables = [tokens.embedding.embedding_layers["item"].weight for tokens in (model.tokens, *model.task_tokens)]
    assert len(tables) == 4
    for number, table in enumerate(tables):
        assert table.std() > 0.1
        assert not any(torch.equal(table, other) for other in tables[:number])


@pytest.mark.parametrize("option", ["num_layers", "num_shared_experts", "num_specific_experts"])
def test_counts_are_checked(option):
    with pytest.raises(ValueError, match=f"^{option} must be a whole number of at least 1; got 0"):
        build(**{option: 0})

"""HiNet against loops over its equations, and what each scenario reads."""

import json

import pytest
import torch
from flowctr import experiment
from flowctr.layers import own_scenario
from flowctr.models.HiNet import HiNet
from flowctr.models.HiNet.HiNet import ScenarioExtraction
from loops import experts, mixture, mlp, sigmoid, softmax, weighted_sum
from toy import BEHAVIORS, MODEL_ARGUMENTS, WIDE_INITIALIZER, toy_batch, toy_feature_map

LABELS = ("click", "like")
SMALL = {
    "behaviors": BEHAVIORS,
    "embedding_dim": 4,
    "embedding_initializer": WIDE_INITIALIZER,
    "num_sub_experts": 2,
    "scenario_hidden_units": (4, 3),
    "num_task_experts": 2,
    "task_hidden_units": (5, 4),
    "head_hidden_units": (8,),
}
SCENARIOS = 4
UNSEEN = SCENARIOS + 1


def feature_map():
    """The toy data with few scenarios."""
    toy = toy_feature_map(LABELS)
    toy.features["author"]["vocab_size"] = SCENARIOS + 2
    del toy.features["watch_author"]["share_embedding"]
    return toy


def toy_scenarios(rows=12):
    batch = toy_batch(feature_map(), rows=rows)
    batch["author"] = 1 + torch.arange(rows) % UNSEEN
    return batch


def perturbed(module):
    torch.manual_seed(4)
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):  # zero at the start
            torch.nn.init.normal_(parameter, std=0.3)
    return module.double().eval()


def build(**options):
    torch.manual_seed(3)
    return HiNet(feature_map(), **{**MODEL_ARGUMENTS, **SMALL, **options})


def reference(model, x, indicator, scenario):
    """The equations for one row; scenario None is one that training has not seen."""
    layer = model.scenario_extraction

    def extract(module):
        return mixture(module.gate, x, experts(module.sub_experts, x))

    shared, specific = extract(layer.shared), [extract(module) for module in layer.specific]
    own = [0.0] * len(shared) if scenario is None else specific[scenario]
    logits = mlp(layer.attention, indicator)
    others = [m for m in range(SCENARIOS) if m != scenario]
    attended = weighted_sum(softmax([logits[m] for m in others]), [specific[m] for m in others])
    c = shared + own + attended
    (tasks,) = model.task_extraction.levels
    *own_experts, of_all_tasks = [experts(group, c) for group in tasks.groups]
    mixed = [mixture(gate, c, outputs + of_all_tasks) for gate, outputs in zip(tasks.gates, own_experts)]
    return [sigmoid(mlp(tower, t)[0]) for tower, t in zip(model.heads.towers, mixed)]


@pytest.mark.parametrize("target_matches", [False, True])
def test_predictions_equal_a_loop_over_the_equations(target_matches):
    model, batch = perturbed(build(target_matches=target_matches)), toy_scenarios()
    predictions = model(batch)
    fields, events, masks = model.tokens(batch)
    assert model.tokens.field_names[4:] == (["watch matches", "like matches"] if target_matches else [])
    x = model.tokens.append_pooled(fields, events, masks).flatten(1).tolist()
    indicators = model.tokens.embedding.embedding_layers["author"](batch["author"]).tolist()
    for row, author in enumerate(batch["author"].tolist()):
        expected = reference(model, x[row], indicators[row], None if author == UNSEEN else author - 1)
        found = [predictions[f"{label}_pred"][row].item() for label in LABELS]
        assert found == pytest.approx(expected, abs=1e-9)


def test_own_scenario_marks_what_training_has_seen():
    marks = own_scenario(torch.tensor([1, 3, 4, 0]), num_scenarios=3)
    assert marks.dtype == torch.bool
    assert marks.int().tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]]


@pytest.fixture
def layer():
    torch.manual_seed(5)
    return perturbed(ScenarioExtraction(SCENARIOS, 6, 3, 2, (5, 4)))


def parts_of(layer, x, scenarios, indicator):
    """G, S and A, for each row."""
    return layer(x, own_scenario(scenarios, SCENARIOS), indicator).unflatten(-1, (3, -1)).unbind(dim=1)


def test_a_scenarios_experts_reach_its_rows_as_their_own_and_the_others_through_attention(layer):
    scenarios = torch.tensor([1, 2, 3, 4, UNSEEN])
    x, indicator = torch.randn(5, 6).double(), torch.randn(5, 3).double()
    before = parts_of(layer, x, scenarios, indicator)
    with torch.no_grad():
        for block in layer.specific[1].sub_experts.mlps:
            block.mlp[2].bias += 1.0
    changed = [(a != b).any(dim=1).tolist() for a, b in zip(parts_of(layer, x, scenarios, indicator), before)]
    assert changed == [[False] * 5, [False, True, False, False, False], [True, False, True, True, True]]


def test_attention_to_the_others_sums_to_one_and_depends_on_the_scenario_alone(layer):
    scenarios = torch.tensor([1, 2, 3, 4, UNSEEN])
    x, indicator = torch.randn(5, 6).double(), torch.randn(5, 3).double()
    for extract in layer.specific[1:]:
        extract.load_state_dict(layer.specific[0].state_dict())
    _, own, attended = parts_of(layer, x, scenarios, indicator)
    torch.testing.assert_close(attended[:4], own[:4])
    assert (own[4] == 0).all() and attended[4].any()
    torch.testing.assert_close(parts_of(layer, x, scenarios, 2 * indicator)[2], attended)
    own_only = parts_of(layer, x.flip(0), scenarios, indicator)[1]
    torch.testing.assert_close(own_only[:4], layer.specific[0](x.flip(0))[:4])


def test_the_only_scenario_has_no_others():
    layer = perturbed(ScenarioExtraction(1, 6, 3, 2, (5, 4)))
    x = torch.randn(3, 6).double()
    out = layer(x, own_scenario(torch.ones(3).long(), 1), torch.randn(3, 3).double()).unflatten(-1, (3, -1))
    torch.testing.assert_close(out[:, 1], layer.specific[0](x))
    assert (out[:, 2] == 0).all()


def test_tasks_share_some_experts_and_have_others_for_themselves():
    model, batch = perturbed(build()), toy_scenarios(rows=64)
    model(batch)["click_pred"].sum().backward()
    (tasks,) = model.task_extraction.levels
    of_the_other = [*tasks.groups[1].parameters(), *tasks.gates[1].parameters()]
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in of_the_other)
    for module in (tasks.groups[0], tasks.groups[2], model.scenario_extraction, model.tokens):
        assert all(parameter.grad.any() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        (
            None,
            "HiNet needs the column of scenarios, scenario: <a categorical column>; got none; data set 'toy' has item",
        ),
        ("tab", "got 'tab', which is not in the data"),
        ("age", "got 'age', which is of type numeric"),
    ],
)
def test_a_scenario_that_is_no_categorical_column_is_refused(scenario, message):
    with pytest.raises(ValueError, match=message):
        build(scenario=scenario)


@pytest.mark.parametrize("option", ["num_sub_experts", "num_task_experts"])
def test_counts_are_checked(option):
    with pytest.raises(ValueError, match=f"^{option} must be a whole number of at least 1; got 0"):
        build(**{option: 0})


def test_a_column_without_a_value_that_training_has_seen_is_refused():
    toy = feature_map()
    toy.features["author"]["vocab_size"] = 2  # padding and what is unknown
    with pytest.raises(ValueError, match="HiNet needs a column of scenarios; training has seen no value of 'author'"):
        HiNet(toy, **{**MODEL_ARGUMENTS, **SMALL})


def test_it_runs_on_data_with_scenarios(tmp_path):
    config = experiment.config.REPOSITORY / "model_zoo" / "HiNet" / "config"
    places = [f"model_root={tmp_path / 'checkpoints'}", f"data_root={tmp_path / 'built'}"]
    result = json.loads(experiment.run(config, "HiNet_test", model_dir=tmp_path, overrides=places).read_text())
    assert {f"{label}_AUC@tab={tab}" for label in result["labels"] for tab in "014"} <= set(result["metrics"]["test"])

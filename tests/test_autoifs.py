"""AutoIFS against loops over its equations, and its two stages."""

import copy
import json

import numpy as np
import pytest
import torch
from flowctr import experiment, weights
from flowctr.models.AutoIFS import AutoIFS
from flowctr.training import accelerate
from toy import BEHAVIORS, MODEL_ARGUMENTS, WIDE_INITIALIZER, toy_batch, toy_feature_map

LABELS = ("click", "like", "long_view")
SMALL = {
    "behaviors": BEHAVIORS,
    "embedding_dim": 4,
    "embedding_initializer": WIDE_INITIALIZER,
    "bottom_hidden_units": (12, 10),
    "scenario_hidden_units": (6,),
    "search_epochs": 3,
    "rewind_epoch": 2,
}


def build(labels=LABELS, model_class=AutoIFS, **options):
    torch.manual_seed(3)
    return model_class(toy_feature_map(labels), **{**MODEL_ARGUMENTS, **SMALL, **options})


def with_specific_units(model):
    """Gives the specific units, zero at the start, something to say."""
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if name.endswith((".B", ".bias")):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def affine(layer, x):
    return [sum(w * v for w, v in zip(row, x)) + b for row, b in zip(layer.weight.tolist(), layer.bias.tolist())]


def low_rank(units, k, x):
    A, B, bias = units.A[k].tolist(), units.B[k].tolist(), units.bias[k].tolist()
    down = [sum(x[i] * A[i][r] for i in range(len(x))) for r in range(len(B))]
    return [sum(d * B[r][o] for r, d in enumerate(down)) + bias[o] for o in range(len(bias))]


def add(*vectors):
    return [sum(values) for values in zip(*vectors)]


def relu(vector):
    return [max(0.0, value) for value in vector]


def reference_logits(model, z, scenario, gate_logits, gate):
    """The equations for one row; scenario None is one that training has not seen."""
    (units,) = model.scenario_layers
    u_sh = affine(units.shared, z)
    u_k = [0.0] * len(u_sh) if scenario is None else low_rank(units.specific, scenario, z)
    h = relu(add(u_sh, u_k))
    logits = []
    for task in range(model.num_tasks):
        full, flows = h, [u_sh, u_k, u_sh, u_k]
        for number, layer in enumerate(model.task_tail.layers):
            if number:
                full, flows = relu(full), [relu(flow) for flow in flows]

            def shared(x, layer=layer):
                return affine(layer.shared, x)

            def specific(x, layer=layer, task=task):
                return low_rank(layer.specific, task, x)

            full = add(shared(full), specific(full))
            flows = [unit(flow) for unit, flow in zip((shared, specific, specific, shared), flows)]
        removed = sum(gate(w) * flow[0] for w, flow in zip(gate_logits[task], flows))
        logits.append(full[0] - removed)
    return logits


@pytest.mark.parametrize("stage", ["search", "retrain"])
@pytest.mark.parametrize("task_hidden_units", [(), (5, 3)])
def test_logits_equal_a_loop_over_the_equations(stage, task_hidden_units):
    model = with_specific_units(build(stage=stage, task_hidden_units=task_hidden_units)).double().eval()
    model.temperature.fill_(3.0)
    batch = toy_batch(toy_feature_map(LABELS))
    batch["author"][3] = 29  # out of vocabulary
    tokens = model.tokens if stage == "search" else model.gate_tokens
    z = model.bottom(model.embed(model.tokens, batch)).tolist()
    w = model.gate_network(model.embed(tokens, batch)).tolist()
    gate = (lambda x: 1 / (1 + np.exp(-3.0 * x))) if stage == "search" else (lambda x: float(x > 0))
    predictions = model(batch)
    for row in range(12):
        scenario = None if row == 3 else batch["author"][row].item() - 1
        expected = torch.tensor(reference_logits(model, z[row], scenario, w[row], gate), dtype=torch.float64)
        found = torch.stack([predictions[f"{label}_pred"][row, 0] for label in LABELS])
        torch.testing.assert_close(torch.logit(found), expected, atol=1e-9, rtol=1e-9)


def test_two_layers_of_scenario_units_read_the_fused_representation():
    model = with_specific_units(build(scenario_hidden_units=(6, 5))).double().eval()
    z = torch.randn(1, 10, dtype=torch.float64)
    scenario = torch.zeros(1, 28, dtype=torch.float64)
    scenario[0, 7] = 1
    first, second = model.scenario_layers
    h = relu(add(affine(first.shared, z[0].tolist()), low_rank(first.specific, 7, z[0].tolist())))
    u_sh, u_k = affine(second.shared, h), low_rank(second.specific, 7, h)
    expected = model.task_tail(torch.tensor([u_sh]).double(), torch.tensor([u_k]).double())
    for found, wanted in zip(model.full_and_flows(z, scenario), expected):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_with_a_linear_middle_the_flows_add_up_to_the_full_logit():
    model = with_specific_units(build(activation=None)).double().eval()
    batch = toy_batch(toy_feature_map(LABELS), rows=200)
    with torch.no_grad():
        full, flows = model.full_and_flows(model.bottom(model.embed(model.tokens, batch)), model.choose_scenario(batch))
        (unit,) = model.task_tail.layers
        biases = unit.shared.bias + unit.specific.bias.flatten()
    assert flows.std() > 0.1
    torch.testing.assert_close(full, flows.sum(dim=-1) - biases, atol=1e-10, rtol=0)
    rectified = with_specific_units(build()).double().eval()
    with torch.no_grad():
        full, flows = rectified.full_and_flows(
            rectified.bottom(rectified.embed(rectified.tokens, batch)), rectified.choose_scenario(batch)
        )
    assert (full - flows.sum(dim=-1) + biases).abs().max() > 0.1, "with a rectified middle it is an approximation"


def test_every_flow_has_its_name():
    """``A to B`` changes with unit A of the scenario stage and unit B of the task stage, and with no other."""
    model = with_specific_units(build()).double().eval()
    batch = toy_batch(toy_feature_map(LABELS), rows=3)
    units = {
        "shared to": model.scenario_layers[0].shared.bias,
        "scenario to": model.scenario_layers[0].specific.bias,
        "to shared": model.task_tail.layers[0].shared.bias,
        "to task": model.task_tail.layers[0].specific.bias,
    }

    def flows():
        with torch.no_grad():
            z = model.bottom(model.embed(model.tokens, batch))
            return model.full_and_flows(z, model.choose_scenario(batch))[1]

    for part, bias in units.items():
        before = flows()
        with torch.no_grad():
            bias += 1.0
        changed = (flows() != before).flatten(0, 1).any(dim=0).tolist()
        assert [name for name, moved in zip(model.FLOWS, changed) if moved] == [
            name for name in model.FLOWS if name.startswith(part) or name.endswith(part)
        ]


def test_specific_units_start_at_zero():
    model, batch = build(), toy_batch(toy_feature_map(LABELS))
    model.reset_parameters()
    z = model.bottom(model.embed(model.tokens, batch))
    u_shared, u_scenario = model.scenario_layers[0](z, model.choose_scenario(batch))
    assert (u_scenario == 0).all() and u_shared.abs().max() > 0
    assert (model.task_tail.layers[0].specific(u_shared.unsqueeze(1)) == 0).all()


def test_the_loss_adds_the_penalty_of_each_task():
    model, batch = build(gate_penalty=[0.5, 0.0, 2.0]), toy_batch(toy_feature_map(LABELS))
    predictions, y_true = model(batch), model.get_labels(batch)
    plain = sum(
        torch.nn.functional.binary_cross_entropy(predictions[f"{label}_pred"], y) for label, y in zip(LABELS, y_true)
    )
    gates = predictions["gates"]
    penalty = 0.5 * gates[:, 0].mean() + 2.0 * gates[:, 2].mean()
    torch.testing.assert_close(model.compute_loss(predictions, y_true), plain + penalty)
    retrained = build(gate_penalty=2.0, stage="retrain")
    predictions = retrained(batch)
    plain = sum(
        torch.nn.functional.binary_cross_entropy(predictions[f"{label}_pred"], y) for label, y in zip(LABELS, y_true)
    )
    torch.testing.assert_close(retrained.compute_loss(predictions, y_true), plain)


@pytest.mark.parametrize("optimizer", ["adam", "AdamW"])
def test_the_gate_network_has_its_own_rate_and_no_decay_and_leaves_the_embedding_alone(optimizer):
    model = build(learning_rate=1e-2, weight_decay=0.1, optimizer=optimizer)
    batch = toy_batch(toy_feature_map(LABELS))
    weights, gates = model.optimizer.param_groups
    assert (weights["lr"], weights["weight_decay"]) == (1e-2, 0.1)
    assert (gates["lr"], gates["weight_decay"]) == (pytest.approx(1e-4), 0)
    count = sum(len(group["params"]) for group in model.optimizer.param_groups)
    assert count == len(list(model.parameters()))
    model(batch)["gates"].sum().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("gate_"))
    assert all(p.grad.abs().sum() > 0 for p in gates["params"])


def test_the_temperature_rises_to_gamma():
    model, seen = build(search_epochs=10, rewind_epoch=9), []
    for epoch in range(10):
        model.start_epoch(epoch, 10)
        seen.append(model.temperature.item())
    assert seen[0] == 1
    assert seen[-1] == pytest.approx(100)
    np.testing.assert_allclose(np.diff(np.log(seen)), np.log(100) / 9, rtol=1e-5)


def trained(tmp_path, **options):
    """Searches and retrains on a few batches, as the runner does."""
    params = {
        **MODEL_ARGUMENTS,
        **SMALL,
        "model_root": str(tmp_path),
        "dataset_id": "toy",
        "model_id": "m",
        "search_learning_rate": 0.01,
        "gate_learning_rate_factor": 1.0,
        "learning_rate": 0.01,
        "epochs": 2,
        **options,
    }
    batches = [toy_batch(toy_feature_map(LABELS), rows=40, seed=seed) for seed in range(4)]
    all_stages = AutoIFS.stages(params)
    models = {}
    for name, stage in all_stages.items():
        torch.manual_seed(1)
        models[name] = accelerate(AutoIFS)(toy_feature_map(LABELS), **stage)
        keep = copy.deepcopy(models[name].state_dict())
        models[name].fit(batches, validation_data=batches if name == "retrain" else None, **stage)
        models[f"{name} at the start"] = keep
    return models, batches


@pytest.mark.parametrize("options", [{}, {"target_matches": True, "reset_embeddings": True}], ids=["paper", "extended"])
def test_the_retraining_starts_from_the_rewound_weights_and_freezes_what_gates(tmp_path, options):
    models, batches = trained(tmp_path, **options)
    search, retrain, start = models["search"], models["retrain"], models["retrain at the start"]
    assert search.temperature.item() == pytest.approx(100)
    rewound = {name.replace("/", "."): weight for name, weight in search.rewound.named_buffers()}
    assert set(rewound) == {name for name, p in retrain.named_parameters() if p.requires_grad}
    for name, weight in rewound.items():
        assert torch.equal(start[name], weight)
    assert not torch.equal(rewound["bottom.mlp.0.weight"], search.bottom.mlp[0].weight), "it is not the search's end"
    end = retrain.state_dict()
    for name in (name for name in end if name.startswith("gate_")):
        source = search.state_dict()[name.replace("gate_tokens", "tokens")]
        assert torch.equal(start[name], source) and torch.equal(end[name], source), name
    assert not torch.equal(end["bottom.mlp.0.weight"], start["bottom.mlp.0.weight"])
    assert len(retrain.tokens.targets) == len(retrain.gate_tokens.targets) == 2 * options.get("target_matches", False)
    with torch.no_grad():
        before = [(search.gate_network(search.embed(search.tokens, batch)) > 0).float() for batch in batches]
        after = [retrain.eval()(batch)["gates"] for batch in batches]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert 0 < torch.cat(after).mean() < 1


def test_new_tables_leave_those_that_the_gates_read():
    model = build(stage="retrain")
    before = copy.deepcopy(model.state_dict())
    weights.redraw_embeddings(model, in_place=False)
    tables = [name for name in before if "embedding_layers" in name]
    assert {name.partition(".")[0] for name in tables} == {"tokens", "gate_tokens"}
    for name in tables:
        assert torch.equal(model.state_dict()[name], before[name]) is name.startswith("gate_tokens"), name


def test_the_rewound_weights_are_those_at_the_start_of_the_epoch(tmp_path):
    model = build(search_epochs=3, rewind_epoch=1, model_class=accelerate(AutoIFS), model_root=str(tmp_path))
    batches = [toy_batch(toy_feature_map(LABELS), rows=20, seed=seed) for seed in range(2)]
    starts = []
    start_epoch = model.start_epoch

    def remember(epoch, epochs):
        starts.append(model.bottom.mlp[0].weight.detach().clone())
        start_epoch(epoch, epochs)

    model.start_epoch = remember
    model.fit(batches, epochs=3)
    assert torch.equal(model.rewound.get_buffer("bottom/mlp/0/weight"), starts[1])
    assert not torch.equal(starts[1], starts[2])


def test_without_gates_there_is_one_stage_and_nothing_is_removed(tmp_path):
    models, batches = trained(tmp_path, gates=False)
    assert set(models) == {"retrain", "retrain at the start"}
    model = models["retrain"].eval()
    with torch.no_grad():
        x = model.bottom(model.embed(model.tokens, batches[0]))
        full, _ = model.full_and_flows(x, model.choose_scenario(batches[0]))
        torch.testing.assert_close(torch.logit(model(batches[0])["like_pred"][:, 0]), full[:, 1], atol=1e-4, rtol=1e-4)
    assert not [name for name, _ in model.named_parameters() if name.startswith("gate_")]
    assert model.kept_flows(batches) is None


def test_kept_flows_are_counted_by_scenario(tmp_path):
    models, batches = trained(tmp_path)
    for name in ("search", "retrain"):
        model = models[name]
        shares = model.kept_flows(batches)
        kept, rows = np.zeros((28, 3, 4)), np.zeros(28)
        for batch in batches:
            tokens = model.tokens if name == "search" else model.gate_tokens
            with torch.no_grad():
                w = model.gate_network(model.embed(tokens, batch))
            for row, scenario in enumerate(batch["author"].tolist()):
                if scenario < 29:
                    kept[scenario - 1] += (w[row] <= 0).numpy()
                    rows[scenario - 1] += 1
        np.testing.assert_allclose(shares, kept / rows[:, None, None], rtol=1e-6)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs AutoIFS_test on the shipped table, with the folders of its files elsewhere."""
    folder = tmp_path_factory.mktemp("autoifs")
    places = [f"model_root={folder / 'checkpoints'}", f"data_root={folder / 'built'}"]

    def run(*overrides):
        config = experiment.config.REPOSITORY / "model_zoo" / "AutoIFS" / "config"
        path = experiment.run(config, "AutoIFS_test", model_dir=folder, overrides=[*places, *overrides])
        return json.loads(path.read_text())

    run.checkpoints = folder / "checkpoints" / "kuairand_tiny_tabs"
    return run


def test_a_search_that_is_done_is_not_repeated_and_the_result_is_the_same(runs):
    """As after a run that was killed while retraining."""
    whole = runs()
    search = runs.checkpoints / "AutoIFS_test-s2022-search.model"
    written = search.stat().st_mtime_ns
    assert runs()["metrics"] == whole["metrics"]
    assert search.stat().st_mtime_ns == written
    alone = runs("stage=retrain")
    assert alone["metrics"] == whole["metrics"] and search.stat().st_mtime_ns == written
    assert alone["stages"]["search"]["curves"] == whole["stages"]["search"]["curves"]
    assert len(whole["stages"]["search"]["curves"]["train"]) > 3
    kept = np.array(whole["kept_flows"]["kept"])
    assert whole["kept_flows"]["scenarios"] == ["1", "0", "4"] and kept.shape == (3, 2, 4)
    assert ((kept >= 0) & (kept <= 1)).all() and 0 < kept.mean() < 1
    by_scenario = [whole["metrics"]["test"][f"{label}_AUC@tab={tab}"] for label in whole["labels"] for tab in "104"]
    assert whole["metrics"]["test"]["AUC@tab"] == pytest.approx(np.mean(by_scenario))


def test_a_retraining_needs_the_search_with_its_settings(runs):
    with pytest.raises(ValueError, match=r"stage search, which is absent.*--set stage=search"):
        runs("stage=retrain", "seed=7")
    result = runs("stage=search", "seed=7")
    assert result["stages"] == {} and len(result["curves"]["valid"]) == 0 and result["metrics"]["valid"]["AUC"] > 0
    with pytest.raises(ValueError, match="other settings: rank was not set and is 3"):
        runs("stage=retrain", "seed=7", "rank=3")
    with pytest.raises(ValueError, match="other settings: epochs was 3 and is 4"):
        runs("stage=retrain", "seed=7", "search_epochs=4")
    retrained = runs("stage=retrain", "seed=7", "learning_rate=1e-3")  # a setting of the retraining alone
    assert retrained["metrics"] == runs("seed=7", "learning_rate=1e-3")["metrics"]
    (runs.checkpoints / "AutoIFS_test-s7-search.model").unlink()
    with pytest.raises(ValueError, match="absent"):
        runs("stage=retrain", "seed=7")
    with pytest.raises(ValueError, match="stage 'search' does not exist here; this experiment has retrain"):
        runs("stage=search", "gates=false")


@pytest.mark.parametrize("setting", ["search_weight_decay=0.1", "rewind_epoch=0", "gamma=7", "batch_size=128"])
def test_every_setting_of_the_search_counts(runs, setting):
    runs("stage=search", "seed=9")
    name = setting.partition("=")[0].removeprefix("search_")
    with pytest.raises(ValueError, match=f"other settings: .*{name} was"):
        runs("stage=retrain", "seed=9", setting)


def test_the_data_of_the_search_count(runs, monkeypatch):
    runs("stage=search", "seed=9")
    monkeypatch.setattr(experiment, "data_digest", lambda data_dir, files: "other data")
    with pytest.raises(ValueError, match="other settings: data was"):
        runs("stage=retrain", "seed=9")


def test_a_setting_that_the_model_refuses_leaves_the_search_alone(runs):
    runs("stage=search", "seed=9")
    with pytest.raises(ValueError, match="rank must be"):
        runs("seed=9", "rank=0")
    assert runs("stage=retrain", "seed=9")["metrics"]


def test_a_penalty_for_each_task_comes_from_the_configuration(runs):
    assert runs("stage=search", "gate_penalty=[0.1, 0.2]", "search_epochs=2")["config"]["gate_penalty"] == [0.1, 0.2]
    with pytest.raises(ValueError, match="'gate_penalty' must be a number of at least 0"):
        runs("gate_penalty=[0.1, -0.2]")
    with pytest.raises(ValueError, match="missing key 'scenario'"):
        runs("scenario=null")
    with pytest.raises(ValueError, match="unknown key 'searched'"):
        runs("searched=/nowhere")


def test_more_epochs_than_the_rewind_epoch_are_needed():
    with pytest.raises(ValueError, match="rewinds to epoch 2, counted from 0, of 2 epochs"):
        build(rewind_epoch=2).start_epoch(0, 2)


def test_a_search_is_forgotten_before_it_is_made_again(runs, monkeypatch):
    """A run killed in its second search leaves no record that fits a checkpoint of the first."""
    runs("stage=search", "seed=8")
    record = runs.checkpoints / "AutoIFS_test-s8-search.json"
    assert record.is_file()
    monkeypatch.setattr(AutoIFS, "start_epoch", lambda self, epoch, epochs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        runs("stage=search", "seed=8")
    assert not record.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scenario": None}, "needs the column of scenarios, scenario: <a categorical column>; got none"),
        ({"scenario": "age"}, "'age', which is of type numeric; data set 'toy' has item, author, user"),
        ({"stage": "prune"}, "stage must be one of search, retrain, both; got 'prune'"),
        ({"rewind_epoch": 3}, "search_epochs=3, rewind_epoch=3"),
        ({"search_epochs": 1, "rewind_epoch": 0}, "at least 2 epochs"),
        ({"gamma": 0}, "gamma must be above 0; got 0"),
        ({"rewind_epoch": 1.5}, "rewind_epoch=1.5"),
        ({"gate_learning_rate_factor": -1}, "gate_learning_rate_factor must be above 0; got -1"),
        ({"scenario_hidden_units": []}, "scenario_hidden_units must list at least one width; got"),
        ({"bottom_hidden_units": (8, 0)}, "bottom_hidden_units must be a whole number of at least 1; got 0"),
        ({"task_hidden_units": (0,)}, "task_hidden_units must be a whole number of at least 1; got 0"),
        ({"rank": 0}, "rank must be a whole number of at least 1; got 0"),
        ({"gate_penalty": [1.0, 2.0]}, "gate_penalty has 2 values for 3 labels"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)

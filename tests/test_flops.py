"""FLOPs per row against hand counts, whatever kernels torch would take, and without a trace on the model."""

import torch
from flowctr.flops import flops_per_row
from flowctr.training import accelerate
from test_training import SETTINGS, SingleTask, TwoTasks, batches_of, build, feature_map_of
from torch import nn


class Mixed(SingleTask):
    """A transformer layer and a GRU over the fields, whose fused kernels the counter does not know."""

    def __init__(self, feature_map, **kwargs):
        super().__init__(feature_map, **kwargs)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.gru = nn.GRU(4, 6, batch_first=True)

    def forward(self, inputs):
        tokens = self.encoder(self.embedding_layer(self.get_inputs(inputs)))
        return {"y_pred": self.output_activation(self.gru(tokens)[0][:, -1].sum(-1, keepdim=True))}


class Noisy(SingleTask):
    def forward(self, inputs):
        return {"y_pred": super().forward(inputs)["y_pred"] + torch.rand(())}


class Broken(SingleTask):
    def forward(self, inputs):
        raise KeyError("no such column")


def test_an_mlp_has_the_products_of_its_layers(tmp_path):
    # fields of width 4 into 8 and 1, and the numeric fields' own linear maps from 1 to 4
    feature_map = feature_map_of(SingleTask)
    fields, numeric = feature_map.num_fields, 2
    model = build(SingleTask, tmp_path)
    assert flops_per_row(model, batches_of(feature_map, 1)) == 2 * (4 * fields * 8 + 8 + numeric * 4)
    feature_map = feature_map_of(TwoTasks)
    model = build(TwoTasks, tmp_path)
    assert flops_per_row(model, batches_of(feature_map, 1)) == 2 * (4 * fields * 8 + 2 * 8 + numeric * 4)


def test_attention_and_recurrence_are_counted_in_full(tmp_path):
    feature_map = feature_map_of(SingleTask)
    n, numeric = feature_map.num_fields, 2
    encoder = n * 4 * (3 * 4 + 4 + 2 * 8) + 2 * n * n * 4  # projections and feed-forward; scores and weighted sums
    gru = n * (4 + 6) * 3 * 6
    model = build(Mixed, tmp_path)
    with torch.no_grad():
        assert flops_per_row(model, batches_of(feature_map, 1)) == 2 * (encoder + gru + numeric * 4)


def test_nothing_of_the_model_changes(tmp_path):
    model = build(Noisy, tmp_path).train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    batches, random = batches_of(model.feature_map, 1), torch.get_rng_state()
    assert flops_per_row(model, batches) > 0 and torch.equal(torch.get_rng_state(), random)
    assert model.training and all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_options_that_train_faster_do_not_change_the_count(tmp_path):
    feature_map = feature_map_of(SingleTask)
    settings = {**SETTINGS, "model_root": str(tmp_path), "model_id": "run"}
    models = [accelerate(SingleTask)(feature_map, **settings, **options) for options in ({}, {"precision": "bf16"})]
    plain, other = (flops_per_row(model, batches_of(feature_map, 1)) for model in models)
    assert plain == other


def test_a_model_that_cannot_be_counted_costs_a_warning(tmp_path, caplog):
    model = build(Broken, tmp_path)
    assert flops_per_row(model, batches_of(model.feature_map, 1)) is None
    assert flops_per_row(build(SingleTask, tmp_path), []) is None
    assert "The FLOPs of Broken cannot be counted: 'no such column'" in caplog.text

"""AutoIFS: automated information flow selection for multi-scenario multi-task recommendation (WSDM 2026).

https://arxiv.org/abs/2512.13396. Two stages, one experiment id: a search trains the model and its gates, the retraining
starts from rewound weights under the gates found.

Differs from the paper and its code:
  * Any number of scenarios and tasks, and deeper tails, whose four flows stay separate streams.
  * Sequences, which the paper's data do not have, enter as the mean of each column's events.
  * All numeric fields share one token; the paper cuts each into buckets with an embedding.
  * A row of a scenario that training has not seen runs through the shared units alone.
  * Each field has an embedding table of its own, xavier-uniform; the code draws one table for all fields.
  * Batches are shuffled anew in each epoch, gradients are clipped, and early stopping can watch any metric.
  * ``target_matches`` gives the fields a token of how each behaviour's events match the target; off by default.
"""

import inspect
from itertools import pairwise
from pathlib import Path

import torch
from flowctr.layers import (
    FeatureTokens,
    check_options,
    check_positive,
    count_scenarios,
    named_predictions,
    own_scenario,
)
from fuxictr.pytorch.layers import MLP_Block
from fuxictr.pytorch.models import MultiTaskModel
from fuxictr.pytorch.torch_utils import get_activation
from torch import nn

from .flows import FLOWS, GateNetwork, ScenarioUnits, TaskTail

STAGES = ("search", "retrain", "both")
SEARCH_KEYS = ("epochs", "learning_rate", "weight_decay")


class AutoIFS(MultiTaskModel):
    """Shared and low-rank specific units per scenario and task, and gates that remove flows between them.

    Args:
        feature_map: FuxiCTR's feature map.
        model_id: Name of the checkpoint and log.
        gpu: GPU index, -1 for the CPU.
        task: FuxiCTR's task type, one for all labels or a list with one for each.
        behaviors: Behaviour name -> aligned sequence columns; none: every sequence column by itself.
        scenario: Categorical column that tells a row's scenario.
        stage: ``search`` (soft gates, trained), ``retrain`` (hard gates, frozen), or ``both``: the runner does one and
            then the other, and a model made with it is in its search.
        searched: Checkpoint of the search that a retraining starts from; None: the weights are loaded later.
        gates: Whether flows are gated; False is the ablation, trained in one stage.
        embedding_dim: Embedding width D.
        embedding_initializer: FuxiCTR's initialiser of the embedding tables.
        target_matches: Whether the fields get a token of how each behaviour's events match the target.
        bottom_hidden_units: Widths of the shared bottom, and of the gate network.
        scenario_hidden_units: Widths of the layers of scenario units.
        task_hidden_units: Widths of the layers of task units before the logit.
        activation: Activation of the scenario and task layers; null: none, the flows then add up to the full logit.
        rank: Rank r of the specific units.
        gamma: Temperature of the gates in the last epoch of the search; 1 in the first.
        gate_penalty: lambda, the weight of the mean removal gate in the search's loss: one for all tasks or a list with
            one for each.
        gate_learning_rate_factor: Learning rate of the gate network as a share of the others'.
        rewind_epoch: Epoch of the search, from 0, at whose start the weights are kept for the retraining; null: the
            last one.
        weight_decay: L2 penalty of the optimiser on all weights but the gate network's.
        search_epochs: Epochs of the search; ``epochs`` are the retraining's at most.
        search_learning_rate: Learning rate of the search.
        search_weight_decay: Weight decay of the search.
        optimizer: FuxiCTR's optimiser name.
        loss: FuxiCTR's loss name.
        learning_rate: Initial learning rate.
        **kwargs: Arguments of ``MultiTaskModel`` and ``BaseModel``.

    Raises:
        ValueError: If ``scenario`` is no categorical column of the data, or an option is out of its range.
    """

    FLOWS = FLOWS

    def __init__(
        self,
        feature_map,
        model_id="AutoIFS",
        gpu=-1,
        task="binary_classification",
        behaviors=None,
        *,
        scenario,
        stage="both",
        searched=None,
        gates=True,
        embedding_dim=16,
        embedding_initializer="nn.init.xavier_uniform_",
        target_matches=False,
        bottom_hidden_units=(1024, 512),
        scenario_hidden_units=(256,),
        task_hidden_units=(),
        activation="ReLU",
        rank=2,
        gamma=100.0,
        gate_penalty=0.0,
        gate_learning_rate_factor=0.01,
        rewind_epoch=None,
        weight_decay=3e-4,
        search_epochs=10,
        search_learning_rate=3e-4,
        search_weight_decay=3e-5,
        optimizer="adam",
        loss="binary_crossentropy",
        learning_rate=1e-4,
        **kwargs,
    ):
        num_tasks = kwargs["num_tasks"] = len(feature_map.labels)
        super().__init__(feature_map, model_id=model_id, gpu=gpu, task=task, **kwargs)
        check_options(stage=(stage, STAGES))
        check_positive(rank=rank)
        for width in task_hidden_units:
            check_positive(task_hidden_units=width)
        _check_widths(bottom_hidden_units=bottom_hidden_units, scenario_hidden_units=scenario_hidden_units)
        self.rewind_epoch = search_epochs - 1 if rewind_epoch is None else rewind_epoch
        if gates:
            _check_search(search_epochs, self.rewind_epoch, gamma, gate_learning_rate_factor)
        self.scenario = scenario
        self.num_scenarios = count_scenarios(feature_map, scenario, "AutoIFS")
        self.searches = gates and stage != "retrain"
        self.gamma, self.weight_decay, self.gate_learning_rate_factor = gamma, weight_decay, gate_learning_rate_factor

        self.tokens = FeatureTokens(feature_map, embedding_dim, behaviors, embedding_initializer, target_matches)
        width = (self.tokens.num_fields + self.tokens.num_columns) * embedding_dim
        self.bottom = MLP_Block(width, hidden_units=list(bottom_hidden_units), hidden_activations="ReLU")
        self.activation = get_activation(activation) or nn.Identity()
        widths = [bottom_hidden_units[-1], *scenario_hidden_units]
        self.scenario_layers = nn.ModuleList(
            ScenarioUnits(self.num_scenarios, *sizes, rank) for sizes in pairwise(widths)
        )
        self.task_tail = TaskTail(num_tasks, widths[-1], task_hidden_units, rank, self.activation)
        self.gate_network = GateNetwork(width, bottom_hidden_units, num_tasks) if gates else None
        self.gate_tokens = None
        if gates and not self.searches:
            # The gates go on reading the embedding that they were found with: on a trained one they would drift.
            self.gate_tokens = FeatureTokens(
                feature_map, embedding_dim, behaviors, embedding_initializer, target_matches
            )
            self.gate_tokens.requires_grad_(False)
            self.gate_network.requires_grad_(False)
        penalties = torch.tensor(_per_task(gate_penalty, num_tasks), dtype=torch.get_default_dtype())
        self.register_buffer("gate_penalties", penalties, persistent=False)
        self.register_buffer("temperature", torch.ones(()))
        self.compile(optimizer, loss, learning_rate)
        self.reset_parameters()
        if self.searches:
            self.rewound = nn.Module()  # weights as buffers: the search's checkpoint then holds all that it found
            for name, weight in self._weights().items():
                self.rewound.register_buffer(_buffer_name(name), weight.detach().clone())
        if searched is not None:
            self._start_from(searched)
        self.model_to_device()

    def forward(self, inputs):
        """Predicts every label, ``{"<label>_pred": (B, 1)}`` (and ``"y_pred"`` when there is one label).

        ``"gates"`` are the removal gates ``(B, K, 4)``.
        """
        inputs = self.get_inputs(inputs)
        x = self.embed(self.tokens, inputs)  # (B, N * D)
        full, flows = self.full_and_flows(self.bottom(x), self.choose_scenario(inputs))
        gates = self.removal_gates(x, inputs)  # (B, K, 4)
        logits = full - (gates * flows).sum(dim=-1)  # (B, K)
        predictions = named_predictions(self.feature_map.labels, self.output_activation, logits.split(1, dim=1))
        return {**predictions, "gates": gates}

    def embed(self, tokens, inputs):
        """Flattens the field tokens and the mean of every sequence column, ``(B, N * D)``."""
        fields, events, masks = tokens(inputs)
        return tokens.append_pooled(fields, events, masks).flatten(1)

    def choose_scenario(self, inputs):
        """Gives each row's scenario one-hot, ``(B, scenarios)``; zeros for one that training has not seen."""
        return own_scenario(inputs[self.scenario], self.num_scenarios).to(self.temperature.dtype)

    def full_and_flows(self, z, scenario):
        """Runs the scenario and task units.

        Args:
            z: Output of the bottom, ``(B, width)``.
            scenario: One-hot ``(B, scenarios)``.

        Returns:
            The full logit ``(B, K)`` and those of the four flows, ``(B, K, 4)``.
        """
        h = z
        for layer in self.scenario_layers:
            u_shared, u_scenario = layer(h, scenario)
            h = self.activation(u_shared + u_scenario)
        return self.task_tail(u_shared, u_scenario)

    def removal_gates(self, x, inputs):
        """Gates each flow of each row and task, ``(B, K, 4)``: 1 subtracts it from the logit, 0 leaves it."""
        if self.gate_network is None:
            return x.new_zeros(len(x), self.num_tasks, len(FLOWS))
        if self.searches:
            return torch.sigmoid(self.temperature * self.gate_network(x.detach()))
        with torch.no_grad():
            return (self.gate_network(self.embed(self.gate_tokens, inputs)) > 0).to(x.dtype)

    def add_loss(self, return_dict, y_true):
        """Adds ``sum_j lambda_j mean(g_j)`` to the losses of the tasks while searching."""
        loss = super().add_loss(return_dict, y_true)
        if not self.searches:
            return loss
        return loss + (self.gate_penalties * return_dict["gates"].mean(dim=(0, 2))).sum()

    def compile(self, optimizer, loss, lr):
        """Gives the gate network a learning rate of its own and no weight decay."""
        super().compile(optimizer, loss, lr)
        groups = [{"params": list(self._weights().values()), "weight_decay": self.weight_decay}]
        if self.searches:
            gate_lr = lr * self.gate_learning_rate_factor
            groups.append({"params": list(self.gate_network.parameters()), "lr": gate_lr, "weight_decay": 0.0})
        self.optimizer = type(self.optimizer)(groups, lr=lr)

    def start_epoch(self, epoch, epochs):
        """Raises the temperature from 1 to gamma over the epochs of the search, and keeps the weights to rewind to."""
        if not self.searches:
            return
        if epochs <= self.rewind_epoch:
            raise ValueError(f"the search rewinds to epoch {self.rewind_epoch}, counted from 0, of {epochs} epochs")
        self.temperature.fill_(self.gamma ** (epoch / max(1, epochs - 1)))
        if epoch == self.rewind_epoch:
            for name, weight in self._weights().items():
                self.rewound.get_buffer(_buffer_name(name)).copy_(weight.detach())

    @classmethod
    def stages(cls, params):
        """Gives the parameters of the stages that one experiment trains, in their order.

        Args:
            params: Those of the experiment.

        Returns:
            Stage -> its parameters. The retraining names the search's checkpoint; without gates there is no search.
        """
        retrain = {**params, "stage": "retrain"}
        if not params.get("gates", True):
            return {"retrain": retrain}
        defaults = {name: p.default for name, p in inspect.signature(AutoIFS.__init__).parameters.items()}
        own = {key: params.get(f"search_{key}", defaults[f"search_{key}"]) for key in SEARCH_KEYS}
        search = {**params, "stage": "search", "model_id": f"{params['model_id']}-search", **own}
        checkpoint = Path(params["model_root"]) / params["dataset_id"] / f"{search['model_id']}.model"
        return {"search": search, "retrain": {**retrain, "searched": str(checkpoint)}}

    @torch.no_grad()
    def kept_flows(self, data_generator):
        """Measures how many rows keep each flow: a soft gate above one half counts as removing it.

        Args:
            data_generator: Batches.

        Returns:
            Shares ``(scenarios, K, 4)``, nan for a scenario without rows; None without gates.
        """
        if self.gate_network is None:
            return None
        self.eval()
        kept = torch.zeros(self.num_scenarios, self.num_tasks * len(FLOWS), device=self.device)
        rows = torch.zeros(self.num_scenarios, 1, device=self.device)
        for batch in data_generator:
            inputs = self.get_inputs(batch)
            scenario = self.choose_scenario(inputs)
            gates = self.removal_gates(self.embed(self.tokens, inputs), inputs)
            kept += scenario.T @ (gates <= 0.5).to(scenario.dtype).flatten(1)
            rows += scenario.sum(dim=0).unsqueeze(1)
        return (kept / rows).unflatten(1, (self.num_tasks, len(FLOWS))).cpu().numpy()

    def _weights(self):
        """Gives what both stages train: all parameters but the gates'."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("gate_")}

    @torch.no_grad()
    def _start_from(self, checkpoint):
        """Loads a search: the rewound weights, and the gate network with the embedding at its end."""
        found = torch.load(checkpoint, map_location="cpu", weights_only=True)
        for name, weight in self.named_parameters():
            if name.startswith("gate_"):
                weight.copy_(found[name.replace("gate_tokens.", "tokens.")])
            else:
                weight.copy_(found[f"rewound.{_buffer_name(name)}"])
        self.temperature.copy_(found["temperature"])


def _buffer_name(name):
    return name.replace(".", "/")  # torch allows no dot in it


def _check_widths(**widths):
    for name, values in widths.items():
        if not values:
            raise ValueError(f"{name} must list at least one width; got {values!r}")
        for value in values:
            check_positive(**{name: value})


def _check_search(search_epochs, rewind_epoch, gamma, gate_learning_rate_factor):
    whole = isinstance(search_epochs, int) and isinstance(rewind_epoch, int)
    if not whole or search_epochs < 2 or not 0 <= rewind_epoch < search_epochs:
        raise ValueError(
            "a search takes at least 2 epochs and rewinds to the start of one of them, counted from 0; got "
            f"search_epochs={search_epochs}, rewind_epoch={rewind_epoch}"
        )
    if gamma <= 0:
        raise ValueError(f"gamma must be above 0; got {gamma}")
    if gate_learning_rate_factor <= 0:
        raise ValueError(f"gate_learning_rate_factor must be above 0; got {gate_learning_rate_factor}")


def _per_task(penalty, num_tasks):
    penalties = penalty if isinstance(penalty, (list, tuple)) else [penalty] * num_tasks
    if len(penalties) != num_tasks:
        raise ValueError(f"gate_penalty has {len(penalties)} values for {num_tasks} labels; got {penalty!r}")
    return [float(value) for value in penalties]

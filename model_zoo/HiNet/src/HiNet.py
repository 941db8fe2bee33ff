"""HiNet: multi-scenario and multi-task learning with hierarchical information extraction (ICDE 2023).

Zhou et al., https://arxiv.org/abs/2303.06095. A scenario layer extracts what all scenarios share, what is the row's own
and what helps from the others; a task layer of shared and specific experts reads it.

Differs from the paper:
  * Sequences enter as the mean of each column's events.
  * The embedding of the scenario is the one of its column, which is also among the inputs.
  * A row whose scenario training has not seen has no scenario of its own: all of them are others to it.
  * Task experts and heads serve all scenarios. A task has as many experts as all tasks share. The sizes are ours.
  * ``target_matches`` gives the fields a token of how each behaviour's events match the target; off by default.
"""

import torch
from flowctr.layers import (
    PLE,
    ExpertGate,
    Experts,
    FeatureTokens,
    TaskHeads,
    check_positive,
    count_scenarios,
    own_scenario,
)
from fuxictr.pytorch.models import MultiTaskModel
from torch import nn


class HiNet(MultiTaskModel):
    """Extracts from field tokens and pooled sequences by scenario, then by task; one MLP per label.

    Args:
        feature_map: FuxiCTR's feature map.
        model_id: Name of the checkpoint and log.
        gpu: GPU index, -1 for the CPU.
        task: FuxiCTR's task type, one for all labels or a list with one for each.
        behaviors: Behaviour name -> aligned sequence columns; none: every sequence column by itself.
        scenario: Categorical column that tells a row's scenario.
        embedding_dim: Token width D.
        embedding_initializer: FuxiCTR's initialiser of the embedding tables.
        target_matches: Whether the fields get a token of how each behaviour's events match the target.
        num_sub_experts: Sub-experts of the shared and of each scenario's extraction.
        scenario_hidden_units: Widths of each sub-expert.
        num_task_experts: Experts of each task in the task layer, and as many shared ones.
        task_hidden_units: Widths of each expert of the task layer.
        head_hidden_units: Hidden widths of the heads.
        activation: Activation of experts and heads.
        net_dropout: Dropout of experts and heads.
        batch_norm: Batch normalisation in experts and heads.
        optimizer: FuxiCTR's optimiser name.
        loss: FuxiCTR's loss name.
        learning_rate: Initial learning rate.
        **kwargs: Arguments of ``MultiTaskModel`` and ``BaseModel``.

    Raises:
        ValueError: If a count is below one, or ``scenario`` is no categorical column of the data.
    """

    def __init__(
        self,
        feature_map,
        model_id="HiNet",
        gpu=-1,
        task="binary_classification",
        behaviors=None,
        *,
        scenario,
        embedding_dim=16,
        embedding_initializer="partial(nn.init.normal_, std=1e-4)",
        target_matches=False,
        num_sub_experts=4,
        scenario_hidden_units=(256, 128),
        num_task_experts=1,
        task_hidden_units=(128, 64),
        head_hidden_units=(64, 32),
        activation="ReLU",
        net_dropout=0.0,
        batch_norm=False,
        optimizer="adam",
        loss="binary_crossentropy",
        learning_rate=1e-3,
        **kwargs,
    ):
        num_tasks = kwargs["num_tasks"] = len(feature_map.labels)
        super().__init__(feature_map, model_id=model_id, gpu=gpu, task=task, **kwargs)
        check_positive(num_sub_experts=num_sub_experts, num_task_experts=num_task_experts)
        layers = {"activation": activation, "dropout": net_dropout, "batch_norm": batch_norm}
        self.scenario = scenario
        self.num_scenarios = count_scenarios(feature_map, scenario, "HiNet")
        self.tokens = FeatureTokens(feature_map, embedding_dim, behaviors, embedding_initializer, target_matches)
        width = (self.tokens.num_fields + self.tokens.num_columns) * embedding_dim
        self.scenario_extraction = ScenarioExtraction(
            self.num_scenarios, width, embedding_dim, num_sub_experts, scenario_hidden_units, **layers
        )
        self.task_extraction = PLE(
            self.scenario_extraction.output_dim,
            num_tasks,
            num_levels=1,  # customised gate control
            num_experts=num_task_experts,
            hidden_units=task_hidden_units,
            **layers,
        )
        self.heads = TaskHeads(
            self.task_extraction.output_dim,
            feature_map.labels,
            head_hidden_units,
            self.output_activation,
            activation,
            net_dropout,
            batch_norm,
        )
        self.compile(optimizer, loss, learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs):
        """Predicts every label, ``{"<label>_pred": (B, 1)}`` (and ``"y_pred"`` when there is one label)."""
        inputs = self.get_inputs(inputs)
        fields, events, masks = self.tokens(inputs)
        x = self.tokens.append_pooled(fields, events, masks).flatten(1)  # (B, N * D)
        indicator = fields[:, self.tokens.field_names.index(self.scenario)]  # (B, D)
        c = self.scenario_extraction(x, own_scenario(inputs[self.scenario], self.num_scenarios), indicator)
        return self.heads(self.task_extraction(c))


class SubExpertIntegration(nn.Module):
    """``SEI(x) = sum_q g_q(x) Q_q(x)`` with ``g(x) = softmax(W x + b)``: sub-experts Q and a gate on the same input.

    Args:
        num_sub_experts: Sub-experts.
        input_dim: Width of the input.
        hidden_units: Widths of each sub-expert.
        **mlp: ``activation``, ``dropout`` and ``batch_norm`` of the sub-experts.
    """

    def __init__(self, num_sub_experts, input_dim, hidden_units, **mlp):
        super().__init__()
        self.sub_experts = Experts(num_sub_experts, input_dim, hidden_units, **mlp)
        self.gate = ExpertGate(input_dim, num_sub_experts)
        self.output_dim = self.sub_experts.output_dim

    def forward(self, x):
        """Maps ``(B, input_dim)`` to ``(B, output_dim)``."""
        return self.gate(x, self.sub_experts(x))


class ScenarioExtraction(nn.Module):
    """``C_i = [G, S_i, A_i]`` for a row of scenario i.

    ``G = SEI_shared(x)``, ``S_m = SEI_m(x)``, and the scenario-aware attentive network (SAN) weighs the others:
    ``A_i = sum_{m != i} a_m S_m`` with ``a = softmax_{m != i}(W e_i + b)``, ``e_i`` the embedding of the scenario.

    Args:
        num_scenarios: Scenarios M.
        input_dim: Width of the input.
        embedding_dim: Width of the scenario's embedding.
        num_sub_experts: Sub-experts of each SEI.
        hidden_units: Widths of each sub-expert.
        **mlp: ``activation``, ``dropout`` and ``batch_norm`` of the sub-experts.
    """

    def __init__(self, num_scenarios, input_dim, embedding_dim, num_sub_experts, hidden_units, **mlp):
        super().__init__()
        self.shared = SubExpertIntegration(num_sub_experts, input_dim, hidden_units, **mlp)
        self.specific = nn.ModuleList(
            SubExpertIntegration(num_sub_experts, input_dim, hidden_units, **mlp) for _ in range(num_scenarios)
        )
        self.attention = nn.Linear(embedding_dim, num_scenarios)
        self.output_dim = 3 * self.shared.output_dim

    def forward(self, x, own, indicator):
        """Extracts by scenario.

        Args:
            x: ``(B, input_dim)``.
            own: Where each row's scenario is, ``torch.bool``, ``(B, M)``; all False in a row of an unseen one.
            indicator: Embedding of each row's scenario, ``(B, embedding_dim)``.

        Returns:
            ``(B, output_dim)``; zeros for ``S_i`` without a scenario, and for ``A_i`` if there is no other.
        """
        specific = torch.stack([extract(x) for extract in self.specific], dim=1)  # (B, M, D)
        logits = self.attention(indicator)  # (B, M)
        logits = logits.masked_fill(own, torch.finfo(logits.dtype).min)  # not -inf: nan if it is the only scenario
        attention = torch.softmax(logits, dim=-1) * ~own
        chosen = torch.stack([own.to(attention.dtype), attention], dim=1) @ specific  # (B, 2, D): S_i and A_i
        return torch.cat([self.shared(x), chosen.flatten(1)], dim=-1)

"""STEM: shared and task-specific embeddings for multi-task recommendation (AAAI 2024).

Su et al., https://arxiv.org/abs/2308.13537, the paper's STEM-Net: every task has embedding tables and experts of its
own beside shared ones. A task's gate reads all experts, but trains only its own and the shared ones.

Differs from the paper and its code:
  * Sequences, which the paper's data do not have, enter as the mean of each column's events.
  * With several layers the shared stream mixes the experts of the tasks without training them, so that a task's
    embeddings learn from that task alone at any depth. In the code every task trains them from the second layer on.
  * The last layer has no shared gate: no head reads it.
"""

import torch
from flowctr.layers import ExpertGate, Experts, FeatureTokens, TaskHeads, check_positive
from fuxictr.pytorch.models import MultiTaskModel
from torch import nn


class STEM(MultiTaskModel):
    """Embeds fields and pooled sequences once for all tasks and once for each, mixes experts, then one MLP per label.

    Args:
        feature_map: FuxiCTR's feature map.
        model_id: Name of the checkpoint and log.
        gpu: GPU index, -1 for the CPU.
        task: FuxiCTR's task type, one for all labels or a list with one for each.
        behaviors: Behaviour name -> aligned sequence columns; none: every sequence column by itself.
        embedding_dim: Token width D of the shared tables and of each task's.
        embedding_initializer: FuxiCTR's initialiser of the embedding tables.
        num_layers: Layers of experts and gates.
        num_shared_experts: Shared experts of a layer.
        num_specific_experts: Experts of each task in a layer.
        expert_hidden_units: Widths of each expert.
        gate_hidden_units: Hidden widths of the gates; none: linear maps.
        head_hidden_units: Hidden widths of the heads.
        activation: Activation of experts, gates and heads.
        net_dropout: Dropout of experts, gates and heads.
        batch_norm: Batch normalisation in experts, gates and heads.
        optimizer: FuxiCTR's optimiser name.
        loss: FuxiCTR's loss name.
        learning_rate: Initial learning rate.
        **kwargs: Arguments of ``MultiTaskModel`` and ``BaseModel``.
    """

    def __init__(
        self,
        feature_map,
        model_id="STEM",
        gpu=-1,
        task="binary_classification",
        behaviors=None,
        embedding_dim=16,
        embedding_initializer="partial(nn.init.normal_, std=1e-4)",
        num_layers=1,
        num_shared_experts=8,
        num_specific_experts=1,
        expert_hidden_units=(512, 512, 512),
        gate_hidden_units=(128, 64),
        head_hidden_units=(128, 64),
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
        check_positive(num_layers=num_layers, num_shared_experts=num_shared_experts)
        check_positive(num_specific_experts=num_specific_experts)
        self.tokens = FeatureTokens(feature_map, embedding_dim, behaviors, embedding_initializer)
        self.task_tokens = nn.ModuleList(
            FeatureTokens(feature_map, embedding_dim, behaviors, embedding_initializer) for _ in range(num_tasks)
        )
        width = (self.tokens.num_fields + self.tokens.num_columns) * embedding_dim
        self.layers = nn.ModuleList()
        for number in range(num_layers):
            layer = STEMLayer(
                num_tasks,
                num_shared_experts,
                num_specific_experts,
                width,
                expert_hidden_units,
                gate_hidden_units,
                mixes_shared=number < num_layers - 1,
                activation=activation,
                dropout=net_dropout,
                batch_norm=batch_norm,
            )
            self.layers.append(layer)
            width = layer.output_dim
        self.heads = TaskHeads(
            width,
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
        shared = embed(self.tokens, inputs)  # (B, N * D)
        tasks = [embed(tokens, inputs) for tokens in self.task_tokens]
        for layer in self.layers:
            shared, tasks = layer(shared, tasks)
        return self.heads(torch.stack(tasks, dim=1))


def embed(tokens, inputs):
    """Flattens the field tokens and the mean of every sequence column, ``(B, N * D)``."""
    return tokens.append_pooled(*tokens(inputs)).flatten(1)


class STEMLayer(nn.Module):
    """Experts and all-forward, task-specific-backward gates.

    With ``F_j = MLPs_j(x_j)`` the outputs of task j's experts, ``F_s`` those of the shared ones and ``sg`` the identity
    without a gradient, task k gets ``softmax(MLP_k(x_k + x_s)) [sg(F_1), ..., F_k, ..., sg(F_K), F_s]``.

    Args:
        num_tasks: Tasks K.
        num_shared_experts: Shared experts.
        num_specific_experts: Experts of each task.
        input_dim: Width of each input.
        expert_hidden_units: Widths of each expert.
        gate_hidden_units: Hidden widths of each gate.
        mixes_shared: Whether a layer follows, which reads a shared stream.
        **mlp: ``activation``, ``dropout`` and ``batch_norm`` of experts and gates.
    """

    def __init__(
        self,
        num_tasks,
        num_shared_experts,
        num_specific_experts,
        input_dim,
        expert_hidden_units,
        gate_hidden_units,
        mixes_shared,
        **mlp,
    ):
        super().__init__()
        self.shared_experts = Experts(num_shared_experts, input_dim, expert_hidden_units, **mlp)
        self.task_experts = nn.ModuleList(
            Experts(num_specific_experts, input_dim, expert_hidden_units, **mlp) for _ in range(num_tasks)
        )
        num_experts = num_shared_experts + num_tasks * num_specific_experts
        self.task_gates = nn.ModuleList(
            ExpertGate(input_dim, num_experts, gate_hidden_units, **mlp) for _ in range(num_tasks)
        )
        self.shared_gate = ExpertGate(input_dim, num_experts, gate_hidden_units, **mlp) if mixes_shared else None
        self.output_dim = self.shared_experts.output_dim

    def forward(self, shared, tasks):
        """Mixes the experts for every stream.

        Args:
            shared: The shared input, ``(B, input_dim)``.
            tasks: Each task's input, K times ``(B, input_dim)``.

        Returns:
            The shared output ``(B, output_dim)``, None if no layer follows; each task's, K times ``(B, output_dim)``.
        """
        of_all = self.shared_experts(shared)  # (B, experts, output_dim)
        own = [experts(x) for experts, x in zip(self.task_experts, tasks)]
        constant = [outputs.detach() for outputs in own]
        mixed = []
        for k, (gate, x) in enumerate(zip(self.task_gates, tasks)):
            mixed.append(gate(x + shared, torch.cat([*constant[:k], own[k], *constant[k + 1 :], of_all], dim=1)))
        if self.shared_gate is None:
            return None, mixed
        return self.shared_gate(shared, torch.cat([*constant, of_all], dim=1)), mixed

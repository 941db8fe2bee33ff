"""OMoE: one-gate mixture of experts, a baseline of Modeling Task Relationships ... (MMoE, KDD 2018).

Ma et al., https://doi.org/10.1145/3219819.3220007, figure 1b: a mixture of experts in the place of the shared bottom,
with one gate for all tasks. MMoE gives each task a gate of its own.

Differs from the paper:
  * Sequences, which the paper's data do not have, enter as the mean of each column's events.
  * The gate is an MLP, as in FuxiCTR's MMoE; ``gate_hidden_units: []`` is the paper's linear one.
  * ``orthogonal: true`` is an option beyond it: the outputs of the experts are orthonormalised as in MOORE (Hendawy et
    al., ICLR 2024, https://arxiv.org/abs/2311.11385), so that no expert repeats another.
"""

import torch
import torch.nn.functional as F
from flowctr.layers import ExpertGate, Experts, FeatureTokens, TaskHeads
from fuxictr.pytorch.models import MultiTaskModel


class OMoE(MultiTaskModel):
    """Mixes experts on the field tokens and pooled sequences with one gate for all tasks, then one MLP per label.

    Args:
        feature_map: FuxiCTR's feature map.
        model_id: Name of the checkpoint and log.
        gpu: GPU index, -1 for the CPU.
        task: FuxiCTR's task type, one for all labels or a list with one for each.
        behaviors: Behaviour name -> aligned sequence columns; none: every sequence column by itself.
        embedding_dim: Token width D.
        embedding_initializer: FuxiCTR's initialiser of the embedding tables.
        num_experts: Experts.
        orthogonal: Whether each row's expert outputs are made orthogonal to each other and of length 1.
        expert_hidden_units: Widths of each expert.
        gate_hidden_units: Hidden widths of the gate; none: a linear map.
        head_hidden_units: Hidden widths of the heads.
        activation: Activation of experts, gate and heads.
        net_dropout: Dropout of experts, gate and heads.
        batch_norm: Batch normalisation in experts, gate and heads.
        optimizer: FuxiCTR's optimiser name.
        loss: FuxiCTR's loss name.
        learning_rate: Initial learning rate.
        **kwargs: Arguments of ``MultiTaskModel`` and ``BaseModel``.

    Raises:
        ValueError: If ``orthogonal`` asks for more experts than their outputs have dimensions.
    """

    def __init__(
        self,
        feature_map,
        model_id="OMoE",
        gpu=-1,
        task="binary_classification",
        behaviors=None,
        embedding_dim=16,
        embedding_initializer="partial(nn.init.normal_, std=1e-4)",
        num_experts=8,
        orthogonal=False,
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
        kwargs["num_tasks"] = len(feature_map.labels)
        super().__init__(feature_map, model_id=model_id, gpu=gpu, task=task, **kwargs)
        layers = {"activation": activation, "dropout": net_dropout, "batch_norm": batch_norm}
        self.tokens = FeatureTokens(feature_map, embedding_dim, behaviors, embedding_initializer)
        width = (self.tokens.num_fields + self.tokens.num_columns) * embedding_dim
        self.experts = Experts(num_experts, width, expert_hidden_units, **layers)
        if orthogonal and num_experts > self.experts.output_dim:
            raise ValueError(
                f"orthogonal: at most as many experts as their last width; got num_experts={num_experts}, "
                f"expert_hidden_units={list(expert_hidden_units)}"
            )
        self.orthogonal = orthogonal
        self.gate = ExpertGate(width, num_experts, gate_hidden_units, **layers)
        self.heads = TaskHeads(
            self.experts.output_dim,
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
        x = self.tokens.append_pooled(*self.tokens(self.get_inputs(inputs))).flatten(1)  # (B, N * D)
        experts = self.experts(x)  # (B, experts, width)
        if self.orthogonal:
            experts = gram_schmidt(experts)
        return self.heads(self.gate(x, experts))


def gram_schmidt(vectors):
    """Orthonormalises the vectors of each row, in their order: ``u_e = v_e - sum_{d<e} <v_e, u_d> u_d``, over its norm.

    Args:
        vectors: ``(B, E, D)``. Half-precision ones are widened: their rounding would undo the orthogonality.

    Returns:
        ``(B, E, D)``; zeros for a vector of zeros, such as the output of rectified units that are all off.
    """
    basis = []
    for vector in vectors.to(torch.promote_types(vectors.dtype, torch.float32)).unbind(dim=1):
        for unit in basis:  # from what is left so far, which rounds less than from the vector itself
            vector = vector - (vector * unit).sum(dim=-1, keepdim=True) * unit
        basis.append(F.normalize(vector, dim=-1, eps=1e-6))
    return torch.stack(basis, dim=1)

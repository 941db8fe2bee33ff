"""Prediction heads: one MLP per task on a shared representation."""

from collections.abc import Iterable, Sequence

import torch
from fuxictr.pytorch.layers import MLP_Block
from torch import Tensor, nn


def named_predictions(
    labels: Sequence[str], activations: Iterable[nn.Module], logits: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Activates one logit ``(B, 1)`` per label and names it as FuxiCTR does.

    Args:
        labels: Label names.
        activations: Output activations, one per label.
        logits: Logits, one per label. Half-precision ones are widened: scores rounded to 8 bits would tie rows that AUC
            and gAUC should tell apart.

    Returns:
        ``{"<label>_pred": (B, 1)}`` for every label; with a single label the same tensor is also ``"y_pred"``, so that
        single-task code of FuxiCTR finds it.
    """
    predictions = {
        f"{label}_pred": activation(logit.to(torch.promote_types(logit.dtype, torch.float32)))
        for label, activation, logit in zip(labels, activations, logits)
    }
    if len(labels) == 1:
        predictions["y_pred"] = predictions[f"{labels[0]}_pred"]
    return predictions


class TaskHeads(nn.Module):
    """``y_k = activation_k(MLP_k(x))``: one MLP of the same architecture and separate weights for every label.

    Args:
        input_dim: Width of the representation.
        labels: Label names, one task each.
        hidden_units: Hidden widths of each MLP.
        activations: Output activations, one per label (sigmoid for a binary task).
        hidden_activation: Activation of the hidden layers.
        dropout: Dropout after each hidden layer.
        batch_norm: Batch normalisation in each hidden layer.
    """

    def __init__(
        self,
        input_dim: int,
        labels: Sequence[str],
        hidden_units: Sequence[int],
        activations: Iterable[nn.Module],
        hidden_activation: str = "SiLU",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ):
        super().__init__()
        self.labels = list(labels)
        self.activations = nn.ModuleList(activations)
        self.towers = nn.ModuleList(
            MLP_Block(
                input_dim,
                hidden_units=list(hidden_units),
                hidden_activations=hidden_activation,
                output_dim=1,
                dropout_rates=dropout,
                batch_norm=batch_norm,
            )
            for _ in self.labels
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Predicts every task.

        Args:
            x: One representation for all tasks, ``(B, input_dim)``, or one for each, ``(B, K, input_dim)``.

        Returns:
            See `named_predictions`.
        """
        inputs = x.unbind(dim=1) if x.dim() == 3 else [x] * len(self.labels)
        logits = [tower(task_input) for tower, task_input in zip(self.towers, inputs)]
        return named_predictions(self.labels, self.activations, logits)

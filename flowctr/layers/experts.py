"""Mixtures of experts: several MLPs on one input, and gates that mix their outputs for each row."""

from collections.abc import Sequence

import torch
from flowctr.layers.options import check_positive
from fuxictr.pytorch.layers import MLP_Block
from torch import Tensor, nn


class Experts(nn.Module):
    """``f_e(x) = MLP_e(x)`` for e = 1..E: one architecture, separate weights.

    Args:
        num_experts: Experts E.
        input_dim: Width of the input.
        hidden_units: Widths of each MLP; the last one is the width D of the output.
        activation: Activation of every layer.
        dropout: Dropout after each layer.
        batch_norm: Batch normalisation in each layer.

    Raises:
        ValueError: If there is no expert or an expert has no layer.
    """

    def __init__(
        self,
        num_experts: int,
        input_dim: int,
        hidden_units: Sequence[int],
        activation: str = "ReLU",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ):
        super().__init__()
        check_positive(num_experts=num_experts)
        if not hidden_units:
            raise ValueError(f"experts need at least one layer: list its width; got {hidden_units!r}")
        self.mlps = nn.ModuleList(
            MLP_Block(
                input_dim,
                hidden_units=list(hidden_units),
                hidden_activations=activation,
                dropout_rates=dropout,
                batch_norm=batch_norm,
            )
            for _ in range(num_experts)
        )
        self.output_dim = hidden_units[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, input_dim)`` to every expert's output, ``(B, E, D)``."""
        return torch.stack([mlp(x) for mlp in self.mlps], dim=1)


class ExpertGate(nn.Module):
    """``sum_e g_e(x) f_e`` with ``g(x) = softmax(MLP(x))``, a linear map if the MLP has no hidden layer.

    Args:
        input_dim: Width of what the gate reads.
        num_experts: Experts E.
        hidden_units: Hidden widths of the MLP.
        activation: Activation of its hidden layers.
        dropout: Dropout after each hidden layer.
        batch_norm: Batch normalisation in each hidden layer.
    """

    def __init__(
        self,
        input_dim: int,
        num_experts: int,
        hidden_units: Sequence[int] = (),
        activation: str = "ReLU",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ):
        super().__init__()
        self.logits = MLP_Block(
            input_dim,
            hidden_units=list(hidden_units),
            hidden_activations=activation,
            output_dim=num_experts,
            dropout_rates=dropout,
            batch_norm=batch_norm,
        )

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """Mixes the experts.

        Args:
            x: What the gate reads, ``(B, input_dim)``.
            experts: Outputs of the experts, ``(B, E, D)``.

        Returns:
            ``(B, D)``.
        """
        weights = torch.softmax(self.logits(x), dim=-1)  # (B, E)
        return (weights.unsqueeze(-1) * experts).sum(dim=1)

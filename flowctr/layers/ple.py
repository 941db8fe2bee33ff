"""Progressive layered extraction: shared and task-specific experts (Tang et al., RecSys 2020)."""

from collections.abc import Sequence

import torch
from flowctr.layers.experts import ExpertGate, Experts
from flowctr.layers.options import check_positive
from torch import Tensor, nn


class PLE(nn.Module):
    """Gives every task a representation of its own, in levels of experts that it owns or shares with all tasks.

    Level l has experts ``E_k`` of each task k, which read the task's stream ``g_k(l-1)``, and shared ones ``E_s``,
    which read the shared stream ``g_s(l-1)``; at the first level all streams are the input. Then

        g_k(l) = softmax(W_k g_k(l-1)) [E_k ; E_s]                  (Customized Gate Control)
        g_s(l) = softmax(W_s g_s(l-1)) [E_1 ; ... ; E_K ; E_s]      (not at the last level: nothing reads it)

    Args:
        input_dim: Width of the input.
        num_tasks: Tasks K.
        num_levels: Levels; 1 is CGC.
        num_experts: Experts of each task, and as many shared ones.
        hidden_units: Widths of each expert's layers; the last one is the width of the streams.
        activation: Activation of the experts' layers.
        dropout: Dropout after each layer of an expert.
        batch_norm: Batch normalisation in each layer of an expert.

    Raises:
        ValueError: If a count is below one, or ``hidden_units`` is empty.
    """

    def __init__(
        self,
        input_dim: int,
        num_tasks: int,
        num_levels: int = 2,
        num_experts: int = 1,
        hidden_units: Sequence[int] = (256, 128),
        activation: str = "ReLU",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ):
        super().__init__()
        check_positive(num_tasks=num_tasks, num_levels=num_levels)
        self.num_tasks = num_tasks
        self.levels = nn.ModuleList()
        for level in range(1, num_levels + 1):
            groups = [
                Experts(num_experts, input_dim, hidden_units, activation, dropout, batch_norm)
                for _ in range(num_tasks + 1)
            ]
            self.levels.append(ExtractionLevel(groups, input_dim, num_experts, last=level == num_levels))
            input_dim = hidden_units[-1]
        self.output_dim = input_dim

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, input_dim)`` to the tasks' representations, ``(B, K, output_dim)``."""
        streams = [x] * (self.num_tasks + 1)
        for level in self.levels:
            streams = level(streams)
        return torch.stack(streams, dim=1)


class ExtractionLevel(nn.Module):
    """One level of PLE: experts of every task and shared ones, and a gate for every stream that goes on."""

    def __init__(self, groups: list[Experts], width: int, num_experts: int, last: bool):
        super().__init__()
        self.groups = nn.ModuleList(groups)  # the experts of each task, then the shared ones
        read = [2 * num_experts] * (len(groups) - 1) + [len(groups) * num_experts] * (not last)
        self.gates = nn.ModuleList(ExpertGate(width, count) for count in read)

    def forward(self, streams: list[Tensor]) -> list[Tensor]:
        """Maps the tasks' streams and the shared one, ``(B, width)`` each, to the next ones; the last level's are K."""
        *own, shared = [experts(x) for experts, x in zip(self.groups, streams)]  # (B, E, D) each
        read = [torch.cat([task, shared], dim=1) for task in own] + [torch.cat([*own, shared], dim=1)]
        return [gate(x, experts) for gate, x, experts in zip(self.gates, streams, read)]

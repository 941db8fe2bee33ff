"""LoRA units: what is specific to a scenario or a task, as low-rank affine maps.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, https://arxiv.org/abs/2106.09685.
"""

import torch
from torch import Tensor, nn


class LoRAUnits(nn.Module):
    """``unit_k(x) = x A_k B_k + b_k`` for k = 1..K: zero at the start, as every ``B_k`` and ``b_k`` is.

    Args:
        num_units: Units K.
        input_dim: Width of the input.
        output_dim: Width of the output.
        rank: Rank r of ``A_k B_k``.
    """

    def __init__(self, num_units: int, input_dim: int, output_dim: int, rank: int):
        super().__init__()
        self.A = nn.Parameter(torch.empty(num_units, input_dim, rank))
        self.B = nn.Parameter(torch.empty(num_units, rank, output_dim))
        self.bias = nn.Parameter(torch.empty(num_units, output_dim))
        self.output_dim = output_dim
        self.init_weights()

    def init_weights(self) -> None:
        """Draws every ``A_k`` (xavier normal) and zeroes the rest."""
        for down in self.A:
            nn.init.xavier_normal_(down)
        nn.init.zeros_(self.B)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, choice: Tensor | None = None) -> Tensor:
        """Applies one unit to each row, or every unit to all of them.

        Args:
            x: ``(B, input_dim)`` with ``choice``; without it ``(B, K, input_dim)``, or ``(B, 1, input_dim)`` where all
                units read the same.
            choice: Each row's unit, one-hot ``(B, K)``; a row of zeros chooses none and gives zeros.

        Returns:
            ``(B, output_dim)`` with ``choice``, else ``(B, K, output_dim)``.
        """
        if choice is None:
            low = torch.einsum("bki,kir->bkr", x.expand(-1, len(self.A), -1), self.A)
            return torch.einsum("bkr,kro->bko", low, self.B) + self.bias
        # All K low-rank products cost less than gathering a matrix for every row.
        low = torch.einsum("bi,kir->bkr", x, self.A) * choice.unsqueeze(-1)
        return torch.einsum("bkr,kro->bo", low, self.B) + choice @ self.bias

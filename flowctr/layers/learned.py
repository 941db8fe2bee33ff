"""Tokens that are parameters: CLS, task and hub tokens that know nothing of the row."""

import torch
from torch import Tensor, nn


class LearnedTokens(nn.Module):
    """Learned tokens, the same for every row.

    Args:
        num_tokens: Tokens N.
        dim: Token width D.
        std: Standard deviation of what the tokens start with; None: xavier normal.
    """

    def __init__(self, num_tokens: int, dim: int, std: float | None = None):
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(num_tokens, dim))
        self.output_dim = dim
        self.init_weights()

    def init_weights(self) -> None:
        """Draws the tokens."""
        if self.std is None:
            nn.init.xavier_normal_(self.weight)
        else:
            nn.init.normal_(self.weight, std=self.std)

    def forward(self, batch_size: int) -> Tensor:
        """Repeats the tokens, ``(B, N, D)``."""
        return self.weight.expand(batch_size, -1, -1)

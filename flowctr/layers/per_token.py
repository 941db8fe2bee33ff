"""Token-specific parameters: tokens of different meaning share no weights (RankMixer, arXiv 2507.15551)."""

import torch
from torch import Tensor, nn


class PerTokenLinear(nn.Module):
    """``y_n = x_n W_n + b_n``: every token has a linear map of its own.

    Args:
        num_tokens: Tokens N.
        input_dim: Width of a token.
        output_dim: Width of a mapped token.
        bias: Whether there are ``b_n``.
    """

    def __init__(self, num_tokens: int, input_dim: int, output_dim: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tokens, input_dim, output_dim))
        self.bias = nn.Parameter(torch.empty(num_tokens, output_dim)) if bias else None
        self.output_dim = output_dim
        self.init_weights()

    def init_weights(self) -> None:
        """Draws every ``W_n`` (xavier normal) and zeroes every ``b_n``."""
        for weight in self.weight:
            nn.init.xavier_normal_(weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, N, input_dim)`` to ``(B, N, output_dim)``."""
        y = torch.einsum("bni,nio->bno", x, self.weight)
        return y if self.bias is None else y + self.bias

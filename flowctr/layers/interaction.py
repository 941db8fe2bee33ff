"""Feature interactions over tokens: pairwise inner products and the low-rank cross of DCNv2."""

import torch
from torch import Tensor, nn


def pairwise_dots(tokens: Tensor) -> Tensor:
    """Inner products of all token pairs.

    Args:
        tokens: ``(B, N, D)``.

    Returns:
        The strict upper triangle of ``Z Z^T`` row by row, ``(B, N(N-1)/2)``.
    """
    n = tokens.shape[1]
    rows, columns = torch.triu_indices(n, n, offset=1, device=tokens.device)
    return (tokens @ tokens.transpose(1, 2))[:, rows, columns]


class DotInteraction(nn.Module):
    """``DOT(Z) = Linear(triu(Z Z^T))``: all pairwise inner products, mapped back to tokens (DLRM, 2019; DHEN, 2022).

    Args:
        num_inputs: Input tokens N.
        num_outputs: Output tokens M.
        dim: Token width D.

    Raises:
        ValueError: If there are fewer than two tokens to pair.
    """

    def __init__(self, num_inputs: int, num_outputs: int, dim: int):
        super().__init__()
        if num_inputs < 2:
            raise ValueError(f"pairwise products need at least two tokens; got num_inputs={num_inputs}")
        self.to_tokens = nn.Linear(num_inputs * (num_inputs - 1) // 2, num_outputs * dim)
        self.output_dim = dim

    def forward(self, z: Tensor) -> Tensor:
        """Maps ``(B, N, D)`` to ``(B, M, D)``."""
        return self.to_tokens(pairwise_dots(z)).unflatten(-1, (-1, self.output_dim))


class CrossInteraction(nn.Module):
    """``DCN(x) = x * (U V x + b)`` on the flattened tokens: one low-rank cross of DCNv2 (Wang et al., 2021), no skip.

    Args:
        num_tokens: Tokens N, kept.
        dim: Token width D.
        rank: Rank of the cross layer's weight.
    """

    def __init__(self, num_tokens: int, dim: int, rank: int):
        super().__init__()
        self.down = nn.Linear(num_tokens * dim, rank, bias=False)
        self.up = nn.Linear(rank, num_tokens * dim)
        self.output_dim = dim

    def forward(self, z: Tensor) -> Tensor:
        """Crosses ``(B, N, D)``; same shape out."""
        x = z.flatten(1)  # (B, N D)
        return (x * self.up(self.down(x))).unflatten(-1, z.shape[1:])

"""Self-gating of summary tokens (InterFormer, arXiv 2411.09852, section on the Cross Arch)."""

import torch
from flowctr.layers.options import check_options
from torch import Tensor, nn

GATING_KINDS = ("self", "identity", "tanh", "sigmoid")


class Gating(nn.Module):
    """Lets each token decide how much of it passes.

    ``self``: ``Y * sigmoid(MLP(Y))``. The paper writes ``sigma(Y * MLP(Y))`` with sigma the identity, tanh or sigmoid;
    these literal forms are the other kinds. At FuxiCTR's embedding scale (std 1e-4) they start out as almost zero
    (identity, tanh) or as the constant 0.5 (sigmoid), which is why they are not the default.

    Args:
        dim: Token width D.
        kind: ``self``, ``identity``, ``tanh`` or ``sigmoid``.

    Raises:
        ValueError: If ``kind`` is unknown.
    """

    def __init__(self, dim: int, kind: str = "self"):
        super().__init__()
        check_options(gating=(kind, GATING_KINDS))
        self.kind = kind
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.output_dim = dim

    def forward(self, y: Tensor) -> Tensor:
        """Gates ``(B, N, D)``; same shape out."""
        gate = self.mlp(y)
        if self.kind == "self":
            return y * torch.sigmoid(gate)
        literal = y * gate
        if self.kind == "tanh":
            return torch.tanh(literal)
        return torch.sigmoid(literal) if self.kind == "sigmoid" else literal

"""Explicit crosses of the tokens before the first block, for the heads."""

import torch
from flowctr.layers import CrossInteraction, Gating, masked_mean
from torch import nn


class CrossTokens(nn.Module):
    """``Gating(W (z + z * (U V z + b)))``: one cross layer of DCNv2 (Wang et al., 2021), compressed to a few tokens.

    z are the field tokens and the mean event of each behaviour.

    Args:
        num_fields: Field tokens M.
        num_behaviors: Behaviours, a mean each.
        num_outputs: Tokens N that are left.
        dim: Token width D.
        rank: Rank of the cross layer's weight U V.
    """

    def __init__(self, num_fields, num_behaviors, num_outputs, dim, rank):
        super().__init__()
        num_tokens = num_fields + num_behaviors
        self.cross = CrossInteraction(num_tokens, dim, rank)
        self.compress = nn.Linear(num_tokens * dim, num_outputs * dim)
        self.gate = Gating(dim)
        self.token_dim = dim
        self.output_dim = num_outputs * dim

    def forward(self, fields, events):
        """Maps field tokens ``(B, M, D)`` and the events and mask of each behaviour to ``(B, N * D)``."""
        means = [masked_mean(s, mask).unsqueeze(1) for s, mask in events.values()]  # (B, 1, D) each
        z = torch.cat([fields, *means], dim=1)  # (B, M + behaviours, D)
        z = z + self.cross(z)
        tokens = self.compress(z.flatten(1)).unflatten(-1, (-1, self.token_dim))  # (B, N, D)
        return self.gate(tokens).flatten(1)

"""Personalised feed-forward network with weights from the sample (InterFormer, arXiv 2411.09852, appendix A.2.2)."""

import torch
from flowctr.layers.options import check_options
from torch import Tensor, nn

PFFN_KINDS = ("literal", "hyper")


class PersonalizedFFN(nn.Module):
    """``PFFN(X_sum, S) = f(X_sum) S``: one ``D x D`` map per sample, applied to every token of the sequence.

    ``literal``: ``f(X_sum) = X_sum^T W`` with a learnable ``W: n_sum x D`` (the appendix). ``hyper``: ``f`` is an MLP
    from the flattened summary to ``D * D`` (the body calls f an MLP).

    Args:
        num_summaries: Summary tokens n_sum.
        dim: Token width D.
        kind: ``literal`` or ``hyper``.

    Raises:
        ValueError: If ``kind`` is unknown.
    """

    def __init__(self, num_summaries: int, dim: int, kind: str = "literal"):
        super().__init__()
        check_options(pffn=(kind, PFFN_KINDS))
        self.kind = kind
        self.output_dim = dim
        if kind == "literal":
            self.weight = nn.Parameter(torch.empty(num_summaries, dim))
            self.init_weights()
        else:
            self.hyper = nn.Sequential(nn.Linear(num_summaries * dim, dim), nn.SiLU(), nn.Linear(dim, dim * dim))

    def init_weights(self) -> None:
        """Draws the literal form's weight (xavier normal)."""
        if self.kind == "literal":
            nn.init.xavier_normal_(self.weight)

    def forward(self, x_sum: Tensor, s: Tensor) -> Tensor:
        """Maps the tokens ``s`` ``(B, T, D)`` with the summary ``x_sum`` ``(B, n_sum, D)``; returns ``(B, T, D)``."""
        if self.kind == "literal":
            return s @ self.weight.T @ x_sum  # X_sum^T W has rank n_sum: two thin products instead of a (B, D, D) map
        w = self.hyper(x_sum.flatten(1)).unflatten(-1, (self.output_dim, -1))  # (B, D, D)
        return s @ w.transpose(1, 2)

"""Two towers, one for the user's histories and one for the target, that learn from the other targets of the batch."""

import torch
from torch import Tensor, nn

TEMPERATURE = 0.1
SMALLEST_NORM = 1e-6  # of a vector that is normalised: a row without events has none, and no steep gradient


class TargetTowers(nn.Module):
    """A token of how well histories h and target v fit, and the loss that teaches it: a softmax over the batch.

    s_ij = cos(W_h h_i, W_v v_j)
    token_i = Linear(s_ii)
    loss = -mean over i with a positive label of log(exp(s_ii / tau) / sum_j exp(s_ij / tau))

    j are all rows of the batch but those that have the very target of row i. So each positive row teaches by thousands
    of targets, not by one label. In-batch negatives: Yi et al., "Sampling-bias-corrected neural modeling for large
    corpus item recommendations", RecSys 2019, https://doi.org/10.1145/3298689.3346996. Their correction for frequent
    targets, which are negatives more often, is left out: how frequent a target is, the other tokens tell.

    Args:
        history_dim: Width of the histories' representation h.
        target_dim: Width of the target's representation v.
        dim: Width D of both towers and of the token.
    """

    def __init__(self, history_dim: int, target_dim: int, dim: int):
        super().__init__()
        self.history = nn.Linear(history_dim, dim, bias=False)
        self.target = nn.Linear(target_dim, dim, bias=False)
        self.token = nn.Linear(1, dim)
        self.output_dim = dim

    def forward(self, history: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compares each history with its target.

        Args:
            history: ``(B, history_dim)``, zeros in rows without events.
            target: ``(B, target_dim)``.

        Returns:
            The token ``(B, D)`` and, for `loss`, both vectors of length one ``(B, D)``.
        """
        u = nn.functional.normalize(self.history(history), dim=-1, eps=SMALLEST_NORM)
        v = nn.functional.normalize(self.target(target), dim=-1, eps=SMALLEST_NORM)
        return self.token((u * v).sum(dim=-1, keepdim=True)), u, v

    @staticmethod
    def loss(u: Tensor, v: Tensor, ids: Tensor, positive: Tensor) -> Tensor:
        """Computes the loss of one label; 0 if no row is positive.

        Args:
            u: Histories' vectors of length one, ``(B, D)``.
            v: Targets' vectors of length one, ``(B, D)``.
            ids: What says which target a row has, ``(B, fields)``.
            positive: Rows with a positive label, ``(B,)``.
        """
        same = (ids.unsqueeze(1) == ids).all(dim=-1)  # (B, B)
        same.fill_diagonal_(False)
        scores = u.float() @ v.float().T / TEMPERATURE  # (B, B)
        losses = scores.masked_fill(same, -torch.inf).logsumexp(dim=1) - scores.diagonal()
        return torch.where(positive, losses, 0).sum() / positive.sum().clamp(min=1)

"""Two towers, one for the user's histories and one for the target, that learn from the other targets of the batch."""

import torch
from torch import Tensor, nn

TEMPERATURE = 0.1
SMALLEST_NORM = 1e-6  # what a row without events, whose vector is zero, is divided by


class TargetTowers(nn.Module):
    """A token of how well histories h and target v fit, and the loss that teaches it: a softmax over the batch.

    s_ij = cos(W_h h_i, W_v v_j)
    token_i = Linear(s_ii)
    loss_i = -log(exp(s_ii / tau) / sum_j exp(s_ij / tau))

    j are row i and all rows of the batch with another target, whatever their labels; `loss_i` counts where the label of
    row i is positive. So a positive row teaches by as many targets as the batch has. In-batch negatives: Yi et al.,
    "Sampling-bias-corrected neural modeling for large corpus item recommendations", RecSys 2019,
    https://doi.org/10.1145/3298689.3346996. Their correction for frequent targets, which are negatives more often, is
    left out: how frequent a target is, the other tokens tell. The loss takes time and memory by the square of the rows.

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
            The token ``(B, D)`` and, for `losses`, both vectors of length one ``(B, D)``.
        """
        u, v = _unit(self.history(history)), _unit(self.target(target))
        return self.token((u * v).sum(dim=-1, keepdim=True)), u, v

    @staticmethod
    def losses(u: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        """Computes the loss of each row, ``(B,)``.

        Args:
            u: Histories' vectors of length one, ``(B, D)``.
            v: Targets' vectors of length one, ``(B, D)``.
            ids: What says which target a row has, ``(B, fields)``; ids that stand for all that is rare are one target.
        """
        same = (ids.unsqueeze(1) == ids).all(dim=-1)  # (B, B)
        same.fill_diagonal_(False)
        scores = ((u / TEMPERATURE) @ v.T).masked_fill_(same, -torch.inf)  # (B, B)
        own = torch.arange(len(ids), device=ids.device)
        return nn.functional.cross_entropy(scores, own, reduction="none")


def _unit(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # under autocast: 8 bits would not give a length of one
    return nn.functional.normalize(wide, dim=-1, eps=SMALLEST_NORM)

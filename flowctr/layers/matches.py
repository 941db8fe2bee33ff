"""What a user's events have in common with the target, counted instead of learned."""

import torch
from torch import Tensor, nn


class MatchToken(nn.Module):
    """One token for a behaviour: ``Linear([log(1 + T), log(1 + n_1), ..., log(1 + n_C), r_1, ..., r_C])``.

    Of T events, n_c have the target's id in column c; the last of them is the 1/r_c-th most recent event, and r_c is 0
    without one. An id of the vocabulary matches however rare it is, and little its embedding has learned.

    Args:
        num_columns: Columns C that can match.
        dim: Token width D.
    """

    def __init__(self, num_columns: int, dim: int):
        super().__init__()
        self.linear = nn.Linear(1 + 2 * num_columns, dim)
        self.output_dim = dim

    def forward(self, matches: Tensor, mask: Tensor) -> Tensor:
        """Makes the token.

        Args:
            matches: Whether an event's column has the target's id, ``(B, T, C)``, the most recent event last.
            mask: Real events, ``(B, T)``.

        Returns:
            ``(B, D)``.
        """
        age = torch.arange(matches.shape[1], 0, -1, device=matches.device)[:, None]  # (T, 1), from 1
        counts = torch.cat([mask.sum(dim=1, keepdim=True), matches.sum(dim=1)], dim=1).float().log1p()  # (B, 1 + C)
        latest = (matches / age).amax(dim=1)  # (B, C)
        return self.linear(torch.cat([counts, latest], dim=1).to(self.linear.weight.dtype))

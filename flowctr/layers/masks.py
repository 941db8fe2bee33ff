"""Real and padded steps: aligning events and averaging over the real ones."""

import torch
from torch import Tensor


def right_align(ids: Tensor, mask: Tensor) -> Tensor:
    """Moves the real events of each row to the end, in their order, and fills the front with padding (0).

    After it, the most recent event is the last step, whichever side the data were padded on and wherever holes were.
    Linear in T: every real event is scattered to its slot counted from the end.

    Args:
        ids: Event ids, ``(B, T)``, oldest first.
        mask: Real events, ``(B, T)``.

    Returns:
        Aligned ids, ``(B, T)``.
    """
    steps = ids.shape[1]
    from_the_end = mask.flip(1).cumsum(1).flip(1)  # 1 at the most recent event
    slot = torch.where(mask, steps - from_the_end, steps)  # padding goes to a spare slot that is cut off
    return ids.new_zeros(ids.shape[0], steps + 1).scatter(1, slot, ids)[:, :steps]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Averages over the real steps; a row without any gives zeros.

    Args:
        x: Tokens, ``(B, T, D)``.
        mask: Real steps, ``(B, T)``.

    Returns:
        Means, ``(B, D)``.
    """
    weights = mask.unsqueeze(-1).to(x.dtype)
    return (x * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)

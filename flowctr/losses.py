"""The loss of each label: weighted against the others', and over the rows that have the label."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from flowctr import distributed
from torch import Tensor, nn

Loss = Callable[..., Tensor]
"""A function of torch.nn.functional: (y_pred, y_true, reduction=...) -> loss."""


@dataclass
class WeightedLoss:
    """``weight * loss``."""

    loss: Loss
    weight: float

    def __call__(self, y_pred: Tensor, y_true: Tensor, reduction: str = "mean") -> Tensor:
        """Returns the weighted loss, reduced as ``loss`` does."""
        return self.weight * self.loss(y_pred, y_true, reduction=reduction)


@dataclass
class UncertaintyLoss:
    """``exp(-s) * loss + s / 2`` with a learned ``s = log(sigma^2)``, the uncertainty of one task.

    The form for classification, the second term of equation 10 of Kendall, Gal and Cipolla, "Multi-task learning using
    uncertainty to weigh losses", CVPR 2018, https://arxiv.org/abs/1705.07115; taken for regression too, whose own form
    has ``loss / 2``.
    """

    loss: Loss
    log_variances: nn.Parameter  # (K,)
    task: int

    def __call__(self, y_pred: Tensor, y_true: Tensor, reduction: str = "mean") -> Tensor:
        """Returns the weighted loss, reduced as ``loss`` does."""
        s = self.log_variances[self.task]
        return torch.exp(-s) * self.loss(y_pred, y_true, reduction=reduction) + s / 2


@dataclass
class KnownLoss:
    """The mean loss of the rows whose label is known, that is not NaN; 0 if there are none.

    Attributes:
        known_share: Share of known labels among all rows of a step that is taken in parts, to be set before each: the
            mean of the parts' losses, weighted by their rows, is then that of all known rows. None: a batch is a step.
    """

    loss: Loss
    known_share: Tensor | None = field(default=None, init=False, compare=False)

    def __call__(self, y_pred: Tensor, y_true: Tensor, reduction: str = "mean") -> Tensor:
        """Returns the mean, the only reduction there is, without waiting for the device."""
        known = ~y_true.isnan()
        losses = self.loss(y_pred, torch.where(known, y_true, 0.0), reduction="none")
        count = known.sum().clamp(min=1) if self.known_share is None else len(y_true) * self.known_share
        return torch.where(known, losses, 0.0).sum() / count


def leave_out_missing(losses: Mapping[str, Loss], may_be_missing: Sequence[str]) -> list[Loss]:
    """Puts `KnownLoss` around the loss of each label that may be missing, once."""
    return [
        KnownLoss(loss) if label in may_be_missing and not isinstance(loss, KnownLoss) else loss
        for label, loss in losses.items()
    ]


def share_known(losses: Mapping[str, Loss], batch: Mapping[str, Tensor], rows: int) -> None:
    """Tells each `KnownLoss` which share of a step's rows has its label.

    Args:
        losses: Label -> its loss.
        batch: Rows of the step; those of this process, if several take it together.
        rows: Their number, maybe 0.
    """
    known = {label: loss for label, loss in losses.items() if isinstance(loss, KnownLoss)}
    if not known:
        return
    shares = [(~batch[label].isnan()).sum() / max(rows, 1) for label in known]
    distributed.mean_over_rows(shares, rows)
    for loss, share in zip(known.values(), shares):
        loss.known_share = share.masked_fill_(share == 0, 1)  # of none the loss is 0, whatever it is divided by

"""Learning curves for TensorBoard."""

import logging
from collections.abc import Mapping
from pathlib import Path


def check_installed() -> None:
    """Raises ValueError if the package is missing, which training does not need otherwise."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "tensorboard: true needs the package tensorboard; pip install 'flowctr[tensorboard]', or leave the key out"
        ) from error


class CurveEvents:
    """The event files of one training.

    Args:
        folder: Where they are; those of an earlier training are removed.
        step: Step after which an interrupted training goes on: its files stay, what they have of later steps, which
            come again, is purged. 0 to start anew.
    """

    def __init__(self, folder: Path, step: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        for path in folder.glob("events.out.tfevents.*") if step == 0 else ():
            path.unlink()
        self._writer: SummaryWriter | None = SummaryWriter(folder, purge_step=step + 1)

    def add(self, curve: str, point: Mapping[str, float]) -> None:
        """Writes a point of a curve, ``{step, epoch, <name>: value}``, at once, so that a killed run leaves it.

        When that fails, as on a full disk, there is one warning and nothing more: the training goes on.
        """
        if self._writer is None:
            return
        try:
            for name, value in point.items():
                if name not in ("step", "epoch"):
                    self._writer.add_scalar(f"{curve}/{name}", value, point["step"])
            self._writer.flush()
        except OSError as error:
            logging.warning("The curves for TensorBoard cannot be written to %s: %s", self._writer.log_dir, error)
            self._writer = None

    def close(self) -> None:
        """Closes the files."""
        if self._writer is not None:
            self._writer.close()

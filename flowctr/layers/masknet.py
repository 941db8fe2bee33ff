"""MaskNet: merges several parallel sequences into one (InterFormer, arXiv 2411.09852, eq. 3 of CIKM'25)."""

from torch import Tensor, nn


class MaskNet(nn.Module):
    """``S = MLP_lce(S_cat * MLP_mask(S_cat))``, per step; an instance-guided mask denoises the concatenated columns.

    The mask starts near one: at FuxiCTR's embedding scale (std 1e-4) a product of two small numbers would leave the
    sequence without a signal to learn from.

    Args:
        input_dim: Width of the concatenated columns.
        dim: Width D of the merged event.
    """

    def __init__(self, input_dim: int, dim: int):
        super().__init__()
        self.mask = nn.Sequential(nn.Linear(input_dim, input_dim), nn.SiLU(), nn.Linear(input_dim, input_dim))
        self.lce = nn.Linear(input_dim, dim)
        self.output_dim = dim
        self.init_weights()

    def init_weights(self) -> None:
        """Opens the mask: its output bias is one."""
        nn.init.ones_(self.mask[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        """Merges ``(B, T, input_dim)`` into ``(B, T, D)``."""
        return self.lce(x * self.mask(x))

"""Linear compressed embedding: a linear map along the token axis (InterFormer, arXiv 2411.09852, appendix A.2.1)."""

from torch import Tensor, nn


class LinearCompressedEmbedding(nn.Module):
    """``Y_m = sum_n W_nm X_n``: each output token is a learned mixture of the input tokens.

    Args:
        num_inputs: Input tokens N.
        num_outputs: Output tokens M.
    """

    def __init__(self, num_inputs: int, num_outputs: int):
        super().__init__()
        self.mix = nn.Linear(num_inputs, num_outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes ``(B, N, D)`` into ``(B, M, D)``."""
        return self.mix(x.transpose(1, 2)).transpose(1, 2)

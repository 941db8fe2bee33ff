"""Deep hierarchical ensemble layer (DHEN, arXiv 2203.11014), as InterFormer's benchmark uses it: DOT + DCN."""

from flowctr.layers.interaction import CrossInteraction, DotInteraction
from torch import Tensor, nn


class DHENLayer(nn.Module):
    """``DHEN(Z) = LN(DOT(Z) + DCN(Z) + Z)``: a sum ensemble keeps the token count, so the shortcut is the identity.

    Args:
        num_tokens: Tokens N.
        dim: Token width D.
        cross_rank: Rank of the cross layer.
    """

    def __init__(self, num_tokens: int, dim: int, cross_rank: int):
        super().__init__()
        self.dot = DotInteraction(num_tokens, num_tokens, dim)
        self.dcn = CrossInteraction(num_tokens, dim, cross_rank)
        self.norm = nn.LayerNorm(dim)
        self.output_dim = dim

    def forward(self, z: Tensor) -> Tensor:
        """Transforms ``(B, N, D)``; same shape out."""
        return self.norm(self.dot(z) + self.dcn(z) + z)

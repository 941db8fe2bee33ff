"""Multi-head attention with key masks and rotary positions, pooling by it, and reading its weights out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from flowctr.layers.learned import LearnedTokens
from flowctr.layers.rope import rotate
from torch import Tensor, nn

# Tokens up to which compiled code writes the scores to memory: fused kernels work on blocks of 64 to 128 tokens, which
# short sequences would leave mostly empty.
SHORT = 64


class MultiHeadAttention(nn.Module):
    """``softmax(Q K^T / sqrt(D/H)) V`` per head, then an output projection (Vaswani et al., 2017).

    Args:
        dim: Token width D.
        num_heads: Heads H; must divide ``dim``.
        dropout: Dropout on the attention weights while training.
        project_queries: Whether queries pass a projection of this module; False when they come projected.
        project_output: Whether the heads' output passes a projection.

    Raises:
        ValueError: If ``num_heads`` does not divide ``dim``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        dropout: float = 0.0,
        project_queries: bool = True,
        project_output: bool = True,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim; got num_heads={num_heads}, dim={dim}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(dim, dim) if project_queries else nn.Identity()
        self.key = nn.Linear(dim, dim, bias=False)  # softmax cancels a bias shared by all keys
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim) if project_output else nn.Identity()
        self.output_dim = dim

    def forward(
        self,
        queries: Tensor,
        tokens: Tensor,
        mask: Tensor | None = None,
        query_positions: Tensor | None = None,
        token_positions: Tensor | None = None,
    ) -> Tensor:
        """Lets each query read the real tokens.

        Args:
            queries: ``(B, N, D)``.
            tokens: Keys and values, ``(B, T, D)``.
            mask: Real tokens, ``(B, T)``; none: all are real.
            query_positions: Rotary positions of the queries, ``(B, N)``; none: no rotation.
            token_positions: Rotary positions of the tokens, ``(B, T)``; none: no rotation.

        Returns:
            ``(B, N, D)``; zeros where a row has no real token.
        """
        allowed = None if mask is None else _allowed(mask)
        dropout = self.dropout if self.training else 0.0
        unrotated = query_positions is None and token_positions is None
        if unrotated and queries.shape[1] * self.num_heads < self.output_dim:
            heads = self._read(self._split(self.query(queries)), tokens, allowed, dropout)
        else:
            q, k = self._queries_and_keys(queries, tokens, query_positions, token_positions)
            v = self._split(self.value(tokens))
            if torch.compiler.is_compiling() and tokens.shape[1] <= SHORT:
                weights = _weights(q, k, allowed)
                heads = F.dropout(weights, dropout) @ v
            else:
                heads = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
        out = self.out(heads.transpose(1, 2).flatten(2))  # (B, N, D)
        return out if mask is None else out * mask.any(dim=1)[:, None, None]

    def _read(self, q: Tensor, tokens: Tensor, allowed: Tensor | None, dropout: float) -> Tensor:
        """Attends with few queries: ``(q W_k) S^T`` and ``(weights S) W_v`` project queries and results, not tokens.

        Args:
            q: Projected queries, ``(B, H, N, D/H)``.
            tokens: ``(B, T, D)``.
            allowed: Keys that may be read, ``(B, 1, 1, T)``; none: all.
            dropout: Dropout on the attention weights.

        Returns:
            ``(B, H, N, D/H)``, as attention over projected keys and values gives it.
        """
        key, value = (layer.weight.unflatten(0, (self.num_heads, -1)) for layer in (self.key, self.value))
        q = torch.einsum("bhnd,hde->bhne", q, key)  # (B, H, N, D)
        weights = _softmax(torch.einsum("bhne,bte->bhnt", q, tokens) / key.shape[1] ** 0.5, allowed)
        weights = F.dropout(weights, dropout)
        read = torch.einsum("bhnt,bte->bhne", weights, tokens)  # (B, H, N, D)
        bias = self.value.bias.unflatten(0, (self.num_heads, 1, -1))
        return torch.einsum("bhne,hde->bhnd", read, value) + weights.sum(dim=-1, keepdim=True) * bias

    def weights(
        self,
        queries: Tensor,
        tokens: Tensor,
        mask: Tensor | None = None,
        query_positions: Tensor | None = None,
        token_positions: Tensor | None = None,
    ) -> Tensor:
        """Computes the attention weights that ``forward`` uses for the same arguments, ``(B, H, N, T)``."""
        q, k = self._queries_and_keys(queries, tokens, query_positions, token_positions)
        if mask is None:
            return _weights(q, k, None)
        return _weights(q, k, _allowed(mask)) * mask.any(dim=1)[:, None, None, None]

    def _queries_and_keys(self, queries, tokens, query_positions, token_positions) -> tuple[Tensor, Tensor]:
        q, k = self._split(self.query(queries)), self._split(self.key(tokens))
        if query_positions is not None:
            q = rotate(q, query_positions)
        if token_positions is not None:
            k = rotate(k, token_positions)
        return q, k

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N, D/H)


def _allowed(mask: Tensor) -> Tensor:
    """Broadcasts a key mask to ``(B, 1, 1, T)``; a row without a real key may read all, as softmax needs one."""
    return (mask | ~mask.any(dim=1, keepdim=True))[:, None, None, :]


def _weights(q: Tensor, k: Tensor, allowed: Tensor | None) -> Tensor:
    return _softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, allowed)


def _softmax(scores: Tensor, allowed: Tensor | None) -> Tensor:
    return (scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)).softmax(dim=-1)


class AttentionPooling(nn.Module):
    """Pooling by multi-head attention: learnable queries read the tokens (PMA; Lee et al., Set Transformer, 2019).

    ``PMA(S) = MHA(Q, S, S)`` with a learnable ``Q: num_queries x D``.

    Args:
        num_queries: Number of pooled tokens N.
        dim: Token width D.
        num_heads: Attention heads.
        dropout: Dropout on the attention weights while training.
    """

    def __init__(self, num_queries: int, dim: int, num_heads: int = 1, dropout: float = 0.0):
        super().__init__()
        self.queries = LearnedTokens(num_queries, dim)
        self.attention = MultiHeadAttention(dim, num_heads, dropout)
        self.num_tokens = num_queries
        self.output_dim = dim

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Pools ``(B, T, D)`` under the mask ``(B, T)`` into ``(B, N, D)``."""
        return self.attention(self.queries(len(tokens)), tokens, mask)


@contextmanager
def record_attention(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Records, while active, the weights of every ``MultiHeadAttention`` that runs inside ``model``.

    Yields:
        A dict that fills up as the model runs: module name -> weights averaged over heads, ``(B, N, T)``.
    """
    recorded: dict[str, Tensor] = {}

    def recorder(name: str):
        def hook(module, args, kwargs, output):
            recorded[name] = module.weights(*args, **kwargs).mean(dim=1)

        return hook

    handles = [
        module.register_forward_hook(recorder(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, MultiHeadAttention)
    ]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()

"""Rotary position embedding (Su et al., RoFormer, 2021)."""

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Rotates each pair of channels by an angle proportional to the token's position.

    Channel pairs ``(i, i + D/2)`` turn by ``position * base^(-2i/D)``, so that a query-key product depends on the two
    positions only through their difference.

    Args:
        x: Queries or keys per head, ``(B, H, T, D)``, D even.
        positions: Position of each token, ``(B, T)``.
        base: Wavelength base.

    Returns:
        Rotated ``x``, ``(B, H, T, D)``.

    Raises:
        ValueError: If D is odd.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"rotary positions need an even width per head; got {x.shape[-1]}")
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, D/2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)

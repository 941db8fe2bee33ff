from .InterFormer import InterFormer

__all__ = ["InterFormer"]

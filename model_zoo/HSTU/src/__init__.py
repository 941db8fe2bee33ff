from .HSTU import HSTU

__all__ = ["HSTU"]

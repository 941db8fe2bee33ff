from .STEM import STEM

__all__ = ["STEM"]

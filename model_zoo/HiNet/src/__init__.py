from .HiNet import HiNet

__all__ = ["HiNet"]

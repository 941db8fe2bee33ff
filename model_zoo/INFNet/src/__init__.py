from .INFNet import INFNet

__all__ = ["INFNet"]

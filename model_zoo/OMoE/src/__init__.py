from .OMoE import OMoE

__all__ = ["OMoE"]

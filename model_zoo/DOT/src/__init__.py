from .DOT import DOT

__all__ = ["DOT"]

from .AutoIFS import AutoIFS

__all__ = ["AutoIFS"]

from .OneTrans import OneTrans

__all__ = ["OneTrans"]

"""Filled from ``model_zoo/<MODEL>/src`` by setup.cfg: ``from flowctr.models.InterFormer import InterFormer``."""

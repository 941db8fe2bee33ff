"""MLPs, softmax and mixtures of experts in plain Python, for one row: what the models' equations are checked with."""

import math

from torch import nn


def mlp(block, x):
    """Runs an ``MLP_Block`` or a single ``Linear`` on a list of numbers; its activations must be ReLU."""
    for layer in block.mlp if hasattr(block, "mlp") else [block]:
        if isinstance(layer, nn.Linear):
            rows = zip(layer.weight.tolist(), layer.bias.tolist())
            x = [sum(w * v for w, v in zip(row, x)) + b for row, b in rows]
        else:
            assert isinstance(layer, nn.ReLU)
            x = [max(0.0, v) for v in x]
    return x


def experts(module, x):
    """Runs every expert of ``Experts``."""
    return [mlp(block, x) for block in module.mlps]


def softmax(logits):
    """Normalises a list of numbers."""
    exponentials = [math.exp(v) for v in logits]
    return [e / sum(exponentials) for e in exponentials]


def weighted_sum(weights, vectors):
    """Sums vectors, each times its weight."""
    return [sum(w * v for w, v in zip(weights, column)) for column in zip(*vectors)]


def mixture(gate, x, vectors):
    """Mixes vectors as ``ExpertGate`` does."""
    return weighted_sum(softmax(mlp(gate.logits, x)), vectors)


def sigmoid(x):
    """Maps a logit to a probability."""
    return 1 / (1 + math.exp(-x))

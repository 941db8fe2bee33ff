"""What a model computes for one row."""

import logging
from collections.abc import Iterable, Mapping

import torch
from fuxictr.pytorch.models import BaseModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROWS = 32


def flops_per_row(model: BaseModel, data: Iterable[Mapping[str, Tensor]]) -> float | None:
    """Counts the operations of the forward pass in evaluation mode, a multiplication with its addition as two.

    Like torch's counter it counts matrix products, convolutions and attention; sums, activations and the lookup of
    embeddings are not counted. What a batch costs once is shared by its rows.

    Args:
        model: A model; weights, mode and random numbers stay as they are.
        data: Batches; the first ``ROWS`` rows of the first one are taken.

    Returns:
        Operations per row; None, with a warning, if the model cannot be counted.
    """
    devices = [model.device] if model.device.type == "cuda" else []
    training = model.training
    try:
        rows = {name: values[:ROWS].to(model.device) for name, values in next(iter(data)).items()}
        # The counter knows the parts of attention, transformer layers and recurrent layers, not their fused kernels: so
        # no fused attention, no cuDNN, and gradients, with which torch takes no fast path of a transformer layer.
        with torch.random.fork_rng(devices), sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            with torch.enable_grad(), FlopCounterMode(display=False) as counter:
                model.eval()(rows)
        return counter.get_total_flops() / len(next(iter(rows.values())))
    except Exception as error:  # whatever a model does: a number beside the result must not cost the result
        logging.warning("The FLOPs of %s cannot be counted: %s", type(model).__name__, error)
        return None
    finally:
        model.train(training)

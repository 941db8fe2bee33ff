"""How a training step gets faster or smaller: precision, compiled and captured steps, one-kernel updates, checkpoints.

`flowctr.training.Engine` puts these together; each works alone, and each is off or exact by default.
"""

import ctypes
import functools
import gc
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from fuxictr.pytorch.layers import FeatureEmbeddingDict
from fuxictr.pytorch.models import BaseModel
from fuxictr.pytorch.torch_utils import get_regularizer
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

PRECISIONS = ("fp32", "tf32", "bf16")

Batch = Mapping[str, Tensor]


# Precision


def check_precision(precision: str, device: torch.device) -> None:
    """Raises ValueError if a precision is unknown or the GPU lacks it."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} must be one of {', '.join(PRECISIONS)}")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"precision=bf16 needs a GPU with bfloat16, of compute capability 8.0 or more; {device} has none: use fp32"
        )


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Lets float32 matrix products round their factors to TF32 if asked for, else not; puts the global setting back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Returns the context of a forward pass: matrix products in bfloat16, if asked for."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def widen_logits(activations: nn.Module) -> None:
    """Makes output activations compute in float32: a bfloat16 probability near 1 is 1, and its loss infinite."""
    for activation in activations.modules():
        activation.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))


def widened(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Gives a model's outputs in float32, as torch's loss functions want them."""
    return {
        name: value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
        for name, value in outputs.items()
    }


# Compiled and captured steps


class CompiledForward:
    """Runs a model's forward compiled, once for training and once for evaluation.

    That is for batches with the most rows so far. Smaller ones, such as the last of an epoch, run as they are: they are
    not worth a compilation.

    Args:
        model: The model.
        forward: What it computes: a batch to named outputs.
    """

    def __init__(self, model: BaseModel, forward: Callable[[Batch], dict[str, Any]]):
        self.model = model
        self.forward = forward
        self.compiled = torch.compile(forward, dynamic=False)
        self.rows = 0

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """Computes the outputs.

        Raises:
            RuntimeError: If torch cannot compile the model, or nothing on this machine.
        """
        if row_count(batch) < self.rows:
            return self.forward(batch)
        self.rows = row_count(batch)
        try:
            return self.compiled(batch)
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            raise RuntimeError(
                f"compile: true does not work for {type(self.model).__name__} on this machine ({cause}); turn it off, "
                "or if a compiler is missing, install it: it needs one for C++ such as g++, and on a GPU triton"
            ) from error


class GraphedStep:
    """Replays captured training steps: forward, backward, clipping and update go to the GPU in one launch.

    Each shape of a batch has a captured step of its own. Its first batches run as they are, which lets libraries choose
    their kernels and leaves rare shapes, such as the last batch of an epoch, without one. A changed learning rate is
    captured anew.

    Args:
        model: A model on a GPU whose ``train_step`` does not read values back from the device.

    Raises:
        ValueError: If the optimiser counts its steps on the host: the captured step would repeat one count for ever.
    """

    WARM_UP_STEPS = 3

    def __init__(self, model: BaseModel):
        self.model = model
        self.captured: dict[tuple, CapturedStep] = {}
        self.memory = None  # the first graph's, for all of them: they run one after the other
        self.makes_host_tensors: bool | None = None  # as BST does its mask; known after a batch
        optimizer = model.optimizer
        if "capturable" not in optimizer.defaults and not isinstance(optimizer, torch.optim.SGD):
            raise ValueError(f"cuda_graphs cannot capture {type(optimizer).__name__}; use adam or SGD, or turn it off")
        for group in optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = True  # keeps the step counter on the device
                for parameter in group["params"]:
                    state = optimizer.state.get(parameter, {})  # of an earlier fit
                    if "step" in state:
                        state["step"] = state["step"].to(parameter.device)

    def __call__(self, batch: Batch) -> Tensor:
        """Trains on a batch that lies on the device and returns its loss, which the next step may overwrite."""
        shapes = tuple(values.shape for values in batch.values())
        if shapes not in self.captured:
            on_device = {name: values for name, values in batch.items() if values.device == self.model.device}
            self.captured[shapes] = CapturedStep({name: torch.empty_like(values) for name, values in on_device.items()})
        step = self.captured[shapes]
        torch._foreach_copy_(list(step.inputs.values()), [batch[name] for name in step.inputs])  # one launch, not many
        if self.makes_host_tensors is None:
            self.makes_host_tensors = makes_host_tensors(self.model, step.inputs)
        step.warm_up += 1
        if step.warm_up <= self.WARM_UP_STEPS:  # on the graph's inputs: for others a compiled forward is compiled anew
            return self._train_step(step)
        rates = [group["lr"] for group in self.model.optimizer.param_groups]
        if rates != step.rates:
            self._capture(step)
            step.rates = rates
        step.graph.replay()
        return step.loss

    def _train_step(self, step: "CapturedStep") -> Tensor:
        """Trains; what the model makes without naming a device, lies on the GPU: no copy from the host is captured."""
        with self.model.device if self.makes_host_tensors else nullcontext():  # in which torch cannot compile it all
            return self.model.train_step(step.inputs)

    def _capture(self, step: "CapturedStep") -> None:
        self.model.optimizer.zero_grad(set_to_none=True)  # gradients belong to the graphs' own memory
        graph = torch.cuda.CUDAGraph()
        try:
            with (  # thread_local: the loader's thread may go on copying batches meanwhile
                without_garbage_collection(),
                torch.cuda.device(self.model.device),  # on which the capture's stream is made
                torch.cuda.graph(graph, pool=self.memory, capture_error_mode="thread_local"),
            ):
                step.loss = self._train_step(step).detach()
        except RuntimeError as error:
            if "CUDA error" not in str(error):
                raise
            raise RuntimeError(
                f"cuda_graphs: CUDA could not capture a step of {row_count(step.inputs)} rows "
                f"({str(error).splitlines()[0]}). A GPU without free memory is reported so, too: take a smaller "
                "batch_size or fewer runs at a time, or turn cuda_graphs off"
            ) from error
        self.memory = graph.pool()
        step.graph = graph  # not earlier: memory that no graph holds any more cannot be captured into


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Stops collecting garbage while a step is captured: a graph or an event freed then would spoil the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@torch.no_grad()
def makes_host_tensors(model: BaseModel, batch: Batch) -> bool:
    """Tells whether a model's forward, as it predicts, makes tensors that are not on its device."""
    watch = DeviceWatch()
    model.eval()  # in which it runs uncompiled: torch would never compile what it first saw under the watch
    with watch:
        model.forward(batch)
    model.train()
    return any(device != model.device for device in watch.seen)


class DeviceWatch(TorchDispatchMode):
    """Collects the devices on which tensors with more than one value are made."""

    def __init__(self):
        super().__init__()
        self.seen: set[torch.device] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs an operation and looks at its result."""
        made = func(*args, **(kwargs or {}))
        self.seen |= {x.device for x in tree_leaves(made) if isinstance(x, Tensor) and x.dim()}
        return made


@dataclass
class CapturedStep:
    """The training step for batches of one shape: its inputs and, after the warm-up, graph, loss and learning rates."""

    inputs: dict[str, Tensor]
    warm_up: int = 0
    rates: list[float] = field(default_factory=list)
    graph: torch.cuda.CUDAGraph | None = None
    loss: Tensor | None = None


# Update and penalty


def fused_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Rebuilds an optimiser that has taken no step yet, so that its whole update is one kernel.

    Raises:
        ValueError: If torch has no fused form of it.
    """
    if "fused" not in optimizer.defaults:
        raise ValueError(f"fused_optimizer: torch has no fused {type(optimizer).__name__}; use adam, or turn it off")
    groups = [{**group, "fused": True} for group in optimizer.param_groups]
    return type(optimizer)(groups, lr=optimizer.defaults["lr"], fused=True)


class Penalty(torch.autograd.Function):
    """``weight / p * sum_w |w|^p`` over a list of parameters, with the gradient ``weight * sign(w) |w|^(p - 1)``.

    FuxiCTR differentiates one norm per parameter, in several passes over each.
    """

    @staticmethod
    def forward(ctx, p: int, weight: float, *parameters: Tensor) -> Tensor:
        """Computes the penalty for p = 1 or 2."""
        ctx.p, ctx.weight = p, weight
        ctx.save_for_backward(*parameters)
        return weight / p * torch.stack(torch._foreach_norm(parameters, p)).pow(p).sum()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the parameters, or their signs."""
        slopes = ctx.saved_tensors if ctx.p == 2 else torch._foreach_sign(ctx.saved_tensors)
        return None, None, *torch._foreach_mul(slopes, ctx.weight * gradient)


def penalties(
    model: BaseModel, embedding_regularizer: float | str | None, net_regularizer: float | str | None
) -> list[tuple[int, float, list[nn.Parameter]]]:
    """Lists what FuxiCTR's regularisation is made of: norm, weight and the parameters, tables apart from the others."""
    in_tables = {
        id(parameter)
        for module in model.modules()
        if type(module) is FeatureEmbeddingDict  # as FuxiCTR tells them
        for parameter in module.parameters()
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tables = [parameter for parameter in trained if id(parameter) in in_tables]
    others = [parameter for parameter in trained if id(parameter) not in in_tables]
    return [
        (p, weight, parameters)
        for regularizer, parameters in ((embedding_regularizer, tables), (net_regularizer, others))
        for p, weight in get_regularizer(regularizer)
        if parameters
    ]


# Memory

# Of glibc's malloc.h: size at the end of the heap from which it is returned, and blocks that are mapped by themselves.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


@functools.cache
def keep_freed_memory() -> None:
    """Lets the C library keep large blocks that are freed, for the rest of the process, where it is glibc.

    It would give them back to the system, which has to clear them again for the next step that takes as much. The price
    is a higher peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# Large batches and long sequences


def join_batches(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    """Concatenates every ``count`` batches to one; at the end, as many as are left."""
    batches = iter(batches)
    while group := list(islice(batches, count)):
        yield group[0] if len(group) == 1 else {name: torch.cat([b[name] for b in group]) for name in group[0]}


def split_batch(batch: Batch, count: int) -> list[Batch]:
    """Cuts a batch into at most ``count`` parts of equal size, the last one may be smaller."""
    columns = [[(name, part) for part in values.chunk(count)] for name, values in batch.items()]
    return [dict(part) for part in zip(*columns)]


BATCHES_COMPARED = 64  # to find one with short sequences


@torch.no_grad()
def check_padding_invariance(model: BaseModel, data: Any, tolerance: float = 1e-4) -> None:
    """Predicts a batch of ``bucket_by_length`` with and without its padding, trained or not.

    Args:
        model: The model, in evaluation mode afterwards.
        data: Its training data, an `H5DataLoader`; the next epoch stays the next one.
        tolerance: By how much predictions may differ.

    Raises:
        ValueError: If the model needs sequences of one length, or padding makes a difference to it.
    """
    model.eval()
    epoch, start_batch = data.epoch, data.start_batch
    pairs = ((cut, data.padded(cut)) for cut in data if row_count(cut))
    pairs = islice((pair for pair in pairs if _shapes(pair[0]) != _shapes(pair[1])), BATCHES_COMPARED)
    shortest = min(pairs, key=lambda pair: sum(math.prod(shape[1:]) for shape in _shapes(pair[0])), default=None)
    data.epoch, data.start_batch = epoch, start_batch
    if shortest is None:  # no batch is ever cut
        return
    cut, whole = shortest
    with matmul_precision("fp32"), _telling_weights(model):
        expected = model.forward(whole)
        try:
            outputs = model.forward(cut)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                f"bucket_by_length: {type(model).__name__} needs sequences of one length ({error}); turn it off"
            ) from error
    differences = [(outputs[name] - expected[name]).abs().max() for name in outputs if name.endswith("_pred")]
    difference = float(torch.stack(differences).max())
    if not difference <= tolerance:  # put like this, nan is none
        raise ValueError(
            f"bucket_by_length: padding changes the predictions of {type(model).__name__} by {difference:.2g}; turn it "
            "off"
        )


def _shapes(batch: Batch) -> list[torch.Size]:
    return [values.shape for values in batch.values()]


@contextmanager
def _telling_weights(model: nn.Module) -> Iterator[None]:
    """Gives a model weights, for a while, as a training may leave them.

    At its start, embeddings of 1e-4 (FuxiCTR's default) and biases of 0 hide what an input changes. Tables are scaled
    to a standard deviation of about 0.25 by a power of two, which is exact in both directions; vectors get noise.
    """
    tables = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    spreads = [(table, float(table.std())) for table in tables.values()]
    scales = [(table, 2.0 ** round(math.log2(0.25 / spread))) for table, spread in spreads if spread > 0]
    vectors = [(parameter, parameter.clone()) for parameter in model.parameters() if parameter.dim() == 1]
    noise = torch.Generator().manual_seed(0)  # leaves the training's random numbers alone
    for vector, _ in vectors:
        vector.add_(0.1 * torch.randn(vector.shape, generator=noise).to(vector))
    for table, scale in scales:
        table.mul_(scale)
    try:
        yield
    finally:
        for vector, values in vectors:
            vector.copy_(values)
        for table, scale in scales:
            table.div_(scale)


def row_count(batch: Batch) -> int:
    """Counts the rows of a batch."""
    return len(next(iter(batch.values())))


def checkpoint_activations(model: nn.Module) -> None:
    """Makes every block of the model's own ``ModuleList`` attributes forget its activations and compute them again.

    What remains in memory until the backward pass is what enters and leaves a block.

    Raises:
        ValueError: If the model has no such blocks.
    """
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
    blocks = [block for blocks in lists for block in blocks if any(True for _ in block.parameters())]
    if not blocks:
        raise ValueError(
            f"activation_checkpointing: {type(model).__name__} has no ModuleList of blocks as an attribute; turn it off"
        )
    for block in blocks:
        contexts = partial(_forward_and_again, block)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def _forward_and_again(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _statistics_kept(block)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Lets batch norms leave their running statistics alone, which the first forward pass has updated already."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    kept = [(value, value.clone()) for norm in norms for value in norm.buffers(recurse=False)]
    try:
        yield
    finally:
        with torch.no_grad():
            for value, before in kept:
                value.copy_(before)

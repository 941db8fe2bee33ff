"""Several processes that train one model together, as torchrun launches them.

Each takes its part of every batch and all hold the same weights: gradients are averaged over all rows of a step. Rank 0
is the writer: it alone writes files and logs, and decides what must be the same everywhere, such as metrics. Without
torchrun there is one process, which is the writer; everything here then leaves it alone.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# For sums and gathers, to which all processes come from a step or a `barrier`: one that hangs ends the run within a
# minute.
COLLECTIVE_TIMEOUT = timedelta(seconds=45)
# For what one process does alone while the others wait, such as building a data set: in effect none.
MEETING_TIMEOUT = timedelta(days=365)


class ProcessError(RuntimeError):
    """Another process of this run has failed; the message has its error."""


@dataclass
class _Group:
    """The processes of this run, and the store by which they tell each other what has failed."""

    rank: int
    size: int
    store: dist.Store
    meetings: dist.ProcessGroup | None = None  # of gloo, which notices at once when a process ends

    def failure(self) -> str | None:
        """Says which process failed first, and why; None if none has said so."""
        try:
            return self.store.get("failure").decode() if self.store.check(["failure"]) else None
        except dist.DistError:  # the store has gone with the first process
            return None

    def report(self, error: Exception) -> str:
        """Tells the other processes of a failure; the first one counts, and is returned."""
        failure = f"process {self.rank} of {self.size} failed: {error or type(error).__name__}"
        try:
            return self.store.compare_set("failure", "", failure).decode()
        except dist.DistError:
            return failure


_group: _Group | None = None
_runs = itertools.count()  # a process may take part in several runs, with one store


@contextmanager
def process_group(gpu: int) -> Iterator[int]:
    """Lets this process take part in a run, if torchrun has launched it.

    Args:
        gpu: The GPU of the first process of this machine, the others take those that follow; -1 for the CPU.

    Yields:
        The GPU of this process, or -1.

    Raises:
        ValueError: If there are not enough GPUs.
        ProcessError: If another process failed before this one.
    """
    global _group
    if "RANK" not in os.environ:
        yield gpu
        return
    store, rank, size = next(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    store = dist.PrefixStore(f"run{next(_runs)}", store)
    _group = _Group(rank, size, store)
    try:
        gpu = _own_gpu(gpu)
        if gpu >= 0:
            torch.cuda.set_device(gpu)
        dist.init_process_group(
            "gloo" if gpu < 0 else "nccl", store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT
        )
        _group.meetings = dist.new_group(backend="gloo", timeout=MEETING_TIMEOUT)
        yield gpu
        barrier()  # the writer may still be at work
        dist.barrier()  # the store may live in the first process, which must not leave before the others
        dist.destroy_process_group()
    except Exception as error:
        # The group stays: to take it down would wait for the others, who are told here or ended by torchrun.
        failure = _group.report(error)
        if isinstance(error, ProcessError) or failure.startswith(f"process {rank} "):
            raise
        raise ProcessError(failure) from error
    finally:
        _group = None


def rank() -> int:
    """Returns the number of this process in the run, from 0."""
    return _group.rank if _group else 0


def world_size() -> int:
    """Returns the number of processes of the run."""
    return _group.size if _group else 1


def is_writer() -> bool:
    """Says whether this process writes files and logs."""
    return rank() == 0


def barrier() -> None:
    """Waits for all processes, however long they take."""
    if _group is not None:
        with _together():
            dist.barrier(group=_group.meetings)


def from_writer(work: Callable[[], Any]) -> Any:
    """Lets the writer do something while the others wait, however long it takes.

    Args:
        work: Returns plain values.

    Returns:
        What the writer's ``work`` returned, in every process.
    """
    if _group is None:
        return work()
    result = [work() if is_writer() else None]
    with _together():
        dist.broadcast_object_list(result, src=0, group=_group.meetings)
    return result[0]


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Replaces tensors by the writer's, in place."""
    if _group is None:
        return
    with _together():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def mean_over_rows(tensors: Sequence[Tensor], rows: int) -> None:
    """Replaces the means over each process's rows by the mean over the rows of all, in place.

    One sum over all processes does it, which takes the memory of the tensors once more.

    Args:
        tensors: Means of any shapes, of one device and one floating type.
        rows: Rows of this process; none leaves its tensors out.
    """
    if _group is None:
        return
    flat = torch.cat([*(tensor.reshape(-1) for tensor in tensors), tensors[0].new_ones(1)]).mul_(rows)
    with _together():
        dist.all_reduce(flat)
    *sums, all_rows = flat.split([*(tensor.numel() for tensor in tensors), 1])
    torch._foreach_div_(sums, all_rows[0])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(sums, tensors)])


def gather(value: Any) -> list[Any]:
    """Lists the values of all processes, in the order of their ranks."""
    if _group is None:
        return [value]
    values = [None] * _group.size
    with _together():
        dist.all_gather_object(values, value)
    return values


@contextmanager
def _together() -> Iterator[None]:
    """Says of what the processes do together, and one of them left, why it failed."""
    try:
        yield
    except RuntimeError as error:
        failure = _group.failure() or f"another process of this run has ended or does not answer: {error}"
        raise ProcessError(failure) from error


def _own_gpu(first: int) -> int:
    """Returns the GPU of this process; raises ValueError if those of this machine are too few."""
    if first < 0:
        return first
    processes, available = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if first + processes > available:
        raise ValueError(
            f"--gpu {first} with {processes} processes on this machine takes GPUs {first} to {first + processes - 1}, "
            f"but it has {available}; start fewer processes, or use the CPU with --gpu -1"
        )
    return first + int(os.environ["LOCAL_RANK"])

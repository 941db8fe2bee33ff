"""Batches from an h5 data set: gathered whole from memory or on the GPU, or streamed within bounded memory."""

import functools
import json
import logging
import math
import os
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import h5py
import numpy as np
import torch
from flowctr.data.format import FORMAT, feature_map_digest, find_h5, h5_files, narrow_dtype, relevant_spec

WINDOW_BYTES = 2**28  # what streaming keeps in memory at a time
READ_ROWS = 65536
PREFETCH_BATCHES = 8
LENGTH_CLASSES = 4  # of bucket_by_length: up to an eighth, a quarter and a half of the longest sequence, and all of it
BUCKETED_BATCHES = 64  # whose rows are put in order of their lengths at a time


_Buffer = tuple[torch.dtype, bool]


@dataclass
class _Column:
    """How one column is held and handed out: ``dtype`` in memory, ``tensor_dtype`` in a batch.

    Values outside of ``bounds`` are an error, which ``complaint`` describes; NaN is none if it ``may_be_missing``.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    tensor_dtype: torch.dtype
    bounds: tuple[float, float] | None = None
    complaint: str = ""
    may_be_missing: bool = False
    is_meta: bool = False
    padding: str | None = None  # of a sequence: "pre" or "post"

    @property
    def width(self) -> int:
        """Values per row."""
        return int(np.prod(self.shape))

    @property
    def buffer(self) -> _Buffer:
        """The buffer of a packed batch that holds it."""
        return self.tensor_dtype, self.is_meta

    def cut(self, length: int) -> slice:
        """The steps of a sequence that are left when padding is cut off to a length."""
        return slice(-length, None) if self.padding == "pre" else slice(length)

    def cut_shape(self, length: int | None) -> tuple[int, ...]:
        """The shape of a row whose padding is cut off."""
        return self.shape if length is None or not self.padding else (min(length, *self.shape),)


_Packed = tuple[dict[_Buffer, torch.Tensor], int | None]
"""A batch: one buffer for all columns of a type, those that stay on the host (meta) by themselves; and the length that
its sequences are cut to, if any."""


@dataclass
class _Stack:
    """Columns of equal type and shape on the device: ``values`` is ``(rows, columns, *shape)``.

    In a batch they have the wider ``tensor_dtype``; ``bits`` of it are theirs if the narrow type has a sign too many.
    """

    names: list[str]
    values: torch.Tensor
    tensor_dtype: torch.dtype
    padding: str | None
    bits: int | None


class H5DataLoader:
    """Batches of an h5 data set, gathered a whole batch at a time; no worker processes.

    In memory, every column is one array of its narrow type. Streaming holds a window of rows: the file's blocks are
    visited in shuffled order and the rows of a window are shuffled among themselves. Each row comes exactly once per
    epoch, the last batch may be smaller. Files of FuxiCTR 2.0 and 2.1 open as well.

    With a GPU, batches lie on it but for their meta columns. A thread packs the columns of one type into one pinned
    buffer and copies it on a stream of its own, some batches ahead of the one that is asked for. With
    ``data_on_device`` nothing is copied any more: rows are gathered there, and widened only then.

    Several processes share the work. Of the training split they take the same number of batches: the rows that one
    process would have in a batch of ``world_size * batch_size`` are dealt to them as evenly as can be, in the order of
    their ranks; where the last ones of an epoch are fewer than the processes, some get a batch of no rows. Of other
    splits each process has a contiguous part of the rows and holds no others.

    Args:
        feature_map: FuxiCTR's FeatureMap of the data set.
        data_path: An h5 file (``.h5`` may be left out) or a folder of part files.
        split: Only "train" is shuffled; other splits come in file order.
        batch_size: Rows per batch.
        shuffle: Whether to shuffle the training split, anew in each epoch.
        seed: With ``epoch``, determines the order.
        streaming: Whether to read while iterating instead of loading all; None streams when the arrays would take
            more than half of this machine's memory. It shuffles windows instead of the whole split: another order.
        buffer_size: Rows in a window of streaming; None for as many as fit into 256 MiB.
        pin_memory: Whether batches lie in pinned memory on their way; None for "if they go to a GPU".
        num_workers: Any value above 0 prepares batches ahead in one thread, as streaming and pinning always do.
        gpu: Index of the GPU that the batches go to, as in FuxiCTR; -1 for none.
        bucket_by_length: Whether rows with sequences of similar lengths share a batch of the shuffled training split,
            from which padding is cut off, to one of `LENGTH_CLASSES` lengths. The rows of a batch are less random then.
        data_on_device: Whether all columns but meta ones are kept, in their narrow types, on the GPU (or in the CPU's
            memory without one). Batches are the same. What would take more than half of the memory that is free there
            is copied batch by batch instead, with a warning.
        task: FuxiCTR's task, or a list of one per label: labels of "binary_classification" must be in [0, 1], others
            finite.
        rank: This process's number among those that share the work.
        world_size: Their number.
        **kwargs: Other settings of FuxiCTR's loaders, ignored.

    Attributes:
        epoch: Number of the next epoch.
        start_batch: First batch of the next epoch, 0 for all of them; set it and ``epoch`` to continue a run.
        base_rates: Mean of each label, over the rows that have it.
        may_be_missing: Labels that are NaN in rows that lack them.
        num_samples, num_batches, num_blocks: Rows of the split, batches of this process and part files.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file is damaged, empty, or does not fit the feature map, a label does not fit its task
            or is missing in every row, the split has fewer rows than there are processes, or the data shall be streamed
            and stay on the device at once. Streaming finds wrong ids and labels while iterating.
    """

    def __init__(
        self,
        feature_map,
        data_path,
        split: str = "train",
        batch_size: int = 32,
        shuffle: bool = False,
        seed: int = 0,
        streaming: bool | None = None,
        buffer_size: int | None = None,
        pin_memory: bool | None = None,
        num_workers: int = 0,
        gpu: int = -1,
        bucket_by_length: bool = False,
        data_on_device: bool = False,
        task: str | list[str] = "binary_classification",
        rank: int = 0,
        world_size: int = 1,
        **kwargs,
    ):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}; a batch needs a positive whole number of rows")
        if data_on_device and streaming:
            raise ValueError("data_on_device keeps all rows, streaming keeps a few of them; turn one of them off")
        self.files = h5_files(find_h5(data_path))
        self.batch_size, self.seed, self.epoch, self.start_batch = batch_size, seed, 0, 0
        self.shuffle = shuffle and split == "train"
        self.device = torch.device("cuda", gpu) if gpu >= 0 and torch.cuda.is_available() else torch.device("cpu")
        self.pin_memory = self.device.type == "cuda" if pin_memory is None else pin_memory
        self._columns = _columns(feature_map, self.files[0], task)
        self._sequences = [name for name, column in self._columns.items() if column.padding]
        if bucket_by_length and not self._sequences:
            raise ValueError(f"bucket_by_length: {data_path} has no sequence that says where it is padded; turn it off")
        self.bucket_by_length = bucket_by_length and self.shuffle
        digest = feature_map_digest(feature_map.data_dir)
        inspected = [_inspect(path, feature_map, self._columns, digest) for path in self.files]
        file_rows = [rows for rows, _ in inspected]
        self.num_samples = sum(file_rows)
        if self.num_samples == 0:
            raise ValueError(f"{data_path}: the {split} split has no rows")
        if self.num_samples < world_size:
            raise ValueError(
                f"{data_path}: the {split} split has {self.num_samples} rows for {world_size} processes; each needs "
                "one, start fewer"
            )
        first, stop = 0, self.num_samples
        self._dealt_to, self._dealt_among = rank, world_size  # the rows of each batch
        if split != "train":
            first, stop = _share(0, self.num_samples, rank, world_size)
            self._dealt_to, self._dealt_among = 0, 1
        self._pieces = _pieces(file_rows, first, stop)
        self._rows = stop - first  # held, or streamed through
        self._dealt_rows = self._dealt_among * batch_size
        self.num_blocks = len(self.files)
        self.num_batches = -(-self._rows // self._dealt_rows)
        self.may_be_missing = [label for label in feature_map.labels if self._columns[label].may_be_missing]
        self.base_rates = {}
        for label in feature_map.labels:
            parts = [means[label] for _, means in inspected]
            known = sum(rows for rows, _ in parts)
            if known == 0:
                raise ValueError(
                    f"{data_path}: label {label!r} is missing in every row of the {split} split; leave the label out "
                    "of label_col, or take rows that have it"
                )
            self.base_rates[label] = sum(rows * mean for rows, mean in parts) / known
        row_bytes = sum(c.dtype.itemsize * c.width for c in self._columns.values())
        if streaming is None:
            held_by_all = world_size * self._rows * row_bytes
            streaming = held_by_all > _total_memory() / 2
        self.streaming = streaming
        if streaming:
            logging.info("The %s split is read in windows while iterating; they decide the order of its rows", split)
        window_rows = min(buffer_size or WINDOW_BYTES // row_bytes, self._rows)
        # Whole batches, so that only the last one of an epoch is smaller.
        self._window_rows = max(1, -(-window_rows // self._dealt_rows)) * self._dealt_rows
        self._ahead = bool(streaming or self.pin_memory or num_workers)
        self._arrays = None if streaming else self._load()
        longest = max((self._columns[name].width for name in self._sequences), default=0)
        self._lengths = [-(-longest // 2**k) for k in reversed(range(LENGTH_CLASSES))]
        self._classes = None  # of all rows held; streaming finds those of each window
        if self.bucket_by_length and not streaming:
            self._classes = self._length_classes(self._arrays, self._rows)
        self._stacks = None
        if data_on_device and self._fits_on_device(split):
            self._stacks = self._move_to_device()

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        first_row = self.start_batch * self._dealt_rows
        self.epoch, self.start_batch = self.epoch + 1, 0
        if self._stacks is not None:
            return self._gathered_on_device(rng, first_row)
        packed = self._packed(rng, first_row)
        if self.device.type == "cuda":
            return self._received(_prefetch(self._sent(packed)))
        return map(self._unpack, _prefetch(packed) if self._ahead else packed)

    def _packed(self, rng: np.random.Generator, first_row: int) -> Iterator[_Packed]:
        windows = self._windows(rng, first_row) if self.streaming else [(self._arrays, self._rows)]
        for arrays, rows in windows:
            classes = self._classes
            if self.bucket_by_length and self.streaming:
                skipped = arrays is None  # any classes do: how often the generator draws does not depend on them
                classes = np.zeros(rows, dtype=np.uint8) if skipped else self._length_classes(arrays, rows)
            order = self._order(rng, rows, classes) if self.shuffle else None
            for batch in self._dealt(min(first_row, rows), rows):
                chosen = batch if order is None else order[batch]
                yield self._pack(arrays, chosen, self._cut_length(classes, chosen))
            first_row = max(0, first_row - rows)

    def _length_classes(self, arrays: dict[str, np.ndarray], rows: int) -> np.ndarray:
        """Finds for each row the smallest of the lengths that all its sequences fit into, as its index."""
        classes = np.zeros(rows, dtype=np.uint8)
        for name in self._sequences:
            column = self._columns[name]
            for k, length in enumerate(self._lengths[:-1]):
                cut_off = slice(None, -length) if column.padding == "pre" else slice(length, None)
                for start in range(0, rows, READ_ROWS):  # in parts, which bounds the memory
                    part = slice(start, min(rows, start + READ_ROWS))
                    longer = arrays[name][part, cut_off].any(axis=1)
                    np.maximum(classes[part], longer * np.uint8(k + 1), out=classes[part])
        return classes

    def _order(self, rng: np.random.Generator, rows: int, classes: np.ndarray | None) -> np.ndarray:
        """Shuffles rows; with their length classes, so that most batches hold rows of one class."""
        order = rng.permutation(rows)
        if classes is None:
            return order
        size = self._dealt_rows
        for start in range(0, rows, BUCKETED_BATCHES * size):
            part = order[start : start + BUCKETED_BATCHES * size]
            part[:] = part[np.argsort(classes[part], kind="stable")]
            whole = part[: len(part) // size * size].reshape(-1, size)
            whole[:] = whole[rng.permutation(len(whole))]
        return order

    def _cut_length(self, classes: np.ndarray | None, rows: np.ndarray) -> int | None:
        """Gives the length that the sequences of a batch are cut to; None leaves them whole."""
        return None if classes is None else self._lengths[classes[rows].max(initial=0)]

    def _dealt(self, first_row: int, rows: int) -> Iterator[slice]:
        """Yields the rows of each of this process's batches."""
        for start in range(first_row, rows, self._dealt_rows):
            yield slice(*_share(start, min(rows, start + self._dealt_rows), self._dealt_to, self._dealt_among))

    def _pack(self, arrays: dict[str, np.ndarray], rows: slice | np.ndarray, length: int | None) -> _Packed:
        """Gathers rows, each column into its part of a buffer."""
        count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        widths: dict[_Buffer, int] = defaultdict(int)
        for column in self._columns.values():
            widths[column.buffer] += math.prod(column.cut_shape(length))
        buffers = {
            (dtype, is_meta): torch.empty(count * width, dtype=dtype, pin_memory=self.pin_memory)
            for (dtype, is_meta), width in widths.items()
        }
        for name, tensor in self._unpack((buffers, length)).items():
            array, column = arrays[name], self._columns[name]
            if column.cut_shape(length) != column.shape:
                tensor.numpy()[...] = array[:, column.cut(length)][rows]
            else:
                tensor.numpy()[...] = array[rows] if isinstance(rows, slice) else np.take(array, rows, axis=0)
        return buffers, length

    def _unpack(self, packed: _Packed) -> dict[str, torch.Tensor]:
        """Views the columns, which lie one after the other in the buffers."""
        buffers, length = packed
        shapes = {name: column.cut_shape(length) for name, column in self._columns.items()}
        widths: dict[_Buffer, int] = defaultdict(int)
        for name, column in self._columns.items():
            widths[column.buffer] += math.prod(shapes[name])
        rows = {kind: len(buffer) // widths[kind] for kind, buffer in buffers.items()}
        firsts: dict[_Buffer, int] = defaultdict(int)
        batch = {}
        for name, column in self._columns.items():
            kind = column.buffer
            values = rows[kind] * math.prod(shapes[name])
            batch[name] = buffers[kind][firsts[kind] : firsts[kind] + values].view(rows[kind], *shapes[name])
            firsts[kind] += values
        return batch

    def padded(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gives a batch whose sequences have been cut with its padding."""
        padded = dict(batch)
        for name in self._sequences:
            missing = self._columns[name].width - batch[name].shape[1]
            sides = (missing, 0) if self._columns[name].padding == "pre" else (0, missing)
            padded[name] = torch.nn.functional.pad(batch[name], sides)
        return padded

    def _sent(self, batches: Iterable[_Packed]) -> Iterator[tuple[_Packed, torch.cuda.Event]]:
        """Starts the copy of each batch to the GPU; the event is its arrival."""
        stream = _copying_stream(self.device)
        for buffers, length in batches:
            with torch.cuda.stream(stream):
                copies = {
                    (dtype, is_meta): buffer if is_meta else buffer.to(self.device, non_blocking=True)
                    for (dtype, is_meta), buffer in buffers.items()
                }
            yield (copies, length), stream.record_event()

    def _received(self, batches: Iterable[tuple[_Packed, torch.cuda.Event]]) -> Iterator[dict[str, torch.Tensor]]:
        """Lets the current stream wait for each batch, not the host."""
        for packed, arrival in batches:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(arrival)
            buffers, _ = packed
            for (_, is_meta), buffer in buffers.items():
                if not is_meta:
                    buffer.record_stream(stream)  # its memory is the copying stream's, but this one uses it
            yield self._unpack(packed)

    def _gathered_on_device(self, rng: np.random.Generator, first_row: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yields the batches of ``data_on_device``."""
        order = self._order(rng, self._rows, self._classes) if self.shuffle else np.arange(self._rows)
        order_on_device = torch.from_numpy(order).to(self.device)  # once: a copy for each batch would wait for the step
        for rows in self._dealt(first_row, self._rows):
            batch, length = {}, self._cut_length(self._classes, order[rows])
            for name, array in self._arrays.items():
                batch[name] = torch.from_numpy(np.take(array, order[rows], axis=0)).to(self._columns[name].tensor_dtype)
            for stack in self._stacks:
                values = stack.values
                if length is not None and stack.padding:
                    values = values[..., self._columns[stack.names[0]].cut(length)]
                gathered = values.index_select(0, order_on_device[rows]).transpose(0, 1)
                values = torch.empty(gathered.shape, dtype=stack.tensor_dtype, device=self.device).copy_(gathered)
                batch.update(zip(stack.names, values if stack.bits is None else values.bitwise_and_(stack.bits)))
            yield {name: batch[name] for name in self._columns}

    def _load(self) -> dict[str, np.ndarray]:
        arrays = self._allocate(self._rows)
        offset = 0
        for i, first, last in self._pieces:
            with _open(self.files[i]) as file:
                for start in range(first, last, READ_ROWS):
                    stop = min(last, start + READ_ROWS)
                    self._read(file, start, stop, arrays, offset)
                    offset += stop - start
        return arrays

    def _fits_on_device(self, split: str) -> bool:
        """Says whether all rows may be kept on the device; warns if not."""
        row_bytes = sum(c.dtype.itemsize * c.width for c in self._columns.values() if not c.is_meta)
        needed = self._rows * row_bytes
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else _total_memory()
        fits = not self.streaming and needed <= free / 2
        if not fits:
            logging.warning(
                "data_on_device: the %s split needs %d bytes, more than half of the %d bytes free on %s; its batches "
                "are copied there one by one instead",
                *(split, needed, free, self.device),
            )
        return fits

    def _move_to_device(self) -> list[_Stack]:
        """Stacks all columns on the device but meta ones, which stay in the arrays."""
        names_by_kind: dict[tuple, list[str]] = defaultdict(list)
        for name, column in self._columns.items():
            if not column.is_meta:
                names_by_kind[column.dtype, column.tensor_dtype, column.shape, column.padding].append(name)
        stacks = []
        for (dtype, tensor_dtype, shape, padding), names in names_by_kind.items():
            # torch gathers no uint16: it is kept as int16, whose bits are read as what they are when they are widened.
            unsigned = dtype == np.uint16
            columns = [torch.from_numpy(self._arrays.pop(name).view(np.int16 if unsigned else dtype)) for name in names]
            values = torch.empty((self._rows, len(names), *shape), dtype=columns[0].dtype, device=self.device)
            for i, column in enumerate(columns):
                values[:, i] = column
            stacks.append(_Stack(names, values, tensor_dtype, padding, 0xFFFF if unsigned else None))
        return stacks

    def _windows(self, rng: np.random.Generator, first_row: int):
        """Yields arrays and the number of rows in them; the next window fills the same arrays.

        A window that lies before ``first_row`` is not read: None instead of its arrays.
        """
        arrays = self._allocate(min(self._window_rows, self._rows))
        stop = 0
        for blocks in _cut(self._blocks(rng), self._window_rows):
            rows = sum(block_stop - start for _, start, block_stop in blocks)
            stop += rows
            if stop <= first_row:
                yield None, rows
                continue
            filled = 0
            for i, blocks_of_file in groupby(sorted(blocks), key=itemgetter(0)):
                with _open(self.files[i]) as file:
                    for _, start, stop in blocks_of_file:
                        self._read(file, start, stop, arrays, filled)
                        filled += stop - start
            yield arrays, filled

    def _blocks(self, rng: np.random.Generator) -> list[tuple[int, int, int]]:
        """Lists ``(file, start, stop)`` covering all rows held; shuffled, they are chunks, at least 16 to a window."""
        size = READ_ROWS
        if self.shuffle:
            with _open(self.files[0]) as file:
                chunk_rows = min((file[name].chunks or (READ_ROWS,))[0] for name in self._columns)
            size = max(1, min(chunk_rows, self._window_rows // 16))
        blocks = [
            (i, start, min(last, start + size)) for i, first, last in self._pieces for start in range(first, last, size)
        ]
        return [blocks[j] for j in rng.permutation(len(blocks))] if self.shuffle else blocks

    def _allocate(self, rows: int) -> dict[str, np.ndarray]:
        return {name: np.empty((rows, *column.shape), column.dtype) for name, column in self._columns.items()}

    def _read(self, file: h5py.File, start: int, stop: int, arrays: dict[str, np.ndarray], at: int) -> None:
        """Reads rows ``start`` to ``stop`` of a file into the arrays from row ``at`` on and checks their ids."""
        for name, column in self._columns.items():
            dataset, target = file[name], arrays[name][at : at + stop - start]
            try:
                if dataset.dtype == target.dtype:
                    dataset.read_direct(target, np.s_[start:stop])
                    values = target
                else:
                    values = dataset[start:stop]
            except OSError as error:
                raise ValueError(
                    f"{file.filename}: column {name!r} cannot be read, the file is damaged: {error}"
                ) from error
            if column.bounds:
                low, high = column.bounds
                if not (low <= values.min() and values.max() <= high):  # put like this, NaN is outside
                    outside = ~((low <= values) & (values <= high))
                    if column.may_be_missing:
                        outside &= ~np.isnan(values)
                    for row, *step in np.argwhere(outside)[:1]:
                        complaint = column.complaint.format(values[(row, *step)])
                        raise ValueError(f"{file.filename}: column {name!r}, row {start + row}: {complaint}")
            if values is not target:
                target[...] = values


@functools.cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    """Gives the one stream on which all loaders copy to a device.

    torch deals out the same 32 streams in turn. If each epoch and evaluation took a new one, that of the 17th epoch
    would be the one on which training steps are captured, and a copy there spoils a capture.
    """
    return torch.cuda.Stream(device)


def _prefetch(batches):
    """Runs a generator of batches a few steps ahead in one thread, which ends with the iteration."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="h5-prefetch")
    try:
        pending = deque(pool.submit(next, batches, None) for _ in range(PREFETCH_BATCHES))
        while (batch := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, batches, None))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


def _share(start: int, stop: int, share: int, shares: int) -> tuple[int, int]:
    """Divides the rows from ``start`` to ``stop`` into shares of nearly equal size; gives the bounds of one."""
    rows = stop - start
    return start + rows * share // shares, start + rows * (share + 1) // shares


def _pieces(file_rows: list[int], first: int, stop: int) -> list[tuple[int, int, int]]:
    """Lists ``(file, start, stop)`` of the rows from ``first`` to ``stop``, counted over all files."""
    pieces, offset = [], 0
    for i, rows in enumerate(file_rows):
        piece = max(0, first - offset), min(rows, stop - offset)
        if piece[0] < piece[1]:
            pieces.append((i, *piece))
        offset += rows
    return pieces


def _cut(blocks: list[tuple[int, int, int]], rows: int):
    """Yields lists of blocks with exactly ``rows`` rows each, the last one fewer; blocks are divided to fit."""
    window, room = [], rows
    for i, start, stop in blocks:
        while start < stop:
            end = min(stop, start + room)
            window.append((i, start, end))
            room -= end - start
            start = end
            if room == 0:
                yield window
                window, room = [], rows
    if window:
        yield window


def _total_memory() -> int:
    """Returns the bytes of memory of this machine, or of the container if it has less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    container = limit.read_text().strip() if limit.is_file() else "max"
    return total if container == "max" else min(total, int(container))


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path}: not an h5 file, or a truncated one ({error}); build the data set again") from error


def _check_names(file: h5py.File, names) -> None:
    if missing := [name for name in names if name not in file]:
        missing, present = (", ".join(map(repr, names)) for names in (missing, file))
        raise ValueError(f"{file.filename}: no column {missing}; the file has {present}; build the data set again")


def _columns(feature_map, path: Path, task: str | list[str]) -> dict[str, _Column]:
    """Describes each column of the feature map; types that it leaves open are taken from the file."""
    columns, labels = {}, feature_map.labels
    if isinstance(task, list) and len(task) != len(labels):
        raise ValueError(f"task={task} has {len(task)} entries for the {len(labels)} labels {', '.join(labels)}")
    tasks = dict(zip(labels, task if isinstance(task, list) else [task] * len(labels)))
    with _open(path) as file:
        names = [*feature_map.features, *feature_map.labels]
        _check_names(file, names)
        for name in names:
            spec = feature_map.features.get(name, {"type": "label"})
            shape = {"sequence": (spec.get("max_len"),), "embedding": (spec.get("pretrain_dim"),)}.get(spec["type"], ())
            vocab_size = spec.get("vocab_size")
            if spec["type"] in ("numeric", "embedding"):
                column = _Column(shape, np.dtype(np.float32), torch.float32)
            elif name in tasks:
                bounds, complaint = _label_bounds(tasks[name])
                marked = "known" in file[name].attrs
                column = _Column(shape, np.dtype(np.float32), torch.float32, bounds, complaint, marked)
            elif vocab_size is not None:
                complaint = (
                    f"index {{}} is beyond its vocabulary (vocab_size={vocab_size}); the file does not belong to this "
                    "feature map, build it again"
                )
                column = _Column(shape, narrow_dtype(vocab_size), torch.int32, (0, vocab_size - 1), complaint)
            else:  # meta columns have no vocabulary in FuxiCTR's feature map and may hold wide ids
                dtype = file[name].dtype
                column = _Column(shape, dtype, torch.int64 if dtype.itemsize == 8 else torch.int32)
            column.is_meta = spec["type"] == "meta"
            if spec["type"] == "sequence":
                column.padding = file[name].attrs.get("padding")
            columns[name] = column
    return columns


def _label_bounds(task: str) -> tuple[tuple[float, float], str]:
    """Returns the bounds of a task's labels and what to say about a label beyond them."""
    if task == "binary_classification":
        return (0, 1), "label {} is not in [0, 1], as task binary_classification needs; correct the data or the task"
    largest = float(np.finfo(np.float32).max)
    return (-largest, largest), "label {} is not a finite number; correct the data"


def _inspect(
    path: Path, feature_map, columns: dict[str, _Column], digest: str | None
) -> tuple[int, dict[str, tuple[int, float]]]:
    """Checks a file against the feature map without reading its rows.

    Returns:
        The number of rows, and for each label the number of rows that have it and its mean over them.
    """
    with _open(path) as file:
        _check_names(file, columns)
        if (version := file.attrs.get("format", FORMAT)) != FORMAT:
            raise ValueError(f"{path}: format {version}, this flowctr reads format {FORMAT}; build the data set again")
        rows = int(file.attrs.get("rows", len(file[next(iter(columns))])))
        for name, column in columns.items():
            dataset = file[name]
            if len(dataset) != rows:
                raise ValueError(f"{path}: column {name!r} has {len(dataset)} rows instead of {rows}; build it again")
            found = json.loads(dataset.attrs.get("spec", "{}"))
            expected = relevant_spec(feature_map.features.get(name, {}))
            if found and found != expected:
                raise ValueError(
                    f"{path}: column {name!r} was built with {found}, the feature map says {expected}; "
                    "use the feature map that was built with the file, or build the data set again"
                )
            if dataset.shape[1:] != column.shape:
                raise ValueError(f"{path}: column {name!r} has shape {dataset.shape}, expected {(rows, *column.shape)}")
        if digest and file.attrs.get("feature_map_digest", digest) != digest:
            raise ValueError(
                f"{path}: built with another feature map (its vocabularies differ from those in "
                f"{feature_map.data_dir}); build the data set again"
            )
        means = {}
        for label in feature_map.labels:
            mean = file[label].attrs.get("mean")
            mean = float(np.mean(file[label][:], dtype=np.float64) if mean is None and rows else mean or 0.0)
            means[label] = int(file[label].attrs.get("known", rows)), mean
    return rows, means

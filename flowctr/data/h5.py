"""Batches from an h5 data set: gathered whole from memory, or streamed within bounded memory."""

import json
import os
from collections import deque
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


class H5DataLoader:
    """Batches of an h5 data set, gathered a whole batch at a time; no worker processes.

    In memory, every column is one array of its narrow type. Streaming holds a window of rows: the file's blocks are
    visited in shuffled order and the rows of a window are shuffled among themselves. Each row comes exactly once per
    epoch, the last batch may be smaller. Files of FuxiCTR 2.0 and 2.1 open as well.

    Args:
        feature_map: FuxiCTR's FeatureMap of the data set.
        data_path: An h5 file (``.h5`` may be left out) or a folder of part files.
        split: Only "train" is shuffled; other splits come in file order.
        batch_size: Rows per batch.
        shuffle: Whether to shuffle the training split, anew in each epoch.
        seed: With ``epoch``, determines the order.
        streaming: Whether to read while iterating instead of loading all; None streams when the arrays would take
            more than half of this machine's memory.
        buffer_size: Rows in a window of streaming; None for as many as fit into 256 MiB.
        pin_memory: Whether batches lie in pinned memory; None for "if there is a GPU".
        num_workers: Any value above 0 prepares batches ahead in one thread, as streaming and pinning always do.
        task: FuxiCTR's task, or a list of one per label: labels of "binary_classification" must be in [0, 1], others
            finite.
        **kwargs: Other settings of FuxiCTR's loaders, ignored.

    Attributes:
        epoch: Number of the next epoch; set it to continue an interrupted run.
        base_rates: Mean of each label, over the rows that have it.
        may_be_missing: Labels that are NaN in rows that lack them.
        num_samples, num_batches, num_blocks: Rows, batches and part files.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file is damaged, empty, or does not fit the feature map, a label does not fit its task
            or is missing in every row. Streaming finds wrong ids and labels while iterating.
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
        task: str | list[str] = "binary_classification",
        **kwargs,
    ):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}; a batch needs a positive whole number of rows")
        self.files = h5_files(find_h5(data_path))
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        self.shuffle = shuffle and split == "train"
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._columns = _columns(feature_map, self.files[0], task)
        digest = feature_map_digest(feature_map.data_dir)
        inspected = [_inspect(path, feature_map, self._columns, digest) for path in self.files]
        self._file_rows = [rows for rows, _ in inspected]
        self.num_samples = sum(self._file_rows)
        if self.num_samples == 0:
            raise ValueError(f"{data_path}: the {split} split has no rows")
        self.num_blocks = len(self.files)
        self.num_batches = -(-self.num_samples // batch_size)
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
        row_bytes = sum(c.dtype.itemsize * int(np.prod(c.shape)) for c in self._columns.values())
        if streaming is None:
            streaming = self.num_samples * row_bytes > _total_memory() / 2
        self.streaming = streaming
        window_rows = min(buffer_size or WINDOW_BYTES // row_bytes, self.num_samples)
        # Whole batches, so that only the last one of an epoch is smaller.
        self._window_rows = max(1, -(-window_rows // batch_size)) * batch_size
        self._ahead = bool(streaming or self.pin_memory or num_workers)
        self._arrays = None if streaming else self._load()

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self):
        batches = self._batches(np.random.default_rng([self.seed, self.epoch]))
        self.epoch += 1
        return _prefetch(batches) if self._ahead else batches

    def _batches(self, rng: np.random.Generator):
        windows = self._windows(rng) if self.streaming else [(self._arrays, self.num_samples)]
        for arrays, rows in windows:
            order = rng.permutation(rows) if self.shuffle else None
            for start in range(0, rows, self.batch_size):
                batch = slice(start, min(rows, start + self.batch_size))
                yield self._gather(arrays, batch if order is None else order[batch])

    def _gather(self, arrays: dict[str, np.ndarray], rows: slice | np.ndarray) -> dict[str, torch.Tensor]:
        batch = {}
        for name, array in arrays.items():
            values = array[rows] if isinstance(rows, slice) else np.take(array, rows, axis=0)
            tensor = torch.empty(values.shape, dtype=self._columns[name].tensor_dtype, pin_memory=self.pin_memory)
            tensor.numpy()[...] = values
            batch[name] = tensor
        return batch

    def _load(self) -> dict[str, np.ndarray]:
        arrays = self._allocate(self.num_samples)
        offset = 0
        for path, rows in zip(self.files, self._file_rows):
            with _open(path) as file:
                for start in range(0, rows, READ_ROWS):
                    stop = min(rows, start + READ_ROWS)
                    self._read(file, start, stop, arrays, offset + start)
            offset += rows
        return arrays

    def _windows(self, rng: np.random.Generator):
        """Yields arrays and the number of rows in them; the next window fills the same arrays."""
        arrays = self._allocate(min(self._window_rows, self.num_samples))
        for blocks in _cut(self._blocks(rng), self._window_rows):
            filled = 0
            for i, blocks_of_file in groupby(sorted(blocks), key=itemgetter(0)):
                with _open(self.files[i]) as file:
                    for _, start, stop in blocks_of_file:
                        self._read(file, start, stop, arrays, filled)
                        filled += stop - start
            yield arrays, filled

    def _blocks(self, rng: np.random.Generator) -> list[tuple[int, int, int]]:
        """Lists ``(file, start, stop)`` covering all rows; shuffled, they are chunks, at least 16 to a window."""
        size = READ_ROWS
        if self.shuffle:
            with _open(self.files[0]) as file:
                chunk_rows = min((file[name].chunks or (READ_ROWS,))[0] for name in self._columns)
            size = max(1, min(chunk_rows, self._window_rows // 16))
        blocks = [
            (i, start, min(rows, start + size))
            for i, rows in enumerate(self._file_rows)
            for start in range(0, rows, size)
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

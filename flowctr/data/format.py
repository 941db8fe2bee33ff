"""The h5 format of a data set, and its writer.

A file has one dataset per feature and label, the layout of FuxiCTR 2.0 and 2.1: ids ``(N,)`` or ``(N, max_len)`` in
the narrowest of uint8, uint16, int32 and int64; numbers, embeddings and labels in float32; in chunks of whole rows.
Attributes of the file: ``format``, ``rows``, ``feature_map_digest``; of a feature: ``spec`` (JSON of its type and
sizes), of a sequence also ``padding``; of a label: ``mean`` of the rows that have it, and, if it may be missing (NaN),
``known``, the number of these rows.
"""

import hashlib
import io
import json
from collections.abc import Collection
from operator import itemgetter
from pathlib import Path

import h5py
import numpy as np
from flowctr.data.files import natural_order, read_json
from flowctr.names import did_you_mean

FORMAT = 1
CHUNK_BYTES = 2**20  # HDF5 caches chunks up to this size
CHUNK_ROWS = 65536
SPEC_KEYS = ("type", "vocab_size", "max_len", "pretrain_dim")  # what a feature's ids depend on
UNSEEN = "unseen"  # the scenario of values that training lacks
NEEDED = {"sequence": "max_len", "embedding": "pretrain_dim"}  # what FuxiCTR cannot do without


def narrow_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest of uint8, uint16, int32 and int64 that holds the ids ``0 .. vocab_size - 1``."""
    for dtype in (np.uint8, np.uint16, np.int32):
        if vocab_size - 1 <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    return np.dtype(np.int64)


def feature_map_digest(data_dir: str | Path) -> str | None:
    """Digests what gives ids their meaning: the features' sizes and the vocabularies.

    Args:
        data_dir: The folder with ``feature_map.json`` and ``feature_vocab.json``.

    Returns:
        A sha256 hex digest, None if the folder holds no feature map.
    """
    data_dir = Path(data_dir)
    if not (data_dir / "feature_map.json").is_file():
        return None
    specs = {name: relevant_spec(spec) for name, spec in read_feature_map(data_dir)["features"].items()}
    digest = hashlib.sha256(json.dumps(specs, sort_keys=True).encode())
    if (vocab := data_dir / "feature_vocab.json").is_file():
        digest.update(vocab.read_bytes())
    return digest.hexdigest()


def read_feature_map(data_dir: Path) -> dict:
    """Reads ``feature_map.json`` with its features as one dict of specs by name.

    Raises:
        ValueError: If the file is damaged or no feature map.
    """
    path = data_dir / "feature_map.json"
    remedy = "put back the one that was built with the h5 files, or build again (flowctr build --rebuild)"
    content = read_json(path, ("dataset_id", "features", "labels"), remedy)
    try:
        content["features"] = {name: spec for feature in content["features"] for name, spec in feature.items()}
        complete = all(NEEDED.get(spec["type"], "type") in spec for spec in content["features"].values())
    except (AttributeError, KeyError, TypeError):
        complete = False
    if not complete:
        raise ValueError(f"{path} is damaged: its features are not those of a feature map; {remedy}")
    return content


def scenario_names(feature_map, column: str) -> dict[int, str]:
    """Names the scenarios of a data set: the values that a categorical column has in training.

    Args:
        feature_map: FuxiCTR's FeatureMap of the data set.
        column: The column that tells a row's scenario.

    Returns:
        Id -> raw value, in the order of ids, the id itself where the data set has no ``feature_vocab.json``. Padding,
        id 0, is none; the id of values that training lacks is `UNSEEN`.

    Raises:
        ValueError: If there is no such column, or it is not categorical, or ``feature_vocab.json`` is damaged.
    """
    spec = feature_map.features.get(column)
    if spec is None:
        raise ValueError(f"scenario {column!r} is no feature{did_you_mean(column, feature_map.features)}")
    if spec["type"] != "categorical":
        raise ValueError(f"scenario {column!r} is {spec['type']}; a scenario is a categorical feature")
    path = Path(feature_map.data_dir) / "feature_vocab.json"
    if path.is_file():
        ids = read_json(path, [column], "build the data set again")[column]
    else:
        ids = {str(i): i for i in range(spec["vocab_size"] - 1)} | {"__OOV__": spec["vocab_size"] - 1}
    names = {i: UNSEEN if token == "__OOV__" else token for token, i in sorted(ids.items(), key=itemgetter(1))}
    return {i: name for i, name in names.items() if i != 0}


class H5Writer:
    """Appends encoded rows to ``<split>.h5``, or to ``<split>/part-000000.h5`` and so on.

    Args:
        folder: Where the files go.
        split: Their name.
        features: The feature map's specs by name.
        paddings: "pre" or "post" for each sequence.
        labels: Names of the labels.
        digest: See ``feature_map_digest``.
        block_rows: Rows per part file; 0 for a single file.
        compression: None, "gzip" or "lzf".
        may_be_missing: Labels that may be NaN.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        features: dict[str, dict],
        paddings: dict[str, str],
        labels: list[str],
        digest: str,
        block_rows: int = 0,
        compression: str | None = None,
        may_be_missing: Collection[str] = (),
    ):
        self.folder, self.split, self.block_rows, self.compression = folder, split, block_rows, compression
        self.features, self.paddings, self.labels, self.digest = features, paddings, labels, digest
        self.may_be_missing = may_be_missing
        self.files = []
        self.rows = 0
        self._sink = None

    def __enter__(self) -> "H5Writer":
        return self

    def __exit__(self, exc_type, exc_value, traceback):
        self._finish_file()

    def append(self, columns: dict[str, np.ndarray]) -> None:
        """Writes rows, opening the next part file whenever one is full.

        Args:
            columns: One array per feature and label, all of the same length.

        Raises:
            OSError: If the disk is full.
        """
        start, total = 0, len(next(iter(columns.values())))
        while start < total:
            if self._sink is None:
                self._start_file(columns)
            room = self.block_rows - self._file_rows if self.block_rows else total
            stop = min(total, start + room)
            for name, array in columns.items():
                dataset = self._file[name]
                dataset.resize(self._file_rows + stop - start, axis=0)
                dataset[self._file_rows :] = array[start:stop]
            for label in self.labels:
                values = columns[label][start:stop]
                self._label_sums[label] += np.nansum(values, dtype=np.float64)
                self._label_rows[label] += np.count_nonzero(~np.isnan(values))
            self._file_rows += stop - start
            self.rows += stop - start
            start = stop
            self._sink.check()
            if self._file_rows == self.block_rows:
                self._finish_file()

    def _start_file(self, columns: dict[str, np.ndarray]) -> None:
        name = f"{self.split}/part-{len(self.files):06d}.h5" if self.block_rows else f"{self.split}.h5"
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.files.append(name)
        self._sink = _Sink(path)
        self._file = h5py.File(self._sink, "w")
        self._file_rows = 0
        self._label_sums, self._label_rows = dict.fromkeys(self.labels, 0.0), dict.fromkeys(self.labels, 0)
        row_bytes = max(array[:1].nbytes for array in columns.values())
        chunk_rows = min(CHUNK_ROWS, 1 << max(1, CHUNK_BYTES // row_bytes).bit_length() - 1)  # a power of two
        if self.block_rows:
            chunk_rows = min(chunk_rows, self.block_rows)
        for name, array in columns.items():
            shape = array.shape[1:]
            dataset = self._file.create_dataset(
                name,
                shape=(0, *shape),
                maxshape=(None, *shape),
                chunks=(min(chunk_rows, len(array)), *shape),
                dtype=array.dtype,
                compression=self.compression,
            )
            if name in self.features:
                dataset.attrs["spec"] = json.dumps(relevant_spec(self.features[name]), sort_keys=True)
            if name in self.paddings:
                dataset.attrs["padding"] = self.paddings[name]

    def _finish_file(self) -> None:
        if self._sink is None:
            return
        self._file.attrs.update({"format": FORMAT, "rows": self._file_rows, "feature_map_digest": self.digest})
        for label, total in self._label_sums.items():
            known = self._label_rows[label]
            self._file[label].attrs["mean"] = total / max(known, 1)
            if label in self.may_be_missing:
                self._file[label].attrs["known"] = known
        self._file.close()
        self._sink.close()
        sink, self._sink = self._sink, None
        sink.check()


class _Sink(io.FileIO):
    """The file under an HDF5 writer: it keeps the first write error for us and hides it from HDF5.

    HDF5 cannot close a file whose writes fail, and the process dies of a segmentation fault at exit.
    """

    def __init__(self, path: Path):
        super().__init__(path, "w+")
        self._error = None

    def write(self, data) -> int:
        data = memoryview(data).cast("B")
        done = 0
        try:
            while self._error is None and done < len(data):
                done += super().write(data[done:])
        except OSError as error:
            self._error = error
        return len(data)

    def truncate(self, size=None) -> int:
        try:
            if self._error is None:
                return super().truncate(size)
        except OSError as error:
            self._error = error
        return size

    def check(self) -> None:
        """Raises the write error that occurred, if any."""
        if self._error is not None:
            raise OSError(self._error.errno, self._error.strerror, self.name)


def h5_files(path: Path) -> list[Path]:
    """Lists the file, or the part files of a folder by their numbers."""
    return [path] if path.is_file() else sorted(path.glob("*.h5"), key=natural_order)


def find_h5(data_path: str | Path) -> Path:
    """Finds an h5 file, whose suffix may be left out, or a folder of part files.

    Raises:
        FileNotFoundError: If there is neither.
    """
    path = Path(data_path)
    candidates = [path] if path.suffix == ".h5" else [path.with_name(path.name + ".h5"), path]
    for candidate in candidates:
        if candidate.is_file() or any(candidate.glob("*.h5")):
            return candidate
    tried = ", ".join([*map(str, candidates), str(candidates[-1] / "*.h5")])
    raise FileNotFoundError(f"no h5 data at {data_path}; tried {tried}; build the data set first")


def relevant_spec(spec: dict) -> dict:
    """Returns the part of a feature's spec that its ids depend on."""
    return {key: spec[key] for key in SPEC_KEYS if key in spec}

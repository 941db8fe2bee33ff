"""Scores a csv, parquet or h5 file of any length with a trained experiment."""

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import torch
from flowctr.data import Encoder
from flowctr.data.encode import ColumnError
from flowctr.data.files import check_csv_end, read_json
from flowctr.names import did_you_mean
from flowctr.trained import TrainedModel
from flowctr.training import TrainingError
from torch import Tensor
from tqdm import tqdm

CHUNK_ROWS = 8192  # rows that are read, encoded and written at a time
ROW = "row"
NUMBERS = {"int": pl.Int64, "float": pl.Float64}

Chunks = Iterator[tuple[pl.DataFrame, dict[str, Tensor]]]
"""The ids of some rows and their encoded columns, until the file ends."""


def predict(trained: TrainedModel, data: str | Path, out: str | Path, ids: Sequence[str] = ()) -> int:
    """Scores the rows of a file, in its order.

    Args:
        trained: A trained experiment.
        data: Raw rows in csv or parquet, or an h5 file of the experiment's data set. Labels are not needed.
        out: csv or parquet file for the ids and, for each label, a column ``<label>_pred``; it is written whole or not
            at all.
        ids: Columns of ``data`` that tell its rows apart; none: ``row``, counted from 0.

    Returns:
        The number of rows.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a suffix is unknown, or the data are damaged or empty, lack a column, or have one of another
            type or with a wrong value.
        TrainingError: If a prediction is not a number.
    """
    data, out, ids = Path(data), Path(out), list(dict.fromkeys(ids))
    for path, known in ((data, READERS), (out, WRITERS)):
        if path.suffix not in known:
            raise ValueError(f"{path} ends in {path.suffix!r}; it must end in {' or '.join(known)}")
    if not data.is_file():
        raise FileNotFoundError(f"there is no file {data}")
    if out.resolve() == data.resolve():
        raise ValueError(f"{out} holds the rows to score, which the scores would replace; name another file for these")
    total, chunks = READERS[data.suffix](trained, data, ids)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = 0
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        unfinished = Path(folder) / out.name
        with (
            WRITERS[out.suffix](unfinished) as write,
            tqdm(desc="predict", total=total, unit=" rows", disable=None) as progress,  # None: only on a terminal
        ):
            for id_columns, columns in chunks:
                scores = _score(trained, columns)
                if not ids:
                    id_columns = pl.DataFrame({ROW: np.arange(rows, rows + len(scores))})
                write(pl.concat([id_columns, scores], how="horizontal"))
                rows += len(scores)
                progress.update(len(scores))
        os.replace(unfinished, out)
    return rows


@torch.no_grad()
def _score(trained: TrainedModel, columns: dict[str, Tensor]) -> pl.DataFrame:
    size = trained.params["batch_size"]
    batches = zip(*(values.split(size) for values in columns.values()))
    parts = [trained.score(dict(zip(columns, batch))) for batch in batches]
    scores = {}
    for label in trained.labels:
        name = f"{label}_pred"
        scores[name] = torch.cat([part[name].flatten() for part in parts]).cpu().numpy()
        if not np.isfinite(scores[name]).all():
            raise TrainingError(f"the model predicts nan or inf for {label}; its training has diverged")
    return pl.DataFrame(scores)


# From files to chunks


def _read_csv(trained: TrainedModel, path: Path, ids: list[str]) -> tuple[int, Chunks]:
    separator = _manifest(trained)["settings"]["sep"]
    check_csv_end(path, separator)
    # As text, which ids stay; numbers are read by `_to_numbers`, which names a value that is none.
    return _read_raw(trained, path, ids, pl.scan_csv(path, separator=separator, infer_schema=False))


def _read_parquet(trained: TrainedModel, path: Path, ids: list[str]) -> tuple[int, Chunks]:
    return _read_raw(trained, path, ids, pl.scan_parquet(path))


def _read_raw(trained: TrainedModel, path: Path, ids: list[str], scan: pl.LazyFrame) -> tuple[int, Chunks]:
    """Checks the columns of a table before anything is computed; what is in them while reading."""
    _manifest(trained)
    encoder = Encoder.load(trained.feature_map.data_dir, trained.params.get("behaviors"))
    read = encoder.processor.feature_cols = [
        col for col in encoder.processor.feature_cols if col["name"] in trained.feature_map.features
    ]
    keys = {name: state["key"] for name, state in encoder.state().items()}
    columns = {_source(col): col for col in read}
    with _readable(path):
        schema = scan.collect_schema()
        total = scan.select(pl.len()).collect().item()
    if missing := [name for name in columns if name not in schema]:
        listed = ", ".join(f"{name!r}{did_you_mean(name, schema)}" for name in missing)
        raise ValueError(f"{path} lacks columns that the model reads: {listed}; it has {', '.join(schema)}")
    _check_ids(trained, path, ids, {name: dtype.is_nested() for name, dtype in schema.items()})
    if total == 0:
        raise ValueError(f"{path} has no rows")
    numbers = {}
    for name, col in columns.items():
        kind = keys.get(col["name"]) or encoder.processor.dtype_dict[col["name"]].__name__
        if path.suffix != ".csv":
            tokens = encoder.tokens(col["name"]) if keys.get(col["name"]) == "str" else ()
            _check_type(path, name, schema[name], col["type"], keys.get(col["name"]), tokens)
        if schema[name] == pl.String and col["type"] in ("numeric", "categorical") and kind in NUMBERS:
            numbers[name] = NUMBERS[kind]

    def chunks() -> Chunks:
        first = 0
        rows = scan.select(list(dict.fromkeys([*columns, *ids])))
        with _readable(path):
            for frame in rows.collect_batches(chunk_size=CHUNK_ROWS, maintain_order=True):
                try:
                    arrays = encoder.encode(_to_numbers(frame, numbers, path, first))
                except ColumnError as error:
                    raise ValueError(f"{path}, rows {first} to {first + len(frame) - 1}: {error}") from error
                yield frame.select(ids), {name: _to_tensor(array) for name, array in arrays.items()}
                first += len(frame)

    return total, chunks()


def _read_h5(trained: TrainedModel, path: Path, ids: list[str]) -> tuple[int, Chunks]:
    specs = trained.feature_map.features
    _check_ids(trained, path, ids, {name: spec["type"] in ("sequence", "embedding") for name, spec in specs.items()})
    batches = trained.loader(path, CHUNK_ROWS, ids)
    chunks = ((pl.DataFrame({name: batch[name].numpy() for name in ids}), batch) for batch in batches)
    return batches.num_samples, chunks


READERS = {".csv": _read_csv, ".parquet": _read_parquet, ".h5": _read_h5}


TEXTS = (pl.String, pl.Categorical, pl.Enum)
# How polars writes numbers as text.
INTEGER = r"-?\d+"
FLOAT = r"-?\d+\.\d+(e[+-]?\d+)?|-?\d+e[+-]?\d+"


def _manifest(trained: TrainedModel) -> dict[str, Any]:
    path = Path(trained.feature_map.data_dir) / "manifest.json"
    if not path.is_file():
        raise ValueError(
            f"{path.parent} was not built by flowctr, so how to encode raw rows is not known; give the rows as h5"
        )
    return read_json(path, ["settings"], "build the data set again")


def _source(col: dict[str, Any]) -> str:
    """Names the raw column that a feature is made from."""
    copied = re.fullmatch(r"copy_from\((.+)\)", col.get("preprocess") or "")
    return copied[1] if copied else col["name"]


def _check_ids(trained: TrainedModel, path: Path, ids: list[str], columns: dict[str, bool]) -> None:
    """Checks that ids are columns of single values, of which the dict says whether they are lists."""
    for name in ids:
        if name not in columns:
            raise ValueError(f"--id: {path} has no column {name!r}{did_you_mean(name, columns)}")
        if columns[name]:
            raise ValueError(f"--id: column {name!r} of {path} has many values in a row; an id has one")
        if name in [f"{label}_pred" for label in trained.labels]:
            raise ValueError(f"--id: {name!r} is the name of a score; rename the column of {path}")


def _check_type(
    path: Path, name: str, dtype: pl.DataType, feature: str, key: str | None, tokens: Iterable[str]
) -> None:
    """Raises for a column whose values, being of another type than in training, would all count as unseen."""
    if feature == "categorical" and key == "str" and not dtype.is_nested() and dtype not in TEXTS:
        form = INTEGER if dtype.is_integer() else FLOAT if dtype.is_float() else ".*"  # of what it becomes as text
        if any(re.fullmatch(form, token) for token in tokens):
            return
    wanted = {
        "sequence": ("text", "lists"),
        "embedding": ("lists",),
        "numeric": ("numbers", "text"),
        "categorical": {"": ("numbers", "text"), "str": ("text",)}.get(key, ("numbers",)),
    }[feature]
    kinds = {
        "numbers": dtype.is_numeric() or dtype == pl.Boolean,
        "text": dtype in TEXTS,
        "lists": dtype in (pl.List, pl.Array),
    }
    if dtype != pl.Null and not any(kinds[kind] for kind in wanted):
        raise ValueError(f"{path}: column {name!r} is {dtype}; the model was trained with {' or '.join(wanted)} there")


def _to_numbers(frame: pl.DataFrame, types: dict[str, type[pl.DataType]], path: Path, first: int) -> pl.DataFrame:
    """Casts text to numbers; empty values become null, which the encoder fills in as in training."""
    numbers = frame.select(pl.col(name).cast(dtype, strict=False) for name, dtype in types.items())
    for name in types:
        text = frame[name].fill_null("")
        if (wrong := numbers[name].is_null() & (text != "")).any():
            row = first + wrong.arg_max()
            line = f" (line {row + 2})" if path.suffix == ".csv" else ""
            number = "an integer" if types[name] == pl.Int64 else "a number"
            raise ValueError(f"{path}: column {name!r} has {text[wrong.arg_max()]!r} in row {row}{line}, not {number}")
    return frame.with_columns(numbers)


def _to_tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array if array.dtype == np.float32 else array.astype(np.int32))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except pl.exceptions.NoDataError as error:
        raise ValueError(f"{path} is an empty file") from error
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


# From frames to a file


@contextmanager
def _csv_writer(path: Path) -> Iterator[Callable[[pl.DataFrame], None]]:
    with open(path, "wb") as file:
        yield lambda frame: frame.write_csv(file, include_header=file.tell() == 0)


@contextmanager
def _parquet_writer(path: Path) -> Iterator[Callable[[pl.DataFrame], None]]:
    writer = None

    def write(frame: pl.DataFrame) -> None:
        nonlocal writer
        table = frame.to_arrow()
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()


WRITERS = {".csv": _csv_writer, ".parquet": _parquet_writer}

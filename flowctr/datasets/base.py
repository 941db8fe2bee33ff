"""What every data set module shares: the registry's entry, finding raw files, writing tables whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from flowctr.data.files import NO_SPACE, locked

SPLITS = ("train", "valid", "test")
UNKNOWN = "unknown"  # the token of what is missing: an empty one would be read as padding


@dataclass(frozen=True)
class Dataset:
    """One public split that `flowctr prepare` can make.

    Attributes:
        id: The name of the split and of its data_configs/<id>.yaml.
        description: One sentence: what it is and how it is split.
        download: Where the raw files can be had.
        licence: What its owner allows.
        files: The raw files' published names.
        function: Writes the tables of the split; called with the folder of the raw files and the output folder.
    """

    id: str
    description: str
    download: str
    licence: str
    files: tuple[str, ...]
    function: Callable[[Path, Path], list[Path]]


def find_raw(raw: Path, name: str, download: str, also: str | None = None) -> Path:
    """Returns the path of one raw file.

    Args:
        raw: The folder that holds the raw files.
        name: The file's published name, e.g. "user_features_pure.csv".
        download: Where the file can be had, for the error message.
        also: Another suffix under which the same table is accepted, e.g. ".parquet".

    Raises:
        FileNotFoundError: If the folder has no such file.
    """
    candidates = [raw / name]
    if also and not name.endswith(also):
        candidates.append((raw / name).with_suffix(also))
    for path in candidates:
        if path.is_file():
            return path
    names = " or ".join(path.name for path in candidates)
    raise FileNotFoundError(f"no {names} in {raw}; download it from {download}")


@contextmanager
def written_together(paths: list[Path]) -> Iterator[list[Path]]:
    """Yields one temporary path for each path and renames them all once the block has succeeded.

    One process at a time writes to a folder. It removes the temporary files of those that were killed.

    Args:
        paths: Files of one folder, which is made.

    Raises:
        OSError: If the disk is full.
    """
    folder = paths[0].parent
    temporary = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths]
    with locked(folder), ExitStack() as cleanup:
        folder.mkdir(parents=True, exist_ok=True)
        for path, target in zip(temporary, paths, strict=True):
            for stale in folder.glob(f".{target.name}.*.tmp"):
                stale.unlink()
            cleanup.callback(path.unlink, missing_ok=True)
        try:
            yield temporary
        except (OSError, pl.exceptions.PolarsError) as error:
            if (code := _error_number(error)) not in NO_SPACE:
                raise
            raise OSError(
                code,
                f"no space left for {', '.join(path.name for path in paths)} in {folder} ({os.strerror(code)}); free "
                "disk space or choose another folder. Temporary files were removed, existing tables are untouched",
            ) from error
        for source, target in zip(temporary, paths, strict=True):
            os.replace(source, target)


def _error_number(error: Exception) -> int | None:
    """Returns the errno of a failed write; polars has it in its message only."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return int(number[1]) if number else getattr(error, "errno", None)


def random_split(table: pl.DataFrame, seed: int) -> list[pl.DataFrame]:
    """Draws 80 % of the rows for train, half of the others for valid and leaves the rest to test.

    Args:
        table: Rows in an order that does not depend on the raw files' order.
        seed: Of numpy's generator.

    Returns:
        The rows of each of `SPLITS`, in the table's order.

    Raises:
        ValueError: If there are too few rows for three splits.
    """
    train = round(0.8 * len(table))
    valid = round(0.5 * (len(table) - train))
    if not 0 < valid < len(table) - train:
        raise ValueError(f"a random 80/10/10 split needs more rows than {len(table)}; get the whole raw files")
    order = np.random.default_rng(seed).permutation(len(table))
    return [table[np.sort(rows)] for rows in np.split(order, [train, train + valid])]


def joined(tokens: pl.Series, start: np.ndarray, end: np.ndarray) -> pl.Series:
    """Returns "^".join(tokens[start[i]:end[i]]) for each i, as slices of the one text of all tokens.

    Args:
        tokens: Strings, (E,).
        start: First token of each history, (B,).
        end: One past the last token of each history, (B,); equal to `start` for an empty one.
    """
    position = np.concatenate(([0], np.cumsum(tokens.str.len_bytes().to_numpy().astype(np.int64) + 1)))
    length = np.maximum(position[end] - 1 - position[start], 0)  # without the separator after the last token
    text = pl.lit(tokens.str.join("^").item().encode())
    return pl.select(text.bin.slice(pl.Series(position[start]), pl.Series(length)).cast(pl.String)).to_series()

"""MovieLens-1M for scenario models, in the protocol of AutoIFS: ratings by age group, two tasks.

One row is one rating with the labels click (more than 3 stars) and like (more than 4), 8 fields, user_id, movie_id,
gender, age, occupation, zip, genre (the movie's first one) and scenario, and no history. The scenario is the age group
of the user: 0 below 25, 1 from 25 to 34, 2 from 35. The split is random by row.

Differs from the paper: numpy's generator draws the split, so that its sizes are the same but not its rows.

Source: AutoIFS, arXiv 2512.13396; Harper and Konstan, "The MovieLens Datasets: History and Context", TiiS 2015.
"""

from __future__ import annotations

import zlib
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile

import polars as pl
from flowctr.datasets.base import SPLITS, Dataset, random_split, written_together

DOWNLOAD = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
FILES = ("ratings.dat", "users.dat", "movies.dat")
SEED = 2021
SCENARIOS = {"1": "0", "18": "0", "25": "1", "35": "2", "45": "2", "50": "2", "56": "2"}  # by the file's age codes
# One line of each file; what has no name is not read.
_LINES = {
    "ratings.dat": r"^(?<user_id>[0-9]{1,9})::(?<movie_id>[0-9]{1,9})::(?<rating>[1-5])::[0-9]+$",
    "users.dat": r"^(?<user_id>[0-9]{1,9})::(?<gender>[FM])::(?<age>"
    + "|".join(SCENARIOS)
    + r")::(?<occupation>[0-9]{1,9})::(?<zip>[^:]+)$",
    "movies.dat": r"^(?<movie_id>[0-9]{1,9})::.*::(?<genre>[^:|]+)(?:\|[^:|]+)*$",
}


def prepare_movielens(raw: Path, out: Path) -> list[Path]:
    """Writes the tables of protocol movielens_1m.

    Args:
        raw: The folder with ratings.dat, users.dat and movies.dat, with the folder ml-1m or with ml-1m.zip.
        out: The folder to write train.parquet, valid.parquet and test.parquet to.

    Returns:
        The three paths.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a line is not as published, a user or movie has two lines or a rating's user or movie none.
    """
    ratings, users, movies = (_read(raw, name) for name in FILES)
    table = ratings
    for other, key, column, name in ((users, "user_id", "gender", FILES[1]), (movies, "movie_id", "genre", FILES[2])):
        if (repeated := other[key].is_duplicated()).any():
            raise ValueError(
                f"{name} in {raw}: {key} {other[key][repeated.arg_max()]} has more than one line; "
                f"get the file from {DOWNLOAD}"
            )
        table = table.join(other, on=key, how="left", maintain_order="left")
        if (unknown := table[column].is_null()).any():
            row = unknown.arg_max()
            raise ValueError(
                f"{FILES[0]} in {raw}: line {row + 1} has {key} {table[key][row]}, which {name} lacks; "
                f"get all files from {DOWNLOAD}"
            )
    table = table.select(
        (pl.col("rating") > "3").cast(pl.Float32).alias("click"),
        (pl.col("rating") > "4").cast(pl.Float32).alias("like"),
        *("user_id", "movie_id", "gender", "age", "occupation", "zip", "genre"),
        pl.col("age").replace_strict(SCENARIOS).alias("scenario"),
    ).sort("user_id", "movie_id", "like", "click")
    paths = [out / f"{split}.parquet" for split in SPLITS]
    with written_together(paths) as temporary:
        for path, rows in zip(temporary, random_split(table, SEED), strict=True):
            rows.cast({"user_id": pl.String, "movie_id": pl.String}).write_parquet(path, compression="zstd")
    return paths


def _read(raw: Path, name: str) -> pl.DataFrame:
    """Returns the named parts of each line of a file: the ids as numbers, the others as strings."""
    path, content = _content(raw, name)
    text = content.decode("latin-1").replace("\r\n", "\n").removesuffix("\n")
    lines = pl.Series("line", text.split("\n"))  # splitlines would also split at characters of latin-1
    table = lines.str.extract_groups(_LINES[name]).struct.unnest()
    wrong = table.to_series(0).is_null()
    if wrong.any():
        row = wrong.arg_max()
        raise ValueError(
            f"{path}: lines that are not as published: {wrong.sum()}, the first is line {row + 1}, "
            f"{lines[row][:80]!r}; get the file from {DOWNLOAD}"
        )
    return table.cast({column: pl.Int64 for column in table.columns if column in ("user_id", "movie_id")})


def _content(raw: Path, name: str) -> tuple[Path, bytes]:
    """Returns the path and the bytes of a file, which may be packed in ml-1m.zip."""
    for path in (raw / name, raw / "ml-1m" / name):
        if path.is_file():
            return path, path.read_bytes()
    archive = raw / "ml-1m.zip"
    if archive.is_file():
        try:
            with ZipFile(archive) as packed:
                for member in packed.namelist():
                    if PurePosixPath(member).name == name:
                        return archive / member, packed.read(member)
        except (BadZipFile, zlib.error) as error:
            raise ValueError(f"{archive} is damaged ({error}); download it again from {DOWNLOAD}") from error
    raise FileNotFoundError(f"no {name} in {raw}, {raw / 'ml-1m'} or {archive}; download it from {DOWNLOAD}")


DATASETS = [
    Dataset(
        id="movielens_1m",
        description="MovieLens-1M ratings, three scenarios by the user's age, random 80/10/10 by row as in AutoIFS; "
        "tasks click (more than 3 stars), like (more than 4). Also takes ml-1m.zip as it is.",
        download=DOWNLOAD,
        licence="GroupLens: for research with acknowledgement; neither redistribution nor commercial use without "
        "permission",
        files=FILES,
        function=prepare_movielens,
    ),
]

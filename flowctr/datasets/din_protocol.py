"""DIN's next-item protocol: per-user item sequences and an item-to-category map to train, valid and test tables.

For a user's items i_1 .. i_n and every k = 1 .. n-1 the history is i_1 .. i_k. The next item i_{k+1} is a positive and
one random item that the user never had is a negative, so the classes are balanced. The two rows of k = n-1 go to test,
the others to train; with a hold-out those of k = n-2 go to valid.

Source: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018; AmazonElectronics_x1 of BARS
follows it. The raw layout is that of S3-Rec (Zhou et al., CIKM 2020).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
from flowctr.data.files import read_json
from flowctr.datasets.base import UNKNOWN, Dataset, find_raw, joined, written_together

DOWNLOAD = "https://github.com/RUCAIBox/CIKM2020-S3Rec (folder data)"
SPORTS = "Sports_and_Outdoors"
SEQUENCES = "{}.txt"
ATTRIBUTES = "{}_item2attributes.json"
SEED = 2022


def prepare_amazon(raw: Path, out: Path, category: str = SPORTS, holdout: bool = False) -> list[Path]:
    """Writes the tables of one category of Amazon's reviews.

    Args:
        raw: The folder with the category's two raw files. For Sports and Outdoors those of another data set of S3-Rec,
            such as Yelp.txt and Yelp_item2attributes.json, are taken if they are the only ones there.
        out: The folder to write train.parquet, test.parquet and, with `holdout`, valid.parquet to.
        category: As S3-Rec's files have it.
        holdout: Whether k = n-2 is taken out of train for validation.

    Returns:
        The paths of the tables.
    """
    sequences_path, attributes_path = _find(raw, category)
    sequences, categories = read_sequences(sequences_path), read_categories(attributes_path)
    tables = din_tables(sequences, categories, holdout, SEED)
    paths = [out / f"{split}.parquet" for split in tables]
    with written_together(paths) as temporary:
        for path, table in zip(temporary, tables.values(), strict=True):
            table.write_parquet(path, compression="zstd")
    return paths


def _find(raw: Path, category: str) -> tuple[Path, Path]:
    """Returns the paths of sequences and attributes, see `prepare_amazon`."""
    names = _files(category)
    if category == SPORTS and not any((raw / name).is_file() for name in names):
        suffix = ATTRIBUTES.format("")
        pairs = [
            (path.with_name(SEQUENCES.format(path.name.removesuffix(suffix))), path) for path in raw.glob(f"*{suffix}")
        ]
        if len(pairs) == 1 and pairs[0][0].is_file():
            return pairs[0]
    sequences, attributes = (find_raw(raw, name, DOWNLOAD) for name in names)
    return sequences, attributes


def _files(category: str) -> tuple[str, str]:
    return SEQUENCES.format(category), ATTRIBUTES.format(category)


def read_sequences(path: Path) -> pl.DataFrame:
    """Reads one user per line, "<user> <item> <item> ..." with the items in time order.

    Returns:
        The columns user_id (Int64) and items (list of strings).

    Raises:
        ValueError: If a line does not start with an integer user id or names a user twice.
    """
    lines = path.read_text().splitlines()
    rows = [line.split() for line in lines if line.strip()]
    try:
        users = [int(row[0]) for row in rows]
    except ValueError as error:
        raise ValueError(f"{path}: a line must be a user id and item ids, separated by spaces; {error}") from None
    if len(set(users)) != len(users):
        raise ValueError(f"{path}: {len(users) - len(set(users))} lines repeat a user; one line per user is needed")
    return pl.DataFrame(
        {"user_id": users, "items": [row[1:] for row in rows]},
        schema={"user_id": pl.Int64, "items": pl.List(pl.String)},
    )


def read_categories(path: Path) -> dict[str, str]:
    """Reads {item: [attribute, ...]} and returns each item's last attribute, its most specific category.

    Raises:
        ValueError: If the file is not such an object.
    """
    attributes = read_json(path, (), remedy=f"download it again from {DOWNLOAD}")
    if wrong := [item for item, values in attributes.items() if not isinstance(values, list)]:
        raise ValueError(f"{path}: the attributes of item {wrong[0]!r} are {attributes[wrong[0]]!r} instead of a list")
    return {item: str(values[-1]) for item, values in attributes.items() if values}


def din_tables(
    sequences: pl.DataFrame, categories: dict[str, str], holdout: bool = False, seed: int = SEED
) -> dict[str, pl.DataFrame]:
    """Makes the samples of DIN's protocol.

    Args:
        sequences: The columns user_id and items (list of strings, oldest first), one row per user.
        categories: The category of each item; an item without one gets "unknown".
        holdout: Whether k = n-2 becomes a table "valid" instead of a part of "train".
        seed: Of the negatives; the same with and without `holdout`, so that the test table is the same.

    Returns:
        "train", "valid" (with `holdout` only) and "test", each with the columns label, user_id, item_id, cate_id,
        item_history and cate_history ("^"-joined, oldest first); a positive is followed by its negative.

    Raises:
        ValueError: If no user has two items, or a user has all items, so that no negative exists.
    """
    lengths = sequences["items"].list.len().to_numpy().astype(np.int64)
    if lengths.max(initial=0) < 2:
        raise ValueError("no user has two items, so no history has a next item")
    event_item = sequences["items"].explode(empty_as_null=False)
    event_user = np.repeat(np.arange(len(lengths)), lengths)
    items = event_item.unique().sort()
    cates = pl.Series([categories.get(item, UNKNOWN) for item in items], dtype=pl.String)
    code = items.search_sorted(event_item).to_numpy().astype(np.int64)

    # One sample per k = 1 .. n-1 of each user; `left` counts the user's samples after it.
    samples = np.maximum(lengths - 1, 0)
    user = np.repeat(np.arange(len(lengths)), samples)
    k = 1 + np.arange(len(user)) - np.repeat(np.cumsum(samples) - samples, samples)
    left = samples[user] - k
    start = (np.cumsum(lengths) - lengths)[user]
    end = start + k
    histories = {
        "item_history": joined(event_item, start, end),
        "cate_history": joined(cates.gather(code), start, end),
    }

    # Two rows per sample: the next item, then an item that the user never had.
    item = np.stack((code[end], _negatives(user, event_user, code, len(items), seed)), axis=1).ravel()
    row = np.repeat(np.arange(len(user)), 2)
    table = pl.DataFrame(
        {
            "label": np.tile(np.array([1, 0], dtype=np.float32), len(user)),
            "user_id": sequences["user_id"].gather(user[row]),
            "item_id": items.gather(item),
            "cate_id": cates.gather(item),
            **{name: history.gather(row) for name, history in histories.items()},
        }
    )
    left = left[row]
    if holdout:
        return {"train": table.filter(left > 1), "valid": table.filter(left == 1), "test": table.filter(left == 0)}
    return {"train": table.filter(left > 0), "test": table.filter(left == 0)}


def _negatives(user: np.ndarray, event_user: np.ndarray, code: np.ndarray, items: int, seed: int) -> np.ndarray:
    """Draws for each sample's user an item code that is in none of the user's events, by rejection."""
    owned = np.unique(event_user * items + code)
    full = np.flatnonzero(np.bincount(owned // items) == items)
    if len(full):
        raise ValueError(f"the user in line {full[0] + 1} has all {items} items, so there is no negative to draw")
    rng = np.random.default_rng(seed)
    negative = rng.integers(items, size=len(user))
    open_samples = np.arange(len(user))
    while True:
        drawn = user[open_samples] * items + negative[open_samples]
        at = np.minimum(np.searchsorted(owned, drawn), len(owned) - 1)
        open_samples = open_samples[owned[at] == drawn]
        if not len(open_samples):
            return negative
        negative[open_samples] = rng.integers(items, size=len(open_samples))


def _amazon(dataset_id: str, description: str, category: str, holdout: bool) -> Dataset:
    return Dataset(
        id=dataset_id,
        description=description,
        function=partial(prepare_amazon, category=category, holdout=holdout),
        download=DOWNLOAD,
        licence="none stated by the source: for your own use, do not redistribute",
        files=_files(category),
    )


DATASETS = [
    _amazon(
        "amazon_sports_din",
        "Amazon Sports and Outdoors 5-core (2014), DIN's next-item protocol, validated on test as in BARS; "
        "also takes the files of another category, if they are the only ones in the folder.",
        SPORTS,
        holdout=False,
    ),
    _amazon(
        "amazon_sports_din_holdout",
        "the same with the last but one sample of each user taken out of train for validation.",
        SPORTS,
        holdout=True,
    ),
    _amazon(
        "amazon_beauty_din_holdout",
        "Beauty instead of Sports and Outdoors, with that hold-out.",
        "Beauty",
        holdout=True,
    ),
    _amazon(
        "amazon_toys_din_holdout",
        "Toys and Games instead of Sports and Outdoors, with that hold-out.",
        "Toys_and_Games",
        holdout=True,
    ),
]

"""KuaiRand-Pure: raw log, user and video files to train, valid and test tables.

One row is one exposure of the standard log, with the labels is_click, is_like and long_view, the features of the
user, the video and the request, and three behaviour histories. A history holds the user's last 50 events of its kind
strictly before the exposure's time, oldest first, as four "^"-joined columns that are aligned step by step:

    watch_video, watch_author, watch_tag, watch_gap      every exposure
    like_...                                             those with is_like
    long_view_...                                        those with long_view

The gap is the time from the event to the exposure as floor(log2(1 + whole seconds)). What is missing (a video's tag,
the time of an event of the history file) is the token "unknown", so that the columns stay aligned. What is known only
after the exposure (play_time_ms and all columns after it, the other feedback) is not in the tables.

Source: KuaiRand, Gao et al., CIKM 2022, https://kuairand.com, CC BY-SA 4.0; the tables carry the same licence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
from flowctr.data.files import check_csv_end
from flowctr.datasets.base import SPLITS, UNKNOWN, Dataset, find_raw, joined, written_together

LICENCE = "CC BY-SA 4.0: share with attribution and under the same licence"
PURE_DOWNLOAD = "https://zenodo.org/records/10439422/files/KuaiRand-Pure.tar.gz (see https://kuairand.com)"
PURE_FILES = (
    "log_standard_4_08_to_4_21_pure.csv",
    "log_standard_4_22_to_5_08_pure.csv",
    "user_features_pure.csv",
    "video_features_basic_pure.csv",
)
WINDOW_DOWNLOAD = "the flowctr repository, folder data/kuairand_pure_window"
WINDOW_FILES = (
    "log_standard_4_25_to_5_08_pure.csv",
    "user_history_until_4_24.parquet",
    "user_features_pure.csv",
    "video_features_basic_pure.csv",
)

TABS = (0, 1, 4)  # the three scenarios with most exposures
MAX_EVENTS = 50
LABELS = ("is_click", "is_like", "long_view")
# behaviour -> (its flag in the log, None for every exposure; its column in the history file)
BEHAVIORS = {
    "watch": (None, "watch_seq"),
    "like": ("is_like", "like_seq"),
    "long_view": ("long_view", "long_watch_seq"),
}

USER_COUNTS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
USER_CATEGORIES = (
    "user_active_degree",
    "is_lowactive_period",
    "is_live_streamer",
    "is_video_author",
    *(f"{count}_range" for count in USER_COUNTS),
    *(f"onehot_feat{i}" for i in range(18)),
)
VIDEO_CATEGORIES = (
    "author_id",
    "video_type",
    "upload_dt",
    "upload_type",
    "visible_status",
    "server_width",
    "server_height",
    "music_id",
    "music_type",
    "tag",
)

_LOG_COLUMNS = (
    "user_id video_id date hourmin time_ms is_click is_like is_follow is_comment is_forward is_hate long_view "
    "play_time_ms duration_ms profile_stay_time comment_stay_time is_profile_enter is_rand tab"
).split()
_NEVER_MISSING = ("user_id", "video_id", "date", "time_ms", *LABELS, "tab")
_HISTORY_SCHEMA = {"user_id": pl.Int64, "last_time_ms": pl.Int64} | {
    column: pl.List(pl.Int64) for _, column in BEHAVIORS.values()
}
_CHUNK_ROWS = 100_000  # bounds the memory of the event times that the gaps of one chunk need


def prepare_window(raw: Path, out: Path, tabs: tuple[int, ...] | None = None, every_nth_user: int = 1) -> list[Path]:
    """Writes the tables of protocol kuairand_pure_window, or of the part with some tabs and users.

    Train is 25 April to 4 May 2022, valid 5 and 6 May, test 7 and 8 May. Events until 24 April come from the history
    file, later ones from the whole log, whatever their tab.

    Args:
        raw: The folder with the log, history, user and video files, each as csv or parquet.
        out: The folder to write train.parquet, valid.parquet and test.parquet to.
        tabs: The scenarios whose exposures become rows; None for all.
        every_nth_user: Only exposures of users whose id is divisible by this become rows.

    Returns:
        The three paths.
    """
    log_path, history_path, user_path, video_path = find_files(raw, WINDOW_FILES, WINDOW_DOWNLOAD)
    log = read_log([log_path]).unique(maintain_order=True)
    history = read_table(history_path, _HISTORY_SCHEMA, key="user_id")
    exposures = log.filter(pl.col("user_id") % every_nth_user == 0)
    exposures = exposures if tabs is None else exposures.filter(pl.col("tab").is_in(tabs))
    users, videos = _read_users(user_path), _read_videos(video_path)
    return _write_tables(out, exposures, (20220505, 20220507), users, videos, _events(log, history, videos))


def prepare_pure(raw: Path, out: Path) -> list[Path]:
    """Writes the tables of protocol kuairand_pure: the official download, split chronologically 80/10/10 by day.

    All events come from the log itself, so the histories of the first days are short.

    Args:
        raw: The folder with the two standard logs, the user and the video file, each as csv or parquet.
        out: The folder to write train.parquet, valid.parquet and test.parquet to.

    Returns:
        The three paths.
    """
    *log_paths, user_path, video_path = find_files(raw, PURE_FILES, PURE_DOWNLOAD)
    log = read_log(log_paths).unique(maintain_order=True)
    users, videos = _read_users(user_path), _read_videos(video_path)
    events = _events(log, pl.DataFrame(schema=_HISTORY_SCHEMA), videos)
    return _write_tables(out, log, split_days(log["date"]), users, videos, events)


def split_days(dates: pl.Series) -> tuple[int, int]:
    """Returns the first day of valid and of test: the day boundaries nearest to 80 % and 90 % of the rows.

    Args:
        dates: The day of each row as yyyymmdd.

    Raises:
        ValueError: If there are fewer than three days.
    """
    days, rows = np.unique(dates.to_numpy(), return_counts=True)
    if len(days) < 3:
        raise ValueError(f"a train, a valid and a test split by day need at least 3 days of log; got {len(days)}")
    share_before = np.concatenate(([0], np.cumsum(rows)[:-1])) / rows.sum()
    valid = 1 + np.abs(share_before[1:-1] - 0.8).argmin()
    test = valid + 1 + np.abs(share_before[valid + 1 :] - 0.9).argmin()
    return int(days[valid]), int(days[test])


def _write_tables(
    out: Path,
    exposures: pl.DataFrame,
    first_days: tuple[int, int],
    users: pl.DataFrame,
    videos: pl.DataFrame,
    events: dict[str, pl.DataFrame],
) -> list[Path]:
    """Writes one parquet file per split; `first_days` are the first days of valid and of test."""
    bounds = (0, *first_days, 99999999)
    paths = [out / f"{split}.parquet" for split in SPLITS]
    with written_together(paths) as temporary:
        for split, path, first, end in zip(SPLITS, temporary, bounds[:-1], bounds[1:], strict=True):
            rows = exposures.filter((pl.col("date") >= first) & (pl.col("date") < end))
            if rows.is_empty():
                raise ValueError(f"the log has no exposure for {split}, the days from {first} to before {end}")
            chunks = [_table(chunk, users, videos, events) for chunk in rows.iter_slices(_CHUNK_ROWS)]
            pl.concat(chunks).write_parquet(path, compression="zstd")
    return paths


def _table(
    rows: pl.DataFrame, users: pl.DataFrame, videos: pl.DataFrame, events: dict[str, pl.DataFrame]
) -> pl.DataFrame:
    """Returns the finished columns of some exposures, in their order."""
    clock = pl.from_epoch(pl.col("time_ms") + 8 * 3_600_000, time_unit="ms")  # Beijing time
    table = (
        rows.join(users, on="user_id", how="left", validate="m:1", maintain_order="left")
        .join(videos, on="video_id", how="left", validate="m:1", maintain_order="left")
        .select(
            pl.col(LABELS).cast(pl.Float32),
            "time_ms",
            pl.col("date").cast(pl.Int32),
            pl.col("user_id", "video_id", "tab").cast(pl.String),
            clock.dt.hour().cast(pl.String).alias("hour"),
            clock.dt.weekday().cast(pl.String).alias("weekday"),
            pl.col(*USER_CATEGORIES, *VIDEO_CATEGORIES, "video_duration").fill_null(UNKNOWN),
            pl.col("^log_.*$").fill_null(0.0),
        )
    )
    return table.with_columns(
        column for name, frame in events.items() for column in _histories(name, frame, rows["user_id"], rows["time_ms"])
    )


def _events(log: pl.DataFrame, history: pl.DataFrame, videos: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Returns the events of each behaviour, each user's together and oldest first.

    Columns: user_id; until_ms, the time at which it had happened at the latest; time_ms, its own time, or -1 where that
    is unknown; video, author and tag, the tokens.

    The history file has one time per user, that of the last exposure in it. Hence its events can enter a history only
    after that time, and the log's rows up to that time are left out: the file has them already.
    """
    until = history.select("user_id", pl.col("last_time_ms").alias("until_ms"))
    new = (
        log.join(until, on="user_id", how="left", validate="m:1", maintain_order="left")
        .filter(pl.col("until_ms").is_null() | (pl.col("time_ms") > pl.col("until_ms")))
        .with_columns(pl.col("time_ms").alias("until_ms"))
    )
    last = pl.int_range(pl.len()).over("user_id") == pl.len().over("user_id") - 1
    events = {}
    for name, (flag, column) in BEHAVIORS.items():
        # Only the last watched video is the last exposure for certain; a like may be any earlier one.
        known = last if name == "watch" else pl.lit(False)
        old = (
            until.with_columns(history[column].alias("video_id"))
            .explode("video_id", empty_as_null=False)
            .with_columns(time_ms=pl.when(known).then("until_ms").otherwise(-1))
        )
        recent = new if flag is None else new.filter(pl.col(flag) == 1)
        events[name] = (
            pl.concat([old, recent.select(old.columns)])
            .sort("user_id", "until_ms", maintain_order=True)
            .join(videos, on="video_id", how="left", maintain_order="left")
            .select(
                "user_id",
                "until_ms",
                "time_ms",
                pl.col("video_id").cast(pl.String).alias("video"),
                pl.col("author_id").fill_null(UNKNOWN).alias("author"),
                pl.col("tag").fill_null(UNKNOWN),
            )
        )
    return events


def _histories(name: str, events: pl.DataFrame, user_id: pl.Series, time_ms: pl.Series) -> list[pl.Series]:
    """Returns the four columns of one behaviour for exposures of `user_id` at `time_ms`."""
    start, end = _windows(events, user_id.to_numpy(), time_ms.to_numpy())
    columns = [joined(events[token], start, end).alias(f"{name}_{token}") for token in ("video", "author", "tag")]

    lengths = end - start
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    event = np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], lengths)  # the events of all rows, end to end
    event_ms = events["time_ms"].to_numpy()[event]
    gap = log2_bucket(np.repeat(time_ms.to_numpy(), lengths) - event_ms)
    names = pl.Series([str(bucket) for bucket in range(64)] + [UNKNOWN])
    gaps = joined(names.gather(np.where(event_ms < 0, 64, gap)), offsets[:-1], offsets[1:])
    return [*columns, gaps.alias(f"{name}_gap")]


def _windows(events: pl.DataFrame, user_id: np.ndarray, time_ms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each exposure the half-open range of its last events, which are consecutive in `events`."""
    event_user, event_ms = events["user_id"].to_numpy(), events["until_ms"].to_numpy()
    _, code = np.unique(np.concatenate((event_user, user_id)), return_inverse=True)
    times = np.concatenate((event_ms, time_ms))
    times -= times.min()
    span = times.max() + 1
    key = code * span + times  # (user, time) as one number in the same order
    event_key, exposure_key = key[: len(events)], key[len(events) :]
    end = np.searchsorted(event_key, exposure_key, side="left")  # "left": nothing at the exposure's own time
    first = np.searchsorted(event_key, code[len(events) :] * span, side="left")
    return np.maximum(first, end - MAX_EVENTS), end


def log2_bucket(milliseconds: np.ndarray) -> np.ndarray:
    """Returns floor(log2(1 + whole seconds)) of non-negative durations, exactly."""
    return np.frexp(1 + milliseconds // 1000)[1] - 1


def find_files(raw: Path, names: tuple[str, ...], download: str) -> list[Path]:
    """Returns the paths of raw files, each of them csv or parquet."""
    return [find_raw(raw, name, download, also=".parquet") for name in names]


def read_table(path: Path, schema: Mapping[str, pl.DataType | None], key: str | None = None) -> pl.DataFrame:
    """Returns columns of a csv or parquet file.

    Args:
        path: The file.
        schema: The columns and their types; None for the type that a column has in the file.
        key: The column that identifies a row.

    Raises:
        ValueError: If the file cannot be read, lacks a column, has another value than a column's type, or a key twice.
    """
    dtypes = {column: dtype for column, dtype in schema.items() if dtype is not None}
    try:
        if path.suffix == ".parquet":
            frame = pl.read_parquet(path)
        else:
            check_csv_end(path)
            frame = pl.read_csv(path, infer_schema_length=None)
        missing = [column for column in schema if column not in frame.columns]
        if missing:
            raise ValueError(f"{path} lacks the columns {missing}; it has {frame.columns}")
        frame = frame.select(*schema).cast(dtypes)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if key and (repeated := frame[key].is_duplicated()).any():
        raise ValueError(f"{path}: {key} {frame[key][repeated.arg_max()]} occurs in more than one row")
    return frame


def read_log(paths: list[Path], columns: Sequence[str] = _LOG_COLUMNS) -> pl.DataFrame:
    """Returns columns of some logs, by time and then by all columns: no trace of the files' row order.

    Args:
        paths: The logs.
        columns: What to read, "time_ms" among it.

    Raises:
        ValueError: If a log cannot be read, lacks a column or has no value where there must be one.
    """
    logs = []
    for path in paths:
        log = read_table(path, dict.fromkeys(columns, pl.Int64))
        for column in columns:
            if column in _NEVER_MISSING and log[column].has_nulls():
                row = log[column].is_null().arg_max() + 1
                raise ValueError(f"{path}: column {column!r} is empty in row {row}; correct the file or get it again")
        logs.append(log)
    return pl.concat(logs).sort("time_ms", *columns)


def _read_users(path: Path) -> pl.DataFrame:
    """Returns the users' categories as tokens and their counts as log_<count> = log(1 + count)."""
    counts = dict.fromkeys(USER_COUNTS, pl.Float64)
    users = read_table(path, {"user_id": pl.Int64, **dict.fromkeys(USER_CATEGORIES), **counts}, key="user_id")
    return users.select(
        "user_id",
        *(token(users[column]) for column in USER_CATEGORIES),
        *(_log1p(users[count]) for count in USER_COUNTS),
    )


def _read_videos(path: Path) -> pl.DataFrame:
    """Returns the videos' categories as tokens and their duration as a bucket's token and as log(1 + milliseconds)."""
    categories = dict.fromkeys(VIDEO_CATEGORIES)
    videos = read_table(path, {"video_id": pl.Int64, **categories, "video_duration": pl.Float64}, key="video_id")
    duration = videos["video_duration"].fill_nan(None)
    bucket = pl.Series(log2_bucket(duration.fill_null(0).cast(pl.Int64).to_numpy())).cast(pl.String)
    return videos.select(
        "video_id",
        *(token(videos[column]) for column in VIDEO_CATEGORIES),
        pl.when(duration.is_null()).then(pl.lit(UNKNOWN)).otherwise(bucket).alias("video_duration"),
        _log1p(duration),
    )


def token(column: pl.Series, missing: str = UNKNOWN) -> pl.Series:
    """Returns categories as strings: numbers as integers (the csv files have 9.0 where values are missing)."""
    if column.dtype.is_numeric():
        column = column.cast(pl.Float64).fill_nan(None).cast(pl.Int64)
    return column.cast(pl.String).replace("", None).fill_null(missing)


def _log1p(column: pl.Series) -> pl.Series:
    return column.fill_nan(None).log1p().cast(pl.Float32).alias(f"log_{column.name}")


DATASETS = [
    Dataset(
        id="kuairand_pure_window",
        description="KuaiRand-Pure, 25 April to 8 May 2022: train to 4 May, valid 5 and 6 May, test 7 and 8 May; "
        "tasks is_click, is_like, long_view.",
        download=WINDOW_DOWNLOAD,
        licence=LICENCE,
        files=WINDOW_FILES,
        function=prepare_window,
    ),
    Dataset(
        id="kuairand_pure_window_tabs",
        description="the same, exposures of the scenarios tab 0, 1 and 4 only; tasks is_click, long_view.",
        download=WINDOW_DOWNLOAD,
        licence=LICENCE,
        files=WINDOW_FILES,
        function=partial(prepare_window, tabs=TABS),
    ),
    Dataset(
        id="kuairand_tiny",
        description="kuairand_pure_window, every 32nd user only: a small table to try things on, shipped as "
        "data/kuairand_tiny.",
        download=WINDOW_DOWNLOAD,
        licence=LICENCE,
        files=WINDOW_FILES,
        function=partial(prepare_window, every_nth_user=32),
    ),
    Dataset(
        id="kuairand_tiny_tabs",
        description="kuairand_pure_window_tabs, every 64th user only: the small table for scenario models, shipped "
        "as data/kuairand_tiny_tabs.",
        download=WINDOW_DOWNLOAD,
        licence=LICENCE,
        files=WINDOW_FILES,
        function=partial(prepare_window, tabs=TABS, every_nth_user=64),
    ),
    Dataset(
        id="kuairand_pure",
        description="KuaiRand-Pure, both standard logs of the official download, chronological 80/10/10 by day; "
        "tasks is_click, is_like, long_view.",
        download=PURE_DOWNLOAD,
        licence=LICENCE,
        files=PURE_FILES,
        function=prepare_pure,
    ),
]

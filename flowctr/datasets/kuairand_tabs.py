"""KuaiRand-Pure for scenario models, in the protocol of AutoIFS: standard and random logs, three scenarios, no history.

One row is one exposure of tab 0, 1 or 4, which is its scenario, with the labels is_click and long_view and 89 fields:
27 categories and 4 bucketised numbers of the user, 4 and 53 of the video, and tab. A number v becomes the bucket
floor(ln(v)^2) if v > 2, else v without its fraction; what is missing is 0. Full duplicates of the logs stay, and the
split is random by row. Known leak: the 50 statistics of a video are means over the whole month, test rows included.

Differs from the paper: numpy's generator draws the split, so that its sizes are the same but not its rows.

Source: AutoIFS, arXiv 2512.13396; KuaiRand, Gao et al., CIKM 2022, https://kuairand.com, CC BY-SA 4.0; the tables carry
the same licence.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl
from flowctr.datasets.base import SPLITS, Dataset, random_split, written_together
from flowctr.datasets.kuairand import (
    LICENCE,
    PURE_DOWNLOAD,
    TABS,
    USER_CATEGORIES,
    USER_COUNTS,
    find_files,
    read_log,
    read_table,
    token,
)

FILES = (
    "log_standard_4_08_to_4_21_pure.csv",
    "log_standard_4_22_to_5_08_pure.csv",
    "log_random_4_22_to_5_08_pure.csv",
    "user_features_pure.csv",
    "video_features_basic_pure.csv",
    "video_features_statistic_pure.csv",
)
SEED = 2021
LABELS = ("is_click", "long_view")
IDS = ("user_id", "video_id", "tab")
VIDEO_CATEGORIES = ("video_type", "upload_type", "music_type")
VIDEO_SIZES = ("video_duration", "server_width", "server_height")
VIDEO_STATISTICS = tuple(
    "show_cnt show_user_num play_cnt play_user_num play_duration complete_play_cnt complete_play_user_num "
    "valid_play_cnt valid_play_user_num long_time_play_cnt long_time_play_user_num short_time_play_cnt "
    "short_time_play_user_num play_progress comment_stay_duration like_cnt like_user_num click_like_cnt "
    "double_click_cnt cancel_like_cnt cancel_like_user_num comment_cnt comment_user_num direct_comment_cnt "
    "reply_comment_cnt delete_comment_cnt delete_comment_user_num comment_like_cnt comment_like_user_num follow_cnt "
    "follow_user_num cancel_follow_cnt cancel_follow_user_num share_cnt share_user_num download_cnt download_user_num "
    "report_cnt report_user_num reduce_similar_cnt reduce_similar_user_num collect_cnt collect_user_num "
    "cancel_collect_cnt cancel_collect_user_num direct_comment_user_num reply_comment_user_num share_all_cnt "
    "share_all_user_num outsite_share_all_cnt".split()
)


def prepare_pure_tabs(raw: Path, out: Path) -> list[Path]:
    """Writes the tables of protocol kuairand_pure_tabs.

    Args:
        raw: The folder with the two standard logs, the random log, the user and the two video files, each as csv or
            parquet.
        out: The folder to write train.parquet, valid.parquet and test.parquet to.

    Returns:
        The three paths.
    """
    *log_paths, user_path, video_path, statistics_path = find_files(raw, FILES, PURE_DOWNLOAD)
    log = read_log(log_paths, ("time_ms", *IDS, *LABELS))
    splits = random_split(log.filter(pl.col("tab").is_in(TABS)), SEED)
    users = _read_features(user_path, "user_id", USER_CATEGORIES, USER_COUNTS)
    videos = _read_features(video_path, "video_id", VIDEO_CATEGORIES, VIDEO_SIZES)
    statistics = _read_features(statistics_path, "video_id", (), VIDEO_STATISTICS)
    statistics = statistics.rename({"follow_user_num": "video_follow_user_num"})  # users have a follow_user_num too
    paths = [out / f"{split}.parquet" for split in SPLITS]
    with written_together(paths) as temporary:
        for path, rows in zip(temporary, splits, strict=True):
            table = rows.lazy().drop("time_ms")
            for features, key in ((users, "user_id"), (videos, "video_id"), (statistics, "video_id")):
                table = table.join(features.lazy(), on=key, how="left", maintain_order="left")
            table = table.with_columns(pl.col(LABELS).cast(pl.Float32), pl.col(IDS).cast(pl.String))
            # In a stream: the finished rows are much larger than the log.
            table.with_columns(pl.col(pl.String).fill_null("0"), pl.col(pl.Int32).fill_null(0)).sink_parquet(
                path, compression="zstd"
            )
    return paths


def _read_features(path: Path, key: str, categories: tuple[str, ...], numbers: tuple[str, ...]) -> pl.DataFrame:
    """Returns the categories of a user or video file as tokens and its numbers as buckets."""
    schema = {key: pl.Int64, **dict.fromkeys(categories), **dict.fromkeys(numbers, pl.Float64)}
    table = read_table(path, schema, key)
    try:
        return table.select(key, *(token(table[name], "0") for name in categories), *map(_bucket, numbers))
    except pl.exceptions.InvalidOperationError as error:  # infinity
        raise ValueError(f"{path}: a number has no bucket; {str(error).splitlines()[0]}; correct the file") from error


def _bucket(column: str) -> pl.Expr:
    """Returns floor(ln(v)^2) of a number v > 2, else v without its fraction; 0 for a missing one."""
    number = pl.col(column).fill_nan(None).fill_null(0.0)
    return pl.when(number > 2).then(number.log().pow(2).floor()).otherwise(number).cast(pl.Int32)


DATASETS = [
    Dataset(
        id="kuairand_pure_tabs",
        description="KuaiRand-Pure, standard and random logs, exposures of the scenarios tab 0, 1 and 4 without "
        "histories, random 80/10/10 by row as in AutoIFS; tasks is_click, long_view. The videos' statistics cover the "
        "test rows too.",
        download=PURE_DOWNLOAD,
        licence=LICENCE,
        files=FILES,
        function=prepare_pure_tabs,
    ),
]

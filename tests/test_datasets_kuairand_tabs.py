"""KuaiRand tables without histories: fields and buckets against a loop over the raw files."""

import csv
import hashlib
import math
from pathlib import Path

import polars as pl
import pytest
from flowctr.datasets import prepare
from flowctr.datasets.kuairand_tabs import FILES, VIDEO_STATISTICS
from raw_files import PURE_DAYS, kuairand_log, write_pure_tabs

NUMBERS = ["follow_user_num", "fans_user_num", "friend_user_num", "register_days"]
NUMBERS += ["video_duration", "server_width", "server_height", *VIDEO_STATISTICS]
IDS = ["user_id", "video_id", "tab"]
UNUSED = {"user_id", "video_id", "author_id", "upload_dt", "visible_status", "music_id", "tag", "counts"}


def write(raw: Path, shuffle: int | None = None) -> Path:
    logs = [kuairand_log(0, PURE_DAYS), kuairand_log(1, PURE_DAYS).with_columns(is_rand=1)]
    if shuffle is not None:
        logs = [log.sample(fraction=1, shuffle=True, seed=shuffle) for log in logs]
    return write_pure_tabs(raw, *logs)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def bucket(text: str) -> int:
    value = float(text or 0)
    return math.floor(math.log(value) ** 2) if value > 2 else int(value)


def reference(raw: Path) -> list[dict]:
    """Builds the 89 fields and two labels of every exposure in a plain loop."""
    users = {row["user_id"]: row for row in rows_of(raw / FILES[3])}
    videos = {row["video_id"]: row for row in rows_of(raw / FILES[4])}
    statistics = {row["video_id"]: row for row in rows_of(raw / FILES[5])}
    table = []
    for exposure in (row for name in FILES[:3] for row in rows_of(raw / name)):
        if exposure["tab"] not in ("0", "1", "4"):
            continue
        row = {label: float(exposure[label]) for label in ("is_click", "long_view")} | {n: exposure[n] for n in IDS}
        for source, key in ((users, "user_id"), (videos, "video_id"), (statistics, "video_id")):
            names = [name for name in next(iter(source.values())) if name not in UNUSED]
            for name in names:
                text = source.get(exposure[key], {}).get(name) or "0"
                to = "video_follow_user_num" if source is statistics and name == "follow_user_num" else name
                row[to] = bucket(text) if name in NUMBERS else text.removesuffix(".0")
        table.append(row)
    return table


def test_fields_labels_and_buckets_equal_a_loop_over_the_raw_files(tmp_path):
    raw = write(tmp_path / "raw")
    paths = prepare("kuairand_pure_tabs", raw, tmp_path / "out")
    tables = [pl.read_parquet(path) for path in paths]
    table, expected = pl.concat(tables), pl.DataFrame(reference(raw))
    assert len(table.columns) == 89 + 2 and set(table.columns) == set(expected.columns)
    expected = expected.select(table.columns).cast(dict(table.schema))
    assert table.sort(table.columns).equals(expected.sort(table.columns))
    assert table.is_duplicated().any()  # full duplicates stay
    assert len(tables[0]) == round(0.8 * len(table)) and abs(len(tables[1]) - len(tables[2])) <= 1
    # Users, videos and statistics that are missing, one missing value, and each branch of the bucket are there.
    assert {"6"} <= set(table["user_id"]) and {"111"} <= set(table["video_id"])
    assert table.filter(pl.col("video_id") == "110")["play_cnt"].unique().to_list() == [0]
    assert {0, 1} < set(table["friend_user_num"]) and table["play_duration"].max() > 100


def test_row_order_of_the_logs_changes_no_byte(tmp_path):
    digests = []
    for seed in (None, 0, 1):
        paths = prepare("kuairand_pure_tabs", write(tmp_path / f"raw{seed}", seed), tmp_path / f"out{seed}")
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in paths])
    assert digests[0] == digests[1] == digests[2]


@pytest.mark.parametrize(
    "name, old, new, message",
    [
        (FILES[5], "share_all_cnt", "share_cnt_all", r"statistic_pure\.csv lacks the columns \['share_all_cnt'\]"),
        (FILES[5], "\n110,", "\n109,", r"statistic_pure\.csv: video_id 109 occurs in more than one row"),
        (
            FILES[3],
            ",0,0,0,10",
            ",inf,0,0,10",
            r"user_features_pure\.csv: a number has no bucket; .*follow_user_num.*inf",
        ),
        (FILES[2], "\n", "\nx", r"log_random_4_22_to_5_08_pure\.csv cannot be read: .*user_id"),
    ],
)
def test_a_damaged_raw_file_is_named(tmp_path, name, old, new, message):
    raw = write(tmp_path / "raw")
    text = (raw / name).read_text()
    assert old in text
    (raw / name).write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        prepare("kuairand_pure_tabs", raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_random_log_is_named_with_its_download(tmp_path):
    raw = write(tmp_path / "raw")
    (raw / FILES[2]).unlink()
    with pytest.raises(FileNotFoundError, match=r"no log_random_4_22_to_5_08_pure\.csv .*https://zenodo\.org"):
        prepare("kuairand_pure_tabs", raw, tmp_path / "out")

"""KuaiRand tables: histories against a loop over the exposures, no future, the stated protocols."""

import hashlib
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from flowctr.data.files import locked
from flowctr.datasets import prepare
from flowctr.datasets.kuairand import BEHAVIORS, MAX_EVENTS, WINDOW_FILES, log2_bucket, split_days
from raw_files import PURE_DAYS, WINDOW_DAYS, kuairand_history, kuairand_log, write_pure, write_window

EMBEDDED = Path(__file__).parent.parent / "data" / "kuairand_pure_window"


def read(paths: list[Path]) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(path) for path in paths])


def reference(log: pl.DataFrame, history: dict[int, dict], authors: dict, tags: dict) -> list[dict]:
    """Builds the history columns of every exposure in a plain loop over exposures and events."""
    exposures = sorted(log.unique().iter_rows(named=True), key=lambda row: (row["time_ms"], *row.values()))
    rows = []
    for exposure in exposures:
        user, now = exposure["user_id"], exposure["time_ms"]
        past = history.get(user)
        columns = {"time_ms": now, "user_id": str(user), "video_id": str(exposure["video_id"])}
        for name, (flag, column) in BEHAVIORS.items():
            events = []
            if past and past["last_time_ms"] < now:
                events = [(video, None) for video in past[column]]
                if name == "watch":
                    events[-1] = (events[-1][0], past["last_time_ms"])
            events += [
                (event["video_id"], event["time_ms"])
                for event in exposures
                if event["user_id"] == user
                and event["time_ms"] < now
                and (flag is None or event[flag] == 1)
                and not (past and event["time_ms"] <= past["last_time_ms"])  # the file has it already
            ]
            events = events[-MAX_EVENTS:]
            columns |= {
                f"{name}_video": "^".join(str(video) for video, _ in events),
                f"{name}_author": "^".join(str(authors.get(video) or "unknown") for video, _ in events),
                f"{name}_tag": "^".join(tags.get(video) or "unknown" for video, _ in events),
                f"{name}_gap": "^".join(
                    "unknown" if time is None else str((1 + (now - time) // 1000).bit_length() - 1)
                    for _, time in events
                ),
            }
        rows.append(columns)
    return rows


def videos_of(raw: Path) -> tuple[dict, dict]:
    videos = pl.read_csv(raw / "video_features_basic_pure.csv", schema_overrides={"tag": pl.String})
    return dict(videos.select("video_id", "author_id").iter_rows()), dict(videos.select("video_id", "tag").iter_rows())


@pytest.mark.parametrize("seed", [0, 1])
def test_window_histories_equal_a_loop_over_exposures(tmp_path, seed):
    log = kuairand_log(seed, WINDOW_DAYS)
    raw = write_window(tmp_path / "raw", log)
    table = read(prepare("kuairand_pure_window", raw, tmp_path / "out"))
    history = {row["user_id"]: row for row in kuairand_history(log).iter_rows(named=True)}
    expected = pl.DataFrame(reference(log, history, *videos_of(raw)))
    # Splits go by date, so only the order inside a split is by time.
    keys = [*expected.columns]
    assert table.select(keys).sort(keys).equals(expected.sort(keys))
    lengths = expected["watch_video"].str.split("^").list.len()
    assert lengths.max() == MAX_EVENTS and (expected["watch_video"] == "").any()  # both ends are exercised


def test_official_layout_equals_a_loop_over_exposures(tmp_path):
    log = kuairand_log(3, PURE_DAYS)
    raw = write_pure(tmp_path / "raw", log)
    paths = prepare("kuairand_pure", raw, tmp_path / "out")
    expected = pl.DataFrame(reference(log, {}, *videos_of(raw)))
    keys = [*expected.columns]
    assert read(paths).select(keys).sort(keys).equals(expected.sort(keys))
    days = [sorted(pl.read_parquet(path)["date"].unique()) for path in paths]
    assert days == [PURE_DAYS[:8], PURE_DAYS[8:9], PURE_DAYS[9:]]


def test_features_labels_and_clock(tmp_path):
    log = kuairand_log(0, WINDOW_DAYS)
    table = read(prepare("kuairand_pure_window", write_window(tmp_path / "raw", log), tmp_path / "out"))
    known = table.filter((pl.col("user_id") == "4") & (pl.col("video_id") == "103")).row(0, named=True)
    assert known["onehot_feat4"] == "1" and known["user_active_degree"] == "b" and known["author_id"] == "721"
    assert known["tag"] == "39,68" and known["music_type"] == "9"
    assert known["video_duration"] == "3" and known["log_video_duration"] == pytest.approx(np.log1p(8000))
    assert known["log_follow_user_num"] == pytest.approx(np.log1p(999))
    clock = datetime.fromtimestamp(known["time_ms"] / 1000, timezone(timedelta(hours=8)))
    assert (known["hour"], known["weekday"]) == (str(clock.hour), str(clock.isoweekday()))
    missing = table.filter((pl.col("user_id") == "6") & (pl.col("video_id") == "111")).row(0, named=True)
    assert {missing[name] for name in ("user_active_degree", "onehot_feat4", "author_id", "tag")} == {"unknown"}
    assert missing["log_register_days"] == 0 and missing["video_duration"] == "unknown"
    labels = ["is_click", "is_like", "long_view"]
    assert table.select(pl.col(labels).sum()).row(0) == log.unique().select(pl.col(labels).sum()).row(0)
    assert table.null_count().sum_horizontal()[0] == 0


@pytest.mark.parametrize("dataset_id", ["kuairand_pure_window", "kuairand_pure"])
def test_row_order_of_the_log_changes_no_byte(tmp_path, dataset_id):
    days, write = (WINDOW_DAYS, write_window) if "window" in dataset_id else (PURE_DAYS, write_pure)
    log = kuairand_log(5, days)
    digests = []
    for seed in (None, 0, 1):
        shuffled = log if seed is None else log.sample(fraction=1, shuffle=True, seed=seed)
        paths = prepare(dataset_id, write(tmp_path / f"raw{seed}", shuffled), tmp_path / f"out{seed}")
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in paths])
        assert all(pl.read_parquet(path)["time_ms"].is_sorted() for path in paths)
    assert digests[0] == digests[1] == digests[2]


def test_csv_and_parquet_give_the_same_tables(tmp_path):
    log = kuairand_log(2, WINDOW_DAYS)
    tables = []
    for suffix in (".csv", ".parquet"):
        raw = write_window(tmp_path / f"raw{suffix}", log, suffix)
        tables.append(read(prepare("kuairand_pure_window", raw, tmp_path / f"out{suffix}")))
    assert tables[0].equals(tables[1])


def test_tabs_keeps_rows_of_three_scenarios_with_histories_of_all(tmp_path):
    raw = write_window(tmp_path / "raw", kuairand_log(1, WINDOW_DAYS))
    whole = read(prepare("kuairand_pure_window", raw, tmp_path / "whole"))
    tabs = read(prepare("kuairand_pure_window_tabs", raw, tmp_path / "tabs"))
    assert tabs.equals(whole.filter(pl.col("tab").is_in(["0", "1", "4"])))


def test_log2_bucket_is_exact_at_its_edges():
    seconds = np.array([0, 1, 2, 3, 6, 7, 2**20 - 2, 2**20 - 1, 2**40 - 2, 2**40 - 1])
    assert log2_bucket(seconds * 1000).tolist() == [0, 1, 1, 2, 2, 3, 19, 20, 39, 40]
    assert log2_bucket(np.array([0, 999, 1000])).tolist() == [0, 0, 1]


def test_split_days_are_the_boundaries_nearest_to_80_and_90_percent():
    even = pl.Series(np.repeat(np.arange(20220401, 20220421), 7))
    assert split_days(even) == (20220417, 20220419)
    front_loaded = pl.Series(np.repeat([1, 2, 3, 4, 5, 6], [40, 38, 6, 6, 5, 5]))
    assert split_days(front_loaded) == (3, 5)  # 78 % lie before day 3, 90 % before day 5
    assert split_days(pl.Series([1] * 98 + [2, 3])) == (2, 3)
    with pytest.raises(ValueError, match=r"at least 3 days of log; got 2"):
        split_days(pl.Series([20220408, 20220409]))


def test_a_missing_raw_file_is_named_with_its_download(tmp_path):
    raw = write_window(tmp_path / "raw", kuairand_log(0, WINDOW_DAYS))
    (raw / "user_features_pure.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"no user_features_pure\.csv or user_features_pure\.parquet in .*raw"):
        prepare("kuairand_pure_window", raw, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"log_standard_4_08_to_4_21_pure\.csv.*https://zenodo\.org"):
        prepare("kuairand_pure", raw, tmp_path / "out")


def test_a_missing_column_is_named(tmp_path):
    raw = write_window(tmp_path / "raw", kuairand_log(0, WINDOW_DAYS).drop("long_view"))
    with pytest.raises(ValueError, match=r"log_standard_4_25_to_5_08_pure\.csv lacks the columns \['long_view'\]"):
        prepare("kuairand_pure_window", raw, tmp_path / "out")


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def change_line(path: Path, line: int, old: str, new: str) -> None:
    lines = path.read_text().splitlines()
    assert re.search(old, lines[line - 1])
    lines[line - 1] = re.sub(old, new, lines[line - 1], count=1)
    path.write_text("\n".join(lines) + "\n")


LOG, HISTORY, USERS, VIDEOS = WINDOW_FILES


@pytest.mark.parametrize(
    "name, damage, message",
    [
        (LOG, lambda path: change_line(path, 7, r"^\d+", "abc"), r"log_\S+ cannot be read: .*'user_id'.*\"abc\""),
        (LOG, lambda path: change_line(path, 7, r",\d+,", ",,"), r"log_\S+: column 'video_id' is empty in row 6"),
        (LOG, lambda path: change_line(path, 9, r",\d+$", ","), r"log_\S+: column 'tab' is empty in row 8"),
        (LOG, lambda path: cut(path, -20), r"log_\S+: cut off in line 521: it has \d+ of 19 fields"),
        (LOG, lambda path: path.write_text(""), r"log_\S+ cannot be read: empty"),
        (USERS, lambda path: change_line(path, 3, "^1,", "2,"), r"user_features_pure\.csv: user_id 2 occurs in more"),
        (USERS, lambda path: change_line(path, 3, "^1,", "x,"), r"user_features_pure\.csv cannot be read: .*'user_id'"),
        (VIDEOS, lambda path: change_line(path, 3, "^101,", "100,"), r"video_features_\S+: video_id 100 occurs in"),
        (VIDEOS, lambda path: cut(path, -20), r"video_features_\S+: cut off in line 12: it has \d+ of 12 fields"),
        (HISTORY, lambda path: cut(path, -20), r"user_history_until_4_24\.parquet cannot be read: "),
        (HISTORY, lambda path: pl.concat([pl.read_parquet(path)] * 2).write_parquet(path), "user_id 3 occurs in more"),
    ],
)
def test_a_damaged_raw_file_is_named(tmp_path, name, damage, message):
    raw = write_window(tmp_path / "raw", kuairand_log(0, WINDOW_DAYS))
    damage(raw / name)
    with pytest.raises(ValueError, match=message):
        prepare("kuairand_pure_window", raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()


FULL_DISK_PREPARE = """
import resource, sys
from pathlib import Path
from flowctr.datasets import prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))  # a write beyond this fails as on a full disk
prepare("kuairand_pure_window", Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_full_disk_is_one_error_and_leaves_the_old_tables(tmp_path):
    raw, out = write_window(tmp_path / "raw", kuairand_log(0, WINDOW_DAYS)), tmp_path / "out"
    before = {path.name: path.read_bytes() for path in prepare("kuairand_pure_window", raw, out)}
    child = subprocess.run([sys.executable, "-c", FULL_DISK_PREPARE, raw, out], capture_output=True, text=True)
    assert "OSError: [Errno 27] no space left for train.parquet, " in child.stderr.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_temporary_files_of_killed_processes_are_removed_but_not_those_of_running_ones(tmp_path):
    raw, out = write_window(tmp_path / "raw", kuairand_log(0, WINDOW_DAYS)), tmp_path / "out"
    out.mkdir()
    stale, other = out / ".train.parquet.4242.tmp", out / ".notes.tmp"
    stale.touch()
    other.touch()
    with ThreadPoolExecutor(1) as pool:
        with locked(out):  # as the running one does
            prepared = pool.submit(prepare, "kuairand_pure_window", raw, out)
            with pytest.raises(FutureTimeoutError):
                prepared.result(timeout=0.5)
            assert sorted(out.iterdir()) == sorted([stale, other])
        paths = prepared.result(timeout=60)
    assert sorted(out.iterdir()) == sorted([other, *paths])


def test_a_split_without_rows_is_an_error_and_leaves_the_old_tables(tmp_path):
    log = kuairand_log(0, WINDOW_DAYS)
    paths = prepare("kuairand_pure_window", write_window(tmp_path / "raw", log), tmp_path / "out")
    before = [path.read_bytes() for path in paths]
    raw = write_window(tmp_path / "raw2", log.filter(pl.col("date") < 20220507))
    with pytest.raises(ValueError, match="no exposure for test"):
        prepare("kuairand_pure_window", raw, tmp_path / "out")
    assert [path.read_bytes() for path in paths] == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "test.parquet",
        "train.parquet",
        "valid.parquet",
    ]


# The embedded data.


@pytest.fixture(scope="module")
def window(tmp_path_factory) -> dict[str, pl.DataFrame]:
    paths = prepare("kuairand_pure_window", EMBEDDED, tmp_path_factory.mktemp("kuairand_pure_window"))
    return {path.stem: pl.read_parquet(path) for path in paths}


@pytest.fixture(scope="module")
def log() -> pl.DataFrame:
    return pl.read_parquet(EMBEDDED / "log_standard_4_25_to_5_08_pure.parquet").unique()


def test_embedded_files_are_those_of_the_readme_and_small():
    lines = (EMBEDDED / "README.md").read_text().split("## sha256")[1].split("```")[1].split("\n")
    stated = dict(reversed(line.split()) for line in lines if line)
    files = [path for path in EMBEDDED.iterdir() if path.name != "README.md"]
    assert stated == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert len(stated) == 5 and sum(path.stat().st_size for path in files) <= 10e6


def test_embedded_protocol(window, log):
    assert {split: len(table) for split, table in window.items()} == {"train": 167281, "valid": 26683, "test": 28905}
    days = {split: (table["date"].min(), table["date"].max()) for split, table in window.items()}
    assert days == {"train": (20220425, 20220504), "valid": (20220505, 20220506), "test": (20220507, 20220508)}
    labels = ["is_click", "is_like", "long_view"]
    for split, table in window.items():
        rows = log.filter(pl.col("date").is_between(*days[split]))
        assert table.select(pl.col(labels).mean()).row(0) == pytest.approx(rows.select(pl.col(labels).mean()).row(0))
    whole = pl.concat(window.values())
    assert whole.select(pl.col(labels).mean()).row(0) == pytest.approx((0.449008, 0.017382, 0.316428), abs=1e-6)
    assert whole["user_id"].n_unique() == 25156 and whole["video_id"].n_unique() == 6361


def test_nothing_known_after_the_exposure_is_a_column(window):
    later = {"is_follow", "is_comment", "is_forward", "is_hate", "play_time_ms", "duration_ms", "profile_stay_time"}
    later |= {"comment_stay_time", "is_profile_enter"}
    assert later.isdisjoint(window["train"].columns)


@pytest.mark.parametrize("name", BEHAVIORS)
def test_embedded_histories_hold_exactly_the_last_events_before_each_exposure(window, log, name):
    """Joins every exposure with all events of its user and keeps those before it: the definition, for every row."""
    flag, column = BEHAVIORS[name]
    history = pl.read_parquet(EMBEDDED / "user_history_until_4_24.parquet")
    old = history.select("user_id", pl.col("last_time_ms").alias("until"), pl.col(column).alias("video"))
    old = old.explode("video", empty_as_null=False)
    if name == "watch":  # the file's time is that of its last exposure
        old = old.with_columns(time_ms=pl.when(pl.col("user_id").is_last_distinct()).then("until"))
    new = (log if flag is None else log.filter(pl.col(flag) == 1)).sort("time_ms", *log.columns)
    new = new.select("user_id", pl.col("time_ms").alias("until"), pl.col("video_id").alias("video"), "time_ms")
    new = new.join(history.select("user_id", "last_time_ms"), on="user_id", how="left", maintain_order="left")
    new = new.filter((pl.col("until") > pl.col("last_time_ms")).fill_null(True)).drop("last_time_ms")
    events = pl.concat([old, new], how="diagonal").rename({"time_ms": "event_ms"})

    table = pl.concat(window.values()).with_row_index("row")
    exposures = table.select("row", pl.col("user_id").cast(pl.Int64), "time_ms")
    expected = (
        exposures.join(events, on="user_id", maintain_order="left_right")
        .filter(pl.col("until") < pl.col("time_ms"))
        .group_by("row", maintain_order=True)
        .agg(
            pl.col("video").tail(MAX_EVENTS).cast(pl.String).str.join("^"),
            ((pl.col("time_ms") - pl.col("event_ms")).tail(MAX_EVENTS) // 1000 + 1).log(2).floor().alias("gap"),
        )
    )
    expected = exposures.join(expected, on="row", how="left", maintain_order="left")
    assert (expected["video"].fill_null("") == table[f"{name}_video"]).all()

    gaps = table[f"{name}_gap"].replace("", None).str.split("^")
    assert gaps.list.eval(pl.element().replace("unknown", None).cast(pl.Float64)).equals(expected["gap"])


def test_an_exposure_that_the_history_file_ends_with_does_not_see_itself(window, log):
    history = pl.read_parquet(EMBEDDED / "user_history_until_4_24.parquet")
    same = log.join(history, left_on=["user_id", "time_ms"], right_on=["user_id", "last_time_ms"])
    assert len(same) == 3 and (same["video_id"] == same["watch_seq"].list.last()).all()
    rows = pl.concat(window.values()).join(
        same.select(pl.col("user_id", "video_id").cast(pl.String), "time_ms"), on=["user_id", "video_id", "time_ms"]
    )
    assert len(rows) == 3 and set(rows["watch_video"]) == {""}


def test_embedded_histories_are_aligned(window):
    for table in window.values():
        for name in BEHAVIORS:
            steps = table.select(pl.col(f"^{name}_(video|author|tag|gap)$").str.count_matches("^", literal=True))
            assert steps.width == 4 and all(column.equals(steps.to_series()) for column in steps)
            assert not any(table[column].str.contains(r"^\^|\^\^|\^$").any() for column in steps.columns)

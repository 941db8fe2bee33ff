"""Small raw files in the published layouts, for the tests of flowctr.datasets."""

import json
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import polars as pl
from flowctr.datasets.kuairand import PURE_FILES, USER_CATEGORIES, VIDEO_CATEGORIES, WINDOW_FILES
from flowctr.datasets.kuairand_tabs import FILES as PURE_TABS_FILES
from flowctr.datasets.kuairand_tabs import VIDEO_STATISTICS

WINDOW_DAYS = [20220425, 20220428, 20220504, 20220505, 20220506, 20220507, 20220508]
PURE_DAYS = [20220408 + day for day in range(10)]


def kuairand_log(seed: int, days: list[int], rows: int = 500) -> pl.DataFrame:
    """Makes a log of 7 users (two are busy), 12 videos and few distinct times: many ties and some full duplicates."""
    rng = np.random.default_rng(seed)
    day = rng.integers(len(days), size=rows)
    log = pl.DataFrame(
        {
            "user_id": rng.choice(7, size=rows, p=[0.3, 0.3, 0.1, 0.1, 0.1, 0.05, 0.05]),
            "video_id": rng.integers(100, 112, size=rows),
            "date": np.array(days)[day],
            "hourmin": 100 * rng.integers(24, size=rows),
            # 5 s apart, and the tie of a clock that is exact to the ms
            "time_ms": 1_650_815_000_000 + 86_400_000 * day + 5_000 * rng.integers(40, size=rows) ** 2,
            "is_click": rng.integers(2, size=rows),
            "is_like": (rng.random(rows) < 0.1).astype(int),
            **{name: rng.integers(2, size=rows) for name in ("is_follow", "is_comment", "is_forward", "is_hate")},
            "long_view": rng.integers(2, size=rows),
            "play_time_ms": rng.integers(60_000, size=rows),
            "duration_ms": rng.integers(60_000, size=rows),
            **{name: 0 * day for name in ("profile_stay_time", "comment_stay_time", "is_profile_enter", "is_rand")},
            "tab": rng.integers(6, size=rows),
        }
    )
    return pl.concat([log, log.sample(20, seed=seed)])


def kuairand_users() -> pl.DataFrame:
    """User 6 has no features; a float column has a missing value, as in the published file."""
    columns = {name: ["a", "b", "c", "a", "b", "c"] for name in USER_CATEGORIES}
    counts = {f"{count}_num": [0, 1, 9, 99, 999, 5] for count in ("follow_user", "fans_user", "friend_user")}
    columns |= {"onehot_feat4": [1.0, None, 3.0, 0.0, 1.0, 2.0], "onehot_feat0": [0, 1, 0, 1, 0, 1]}
    return pl.DataFrame({"user_id": range(6)} | columns | counts | {"register_days": [10, 20, 30, 40, 50, 60]})


def kuairand_videos() -> pl.DataFrame:
    """Video 111 has no features, 110 neither tag nor duration."""
    ids = range(100, 111)
    columns = {name: [f"{name}{i % 4}" for i in ids] for name in VIDEO_CATEGORIES}
    columns |= {"author_id": [7 * i for i in ids], "music_type": [9.0] * 10 + [None]}
    columns |= {"server_width": [360.0 * (i % 5) for i in ids], "server_height": [1280.0 + i % 7 for i in ids]}
    columns |= {"tag": ["39", "39,68"] * 5 + [None], "video_duration": [1000.0 * 2**i for i in range(10)] + [None]}
    return pl.DataFrame({"video_id": ids} | columns)


def kuairand_history(log: pl.DataFrame) -> pl.DataFrame:
    """User 0's file ends before the log, user 1's inside it, user 2 liked nothing, user 3 has only one event."""
    inside = int(log.filter(pl.col("user_id") == 1)["time_ms"].sort()[12])
    return pl.DataFrame(
        {
            "user_id": [3, 0, 2, 1],
            "history_len": [1, 50, 3, 2],
            "last_time_ms": [1_650_000_000_000, 1_650_810_000_000, 1_650_814_999_000, inside],
            "watch_seq": [[111], [100 + i % 12 for i in range(50)], [105, 110, 111], [101, 102]],
            "like_seq": [[111], [103, 104], [], [102]],
            "long_watch_seq": [[], [100 + i % 5 for i in range(30)], [110], []],
        }
    )


def write_window(raw: Path, log: pl.DataFrame, suffix: str = ".csv") -> Path:
    """Writes a window; `log` is written in its order."""
    raw.mkdir(parents=True, exist_ok=True)
    log_name, history_name, user_name, video_name = WINDOW_FILES
    for name, frame in ((log_name, log), (user_name, kuairand_users()), (video_name, kuairand_videos())):
        path = (raw / name).with_suffix(suffix)
        frame.write_csv(path) if suffix == ".csv" else frame.write_parquet(path)
    kuairand_history(log).write_parquet(raw / history_name)
    return raw


def write_pure(raw: Path, log: pl.DataFrame) -> Path:
    """Writes the official layout, the log cut into its two files at half of its days."""
    raw.mkdir(parents=True, exist_ok=True)
    first, second, users, videos = PURE_FILES
    middle = log["date"].unique().sort()[log["date"].n_unique() // 2]
    log.filter(pl.col("date") < middle).write_csv(raw / first)
    log.filter(pl.col("date") >= middle).write_csv(raw / second)
    kuairand_users().write_csv(raw / users)
    kuairand_videos().write_csv(raw / videos)
    return raw


def kuairand_statistics() -> pl.DataFrame:
    """Videos 109 to 112: 110 has one value missing, 112 is in no other file."""
    rng = np.random.default_rng(0)
    columns = {name: 10 ** rng.uniform(-1, 11, size=4) for name in VIDEO_STATISTICS}
    table = pl.DataFrame({"video_id": range(109, 113), "counts": [66, 1, 2, 3], **columns})
    return table.with_columns(play_cnt=pl.when(pl.col("video_id") != 110).then("play_cnt"))


def write_pure_tabs(raw: Path, standard: pl.DataFrame, random: pl.DataFrame) -> Path:
    """Writes the official layout with the random log and the statistics of the videos."""
    write_pure(raw, standard)
    _, _, log_name, _, _, statistics_name = PURE_TABS_FILES
    random.write_csv(raw / log_name)
    kuairand_statistics().write_csv(raw / statistics_name)
    return raw


MOVIES = {
    3: "Jumanji (1995)::Adventure|Children's|Fantasy",
    20: "Misérables, Les (1995)::Drama|Musical",  # one byte per letter in latin-1
    100: "Star Wars: Episode IV (1977)::Sci-Fi",
    2000: "Nobody rated this (2000)::Horror",
}
MOVIELENS_USERS = {
    1: "F::1::10::48067",
    2: "M::56::16::70072-1234",
    4: "M::25::7::02460",
    5: "F::18::4::55117",
    30: "M::35::20::90210",
    31: "F::45::0::00001",
    32: "M::50::9::98107",
}


def movielens_ratings(seed: int = 0) -> list[str]:
    """Makes one line for each user and rated movie, in random order."""
    rng = np.random.default_rng(seed)
    pairs = rng.permutation([(user, movie) for user in MOVIELENS_USERS for movie in MOVIES if movie != 2000])
    return [f"{user}::{movie}::{(user + movie) % 5 + 1}::{978300760 + user}" for user, movie in pairs]


def write_movielens(raw: Path, ratings: list[str], layout: str = ".") -> Path:
    """Writes the published layout to a folder of `raw`, or packed if `layout` is "ml-1m.zip"."""
    files = {
        "ratings.dat": ratings,
        "users.dat": [f"{user}::{rest}" for user, rest in MOVIELENS_USERS.items()],
        "movies.dat": [f"{movie}::{rest}" for movie, rest in MOVIES.items()],
    }
    content = {name: "".join(f"{line}\n" for line in lines).encode("latin-1") for name, lines in files.items()}
    raw.mkdir(parents=True, exist_ok=True)
    if layout.endswith(".zip"):
        with ZipFile(raw / layout, "w", ZIP_DEFLATED) as packed:
            for name, text in content.items():
                packed.writestr(f"ml-1m/{name}", text)
    else:
        (raw / layout).mkdir(exist_ok=True)
        for name, text in content.items():
            (raw / layout / name).write_bytes(text)
    return raw


AMAZON_SEQUENCES = {1: "a b c d e", 2: "c a b f g h a", 7: "b d", 9: "h", 12: "f e d"}
AMAZON_ATTRIBUTES = {"a": [5, 7], "b": [7], "c": [], "d": [1, 2, 3], "e": [5], "f": [9, 5]}  # g and h: none


def write_amazon(raw: Path, category: str = "Sports_and_Outdoors") -> Path:
    """Writes per-user sequences and attributes in S3-Rec's layout."""
    raw.mkdir(parents=True, exist_ok=True)
    (raw / f"{category}.txt").write_text("".join(f"{u} {s}\n" for u, s in AMAZON_SEQUENCES.items()))
    (raw / f"{category}_item2attributes.json").write_text(json.dumps(AMAZON_ATTRIBUTES))
    return raw

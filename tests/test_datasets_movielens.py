"""MovieLens-1M tables: every value against the raw lines, the split, the layouts, damaged files."""

import hashlib

import polars as pl
import pytest
from flowctr.datasets import prepare
from flowctr.datasets.base import random_split
from raw_files import MOVIELENS_USERS, MOVIES, movielens_ratings, write_movielens

AGE_GROUPS = [{"1", "18"}, {"25"}, {"35", "45", "50", "56"}]


def test_every_rating_becomes_one_row_with_its_user_and_movie(tmp_path):
    ratings = movielens_ratings()
    paths = prepare("movielens_1m", write_movielens(tmp_path / "raw", ratings), tmp_path / "out")
    assert [path.name for path in paths] == ["train.parquet", "valid.parquet", "test.parquet"]
    table = pl.concat([pl.read_parquet(path) for path in paths])
    expected = []
    for line in ratings:
        user, movie, stars, _ = line.split("::")
        gender, age, occupation, code = MOVIELENS_USERS[int(user)].split("::")
        expected.append(
            {
                "click": float(int(stars) > 3),
                "like": float(int(stars) > 4),
                "user_id": user,
                "movie_id": movie,
                "gender": gender,
                "age": age,
                "occupation": occupation,
                "zip": code,
                "genre": MOVIES[int(movie)].split("::")[1].split("|")[0],
                "scenario": str(next(i for i, ages in enumerate(AGE_GROUPS) if age in ages)),
            }
        )
    expected = pl.DataFrame(expected, schema=table.schema)
    assert table.sort(table.columns).equals(expected.sort(table.columns))
    assert expected["scenario"].n_unique() == 3 and 0 < expected["like"].sum() < expected["click"].sum() < len(expected)


def test_layouts_and_the_order_of_lines_change_no_byte(tmp_path):
    digests = set()
    for seed, layout in enumerate((".", "ml-1m", "ml-1m.zip")):
        raw = write_movielens(tmp_path / f"raw{seed}", movielens_ratings(seed), layout)
        paths = prepare("movielens_1m", raw, tmp_path / f"out{seed}")
        digests.add(tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths))
        assert sorted(path.name for path in raw.iterdir()) in (["ml-1m"], ["ml-1m.zip"], sorted(DAT))
    assert len(digests) == 1


def test_windows_line_ends_are_read(tmp_path):
    raw = write_movielens(tmp_path / "raw", movielens_ratings())
    plain = [path.read_bytes() for path in prepare("movielens_1m", raw, tmp_path / "out")]
    for path in raw.iterdir():
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert [path.read_bytes() for path in prepare("movielens_1m", raw, tmp_path / "out2")] == plain


@pytest.mark.parametrize(
    "rows, sizes",
    [
        (1_000_209, (800_167, 100_021, 100_021)),
        (1_005, (804, 100, 101)),  # Python and pandas round 100.5 to the even number
        (8, (6, 1, 1)),
    ],
)
def test_random_split_has_the_sizes_of_pandas_sampling(rows, sizes):
    table = pl.DataFrame({"row": range(rows)})
    parts = random_split(table, 2021)
    assert tuple(len(part) for part in parts) == sizes
    assert pl.concat(parts)["row"].sort().equals(table["row"])  # each row once
    assert all(part["row"].is_sorted() for part in parts)


@pytest.mark.parametrize("rows", [0, 3, 7])
def test_random_split_refuses_a_table_that_leaves_a_split_empty(rows):
    with pytest.raises(ValueError, match=f"needs more rows than {rows}; get the whole raw files"):
        random_split(pl.DataFrame({"row": range(rows)}), 2021)


def test_random_split_is_that_of_its_seed_and_takes_rows_from_everywhere():
    table = pl.DataFrame({"row": range(100_000)})
    parts = random_split(table, 2021)
    assert all(part.equals(again) for part, again in zip(parts, random_split(table, 2021)))
    assert not parts[2].equals(random_split(table, 2022)[2])
    for part in parts:  # the mean of 10,000 rows deviates by about 290
        assert abs(part["row"].mean() - 50_000) < 1_500


RATINGS, USERS, MOVIE_FILE = DAT = ("ratings.dat", "users.dat", "movies.dat")


@pytest.mark.parametrize(
    "name, line, message",
    [
        (
            RATINGS,
            b"1::20::5\n",
            r"ratings\.dat: lines .*published: 1, the first is line 22, '1::20::5'; get .*ml-1m\.zip",
        ),
        (RATINGS, b"\n1::20::6::9\n", r"ratings\.dat: lines .*: 2, the first is line 22, ''"),
        (RATINGS, b"1::20::3.5::9\n", r"ratings\.dat: .* line 22, '1::20::3\.5::9'"),
        (RATINGS, b"1,20,3,9\n", r"ratings\.dat: .* line 22, '1,20,3,9'"),
        (RATINGS, b"9::20::3::9\n", r"ratings\.dat in .*: line 22 has user_id 9, which users\.dat lacks; get all"),
        (RATINGS, b"1::21::3::9\n", r"ratings\.dat in .*: line 22 has movie_id 21, which movies\.dat lacks"),
        (USERS, b"40::X::25::3::1234\n", r"users\.dat: .* line 8, '40::X::25::3::1234'"),
        (USERS, b"40::F::26::3::1234\n", r"users\.dat: .* line 8, '40::F::26::3::1234'"),
        (USERS, b"4::F::25::3::1234\n", r"users\.dat in .*: user_id 4 has more than one line"),
        (MOVIE_FILE, b"7::\xc9t\xe9 (2001)::\n", r"movies\.dat: .* line 5, '7::Été \(2001\)::'"),
        (MOVIE_FILE, b"3::Twin (2001)::War\n", r"movies\.dat in .*: movie_id 3 has more than one line"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, name, line, message):
    raw = write_movielens(tmp_path / "raw", movielens_ratings())
    with (raw / name).open("ab") as file:
        file.write(line)
    with pytest.raises(ValueError, match=message):
        prepare("movielens_1m", raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_titles_may_have_colons_and_control_characters(tmp_path):
    raw = write_movielens(tmp_path / "raw", movielens_ratings())
    with (raw / MOVIE_FILE).open("ab") as file:
        file.write(b"7::a::b\x85c\x1cd::War|Drama\n")
    with (raw / RATINGS).open("ab") as file:
        file.write(b"1::7::5::9\n")
    tables = [pl.read_parquet(path) for path in prepare("movielens_1m", raw, tmp_path / "out")]
    assert pl.concat(tables).filter(pl.col("movie_id") == "7")["genre"].to_list() == ["War"]


def test_a_missing_file_is_named_with_all_places_and_its_download(tmp_path):
    raw = write_movielens(tmp_path / "raw", movielens_ratings())
    (raw / USERS).unlink()
    message = (
        r"no users\.dat in \S*raw, \S*raw/ml-1m or \S*raw/ml-1m\.zip; download it from https://files\.grouplens\.org"
    )
    with pytest.raises(FileNotFoundError, match=message):
        prepare("movielens_1m", raw, tmp_path / "out")


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_archive_is_named(tmp_path, damage):
    archive = write_movielens(tmp_path / "raw", movielens_ratings(), "ml-1m.zip") / "ml-1m.zip"
    content = archive.read_bytes()
    archive.write_bytes(content[:-30] if damage == "cut" else content[:50] + bytes(10) + content[60:])
    with pytest.raises(ValueError, match=r"ml-1m\.zip is damaged \(.*\); download it again from https://"):
        prepare("movielens_1m", archive.parent, tmp_path / "out")

"""DIN's protocol against a loop over users and steps."""

from collections import defaultdict

import polars as pl
import pytest
from flowctr.datasets import prepare
from flowctr.datasets.din_protocol import din_tables, read_categories, read_sequences
from raw_files import AMAZON_ATTRIBUTES, AMAZON_SEQUENCES, write_amazon

SEQUENCES = {user: items.split() for user, items in AMAZON_SEQUENCES.items()}


def category(item: str) -> str:
    attributes = AMAZON_ATTRIBUTES.get(item)
    return str(attributes[-1]) if attributes else "unknown"


def tables(tmp_path, dataset_id: str) -> dict[str, list[dict]]:
    paths = prepare(dataset_id, write_amazon(tmp_path / "raw"), tmp_path / dataset_id)
    return {path.stem: pl.read_parquet(path).to_dicts() for path in paths}


def positives_by_loop(holdout: bool) -> dict[str, list[dict]]:
    rows = defaultdict(list)
    for user, items in SEQUENCES.items():
        for k in range(1, len(items)):
            left = len(items) - 1 - k
            split = "test" if left == 0 else "valid" if holdout and left == 1 else "train"
            rows[split].append(
                {
                    "label": 1.0,
                    "user_id": user,
                    "item_id": items[k],
                    "cate_id": category(items[k]),
                    "item_history": "^".join(items[:k]),
                    "cate_history": "^".join(map(category, items[:k])),
                }
            )
    return rows


@pytest.mark.parametrize("holdout", [False, True])
def test_positives_equal_a_loop_and_each_is_followed_by_its_negative(tmp_path, holdout):
    made = tables(tmp_path, "amazon_sports_din_holdout" if holdout else "amazon_sports_din")
    expected = positives_by_loop(holdout)
    assert made.keys() == expected.keys()
    known = {item for items in SEQUENCES.values() for item in items}
    for split, rows in made.items():
        assert rows[::2] == expected[split]
        for positive, negative in zip(rows[::2], rows[1::2], strict=True):
            item = negative["item_id"]
            assert item in known and item not in SEQUENCES[negative["user_id"]]
            assert negative == positive | {"label": 0.0, "item_id": item, "cate_id": category(item)}


def test_the_holdout_is_cut_out_of_train_and_test_stays(tmp_path):
    plain, holdout = (tables(tmp_path, name) for name in ("amazon_sports_din", "amazon_sports_din_holdout"))
    assert holdout["test"] == plain["test"]
    assert sorted(holdout["train"] + holdout["valid"], key=str) == sorted(plain["train"], key=str)


def test_counts_follow_from_the_sequence_lengths():
    lengths = [5, 6, 9, 2, 1]
    items = [[f"{user}-{step}" for step in range(length)] for user, length in enumerate(lengths)]
    sequences = pl.DataFrame({"user_id": range(5), "items": items})
    counts = {split: len(table) for split, table in din_tables(sequences, {}, holdout=True).items()}
    # n-1 samples of two rows each: one is test where n > 1, one valid where n > 2
    assert counts == {"test": 2 * 4, "valid": 2 * 3, "train": 2 * (2 + 3 + 6)}


def test_negatives_are_uniform_over_the_items_that_the_user_never_had():
    items = [[str(i) for i in range(0, 8)] * 500, [str(i) for i in range(4, 12)]]
    sequences = pl.DataFrame({"user_id": [1, 2], "items": items})
    drawn = pl.concat(din_tables(sequences, {}).values()).filter(pl.col("label") == 0, pl.col("user_id") == 1)
    counts = dict(drawn["item_id"].value_counts().iter_rows())
    assert counts.keys() == {"8", "9", "10", "11"}
    assert all(abs(count - 1000) < 5 * (1000 * 0.75) ** 0.5 for count in counts.values())  # five standard deviations


def test_the_seed_alone_decides_the_negatives():
    items = [[str((u * 7 + i) % 50) for i in range(9)] for u in range(40)]
    sequences = pl.DataFrame({"user_id": range(40), "items": items})
    first, again, other = (din_tables(sequences, {}, seed=seed)["train"] for seed in (1, 1, 2))
    assert first.equals(again) and not first.equals(other)
    positive = pl.col("label") == 1
    assert first.filter(positive).equals(other.filter(positive))


def test_impossible_data_is_named(tmp_path):
    with pytest.raises(ValueError, match="the user in line 2 has all 3 items"):
        din_tables(pl.DataFrame({"user_id": [1, 2], "items": [["a", "b"], ["a", "b", "c"]]}), {})
    with pytest.raises(ValueError, match="no user has two items"):
        din_tables(pl.DataFrame({"user_id": [1], "items": [["a"]]}), {})
    path = tmp_path / "sequences.txt"
    path.write_text("1 a b\nx c d\n")
    with pytest.raises(ValueError, match=r"sequences\.txt.*'x'"):
        read_sequences(path)
    path.write_text("1 a b\n1 c d\n")
    with pytest.raises(ValueError, match="1 lines repeat a user"):
        read_sequences(path)


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"a": [1, 2], "b": [', r"is damaged \(.*; download it again from https://github"),
        ("[1, 2]", "is damaged: it holds a list instead of an object; download it again"),
        ('{"a": [1], "b": 5}', "the attributes of item 'b' are 5 instead of a list"),
    ],
)
def test_impossible_attributes_are_named(tmp_path, content, message):
    path = tmp_path / "item2attributes.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"item2attributes\.json:? {message}"):
        read_categories(path)


def test_another_category_is_taken_if_it_is_the_only_one(tmp_path):
    raw = write_amazon(tmp_path / "raw")
    sports = [path.read_bytes() for path in prepare("amazon_sports_din", raw, tmp_path / "sports")]
    for end in (".txt", "_item2attributes.json"):
        (raw / f"Sports_and_Outdoors{end}").rename(raw / f"Beauty{end}")
    assert [path.read_bytes() for path in prepare("amazon_sports_din", raw, tmp_path / "beauty")] == sports
    (raw / "Toys_item2attributes.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no Sports_and_Outdoors\.txt in "):
        prepare("amazon_sports_din", raw, tmp_path / "out")


def test_a_category_with_an_id_of_its_own_takes_its_files_alone(tmp_path):
    raw = write_amazon(tmp_path / "raw", "Beauty")
    beauty = prepare("amazon_beauty_din_holdout", raw, tmp_path / "beauty")
    made = {path.stem: pl.read_parquet(path).to_dicts() for path in beauty}
    assert made == tables(tmp_path / "other", "amazon_sports_din_holdout")
    with pytest.raises(FileNotFoundError, match=r"no Toys_and_Games\.txt in "):
        prepare("amazon_toys_din_holdout", raw, tmp_path / "toys")


def test_a_missing_raw_file_is_named_with_its_download(tmp_path):
    (write_amazon(tmp_path) / "Sports_and_Outdoors_item2attributes.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no Sports_and_Outdoors_item2attributes\.json in .*github\.com"):
        prepare("amazon_sports_din", tmp_path, tmp_path / "out")

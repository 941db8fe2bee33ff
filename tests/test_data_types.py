"""Types of parquet columns: equal values get equal ids, whatever they are stored as, or are refused."""

import re
from decimal import Decimal

import h5py
import numpy as np
import polars as pl
import pytest
from flowctr.data import Encoder, build_h5
from flowctr.data.encode import Processor

LABEL = {"name": "y", "active": True, "dtype": "float"}


def column(name, kind="categorical", dtype="str", **settings):
    return {"name": name, "active": True, "dtype": dtype, "type": kind, **settings}


@pytest.fixture
def build(tmp_path):
    """Builds a data set from rows, whose last column is the label, and returns the columns of each split."""

    def build(features, train, valid=None, **settings):
        paths = {}
        for split, rows in (("train", train), ("valid", valid)):
            if rows is not None:
                paths[f"{split}_data"] = str(tmp_path / f"{split}.parquet")
                pl.DataFrame({**rows, "y": [0.0, 1.0, 0.0, 1.0]}, strict=False).write_parquet(paths[f"{split}_data"])
        params = {"dataset_id": "types", "data_root": str(tmp_path / "built"), "data_format": "parquet", **paths}
        files = build_h5({**params, "feature_cols": features, "label_col": LABEL, **settings}, rebuild=True)
        columns = {}
        for split, path in files.items():
            if path:
                with h5py.File(path) as file:
                    columns[split] = {name: file[name][:] for name in file}
        return columns

    return build


def test_a_null_in_a_list_is_an_empty_step(build):
    rows = {
        "item": ["a", "b", "c", "a"],
        "watched": [["a", None, "c"], ["b"], [], ["c"]],
        "place": [["x", "y", "z"], ["y"], [], ["z"]],
    }
    features = [column("item"), column("watched", "sequence", share_embedding="item"), column("place", "sequence")]
    found = build(features, rows, behaviors={"watch": ["watched", "place"]})["train"]
    a, b, c, _ = found["item"]
    x, y, z = found["place"][0]
    np.testing.assert_array_equal(found["watched"], [[a, 0, c], [b, 0, 0], [0, 0, 0], [c, 0, 0]])
    np.testing.assert_array_equal(found["place"], [[x, y, z], [y, 0, 0], [0, 0, 0], [z, 0, 0]])
    assert len({a, b, c}) == len({x, y, z}) == 3


@pytest.mark.parametrize("padding", ["pre", "post"])
def test_columns_of_a_behavior_keep_equally_many_events_in_each_row(build, padding):
    rows = {"watched": [["a"], ["b", "c", "a"], [], ["c"]], "place": [["x"], ["y", "x"], [], ["x"]]}
    features = [column(name, "sequence", max_len=2, padding=padding) for name in rows]
    assert build(features, rows, behaviors={"watch": list(rows)})["train"]["place"].shape == (4, 2)  # two of three
    rows["place"][1] = ["y"]
    message = r"'watch' are aligned, but .* 2 events in 'watched' \('b\^c\^a'\) and 1 in 'place' \('y'\); correct"
    with pytest.raises(ValueError, match=rf"train\.parquet: behaviors: .*{message}"):
        build(features, rows, behaviors={"watch": list(rows)})
    build(features, rows, behaviors={name: [name] for name in rows})


def test_a_token_with_the_splitter_in_it_is_refused_and_another_splitter_keeps_it(build):
    rows = {"item": ["a^1", "b", "a^1", "b"], "watched": [["a^1", "b"], ["b"], [], ["a^1"]]}
    features = [column("item"), column("watched", "sequence", share_embedding="item")]
    with pytest.raises(ValueError, match=r"train\.parquet: column 'watched' has lists with a token that holds the"):
        build(features, rows)
    features[1]["splitter"] = "|"
    found = build(features, rows)["train"]
    first, second = found["item"][:2]
    np.testing.assert_array_equal(found["watched"], [[first, second], [second, 0], [0, 0], [first, 0]])


@pytest.mark.parametrize("ids, warned", [([1.0, 2.0, None, 1.0], True), ([1, 2, None, 1], False)])
def test_floats_beside_texts_are_warned_of_once(build, caplog, ids, warned):
    features = [column("item"), column("watched", "sequence", share_embedding="item")]
    build(features, {"item": ids, "watched": ["1^2", "2", "", "1"]}, {"item": ids, "watched": ["1", "2", "", "1"]})
    found = [text for text in caplog.messages if "tokens are like 1.0" in text]
    assert len(found) == warned
    assert all(re.match(r"column 'item' is Float64 in .*train\.parquet, .*'watched' is String in", t) for t in found)


def test_rows_without_an_id_of_their_group_are_warned_of(build, caplog):
    rows, users = {"item": ["a", "b", "a", "b"]}, {"user": [7, None, 0, None]}
    build([column("item"), column("user", "meta", "int")], rows | users)
    build([column("item"), column("user", "meta", "int", fill_na=-1)], rows | users)
    build([column("item"), column("user", "meta", "int")], rows | {"user": [7, 1, 0, 7]})
    (found,) = [text for text in caplog.messages if "would be one group" in text]
    assert re.search(r"train\.parquet: column 'user' is empty in 2 rows", found)


def test_integers_here_and_floats_there_are_refused(build):
    with pytest.raises(ValueError, match=r"'item' is Float64 in .*valid\.parquet but 'item' is Int64 in .*train"):
        build([column("item")], {"item": [1, 2, 3, 1]}, {"item": [1.0, 2.0, None, 3.0]})
    shared = [column("item"), column("watched", "sequence", share_embedding="item")]
    with pytest.raises(ValueError, match=r"'watched' is Float64 in .*train\.parquet but 'item' is Int64 in"):
        build(shared, {"item": [1, 2, 3, 1], "watched": [[1.0], [2.0, 3.0], [], [1.0]]})
    found = build([column("item")], {"item": [1, 2, 3, 1]}, {"item": pl.Series([1, 2, None, 3], dtype=pl.Int8)})
    np.testing.assert_array_equal(found["valid"]["item"][[0, 1, 3]], found["train"]["item"][:3])


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([Decimal(7), Decimal(8), None, Decimal(7)], "str"),
        ([Decimal(7), Decimal(8), Decimal(0), Decimal(7)], "int"),
        ([b"u7", b"u8", None, b"u7"], "str"),
    ],
)
def test_decimals_and_bytes_are_tokens(build, values, dtype):
    found = build([column("user", dtype=dtype)], {"user": values})["train"]["user"]
    assert found[0] == found[3] and len(set(found)) == 3


def test_a_column_may_share_with_one_that_shares(build):
    rows = {
        "item": list("abca"),
        "liked": [[c] for c in "abca"],
        "shared": [["n1"], ["n2"], ["n3"], ["a"]],
    }
    chain = [column("item"), column("liked", "sequence", share_embedding="item")]
    found = build([*chain, column("shared", "sequence", share_embedding="liked")], rows)["train"]
    np.testing.assert_array_equal(found["liked"][:, 0], found["item"])
    assert found["shared"][3, 0] == found["item"][0] and len(set(found["shared"][:, 0])) == 4


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            [column("item", "sequence", "int")],
            "'item': dtype='int' of a sequence; its tokens are text",
        ),
        (
            [column("n", "numeric", "float"), column("item", share_embedding="n")],
            "share_embedding='n' is numeric",
        ),
    ],
)
def test_columns_that_cannot_be(build, features, message):
    with pytest.raises(ValueError, match=message):
        build(features, {"item": [1, 2, 3, 4], "n": [1.0, 2.0, 3.0, 4.0]})


@pytest.mark.parametrize(
    ("feature", "values", "message"),
    [
        (
            column("n", "numeric", "float"),
            [1.0, 2.0, 3.0, 1.7e308],
            r"'n': 1\.7e\+308 is beyond what float32 holds",
        ),
        (
            column("n", "embedding", "float", pretrain_dim=2),
            [[1.0, None]] * 4,
            "'n': a vector has a number that is",
        ),
        (
            column("n", "meta", "float", remap=False),
            [1.0, 0.25, 3.0, 4.0],
            r"'n' has 0\.25; with `remap: False`",
        ),
    ],
)
def test_numbers_that_would_not_survive(build, feature, values, message):
    with pytest.raises(ValueError, match=rf"train\.parquet: column {message}"):
        build([column("item"), feature], {"item": list("abca"), "n": values})


def test_a_wrong_number_is_named_not_a_boolean_label(build, tmp_path):
    with pytest.raises(ValueError, match="column 'n' has 'abc', which is not a number in row 3"):
        rows = {"item": list("abca"), "n": ["1", "2", "abc", "4"], "y": [False, True, False, True]}
        pl.DataFrame(rows).write_parquet(tmp_path / "boolean.parquet")
        features = [column("item"), column("n", "numeric", "float")]
        build(features, {"item": list("abca"), "n": [1.0] * 4}, train_data=str(tmp_path / "boolean.parquet"))


def test_the_plan_has_one_step_for_all_columns_that_are_only_filled():
    """One for each made time and memory grow with the cube of their number."""
    features = [column(f"c{i}") for i in range(30)]
    features.append(column("copy", preprocess="copy_from(c3)"))
    processor = Processor(features, [LABEL], "types", "nowhere")
    rows = {**{f"c{i}": ["a", None] for i in range(30)}, "y": [0.0, 1.0]}
    frame = processor.preprocess(pl.LazyFrame(rows))
    assert frame.explain(optimized=False).count("WITH_COLUMNS") <= 4
    filled = frame.collect()
    assert filled["c7"].to_list() == filled["copy"].to_list() == ["a", ""]


def test_tokens_of_a_column(build, tmp_path):
    build([column("item")], {"item": [3, 4, 4, None]})
    assert sorted(Encoder.load(tmp_path / "built" / "types").tokens("item")) == ["3", "4"]

"""Building: ids equal FuxiCTR's, a data set exists whole or not at all, and bad input is named."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import flowctr.data.encode as encode
import h5py
import numpy as np
import polars as pl
import pytest
from flowctr.data import Encoder, H5DataLoader, build_h5, load_feature_map, scenario_names
from flowctr.data.files import lock_of
from fuxictr.preprocess.feature_processor import FeatureProcessor

LABELS = [{"name": "label", "dtype": "float"}, {"name": "like", "dtype": "float"}]


def make_rows(rows: int, seed: int, vocabulary: int = 30) -> pl.DataFrame:
    """A table with every kind of column, nulls and tokens that other tables lack."""
    rng = np.random.default_rng(seed)

    def tokens(prefix):
        return [f"{prefix}{i}" for i in (vocabulary * rng.random(rows) ** 2).astype(int)]

    def sequences(prefix, splitter):
        lengths = rng.integers(0, 9, rows)
        return [splitter.join(f"{prefix}{i}" for i in rng.integers(0, vocabulary, n)) or None for n in lengths]

    def with_nulls(values):
        return [None if rng.random() < 0.1 else value for value in values]

    return pl.DataFrame(
        {
            "label": rng.integers(0, 2, rows),
            "like": (rng.random(rows) < 0.1).astype(int),
            "user": rng.integers(100, 100 + rows // 3, rows),
            "item": with_nulls(tokens("i")),
            "cate": with_nulls(rng.integers(-3, 12, rows).tolist()),
            "price": with_nulls((rng.random(rows) * 50).round(3).tolist()),
            "age": rng.integers(18, 80, rows),
            "height": rng.normal(170, 9, rows).round(2),
            "items": sequences("i", "^"),
            "tags": sequences("t", "|"),
        },
        strict=False,
    )


FEATURES = [
    {"name": "user", "active": True, "dtype": "str", "type": "meta"},
    {"name": "item", "active": True, "dtype": "str", "type": "categorical", "source": "item", "min_categr_count": 3},
    {"name": "cate", "active": True, "dtype": "int", "type": "categorical", "fill_na": -1},
    {"name": "price", "active": True, "dtype": "float", "type": "numeric", "normalizer": "StandardScaler"},
    {"name": ["age", "height"], "active": True, "dtype": "float", "type": "numeric", "normalizer": "MinMaxScaler"},
    {
        "name": "items",
        "active": True,
        "dtype": "str",
        "type": "sequence",
        "share_embedding": "item",
        "max_len": 4,
        "padding": "pre",
    },
    {"name": "tags", "active": True, "dtype": "str", "type": "sequence", "splitter": "|", "max_len": 5},
    {
        "name": "tags_again",
        "active": True,
        "dtype": "str",
        "type": "sequence",
        "splitter": "|",
        "preprocess": "copy_from(tags)",
        "padding": "post",
    },
    {"name": "unused", "active": False, "dtype": "str", "type": "categorical"},
]


def with_column(index: int, **changes) -> list[dict]:
    return [*FEATURES[:index], {**FEATURES[index], **changes}, *FEATURES[index + 1 :]]


@pytest.fixture
def params(tmp_path) -> dict:
    for split, rows, vocabulary in (("train", 300, 30), ("valid", 90, 40), ("test", 70, 40)):
        make_rows(rows, rows, vocabulary).write_csv(tmp_path / f"{split}.csv")
    return {
        "dataset_id": "tiny",
        "data_root": str(tmp_path / "built"),
        "data_format": "csv",
        **{f"{split}_data": str(tmp_path / f"{split}.csv") for split in ("train", "valid", "test")},
        "feature_cols": FEATURES,
        "label_col": LABELS,
        "min_categr_count": 2,
    }


def test_an_encoder_of_a_feature_map_is_not_executed(params, tmp_path):
    build_h5(params)
    path = tmp_path / "built" / "tiny" / "feature_map.json"
    code = f"__import__('pathlib').Path({str(tmp_path / 'executed')!r}).touch() or layers.MaskedAveragePooling()"
    text = path.read_text()
    content = json.loads(text)
    for feature in content["features"]:
        for name, spec in feature.items():
            if name == "items":
                spec["feature_encoder"] = code
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"feature_map\.json: feature_encoder of 'items' must be layers\.<Name>"):
        load_feature_map(params)
    assert not (tmp_path / "executed").exists()


def read_columns(path: str) -> dict[str, np.ndarray]:
    parts = [path] if path.endswith(".h5") else sorted(Path(path).glob("*.h5"))
    columns = {}
    for part in parts:
        with h5py.File(part) as file:
            for name in file:
                columns.setdefault(name, []).append(file[name][:])
    return {name: np.concatenate(arrays) for name, arrays in columns.items()}


def fuxictr_columns(params: dict, data_root: Path) -> dict[str, dict[str, np.ndarray]]:
    """What FuxiCTR's processor makes of each split, row by row in Python."""
    params = {**params, "data_root": str(data_root), "feature_cols": [c for c in params["feature_cols"] if c["active"]]}
    processor = FeatureProcessor(**params)
    splits = [split for split in ("train", "valid", "test") if params.get(f"{split}_data")]
    frames = {
        split: processor.preprocess(processor.read_data(params[f"{split}_data"], params["data_format"]))
        for split in splits
    }
    meta = [col["name"] for col in processor.feature_cols if col["type"] == "meta"]
    processor.fit(
        frames["train"],
        meta_ddf=pl.concat([frame.select(meta) for frame in frames.values()]) if meta else None,
        min_categr_count=params["min_categr_count"],
    )
    columns = {}
    for split, frame in frames.items():
        batch = {name: series.to_numpy() for name, series in frame.collect().to_dict().items()}
        columns[split] = {name: np.array(values) for name, values in processor.transform(batch).items()}
    return columns


def assert_equal_columns(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_ids_equal_fuxictr_for_every_feature_type(params, tmp_path):
    paths = build_h5(params)
    expected = fuxictr_columns(params, tmp_path / "fuxictr")
    for split, path in paths.items():
        assert_equal_columns(read_columns(path), expected[split])
    for name in ("feature_map.json", "feature_vocab.json"):
        ours, theirs = (tmp_path / root / "tiny" / name for root in ("built", "fuxictr"))
        assert ours.read_text() == theirs.read_text()


def test_ids_equal_fuxictr_for_parquet_lists_embeddings_and_pretrained_vectors(params, tmp_path):
    for split in ("train", "valid", "test"):
        frame = pl.read_csv(tmp_path / f"{split}.csv")
        vectors = np.random.default_rng(len(frame)).normal(size=(len(frame), 3)).tolist()
        frame = frame.with_columns(
            pl.col("item").cast(pl.Categorical),
            pl.col("items").str.split("^"),
            pl.col("tags").fill_null("").str.extract_all(r"\d+").cast(pl.List(pl.Int64)),
            vector=pl.Series(vectors),
        )
        frame.write_parquet(tmp_path / f"{split}.parquet")
        # FuxiCTR itself can only read lists that are strings already.
        frame.with_columns(
            pl.col("item").cast(pl.String),
            pl.col("items").list.join("^"),
            pl.col("tags").cast(pl.List(pl.String)).list.join("|"),
        ).write_parquet(tmp_path / f"plain_{split}.parquet")
    pl.DataFrame({"key": ["i3", "new1", "i99", "i2"], "value": np.eye(4).tolist()}).write_parquet(
        tmp_path / "emb.parquet"
    )
    columns = [dict(col) for col in FEATURES if "preprocess" not in col]
    columns[1].update(pretrained_emb=str(tmp_path / "emb.parquet"), pretrain_dim=4, freeze_emb=False)
    columns.append(
        {"name": "vector", "active": True, "dtype": "float", "type": "embedding", "pretrain_dim": 3, "fill_na": None}
    )
    params.update(data_format="parquet", feature_cols=columns)
    params.update({f"{split}_data": str(tmp_path / f"{split}.parquet") for split in ("train", "valid", "test")})
    paths = build_h5(params)
    plain = {f"{split}_data": str(tmp_path / f"plain_{split}.parquet") for split in ("train", "valid", "test")}
    expected = fuxictr_columns({**params, **plain}, tmp_path / "fuxictr")
    for split, path in paths.items():
        expected[split]["vector"] = np.stack(expected[split]["vector"])
        assert_equal_columns(read_columns(path), expected[split])
    moved = shutil.move(tmp_path / "emb.parquet", tmp_path / "moved.parquet")
    columns[1]["pretrained_emb"] = str(moved)
    assert build_h5(params) == paths
    for name in ("feature_map.json", "feature_vocab.json", "pretrained_item.parquet"):
        ours, theirs = (tmp_path / root / "tiny" / name for root in ("built", "fuxictr"))
        assert ours.read_bytes() == theirs.read_bytes()


def run_python(code: str, *arguments, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stderr=subprocess.PIPE, text=True, **kwargs
    )


FUXICTR_BUILD = """
import json, sys
import ray
from fuxictr.preprocess import FeatureProcessor, build_dataset
ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR")
params = json.loads(sys.argv[1])
build_dataset(FeatureProcessor(**params), **params)
"""


def test_ids_equal_fuxictrs_own_build_dataset(params, tmp_path):
    active = [col for col in FEATURES if col["active"]]
    theirs = run_python(
        FUXICTR_BUILD, json.dumps({**params, "data_root": str(tmp_path / "theirs"), "feature_cols": active})
    )
    paths = build_h5(params)
    _, errors = theirs.communicate(timeout=120)
    assert theirs.returncode == 0, errors
    for split, path in paths.items():
        frame = pl.read_parquet(tmp_path / "theirs" / "tiny" / f"{split}.parquet")
        assert_equal_columns(read_columns(path), {name: np.array(frame[name].to_list()) for name in frame.columns})
    for name in ("feature_map.json", "feature_vocab.json"):
        ours, other = (tmp_path / root / "tiny" / name for root in ("built", "theirs"))
        assert ours.read_text() == other.read_text()


def test_loaded_encoder_encodes_new_rows_as_the_build_did(params, tmp_path):
    path = build_h5(params)["test"]
    rows = pl.read_csv(params["test_data"]).drop("label", "like", "user")
    built = read_columns(path)
    encoded = Encoder.load(tmp_path / "built" / "tiny").encode(rows)
    assert encoded.keys() == built.keys() - {"label", "like", "user"}
    for name, values in encoded.items():
        np.testing.assert_array_equal(values, built[name])
        assert values.dtype == built[name].dtype


def test_loaded_encoder_takes_vectors(params, tmp_path):
    for split in ("train", "valid", "test"):
        frame = pl.read_csv(tmp_path / f"{split}.csv")
        vectors = np.random.default_rng(len(frame)).normal(size=(len(frame), 3))
        frame.with_columns(vector=pl.Series(vectors.tolist())).write_parquet(tmp_path / f"{split}.parquet")
    vector = {"name": "vector", "active": True, "dtype": "float", "type": "embedding", "pretrain_dim": 3}
    params.update(data_format="parquet", feature_cols=[vector, FEATURES[1]])
    params.update({f"{split}_data": str(tmp_path / f"{split}.parquet") for split in ("train", "valid", "test")})
    build_h5(params)
    encoded = Encoder.load(tmp_path / "built" / "tiny").encode(pl.read_parquet(params["test_data"]))
    np.testing.assert_array_equal(encoded["vector"], vectors.astype(np.float32))


def test_indices_that_are_not_remapped_stay_as_they_are(params, tmp_path):
    pl.DataFrame(
        {"label": [0, 1, 0], "item": [4, 0, 9], "hist": ["1^2^3", None, "9"], "user": [7, 2**40, 7]}
    ).write_csv(tmp_path / "train.csv")
    item = {"name": "item", "active": True, "dtype": "int", "type": "categorical", "remap": False, "vocab_size": 10}
    hist = {"name": "hist", "active": True, "dtype": "str", "type": "sequence", "remap": False, "vocab_size": 10}
    user = {"name": "user", "active": True, "dtype": "int", "type": "meta", "remap": False}
    age = {"name": "label2", "active": True, "dtype": "float", "type": "numeric", "preprocess": "copy_from(label)"}
    params.update(feature_cols=[item, {**hist, "max_len": 2}, user, {**age, "normalizer": "MinMaxScaler"}])
    params.update(label_col=LABELS[0], valid_data=None, test_data=None)
    columns = read_columns(build_h5(params)["train"])
    np.testing.assert_array_equal(columns["item"], [4, 0, 9])
    np.testing.assert_array_equal(columns["hist"], [[1, 2], [0, 0], [9, 0]])
    np.testing.assert_array_equal(columns["user"], [7, 2**40, 7])
    np.testing.assert_array_equal(columns["label2"], [0, 1, 0])
    params["feature_cols"] = [{**item, "vocab_size": 9}, user]
    with pytest.raises(ValueError, match=r"train\.csv: column 'item': index 9 .* beyond its vocabulary .*vocab_size=9"):
        build_h5({**params, "dataset_id": "beyond"})


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


BUILD = "import json, sys; from flowctr.data import build_h5; build_h5(json.loads(sys.argv[1]))"


def test_same_bytes_on_every_build(params, tmp_path, monkeypatch):
    build_h5(params)
    reference = file_bytes(tmp_path / "built" / "tiny")
    single = {**params, "data_root": str(tmp_path / "single")}
    threads = {**os.environ, "POLARS_MAX_THREADS": "1", "PYTHONHASHSEED": "7"}
    assert run_python(BUILD, json.dumps(single), env=threads).wait() == 0
    assert file_bytes(tmp_path / "single" / "tiny") == reference
    # How many rows are encoded at a time shows nowhere.
    monkeypatch.setattr(encode, "BATCH_ROWS", 7)
    build_h5({**params, "data_root": str(tmp_path / "batches")})
    assert_equal_columns(
        read_columns(tmp_path.joinpath("batches/tiny/train.h5").as_posix()),
        read_columns(tmp_path.joinpath("built/tiny/train.h5").as_posix()),
    )


@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
def test_part_files_hold_the_rows_of_the_single_file(params, compression, monkeypatch):
    whole = build_h5(params)
    monkeypatch.setattr(encode, "BATCH_ROWS", 64)
    parts = build_h5({**params, "dataset_id": "parts", "data_block_size": 90, "h5_compression": compression})
    assert [path.name for path in sorted(Path(parts["train"]).iterdir())] == [f"part-{i:06d}.h5" for i in range(4)]
    with h5py.File(Path(parts["train"]) / "part-000003.h5") as file:
        assert (file.attrs["rows"], len(file["items"]), file["items"].compression) == (30, 30, compression)
        assert file["items"].attrs["padding"] == "pre"
        assert file["like"].attrs["mean"] == file["like"][:].mean(dtype=np.float64)
    for split in whole:
        assert_equal_columns(read_columns(parts[split]), read_columns(whole[split]))


def test_folder_of_source_files_reads_as_one_table(params, tmp_path):
    whole = build_h5(params)
    (tmp_path / "parts").mkdir()
    rows = pl.read_csv(params["train_data"])
    rows[:200].write_csv(tmp_path / "parts" / "a.csv")
    rows[200:].write_csv(tmp_path / "parts" / "b.csv")
    parts = build_h5({**params, "dataset_id": "parts", "train_data": str(tmp_path / "parts")})
    assert_equal_columns(read_columns(parts["train"]), read_columns(whole["train"]))


def test_splits_of_one_file_share_their_rows(params):
    paths = build_h5({**params, "valid_data": params["test_data"]})
    assert paths["valid"] == paths["test"] != paths["train"]
    assert len(read_columns(paths["test"])["label"]) == 70
    assert build_h5({**params, "valid_data": params["test_data"]}) == paths


def test_statistics_of_many_rows_are_exact(tmp_path):
    values = np.random.default_rng(0).normal(1e6, 1, 200_000)
    pl.DataFrame({"label": [0.0, 1.0] * 100_000, "x": values, "one": 0.1}).write_parquet(tmp_path / "train.parquet")
    column = {"active": True, "dtype": "float", "type": "numeric", "normalizer": "StandardScaler"}
    params = {
        "dataset_id": "x",
        "data_root": str(tmp_path),
        "data_format": "parquet",
        "train_data": str(tmp_path / "train.parquet"),
        "feature_cols": [{**column, "name": ["x", "one"]}],
        "label_col": LABELS[0],
    }
    columns = read_columns(build_h5(params)["train"])
    np.testing.assert_allclose(columns["x"], (values - values.mean()) / values.std(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(columns["one"], 0)


# What is found later


def test_second_call_reuses_what_was_built(params, tmp_path, caplog):
    paths = build_h5(params)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "built").rglob("*.h5")}
    os.utime(params["train_data"])  # touched, same content
    moved = shutil.move(params["valid_data"], tmp_path / "elsewhere.csv")
    assert build_h5({**params, "valid_data": str(moved)}) == paths
    os.remove(params["test_data"])
    assert build_h5({**params, "valid_data": str(moved)}) == paths
    assert "is gone" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "built").rglob("*.h5")} == before
    feature_map = load_feature_map({**params, "embedding_dim": 8, "group_id": "user"})
    assert (feature_map.default_emb_dim, feature_map.group_id) == (8, "user")
    assert len(H5DataLoader(feature_map, paths["train"], batch_size=64)) == 5


def test_manifest_digest_is_that_of_the_content(params, tmp_path):
    def digest(params):
        build_h5(params)
        return json.loads((Path(params["data_root"]) / "tiny" / "manifest.json").read_text())["digest"]

    first = digest(params)
    shutil.copy(params["train_data"], tmp_path / "copy.csv")
    assert digest({**params, "data_root": str(tmp_path / "a"), "train_data": str(tmp_path / "copy.csv")}) == first
    assert digest({**params, "data_root": str(tmp_path / "b"), "train_data": params["test_data"]}) != first


@pytest.mark.parametrize(
    "change, message",
    [
        ({"min_categr_count": 5}, "min_categr_count: 2 -> 5"),
        ({"data_block_size": 50}, "data_block_size: 0 -> 50"),
        (
            {"feature_cols": [FEATURES[0], {**FEATURES[1], "min_categr_count": 4}, *FEATURES[2:]]},
            r"item\.min.*: 3 -> 4",
        ),
        ({"feature_cols": [FEATURES[1], FEATURES[0], *FEATURES[2:]]}, "order of feature_cols"),
        ({"label_col": LABELS[0]}, "label_col.like.*-> not set"),
        ({"label_col": [LABELS[0], {**LABELS[1], "may_be_missing": True}]}, "like.may_be_missing: not set -> True"),
        ({"test_data": None}, "test data: .*test.csv -> none"),
    ],
)
def test_changed_setting_is_named(params, change, message):
    paths = build_h5(params)
    with pytest.raises(ValueError, match=message) as error:
        build_h5({**params, **change})
    assert "rebuild=True" in str(error.value)
    build_h5({**params, **change}, rebuild=True)
    assert build_h5({**params, **change}).keys() == paths.keys()


def test_changed_source_is_named(params):
    build_h5(params)
    text = Path(params["test_data"]).read_text()
    Path(params["test_data"]).write_text(text.replace("i1", "i2"))
    with pytest.raises(ValueError, match=r"test data .*test\.csv: sha256 .* -> "):
        build_h5(params)
    Path(params["test_data"]).write_text(text + text.splitlines()[-1] + "\n")
    with pytest.raises(ValueError, match=r"test data .*test\.csv: \d+ bytes -> \d+ bytes"):
        build_h5(params)


def test_rebuild_with_fewer_parts_leaves_none_behind(params):
    build_h5({**params, "data_block_size": 20})
    paths = build_h5({**params, "data_block_size": 200}, rebuild=True)
    assert len(list(Path(paths["train"]).iterdir())) == 2
    assert len(read_columns(paths["train"])["label"]) == 300


def test_sources_inside_the_data_set_folder_survive(params, tmp_path):
    folder = tmp_path / "built" / "tiny"
    folder.mkdir(parents=True)
    for split in ("train", "valid", "test"):
        shutil.move(params[f"{split}_data"], folder / f"{split}.csv")
        params[f"{split}_data"] = str(folder / f"{split}.csv")
    build_h5(params)
    build_h5(params, rebuild=True)
    assert len(pl.read_csv(params["train_data"])) == 300


def test_damaged_and_foreign_data_sets_are_not_used(params, tmp_path):
    paths = build_h5(params)
    with open(paths["valid"], "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match=r"valid\.h5 is missing or was cut off"):
        build_h5(params)
    manifest = tmp_path / "built" / "tiny" / "manifest.json"
    build_h5(params, rebuild=True)
    manifest.write_text(manifest.read_text().replace('"min_categr_count": 2', '"min_categr_count": 3'))
    with pytest.raises(ValueError, match=r"manifest\.json was edited"):
        build_h5(params)
    whole = json.loads(manifest.read_text())
    for damaged in (json.dumps(whole)[:100], "[]", "{}", json.dumps({**whole, "splits": []})):
        manifest.write_text(damaged)
        with pytest.raises(ValueError, match=r"manifest\.json is damaged.*rebuild=True"):
            build_h5(params)
    manifest.write_text("{}")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged: it lacks settings, encoders"):
        Encoder.load(manifest.parent)
    manifest.unlink()
    with pytest.raises(ValueError, match="flowctr did not build it"):
        build_h5(params)


DAMAGED_FEATURE_MAPS = [
    "{",
    "{}",
    "[]",
    "\x00",
    '{"dataset_id": "tiny", "labels": [], "features": {"item": {}}}',
    '{"dataset_id": "tiny", "labels": [], "features": [{"item": {}}]}',
    '{"dataset_id": "tiny", "labels": [], "features": [{"items": {"type": "sequence"}}]}',
]


@pytest.mark.parametrize("content", DAMAGED_FEATURE_MAPS)
def test_damaged_feature_map_is_named(params, tmp_path, content):
    paths = build_h5(params)
    feature_map = load_feature_map(params)
    (tmp_path / "built" / "tiny" / "feature_map.json").write_text(content)
    for use in (
        lambda: build_h5(params),
        lambda: build_h5({**params, "data_format": "h5", **{f"{split}_data": path for split, path in paths.items()}}),
        lambda: load_feature_map(params),
        lambda: H5DataLoader(feature_map, paths["train"]),
        lambda: Encoder.load(tmp_path / "built" / "tiny"),
    ):
        with pytest.raises(ValueError, match=r"tiny/feature_map\.json is damaged.*; put back .* or build again"):
            use()
    assert build_h5(params, rebuild=True) == paths


def test_damaged_vocabulary_is_named(params, tmp_path):
    build_h5(params)
    (tmp_path / "built" / "tiny" / "feature_vocab.json").write_text('{"item": {}}')
    with pytest.raises(ValueError, match=r"feature_vocab\.json is damaged: it lacks cate, "):
        Encoder.load(tmp_path / "built" / "tiny")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"group_id": "usr"}, r"group_id names 'usr', which .*feature_map\.json lacks \(did you mean 'user'\?\)"),
        ({"use_features": ["item", "pric"]}, r"use_features names 'pric', .* lacks \(did you mean 'price'\?\)"),
        ({"feature_specs": [{"name": ["item", "cat"], "embedding_dim": 4}]}, r"feature_specs names 'cat', .*'cate'"),
        ({"feature_specs": [{"embedding_dim": 4}]}, "feature_specs names None"),
        ({"use_features": ["item"], "group_id": "user"}, "group_id names 'user', which use_features leaves out"),
        ({"use_features": ["item"], "scenario": "cate"}, "scenario names 'cate', which use_features leaves out"),
        ({"scenario": "cat"}, r"scenario names 'cat', which .* lacks \(did you mean 'cate'\?\)"),
    ],
)
def test_columns_that_the_feature_map_lacks_are_named(params, change, message):
    build_h5(params)
    with pytest.raises(ValueError, match=message):
        load_feature_map({**params, **change})
    specs = [{"name": ["item", "user"], "embedding_dim": 4}]
    feature_map = load_feature_map(
        {**params, "use_features": ["item", "user"], "feature_specs": specs, "group_id": "user"}
    )
    assert [(name, spec["embedding_dim"]) for name, spec in feature_map.features.items()] == [("item", 4), ("user", 4)]


def test_feature_map_of_another_data_set(params, tmp_path):
    build_h5(params)
    shutil.copytree(tmp_path / "built" / "tiny", tmp_path / "built" / "copy")
    with pytest.raises(ValueError, match=r"copy/feature_map\.json is that of dataset_id='tiny', not of 'copy'"):
        load_feature_map({**params, "dataset_id": "copy"})


# Interruptions


def test_reuse_removes_what_a_killed_build_left(params, tmp_path):
    paths = build_h5(params)
    staging = tmp_path / "built" / ".tiny.building"
    staging.mkdir()
    (staging / "train.h5").write_text("half")
    with lock_of(tmp_path / "built" / "tiny"):  # another process is building, and no one waits for it
        assert build_h5(params) == paths
        assert staging.exists()
    assert build_h5(params) == paths
    assert not staging.exists()


INTERRUPTED_BUILD = """
import json, os, signal, sys
import flowctr.data.build as build
import flowctr.data.encode as encode
params, owner, name, fatal_call, rebuild = json.loads(sys.argv[1])
owner = os if owner == "os" else getattr(encode, owner)
original, calls = getattr(owner, name), []
def dying(*args, **kwargs):
    calls.append(1)
    if len(calls) == fatal_call:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(owner, name, dying)
build.build_h5(params, rebuild=rebuild)
"""


def test_killed_build_leaves_nothing_that_is_trusted(params, tmp_path):
    build_h5(params)
    undisturbed = file_bytes(tmp_path / "built" / "tiny")
    # (what is called when the process dies, for the how many-th time, whether a data set is there already)
    moments = [
        ("H5Writer", "append", 2, 0),
        ("os", "replace", 6, 0),
        ("H5Writer", "append", 3, 1),
        ("os", "replace", 2, 1),
    ]
    children = []
    for i, (owner, name, call, exists) in enumerate(moments):
        again = {**params, "data_root": str(tmp_path / f"killed{i}")}
        old = {**again, "data_block_size": 50}
        if exists:
            build_h5(old)
        children.append(
            (again, old, run_python(INTERRUPTED_BUILD, json.dumps([again, owner, name, call, bool(exists)])))
        )
    for (owner, _, _, exists), (again, old, child) in zip(moments, children):
        assert child.wait() == -signal.SIGKILL, child.stderr.read()
        folder = Path(again["data_root"])
        assert (folder / ".tiny.building").exists()
        if exists and owner == "H5Writer":  # died before it touched the old data set
            assert len(read_columns(build_h5(old)["train"])["label"]) == 300
            build_h5(again, rebuild=True)
        else:
            build_h5(again)
        assert file_bytes(folder / "tiny") == undisturbed
        assert not (folder / ".tiny.building").exists()


CONCURRENT_BUILD = """
import json, os, pathlib, sys, time
import flowctr.data.build as build
params, folder = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
original = build._build
def counted(*args):
    (folder / f"builder{os.getpid()}").touch()
    time.sleep(1)
    return original(*args)
build._build = counted
(folder / f"ready{os.getpid()}").touch()
while len(list(folder.glob("ready*"))) < 3:
    time.sleep(0.01)
print(json.dumps(build.build_h5(params)))
"""


def test_of_concurrent_builders_one_builds(params, tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    children = [run_python(CONCURRENT_BUILD, json.dumps(params), marks, stdout=subprocess.PIPE) for _ in range(3)]
    results = [child.communicate(timeout=60) for child in children]
    assert all(child.returncode == 0 for child in children), results
    assert len(list(marks.glob("builder*"))) == 1
    assert [json.loads(output) for output, _ in results] == [build_h5(params)] * 3


FULL_DISK_BUILD = """
import json, resource, sys
from flowctr.data import build_h5
params = json.loads(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # a write beyond this fails as on a full disk
build_h5(params, rebuild=True)
"""


def test_full_disk_is_one_error_and_nothing_is_lost(params, tmp_path, monkeypatch):
    paths = build_h5(params)
    before = file_bytes(tmp_path / "built" / "tiny")
    child = run_python(FULL_DISK_BUILD, json.dumps({**params, "data_block_size": 250}))
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 1  # an exception, not a crash of the h5 library
    assert "OSError: [Errno 27] no space left for the data set" in errors.splitlines()[-1]
    assert file_bytes(tmp_path / "built" / "tiny") == before
    assert not (tmp_path / "built" / ".tiny.building").exists()
    assert build_h5(params) == paths

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(encode.H5Writer, "append", full)
    with pytest.raises(OSError, match=r"no space left for the data set .* free disk space"):
        build_h5(params, rebuild=True)
    assert file_bytes(tmp_path / "built" / "tiny") == before


# Bad input


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data_format": "parqet"}, r"data_format='parqet' is unknown \(did you mean 'parquet'"),
        ({"h5_compression": "zip"}, "h5_compression='zip' is unknown"),
        ({"train_data": None}, "train_data is missing"),
        ({"feature_cols": []}, "feature_cols has no active column"),
        (
            {"feature_cols": with_column(1, dtype="__import__('os').abort()")},
            "'item': dtype=.* not one of str, int, float",
        ),
        (
            {"feature_cols": with_column(1, type="categoric")},
            r"type='categoric' is unknown \(did you mean 'categorical'",
        ),
        ({"feature_cols": with_column(1, category_processor="quantile_bucket")}, "not supported by FuxiCTR 2.3"),
        ({"feature_cols": with_column(1, type="embedding")}, "needs pretrain_dim"),
        ({"feature_cols": with_column(1, remap=False)}, "'item': remap: False needs vocab_size"),
        ({"feature_cols": with_column(5, padding="left")}, "padding='left' is not pre or post"),
        ({"feature_cols": with_column(3, normalizer="Log")}, "normalizer='Log'"),
        ({"feature_cols": with_column(5, share_embedding="itm")}, r"share_embedding='itm' .*did you mean 'item'"),
        ({"feature_cols": with_column(7, preprocess="copy(tags)")}, "preprocess='copy"),
        ({"feature_cols": [*FEATURES, FEATURES[1]]}, "'item' occurs twice"),
        ({"label_col": {"name": "label", "dtype": "str"}}, "'label': dtype='str'; a label is int or float"),
        ({"feature_cols": with_column(2, name="cat")}, r"train\.csv: column 'cat' is missing \(did you mean 'cate'"),
        (
            {"label_col": {"name": "labl", "dtype": "float"}},
            r"train\.csv: column 'labl' is missing \(did you mean 'label'",
        ),
        (
            {"label_col": {"name": "item", "dtype": "float"}},
            r"train\.csv: column 'item' has 'i\d+', .*not a number.* row 1 ",
        ),
        ({"feature_cols": with_column(3, name="item2", preprocess="copy_from(item)")}, "cannot be read"),
        (
            {"feature_cols": with_column(1, min_categr_count=1000)},
            r"train\.csv: column 'item' has no token to learn from",
        ),
        ({"behaviors": {"a": ["items", "tagz"]}}, r"behaviors: 'a' names 'tagz'.*did you mean 'tags"),
        ({"behaviors": {"a": ["items", "tags"]}}, r"behaviors: .*same max_len.* items=4, tags=5"),
    ],
)
def test_bad_parameters_are_named(params, change, message):
    with pytest.raises(ValueError, match=message):
        build_h5({**params, **change})
    assert not (Path(params["data_root"]) / ".tiny.building").exists()


def test_all_wrong_parameters_come_in_one_message(params):
    with pytest.raises(ValueError, match=r"data_format='x'.*h5_compression='y'.*padding='z'"):
        build_h5({**params, "data_format": "x", "h5_compression": "y", "feature_cols": with_column(5, padding="z")})


@pytest.mark.parametrize(
    "rows, message",
    [
        (
            "label,item\n1,a\nabc,b\n",
            r"valid\.csv: column 'label' has 'abc', which is not a number in row 2 \(line 3\)",
        ),
        (
            "label,item\n1,a\n0,b\n,c\n",
            r"valid\.csv: column 'label' is empty in row 3 \(line 4\); correct it or set may_be_missing: true",
        ),
        (
            "label,item\n1,a\nnan,b\n",
            r"column 'label' has 'nan', which is not a number in row 2 .*; set may_be_missing",
        ),
        ("label,item\n", "the valid split has no rows"),
        ("", "the valid split is an empty file"),
        ("label,itm\n1,a\n", r"valid\.csv: column 'item' is missing \(did you mean 'itm'"),
        ("rating,thing\n1,a\n", r"valid\.csv: column 'item' is missing; column 'label' is missing; the valid split"),
        ("label,item\n1,a\n0", r"valid\.csv: cut off in line 3: it has 1 of 2 fields"),
    ],
)
def test_bad_rows_are_named(params, tmp_path, rows, message):
    (tmp_path / "train.csv").write_text("label,item\n1,a\n0,b\n")
    (tmp_path / "valid.csv").write_text(rows)
    params.update(feature_cols=[FEATURES[1]], label_col=LABELS[:1], test_data=None, min_categr_count=1)
    params["feature_cols"] = [{"name": "item", "active": True, "dtype": "str", "type": "categorical"}]
    with pytest.raises(ValueError, match=message):
        build_h5(params)
    assert not (Path(params["data_root"]) / "tiny" / "feature_map.json").exists()


def test_what_can_be_done_about_test_rows_without_labels_and_numbers_that_are_none_is_said(params, tmp_path):
    price = {"name": "price", "active": True, "dtype": "float", "type": "numeric"}
    params.update(feature_cols=[price], label_col=LABELS[:1], min_categr_count=1)
    for split, text in {
        "train": "label,price\n1,2.5\n0,\n",
        "valid": "label,price\n1,0.5\n",
        "test": "price\n1.5\n",
    }.items():
        (tmp_path / f"{split}.csv").write_text(text)
    with pytest.raises(
        ValueError, match=r"test\.csv: column 'label' is missing; .*set test_data: null and use flowctr pred"
    ):
        build_h5(params)
    (tmp_path / "train.csv").write_text("label,price\n1,2.5\n0,NaN\n")
    with pytest.raises(
        ValueError, match=r"column 'price' has 'NaN', which is not a number in row 2 .*; leave it empty"
    ):
        build_h5({**params, "test_data": None})


@pytest.mark.parametrize(
    ("histories", "settings", "warnings"),
    [
        (("a^b^c", "a^b"), {"max_len": 2}, ["1 rows have more than max_len=2 events"]),
        (("a^b^c", "a^b^c"), {"max_len": 2, "padding": "post"}, ["2 rows have more than max_len=2 events"]),
        (("a^b^c", "a^b"), {"max_len": 2, "padding": "pre"}, []),
        (("a^b^c", ""), {"max_len": 3}, []),
        (("a,b,c", "a,b"), {"max_len": 3}, ["no row has more than one event; if its events are joined"]),
        (("a,b,c", "a"), {"max_len": 3, "splitter": ","}, []),
    ],
)
def test_histories_that_are_seldom_meant_are_warned_of(params, tmp_path, caplog, histories, settings, warnings):
    columns = {"label": [1, 0], "items": list(histories)}
    pl.DataFrame(columns).write_parquet(tmp_path / "train.parquet")
    sequence = {"name": "items", "active": True, "dtype": "str", "type": "sequence", **settings}
    params.update(data_format="parquet", valid_data=None, test_data=None, label_col=LABELS[0], min_categr_count=1)
    build_h5({**params, "train_data": str(tmp_path / "train.parquet"), "feature_cols": [sequence]})
    found = [message for message in caplog.messages if "'items'" in message]
    assert len(found) == len(warnings)
    assert all(f"column 'items': {warning}" in message for message, warning in zip(found, warnings))


def test_bad_parquet_columns_are_named(params, tmp_path):
    params.update(data_format="parquet", valid_data=None, test_data=None, label_col=LABELS[0])
    params.update(train_data=str(tmp_path / "train.parquet"), min_categr_count=1)
    categorical = {"name": "item", "active": True, "dtype": "int", "type": "categorical"}
    embedding = {"name": "item", "active": True, "dtype": "float", "type": "embedding", "pretrain_dim": 2}

    def build(columns, feature, **more):
        pl.DataFrame(columns).write_parquet(tmp_path / "train.parquet")
        build_h5({**params, "feature_cols": [feature], **more}, rebuild=True)

    with pytest.raises(ValueError, match="column 'label' has 'x', which is not a number in row 2"):
        build({"label": ["1", "x"], "item": [1, 2]}, categorical)
    with pytest.raises(ValueError, match=r"train\.parquet: column 'item': a row has 1 values, pretrain_dim is 2"):
        build({"label": [1, 0], "item": [[1.0, 2.0], [3.0]]}, embedding)
    with pytest.raises(ValueError, match="column 'item' of type embedding must hold lists"):
        build({"label": [1, 0], "item": [1.0, 2.0]}, embedding)
    pl.DataFrame({"label": [1, 0], "item": ["1", "2"]}).write_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=r"column 'item' is Int64 in .*train\.parquet but String in .*test\.parquet"):
        build({"label": [1, 0], "item": [1, 2]}, categorical, test_data=str(tmp_path / "test.parquet"))
    (tmp_path / "test.parquet").write_bytes((tmp_path / "train.parquet").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"test\.parquet: cannot be read"):
        build({"label": [1, 0], "item": [1, 2]}, categorical, test_data=str(tmp_path / "test.parquet"))


def test_missing_label_takes_the_fill_value_where_one_is_given(params, tmp_path):
    (tmp_path / "train.csv").write_text("label,item\n1,a\n,b\n")
    params.update(feature_cols=[{**FEATURES[2], "name": "item", "dtype": "str"}], valid_data=None, test_data=None)
    params.update(label_col={"name": "label", "dtype": "float", "fill_na": 0}, min_categr_count=1)
    np.testing.assert_array_equal(read_columns(build_h5(params)["train"])["label"], [1, 0])


CONVERSIONS = [1.0, None, 0.0, math.nan, None, 1.0, 1.0, None]
MISSING = {"name": "conversion", "dtype": "float", "may_be_missing": True}


def conversions(params: dict, tmp_path: Path, data_format: str, values: list) -> dict:
    """Parameters of a data set whose label ``conversion`` is known in some rows only."""
    frame = pl.DataFrame({"label": [0, 1] * 4, "item": list("abcdabcd")}).with_columns(conversion=pl.Series(values))
    for split in ("train", "valid"):
        path = tmp_path / f"{split}.{data_format}"
        frame.write_csv(path) if data_format == "csv" else frame.write_parquet(path)
        params[f"{split}_data"] = str(path)
    params.update(feature_cols=[{**FEATURES[2], "name": "item", "dtype": "str"}], data_format=data_format)
    params.update(label_col=[LABELS[0], MISSING], test_data=None, min_categr_count=1)
    return params


@pytest.mark.parametrize("data_format", ["csv", "parquet"])
@pytest.mark.parametrize("block_rows", [0, 3])
def test_a_label_may_be_missing_where_that_is_said(params, tmp_path, data_format, block_rows):
    conversions(params, tmp_path, data_format, CONVERSIONS)
    params["data_block_size"] = block_rows
    paths = build_h5(params)
    assert build_h5(params) == paths
    expected = np.array([1, np.nan, 0, np.nan, np.nan, 1, 1, np.nan], np.float32)
    np.testing.assert_array_equal(read_columns(paths["train"])["conversion"], expected)
    feature_map = load_feature_map(params)
    for given in (paths["train"], build_h5({**params, "data_format": "h5", "train_data": paths["train"]})["train"]):
        for streaming in (False, True):
            loader = H5DataLoader(feature_map, given, batch_size=5, streaming=streaming)
            assert loader.may_be_missing == ["conversion"]
            assert loader.base_rates == {"label": 0.5, "conversion": 0.75}
            batches = [batch["conversion"] for batch in loader]
            np.testing.assert_array_equal(np.concatenate(batches), expected)


@pytest.mark.parametrize("data_format", ["csv", "parquet"])
def test_a_missing_label_is_an_error_everywhere_else(params, tmp_path, data_format):
    conversions(params, tmp_path, data_format, CONVERSIONS)
    params["label_col"] = [LABELS[0], {**MISSING, "may_be_missing": False}]
    with pytest.raises(ValueError, match=rf"train\.{data_format}: column 'conversion' is empty in row 2"):
        build_h5(params)


def test_what_is_no_number_is_no_missing_label(params, tmp_path):
    conversions(params, tmp_path, "parquet", [*CONVERSIONS[:-1], math.inf])
    with pytest.raises(ValueError, match=r"column 'conversion' has 'inf', which is not a number in row 8"):
        build_h5(params)
    conversions(params, tmp_path, "csv", [*map(str, [1, 0, 1]), "yes", "", "1", "0", "1"])
    with pytest.raises(ValueError, match=r"column 'conversion' has 'yes', which is not a number in row 4"):
        build_h5(params)
    params["label_col"] = [LABELS[0], {**MISSING, "fill_na": 0}]
    with pytest.raises(ValueError, match="'conversion': fill_na and may_be_missing exclude each other"):
        build_h5(params)


def test_a_label_that_a_whole_split_lacks_is_an_error(params, tmp_path):
    conversions(params, tmp_path, "parquet", CONVERSIONS)
    empty = pl.read_parquet(params["valid_data"]).with_columns(conversion=pl.lit(None, pl.Float64))
    empty.write_parquet(params["valid_data"])
    paths = build_h5(params)
    with pytest.raises(ValueError, match=r"label 'conversion' is missing in every row of the valid split; leave"):
        H5DataLoader(load_feature_map(params), paths["valid"], "valid")


@pytest.mark.parametrize("change", [{}, {"dtype": "int", "fill_na": 5}, {"share_embedding": "items"}])
def test_scenarios_are_named_by_their_raw_values(params, change):
    """Whatever the encoder does: every row's id stands for its value, or for one that training lacks."""
    columns = [FEATURES[0], FEATURES[6], {**FEATURES[5], "share_embedding": None, "name": "items"}]
    columns[2].pop("share_embedding")
    name = "item" if "share_embedding" in change else "cate"
    columns.append({"name": name, "active": True, "dtype": "str", "type": "categorical", **change})
    paths = build_h5({**params, "feature_cols": columns})
    feature_map = load_feature_map(params)
    names = scenario_names(feature_map, name)
    assert list(names) == list(range(1, feature_map.features[name]["vocab_size"]))
    assert list(names.values()).count("unseen") == 1
    seen = set(names.values())
    for split in ("train", "test"):
        raw = pl.read_csv(params[f"{split}_data"])[name].cast(pl.String).to_list()
        for value, i in zip(raw, read_columns(paths[split])[name]):
            value = str(change["fill_na"]) if value is None and "fill_na" in change else value
            assert names.get(i, "padding") == (value if value in seen else "unseen"), value
    (Path(params["data_root"]) / "tiny" / "feature_vocab.json").unlink()
    ids = [*map(str, range(1, len(names))), "unseen"]
    assert list(scenario_names(feature_map, name).values()) == ids


def test_what_is_no_scenario_is_named(params, tmp_path):
    build_h5(params)
    feature_map = load_feature_map(params)
    with pytest.raises(ValueError, match=r"scenario 'cat' is no feature \(did you mean 'cate'\?\)"):
        scenario_names(feature_map, "cat")
    for name, kind in (("price", "numeric"), ("items", "sequence"), ("user", "meta")):
        with pytest.raises(ValueError, match=f"scenario '{name}' is {kind}; a scenario is a categorical feature"):
            scenario_names(feature_map, name)
    (tmp_path / "built" / "tiny" / "feature_vocab.json").write_text('{"item": {}}')
    with pytest.raises(ValueError, match=r"feature_vocab\.json is damaged: it lacks cate"):
        scenario_names(feature_map, "cate")


def test_missing_source_is_named(params):
    with pytest.raises(FileNotFoundError, match=r"valid data: there is no file nowhere.csv"):
        build_h5({**params, "valid_data": "nowhere.csv"})
    with pytest.raises(FileNotFoundError, match=r"no feature_map.json; build the data set first"):
        load_feature_map(params)


def test_data_that_is_h5_already_is_taken_as_it_is(params):
    paths = build_h5(params)
    given = {**params, "data_format": "h5", "train_data": paths["train"].removesuffix(".h5"), "valid_data": None}
    assert build_h5({**given, "test_data": paths["test"]}) == {**paths, "valid": None}
    with pytest.raises(FileNotFoundError, match="no h5 data at nowhere"):
        build_h5({**given, "test_data": "nowhere"})

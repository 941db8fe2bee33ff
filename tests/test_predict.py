"""Scoring files: against the engine's own predictions, and what is wrong with a file."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from flowctr import cli, experiment
from flowctr.config import REPOSITORY
from flowctr.data import H5DataLoader
from flowctr.metrics import evaluate_metrics
from flowctr.predict import predict
from flowctr.trained import load_trained
from flowctr.training import TrainingError

LABELS = ["is_click", "is_like", "long_view"]
TINY = REPOSITORY / "data" / "kuairand_tiny"

MODEL_CONFIG = """
DOT_mixed:
    model: DOT
    dataset_id: mixed
    metrics: [logloss]
    optimizer: adam
    loss: binary_crossentropy
    batch_size: 50
    epochs: 1
    seed: 1
    monitor: logloss
    monitor_mode: min
    verbose: 0
    embedding_dim: 4
    embedding_initializer: partial(nn.init.normal_, std=0.5)
    head_hidden_units: [8]
"""
DATASET_CONFIG = """
mixed:
    data_root: built
    data_format: csv
    train_data: train.csv
    valid_data: valid.csv
    sep: ;
    group_id: group
    feature_cols:
        - {name: group, active: true, dtype: int, type: meta, preprocess: copy_from(user), remap: false}
        - {name: user, active: true, dtype: int, type: categorical}
        - {name: item, active: true, dtype: str, type: categorical}
        - {name: item_again, active: true, dtype: str, type: categorical, preprocess: copy_from(item)}
        - {name: price, active: true, dtype: float, type: numeric, normalizer: StandardScaler}
        - {name: seen, active: true, dtype: str, type: sequence, max_len: 4, share_embedding: item}
    label_col: {name: click, dtype: float}
"""


def engine_predictions(trained, split):
    path = trained.files[split]
    return trained.model.predict(H5DataLoader(trained.feature_map, path, split=split, batch_size=64))


def load_tiny(model, folder, overrides):
    config = REPOSITORY / "model_zoo" / model / "config"
    return load_trained(config, f"{model}_test", None, folder, -1, overrides)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """InterFormer, trained on the tiny window, its result and the file of its test rows."""
    folder = tmp_path_factory.mktemp("InterFormer")
    overrides = ["epochs=1", "verbose=0", f"data_root={folder / 'data'}"]
    config = REPOSITORY / "model_zoo" / "InterFormer" / "config"
    result = experiment.run(config, "InterFormer_test", None, folder, -1, overrides)
    return load_tiny("InterFormer", folder, overrides), json.loads(result.read_text())


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """DOT, trained on a small csv with integer and text ids, a scaled number and a sequence."""
    folder = tmp_path_factory.mktemp("DOT")
    (folder / "config").mkdir()
    (folder / "config" / "model_config.yaml").write_text(MODEL_CONFIG)
    (folder / "config" / "dataset_config.yaml").write_text(DATASET_CONFIG)
    for split, rows in (("train", 200), ("valid", 120)):
        mixed_rows(rows, seed=rows).write_csv(folder / f"{split}.csv", separator=";")
    experiment.run(folder / "config", "DOT_mixed")
    return load_trained(folder / "config", "DOT_mixed")


def mixed_rows(rows, seed) -> pl.DataFrame:
    random = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "user": random.integers(0, 9, rows),
            "item": [f"i{i}" for i in random.integers(0, 12, rows)],
            "price": random.normal(5, 2, rows).round(3),
            "seen": ["^".join(f"i{i}" for i in random.integers(0, 12, n)) for n in random.integers(0, 6, rows)],
            "click": random.integers(0, 2, rows),
            "note": [f"0{i}" for i in range(rows)],
        }
    )


@pytest.fixture
def rows():
    return mixed_rows(120, seed=120)  # those of the validation split


def scores_of(trained, frame, tmp_path, suffix="csv", ids=()):
    data, out = tmp_path / f"rows.{suffix}", tmp_path / "scores.parquet"
    frame.write_csv(data, separator=";") if suffix == "csv" else frame.write_parquet(data)
    assert predict(trained, data, out, ids) == len(frame)
    return pl.read_parquet(out)


# Equal to the engine


@pytest.mark.parametrize("suffix", ["parquet", "csv", "h5"])
def test_test_rows_score_as_in_the_evaluation(tiny, suffix, tmp_path, monkeypatch):
    monkeypatch.setattr("flowctr.predict.CHUNK_ROWS", 400)  # 993 rows: 3 chunks, of 2 batches each
    trained, result = tiny
    raw = pl.read_parquet(TINY / "test.parquet")
    data = tmp_path / f"rows.{suffix}"
    match suffix:
        case "csv":
            raw.drop(LABELS).write_csv(data)
        case "parquet":
            raw.drop(LABELS).write_parquet(data)
        case "h5":
            data = trained.files["test"]
    assert predict(trained, data, tmp_path / "scores.parquet") == 993
    scores = pl.read_parquet(tmp_path / "scores.parquet")
    assert scores.columns == ["row", *(f"{label}_pred" for label in LABELS)]
    assert scores["row"].to_list() == list(range(993))
    expected = engine_predictions(trained, "test")
    for label in LABELS:
        found = scores[f"{label}_pred"].to_numpy()
        np.testing.assert_allclose(found, expected[label], atol=1e-6, rtol=0)
        reported = result["metrics"]["test"][f"{label}_AUC"]
        assert evaluate_metrics(raw[label].to_numpy(), found, ["AUC"])["AUC"] == pytest.approx(reported, abs=1e-5)


def test_a_model_of_two_stages_scores_with_its_last(tmp_path):
    overrides = ["epochs=1", "search_epochs=2", "verbose=0", f"data_root={tmp_path / 'data'}"]
    experiment.run(REPOSITORY / "model_zoo" / "AutoIFS" / "config", "AutoIFS_test", None, tmp_path, -1, overrides)
    for checkpoint in tmp_path.glob("checkpoints/*/*search.model"):
        checkpoint.unlink()  # the last stage's is enough
    trained = load_tiny("AutoIFS", tmp_path, overrides)
    assert not trained.model.searches
    predict(trained, REPOSITORY / "data" / "kuairand_tiny_tabs" / "test.parquet", tmp_path / "scores.csv")
    scores = pl.read_csv(tmp_path / "scores.csv")
    for label, expected in engine_predictions(trained, "test").items():
        np.testing.assert_allclose(scores[f"{label}_pred"], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_mixed_columns_score_as_in_the_evaluation(mixed, rows, suffix, tmp_path):
    scores = scores_of(mixed, rows.drop("click"), tmp_path, suffix)
    assert scores.columns == ["row", "click_pred"]
    np.testing.assert_allclose(scores["click_pred"], engine_predictions(mixed, "valid")["click"], atol=1e-6, rtol=0)
    assert scores["click_pred"].std() > 1e-3


def test_columns_that_the_model_leaves_out_are_not_needed(mixed, rows, tmp_path):
    config = Path(mixed.params["data_root"]).parent / "config"
    overrides = ["use_features=[group, user, item, seen]", "seed=2", f"model_root={tmp_path}"]
    experiment.run(config, "DOT_mixed", overrides=overrides)
    trained = load_trained(config, "DOT_mixed", overrides=overrides)
    scores = scores_of(trained, rows.drop("price"), tmp_path)
    np.testing.assert_allclose(scores["click_pred"], engine_predictions(trained, "valid")["click"], atol=1e-6, rtol=0)


def test_unseen_and_empty_values_count_as_in_an_evaluation(mixed, rows, tmp_path):
    unseen = rows.with_columns(
        user=pl.when(pl.col("note") == "00").then(999).otherwise("user"),
        item=pl.when(pl.col("note") == "01").then(pl.lit("new")).otherwise("item"),
        price=pl.when(pl.col("note") == "02").then(None).otherwise("price"),
    )
    found = scores_of(mixed, unseen, tmp_path)["click_pred"].to_numpy()
    batch = next(iter(mixed.loader(mixed.files["valid"], len(rows))))
    sizes = {name: spec.get("vocab_size") for name, spec in mixed.feature_map.features.items()}
    batch["user"][0] = sizes["user"] - 1  # FuxiCTR's id of unseen values
    batch["item"][1] = batch["item_again"][1] = sizes["item"] - 1
    train = pl.read_csv(mixed.params["train_data"], separator=";")["price"]
    batch["price"][2] = (0 - train.mean()) / train.std(ddof=0)  # empty is 0, scaled
    with torch.no_grad():
        expected = mixed.score(batch)["click_pred"].flatten().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)
    assert (found[:3] != scores_of(mixed, rows, tmp_path)["click_pred"].to_numpy()[:3]).all()


def test_other_types_of_the_same_values_score_the_same(mixed, rows, tmp_path):
    expected = scores_of(mixed, rows, tmp_path, "parquet")
    other = rows.with_columns(
        pl.col("item").cast(pl.Categorical),
        pl.col("user").cast(pl.Int16),
        pl.col("price").cast(pl.String),
        seen=pl.when(pl.col("seen") == "").then(None).otherwise(pl.col("seen").str.split("^")),
    )
    assert scores_of(mixed, other, tmp_path, "parquet").equals(expected)


# Ids and output


def test_the_command_writes_ids_as_they_are(mixed, rows, tmp_path, capsys):
    data, out = tmp_path / "rows.csv", tmp_path / "deep" / "scores.csv"
    rows = rows.with_columns(user=pl.format("0{}", "user"))
    rows.write_csv(data, separator=";")
    folder = str(Path(mixed.params["data_root"]).parent / "config")
    options = ["--set", f"model_root={mixed.params['model_root']}", "--seed", "1", "--id", "note", "--id", "user"]
    command = ["predict", "DOT", "--expid", "DOT_mixed", "--config", folder, *options]
    cli.app([*command, "--data", str(data), "--out", str(out)], standalone_mode=False)
    assert capsys.readouterr().out.splitlines()[-1] == f"{out}: 120 rows"
    scores = pl.read_csv(out, infer_schema=False)
    assert scores.columns == ["note", "user", "click_pred"]
    assert scores["note"].to_list() == rows["note"].to_list()
    assert scores["user"].to_list() == rows["user"].to_list()  # 03, although the model reads a 3
    expected = engine_predictions(mixed, "valid")["click"]
    np.testing.assert_allclose(scores["click_pred"].cast(pl.Float64), expected, atol=1e-6, rtol=0)
    assert [path.name for path in out.parent.iterdir()] == ["scores.csv"]


def test_ids_of_an_h5_file_are_its_columns(mixed, rows, tmp_path):
    predict(mixed, mixed.files["valid"], tmp_path / "scores.parquet", ["group"])
    assert pl.read_parquet(tmp_path / "scores.parquet")["group"].to_list() == rows["user"].to_list()


def test_what_was_there_stays_when_scoring_fails(mixed, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("flowctr.predict.CHUNK_ROWS", 50)
    data, out = tmp_path / "rows.csv", tmp_path / "out" / "scores.csv"
    out.parent.mkdir()
    out.write_text("before")
    rows.with_columns(price=pl.col("price").cast(pl.String).replace(rows["price"][110], "x")).write_csv(
        data, separator=";"
    )
    with pytest.raises(ValueError, match=r"column 'price' has 'x' in row 110 \(line 112\), not a number"):
        predict(mixed, data, out)
    assert out.read_text() == "before"
    assert [path.name for path in out.parent.iterdir()] == ["scores.csv"]


def test_a_prediction_that_is_no_number(mixed, rows, tmp_path, monkeypatch):
    bias = mixed.model.heads.towers[0].mlp[-1].bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias.data, torch.nan))
    with pytest.raises(TrainingError, match="predicts nan or inf for click"):
        scores_of(mixed, rows, tmp_path)


# Wrong input


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda rows: rows.drop("price", "seen").rename({"item": "itm"}),
            "lacks .*'item' .did you mean 'itm'.*'price'",
        ),
        (lambda rows: rows.with_columns(user=pl.lit("u1")), r"'user' has 'u1' in row 0 \(line 2\), not an integer"),
        (lambda rows: rows.with_columns(user=pl.lit("1.5")), r"'user' has '1.5' in row 0"),
        (lambda rows: rows.with_columns(price=pl.lit("nan")), "rows 0 to 119: column 'price' .* not a finite number"),
        (lambda rows: rows.head(0), "has no rows"),
    ],
    ids=["missing", "text", "fraction", "nan", "no rows"],
)
def test_wrong_csv(mixed, rows, change, message, tmp_path):
    change(rows).write_csv(tmp_path / "rows.csv", separator=";")
    with pytest.raises(ValueError, match=message):
        predict(mixed, tmp_path / "rows.csv", tmp_path / "scores.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"user": pl.col("user").cast(pl.String)}, "column 'user' is String; the model was trained with numbers there"),
        ({"item": pl.lit(3)}, "column 'item' is Int32; the model was trained with text there"),
        ({"seen": pl.lit(1.5)}, "column 'seen' is Float64; the model was trained with text or lists there"),
        ({"price": pl.lit("cheap")}, "column 'price' has 'cheap' in row 0, not a number"),
        ({"price": pl.lit([1.0])}, r"column 'price' is List\(Float64\); the model was trained with numbers or text"),
    ],
    ids=["text for int", "int for text", "number for sequence", "text for number", "list for number"],
)
def test_wrong_types_in_parquet(mixed, rows, change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        scores_of(mixed, rows.with_columns(**change), tmp_path, "parquet")


def test_damaged_files(mixed, rows, tmp_path):
    out = tmp_path / "scores.csv"
    text = rows.write_csv(separator=";")
    (tmp_path / "cut.csv").write_text(text[: text.rindex(";") - 1])
    (tmp_path / "empty.csv").write_text("")
    rows.write_parquet(tmp_path / "cut.parquet")
    whole = (tmp_path / "cut.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "other.h5").write_bytes(b"no h5")
    for name, message in {
        "cut.csv": "cut off in line 121",
        "empty.csv": "is an empty file",
        "cut.parquet": "cannot be read",
        "other.h5": "not an h5 file",
        "rows.txt": r"rows.txt ends in '.txt'; it must end in .csv or .parquet or .h5",
    }.items():
        with pytest.raises(ValueError, match=message):
            predict(mixed, tmp_path / name, out)
    with pytest.raises(ValueError, match=r"scores.json ends in '.json'; it must end in .csv or .parquet"):
        predict(mixed, tmp_path / "cut.csv", tmp_path / "scores.json")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        predict(mixed, tmp_path / "none.csv", out)
    assert not out.exists()


def test_an_h5_file_of_another_data_set(mixed, tiny, tmp_path):
    with pytest.raises(ValueError, match="no column 'user'"):
        predict(mixed, tiny[0].files["test"], tmp_path / "scores.csv")


@pytest.mark.parametrize(
    "ids, message",
    [
        (["nte"], "has no column 'nte' .did you mean 'note'"),
        (["tags"], "'tags' .* has many values in a row"),
        (["click_pred"], "'click_pred' is the name of a score"),
    ],
)
def test_wrong_ids(mixed, rows, ids, message, tmp_path):
    frame = rows.with_columns(tags=pl.lit(["a", "b"]), click_pred=pl.lit(0.5))
    with pytest.raises(ValueError, match=message):
        scores_of(mixed, frame, tmp_path, "parquet", ids)


def test_weights_of_an_interrupted_run_are_no_trained_model(mixed, tmp_path):
    folder = Path(mixed.params["model_root"]).parent
    resume = next(folder.glob("checkpoints/*/DOT_mixed-*.model")).with_suffix(".resume")
    resume.touch()
    try:
        with pytest.raises(ValueError, match=rf"finish it with --resume, or delete {resume} to take the weights"):
            load_trained(folder / "config", "DOT_mixed")
    finally:
        resume.unlink()


def test_scores_do_not_replace_the_rows(mixed, rows, tmp_path):
    rows.write_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows\.parquet holds the rows to score"):
        predict(mixed, tmp_path / "rows.parquet", tmp_path / "." / ".." / tmp_path.name / "rows.parquet")
    assert pl.read_parquet(tmp_path / "rows.parquet").equals(rows)


def test_numbers_are_tokens_where_training_had_them_so(tmp_path, rows):
    """Such as a parquet file's integers under `dtype: str`; floats would be other tokens."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "model_config.yaml").write_text(MODEL_CONFIG)
    text = DATASET_CONFIG.replace("csv", "parquet").replace(
        "user, active: true, dtype: int", "user, active: true, dtype: str"
    )
    (tmp_path / "config" / "dataset_config.yaml").write_text(text)
    for split, count in (("train", 200), ("valid", 120)):
        mixed_rows(count, seed=count).write_parquet(tmp_path / f"{split}.parquet")
    experiment.run(tmp_path / "config", "DOT_mixed")
    trained = load_trained(tmp_path / "config", "DOT_mixed")
    scores = scores_of(trained, rows, tmp_path, "parquet")
    np.testing.assert_allclose(scores["click_pred"], engine_predictions(trained, "valid")["click"], atol=1e-6)
    with pytest.raises(ValueError, match="'user' is Float64; the model was trained with text there"):
        scores_of(trained, rows.with_columns(pl.col("user").cast(pl.Float64)), tmp_path, "parquet")


def test_raw_rows_need_a_data_set_that_flowctr_built(mixed, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(mixed.feature_map, "data_dir", str(tmp_path))
    with pytest.raises(ValueError, match="was not built by flowctr, so how to encode raw rows is not known"):
        scores_of(mixed, rows, tmp_path)

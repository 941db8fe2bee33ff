"""Scenarios, missing labels and learned loss weights together, from raw tables to metrics."""

import logging

import numpy as np
import polars as pl
import pytest
from flowctr.data import H5DataLoader, build_h5, load_feature_map
from flowctr.metrics import evaluate_metrics
from flowctr.training import accelerate
from fuxictr.pytorch.torch_utils import seed_everything
from test_training import SETTINGS, TwoTasks

METRICS = ["AUC", "gAUC", "logloss", "NE"]


def write_table(path, rows, seed, tabs):
    """Draws clicks, conversions that are known after a click only, and tabs of which some are rare."""
    rng = np.random.default_rng(seed)
    item, tab = rng.integers(0, 20, rows), rng.choice(tabs, rows)
    click = item + 2 * tab + rng.normal(0, 6, rows) > 15
    conversion = [float(bought) if clicked else None for clicked, bought in zip(click, rng.random(rows) < 0.4)]
    table = {"click": click.astype(float), "conversion": conversion, "user": rng.integers(0, 9, rows)}
    pl.DataFrame({**table, "item": item.astype(str), "tab": tab.astype(str)}).write_parquet(path)


@pytest.fixture
def params(tmp_path):
    for split, (rows, seed, tabs) in {"train": (900, 1, [0, 1, 4]), "valid": (500, 2, [0, 1, 4, 7])}.items():
        write_table(tmp_path / f"{split}.parquet", rows, seed, tabs)
    return {
        "dataset_id": "tabs",
        "data_root": str(tmp_path),
        "data_format": "parquet",
        **{f"{split}_data": str(tmp_path / f"{split}.parquet") for split in ("train", "valid")},
        "feature_cols": [
            {"name": "user", "active": True, "dtype": "int", "type": "meta"},
            {"name": ["item", "tab"], "active": True, "dtype": "str", "type": "categorical"},
        ],
        "label_col": [
            {"name": "click", "dtype": "float"},
            {"name": "conversion", "dtype": "float", "may_be_missing": True},
        ],
        "group_id": "user",
        "scenario": "tab",
    }


def test_from_raw_tables_to_metrics_within_scenarios(params, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    paths = build_h5(params)
    feature_map = load_feature_map(params)
    train_data = H5DataLoader(feature_map, paths["train"], "train", batch_size=64, shuffle=True, seed=1)
    valid_data = H5DataLoader(feature_map, paths["valid"], "valid", batch_size=64)
    seed_everything(1)
    monitor = {"click_AUC@tab": 0.5, "conversion_logloss": -0.5}
    settings = {**SETTINGS, "metrics": METRICS, "monitor": monitor, "loss_weight": "UW", "scenario": "tab"}
    model = accelerate(TwoTasks)(feature_map, model_id="run", **{**settings, "model_root": str(tmp_path / "runs")})
    model.fit(train_data, validation_data=valid_data, epochs=4)

    values = [record["click_AUC@tab"] / 2 - record["conversion_logloss"] / 2 for record in model.history["valid"]]
    assert model.restored == model.history["valid"][int(np.argmax(values))]
    raw = {split: pl.read_parquet(params[f"{split}_data"]) for split in ("train", "valid")}
    predictions = model.predict(valid_data)
    expected = {}
    for label in ("click", "conversion"):
        truth = raw["valid"][label].cast(pl.Float64).fill_null(np.nan).to_numpy()
        rate, tab = raw["train"][label].mean(), raw["valid"]["tab"].to_numpy()
        users = raw["valid"]["user"].to_numpy()
        for name in (None, "0", "1", "4", "7"):
            rows = ~np.isnan(truth) & (np.full(len(tab), True) if name is None else tab == name)
            where = "" if name is None else "@tab=unseen" if name == "7" else f"@tab={name}"
            scores = evaluate_metrics(truth[rows], predictions[label][rows], METRICS, users[rows], rate)
            expected |= {f"{label}_{metric}{where}": value for metric, value in scores.items()}
        for metric in METRICS:
            expected[f"{label}_{metric}@tab"] = np.mean([expected[f"{label}_{metric}@tab={i}"] for i in (0, 1, 4)])
    for metric in METRICS:
        for where in ("", "@tab", "@tab=0", "@tab=1", "@tab=4", "@tab=unseen"):
            both = [expected[f"{label}_{metric}{where}"] for label in ("click", "conversion")]
            expected[metric + where] = np.mean(both)
    found = {name: value for name, value in model.restored.items() if name not in ("step", "epoch")}
    assert found == pytest.approx(expected, rel=1e-6)

    unseen = int((raw["valid"]["tab"] == "7").sum())
    assert caplog.text.count(f"{unseen} of 500 rows have an unknown tab (missing, rare or not in training)") == 1
    assert caplog.text.count("Loss weights: click ") == len(model.history["valid"]) == 4

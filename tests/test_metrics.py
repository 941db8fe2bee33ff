"""Metrics against brute-force loops, scikit-learn and FuxiCTR."""

import math
import warnings

import fuxictr.metrics
import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn.metrics
import torch
from flowctr.metrics import evaluate_metrics, evaluate_metrics_within
from hypothesis import given, settings
from hypothesis import strategies as st

GROUP_METRICS = ["gAUC", "avgAUC", "MRR", "NDCG@1", "NDCG@3", "NDCG(k=100)"]
ALL_METRICS = ["logloss", "NE", "AUC", *GROUP_METRICS]

# Few distinct scores and groups: ties, constant predictions and one-class groups are common.
ROWS = st.lists(st.tuples(st.integers(0, 1), st.integers(-3, 3), st.integers(0, 4)), min_size=1, max_size=40)


def evaluate(*args, **kwargs):
    """Evaluate without the warnings for undefined values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return evaluate_metrics(*args, **kwargs)


def random_log(seed: int, rows: int = 400, groups: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw labels, distinct probabilities and shuffled groups of which some have one class."""
    rng = np.random.default_rng(seed)
    y_true = rng.integers(0, 2, rows).astype(np.float64)
    y_pred = rng.permutation(np.linspace(0.01, 0.99, rows))
    return y_true, y_pred, rng.integers(0, groups, rows)


# ---------------------------------------------------------------------------------------------- brute-force references


def loop_auc(labels, scores):
    """Share of (positive, negative) pairs in the right order, a tie counts one half; None with one class."""
    pairs = [(p, n) for p, y in zip(scores, labels) if y for n, z in zip(scores, labels) if not z]
    return sum((p > n) + (p == n) / 2 for p, n in pairs) / len(pairs) if pairs else None


def loop_ranking(scores):
    """Row numbers from the highest score down, the later of two equal rows first."""
    return sorted(range(len(scores)), key=lambda row: (scores[row], row), reverse=True)


def loop_mrr(labels, scores):
    ranks = [rank for rank, row in enumerate(loop_ranking(scores), start=1) if labels[row]]
    return sum(1 / rank for rank in ranks) / len(ranks) if ranks else 0.0


def loop_ndcg(labels, scores, k):
    def dcg(by):
        return sum((2 ** labels[row] - 1) / math.log2(i + 2) for i, row in enumerate(loop_ranking(by)[:k]))

    return dcg(scores) / dcg(labels) if any(labels) else 0.0


def loop_evaluate(labels, scores, groups):
    members = [[row for row, g in enumerate(groups) if g == group] for group in dict.fromkeys(groups)]
    parts = [([labels[row] for row in rows], [scores[row] for row in rows]) for rows in members]
    aucs = [(auc, len(part[0])) for part in parts if (auc := loop_auc(*part)) is not None]
    auc = loop_auc(labels, scores)
    return {
        "AUC": math.nan if auc is None else auc,
        "gAUC": sum(a * n for a, n in aucs) / sum(n for _, n in aucs) if aucs else math.nan,
        "avgAUC": sum(a for a, _ in aucs) / len(aucs) if aucs else math.nan,
        "MRR": sum(loop_mrr(*part) for part in parts) / len(parts),
        **{
            name: sum(loop_ndcg(*part, k) for part in parts) / len(parts)
            for name, k in (("NDCG@1", 1), ("NDCG@3", 3), ("NDCG(k=100)", 100))
        },
    }


@settings(max_examples=300, deadline=None)
@given(ROWS)
def test_equals_brute_force(rows):
    labels, scores, groups = (list(column) for column in zip(*rows))
    scores = [score / 2 for score in scores]
    found = evaluate(labels, scores, ["AUC", *GROUP_METRICS], groups)
    assert found == pytest.approx(loop_evaluate(labels, scores, groups), abs=1e-12, nan_ok=True)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=20), st.integers(1, 5))
def test_graded_ndcg_equals_brute_force(rows, k):
    labels, scores = (list(column) for column in zip(*rows))
    found = evaluate(labels, scores, [f"NDCG@{k}"], [0] * len(rows))
    assert found[f"NDCG@{k}"] == pytest.approx(loop_ndcg(labels, scores, k), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(ROWS, st.randoms(use_true_random=False))
def test_row_order_and_group_names_are_irrelevant(rows, random):
    labels, scores, groups = (np.array(column) for column in zip(*rows))
    scores = scores + np.linspace(0, 0.5, len(rows))  # MRR and NDCG break ties by row order, so have none
    order = np.array(random.sample(range(len(rows)), len(rows)))
    metrics = ["AUC", *GROUP_METRICS]
    names = np.array(["u9", "u10", "", "ü", "u1"])[groups]
    expected = evaluate(labels, scores, metrics, groups)
    found = evaluate(labels[order], scores[order], metrics, names[order])
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_auc_ignores_monotone_transforms_and_flips_with_the_sign(rows):
    labels, scores, groups = (np.array(column) for column in zip(*rows))
    metrics = ["AUC", "gAUC", "avgAUC"]
    expected = evaluate(labels, scores, metrics, groups)
    assert evaluate(labels, np.exp(scores), metrics, groups) == pytest.approx(expected, nan_ok=True)
    flipped = {name: 1 - value for name, value in expected.items()}
    assert evaluate(labels, -scores, metrics, groups) == pytest.approx(flipped, nan_ok=True)


# -------------------------------------------------------------------------------------------- scikit-learn and FuxiCTR


@pytest.mark.parametrize("seed", range(3))
def test_equals_scikit_learn(seed):
    y_true, y_pred, _ = random_log(seed, rows=5000)
    y_pred = np.round(y_pred, 2)  # ties
    found = evaluate_metrics(y_true, y_pred, ["logloss", "binary_crossentropy", "AUC"])
    logloss = sklearn.metrics.log_loss(y_true, y_pred)
    auc = sklearn.metrics.roc_auc_score(y_true, y_pred)
    assert found == pytest.approx({"logloss": logloss, "binary_crossentropy": logloss, "AUC": auc}, abs=1e-9)


# scikit-learn computes float32 input in float32.
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-9), (np.int64, 1e-9), (np.float32, 1e-6)])
def test_saturated_predictions_are_clipped_as_in_scikit_learn(dtype, tolerance):
    y_true, y_pred = np.array([0, 1, 1, 0]), np.array([0, 0, 1, 1], dtype)
    expected = sklearn.metrics.log_loss(y_true, y_pred)
    assert evaluate_metrics(y_true, y_pred, ["logloss"])["logloss"] == pytest.approx(expected, abs=tolerance, rel=0)


@pytest.mark.parametrize("seed", range(3))
def test_equals_fuxictr_group_by_group(seed):
    y_true, y_pred, group_id = random_log(seed)
    rounded = np.round(y_pred, 1)
    for name, function, scores in (
        ("gAUC", fuxictr.metrics.gAUC, rounded),
        ("avgAUC", fuxictr.metrics.avgAUC, rounded),
        ("MRR", fuxictr.metrics.MRR, y_pred),  # FuxiCTR's order of ties depends on the CPU
        ("NDCG@1", fuxictr.metrics.NDCG(), y_pred),
        ("NDCG(k=5)", fuxictr.metrics.NDCG(k=5), y_pred),
    ):
        pairs = [function(y_true[group_id == group], scores[group_id == group]) for group in np.unique(group_id)]
        values, weights = zip(*(pair if isinstance(pair, tuple) else (pair, 1) for pair in pairs))
        found = evaluate_metrics(y_true, scores, [name], group_id)
        assert found[name] == pytest.approx(sum(values) / sum(weights), abs=1e-9), name


def test_equals_fuxictr_evaluate_metrics(monkeypatch):
    monkeypatch.setattr(fuxictr.metrics.mp, "cpu_count", lambda: 2)  # its pool of cpu_count // 2 fails on one core
    y_true, y_pred, group_id = random_log(0, rows=60, groups=12)
    metrics = ["gAUC", "logloss", "NDCG(1)", "AUC", "MRR", "binary_crossentropy", "NDCG(k=5)", "avgAUC", "NDCG()"]
    expected = fuxictr.metrics.evaluate_metrics(y_true, y_pred, metrics, group_id)
    found = evaluate_metrics(y_true, y_pred, metrics, group_id)
    assert found == pytest.approx(dict(expected), abs=1e-9)
    assert list(found) == metrics


# ------------------------------------------------------------------------------------------------------ fixed examples


def test_group_metrics_by_hand():
    # Group a: perfect; group b: wrong, three rows; group c: positives only; group d: negatives only.
    group_id = ["a", "b", "b", "b", "a", "c", "c", "d"]
    y_true = [1, 0, 0, 1, 0, 1, 1, 0]
    y_pred = [0.9, 0.8, 0.7, 0.1, 0.2, 0.5, 0.6, 0.3]
    assert evaluate_metrics(y_true, y_pred, ["gAUC", "avgAUC", "MRR", "NDCG@1", "NDCG@3"], group_id) == pytest.approx(
        {
            "gAUC": 2 / 5,
            "avgAUC": 1 / 2,
            "MRR": (1 + 1 / 3 + 3 / 4 + 0) / 4,
            "NDCG@1": (1 + 0 + 1 + 0) / 4,
            "NDCG@3": (1 + 1 / 2 + 1 + 0) / 4,
        }
    )


@pytest.mark.parametrize("spelling", ["NDCG@3", "NDCG(3)", "NDCG(k=3)", "NDCG( k = 3 )"])
def test_spellings_of_ndcg(spelling):
    y_true, y_pred, group_id = random_log(1)
    expected = evaluate_metrics(y_true, y_pred, ["NDCG@3"], group_id)["NDCG@3"]
    assert evaluate_metrics(y_true, y_pred, [spelling], group_id) == {spelling: expected}
    assert expected != evaluate_metrics(y_true, y_pred, ["NDCG@2"], group_id)["NDCG@2"]


def test_equal_scores_rank_the_later_row_first():
    found = evaluate_metrics([1, 0, 0], [0.5, 0.5, 0.5], ["MRR", "NDCG@2"], [7, 7, 7])
    assert found == pytest.approx({"MRR": 1 / 3, "NDCG@2": 0})
    assert evaluate_metrics([0, 0, 1], [0.5, 0.5, 0.5], ["MRR"], [7, 7, 7]) == {"MRR": 1}


def test_infinite_scores_are_ranked():
    y_true, y_pred = [0, 0, 1, 1], [-np.inf, np.inf, np.inf, 0.0]
    assert evaluate_metrics(y_true, y_pred, ["AUC"]) == {"AUC": (1 + 0.5 + 1 + 0) / 4}


@pytest.mark.parametrize("convert", [list, pd.Series, pl.Series, torch.tensor, lambda x: np.array(x)[:, None]])
def test_kinds_of_arrays(convert):
    y_true, y_pred, group_id = (column.tolist() for column in random_log(2))
    expected = evaluate_metrics(np.array(y_true), np.array(y_pred), ALL_METRICS, np.array(group_id))
    y_pred = torch.tensor(y_pred, dtype=torch.float64) if convert is torch.tensor else convert(y_pred)
    assert evaluate_metrics(convert(y_true), y_pred, ALL_METRICS, convert(group_id)) == expected


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint8, np.int64, np.float32, object])
def test_types_of_labels(dtype):
    y_true, y_pred, group_id = random_log(3)
    expected = evaluate_metrics(y_true, y_pred, ALL_METRICS, group_id)
    assert evaluate_metrics(y_true.astype(dtype), y_pred, ALL_METRICS, group_id) == expected


@pytest.mark.parametrize("convert", [lambda g: g.astype(str), lambda g: g.astype(str).astype(object), np.negative])
def test_types_of_group_ids(convert):
    y_true, y_pred, group_id = random_log(4)
    expected = evaluate_metrics(y_true, y_pred, GROUP_METRICS, group_id)
    assert evaluate_metrics(y_true, y_pred, GROUP_METRICS, convert(group_id)) == pytest.approx(expected, abs=1e-12)


def test_missing_group_ids_are_one_group():
    y_true, y_pred, group_id = random_log(5)
    expected = evaluate_metrics(y_true, y_pred, GROUP_METRICS, group_id)
    missing = np.where(group_id == 3, None, group_id.astype(object))
    assert evaluate_metrics(y_true, y_pred, GROUP_METRICS, missing) == pytest.approx(expected, abs=1e-12)


def test_inputs_are_left_as_they_are():
    arrays = random_log(6)
    copies = [array.copy() for array in arrays]
    evaluate_metrics(arrays[0], arrays[1], ALL_METRICS, arrays[2])
    for array, copy in zip(arrays, copies):
        np.testing.assert_array_equal(array, copy)


def test_no_metrics_give_no_values():
    assert evaluate_metrics([0, 1], [0.1, 0.2], []) == {}


# ------------------------------------------------------------------------------------------------------------------ NE


def test_ne_is_one_for_the_base_rate_itself():
    y_true = np.array([1, 0, 0, 0])
    assert evaluate_metrics(y_true, np.full(4, 0.25), ["NE"])["NE"] == pytest.approx(1, abs=1e-12)


def test_ne_uses_the_training_base_rate_where_given():
    y_true, y_pred, _ = random_log(7)
    found = evaluate_metrics(y_true, y_pred, ["logloss", "NE"], base_rate=0.1)
    entropy = -(0.1 * math.log(0.1) + 0.9 * math.log(0.9))
    assert found["NE"] == pytest.approx(found["logloss"] / entropy, abs=1e-12)
    assert found["NE"] != pytest.approx(evaluate_metrics(y_true, y_pred, ["NE"])["NE"], abs=0.1)


def test_ne_of_one_class_is_defined_by_the_training_base_rate():
    assert evaluate_metrics([0, 0], [0.5, 0.5], ["NE"], base_rate=0.5)["NE"] == pytest.approx(1, abs=1e-12)


# ----------------------------------------------------------------------------------------------- warnings and bad input


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("metric", ["AUC", "gAUC", "avgAUC", "NE"])
def test_one_class_gives_nan_and_a_warning_that_names_the_metric(metric, label):
    with pytest.warns(UserWarning, match=rf"^{metric} is undefined") as caught:
        found = evaluate_metrics([label] * 3, [0.1, 0.2, 0.3], [metric], [0, 0, 1])
    assert math.isnan(found[metric])
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("metric", ["gAUC", "avgAUC"])
def test_no_group_with_both_classes_gives_nan_and_a_warning(metric):
    with pytest.warns(UserWarning, match=f"{metric} is undefined .* no group has both classes"):
        found = evaluate_metrics([0, 1], [0.1, 0.2], [metric, "AUC"], [0, 1])
    assert math.isnan(found[metric])
    assert found["AUC"] == 1


@pytest.mark.parametrize("base_rate", [0, 1.0])
def test_ne_without_entropy_gives_nan_and_a_warning(base_rate):
    with pytest.warns(UserWarning, match="NE is undefined .* base rate is 0 or 1"):
        assert math.isnan(evaluate_metrics([0, 1], [0.1, 0.2], ["NE"], base_rate=base_rate)["NE"])


def test_metrics_that_one_class_leaves_defined():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluate_metrics([0, 0], [0.5, 0.5], ["logloss", "MRR", "NDCG@1"], [0, 1])
    assert found == pytest.approx({"logloss": math.log(2), "MRR": 0, "NDCG@1": 0})


@pytest.mark.parametrize(
    ("metric", "nearest"),
    [
        ("auc", "AUC"),
        ("GAUC", "gAUC"),
        ("log_loss", "logloss"),
        ("NDCG", "NDCG@k"),
        ("ndcg@5", "NDCG@k"),
        ("NDCG@0", "NDCG@k"),
        ("NDCG@k", "NDCG@k"),
        ("NDCG(k=__import__('os'))", "NDCG@k"),
        ("binary_cross_entropy", "binary_crossentropy"),
    ],
)
def test_unknown_metric_names_the_nearest(metric, nearest):
    with pytest.raises(ValueError) as error:
        evaluate_metrics([0, 1], [0.1, 0.2], ["AUC", metric], [0, 1])
    assert f"unknown metric {metric!r}; the nearest valid name is {nearest!r}" in str(error.value)


@pytest.mark.parametrize("metric", ["gAUC", "avgAUC", "MRR", "NDCG@5", "NDCG(k=5)"])
def test_group_metric_without_group_id(metric):
    with pytest.raises(ValueError) as error:
        evaluate_metrics([0, 1], [0.1, 0.2], ["AUC", metric])
    assert str(error.value).startswith(f"{metric} needs group_id")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"y_true": [0, 1, 1]}, "y_true, y_pred must have the same length; got 3, 2"),
        ({"group_id": [0]}, "y_true, y_pred, group_id must have the same length; got 2, 2, 1"),
        ({"y_true": [], "y_pred": []}, "y_true and y_pred are empty"),
        ({"y_pred": [[0.1, 0.2]]}, r"y_pred must have one value per row, .* got shape \(1, 2\)"),
        (
            {"y_true": [0, 1, 0], "y_pred": [0.1, np.nan, np.nan]},
            r"y_pred must not be NaN; 2 of 3 rows break this, the first is row 1 \(counted from 0\), which is nan",
        ),
        ({"y_true": [0, 2]}, "AUC needs y_true 0 or 1; 1 of 2 rows break this, the first is row 1 .* 2.0"),
        ({"y_true": [np.nan, 1]}, "AUC needs y_true 0 or 1; 1 of 2 rows break this, the first is row 0 .* nan"),
        ({"y_true": [1, -1], "metrics": ["NDCG@1"], "group_id": [0, 0]}, "NDCG@1 needs finite y_true >= 0; 1 of 2"),
        (
            {"y_pred": [0.5, 1.5], "metrics": ["AUC", "logloss"]},
            r"logloss needs probabilities, y_pred in \[0, 1\]; 1 of",
        ),
        (
            {"y_pred": [-0.5, 0.5], "metrics": ["NE"]},
            r"NE needs probabilities, y_pred in \[0, 1\]; 1 of 2 rows .* -0.5",
        ),
        ({"metrics": ["NE"], "base_rate": 1.5}, r"base_rate must be a share of positives in \[0, 1\]; got 1.5"),
        ({"metrics": ["NE"], "base_rate": math.nan}, r"base_rate must be a share of positives in \[0, 1\]; got nan"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_metrics(**{"y_true": [0, 1], "y_pred": [0.1, 0.2], "metrics": ["AUC"], **arguments})


# ------------------------------------------------------------------------------------------------------ within segments


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(-3, 3), st.integers(0, 4), st.integers(-1, 3)), min_size=1))
def test_within_a_segment_it_is_the_metric_of_its_rows(rows):
    y_true, scores, groups, segments = (np.array(column) for column in zip(*rows))
    y_pred = (scores + 4) / 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # undefined values are no news within a segment
        found = evaluate_metrics_within(y_true, y_pred, segments, ALL_METRICS, groups, base_rate=0.3)
    assert list(found) == sorted(set(segments.tolist()))
    for segment, values in found.items():
        of = segments == segment
        expected = evaluate(y_true[of], y_pred[of], ALL_METRICS, groups[of], base_rate=0.3)
        assert list(values) == list(expected)
        # within a segment groups are summed in another order: the last digit may differ
        np.testing.assert_allclose(list(values.values()), list(expected.values()), rtol=1e-14)


def test_within_segments_ne_has_one_base_rate():
    y_true, y_pred, _ = random_log(3)
    segments = np.repeat([5, 2], 200)
    found = evaluate_metrics_within(y_true, y_pred, segments, ["NE", "logloss"])
    mean = y_true.mean()
    entropy = -mean * math.log(mean) - (1 - mean) * math.log(1 - mean)
    for values in found.values():
        assert values["NE"] == pytest.approx(values["logloss"] / entropy, rel=1e-12)


def test_segments_are_checked_as_all_rows():
    with pytest.raises(ValueError, match="segment has 1 rows, y_true has 2"):
        evaluate_metrics_within([0, 1], [0.1, 0.2], [3], ["AUC"])
    with pytest.raises(ValueError, match="gAUC needs group_id"):
        evaluate_metrics_within([0, 1], [0.1, 0.2], [3, 3], ["gAUC"])
    with pytest.raises(ValueError, match="y_pred must not be NaN; 1 of 2 rows"):
        evaluate_metrics_within([0, 1], [0.1, math.nan], [3, 4], ["AUC"])

"""Metrics of click prediction, vectorised: the names, signature and values of `fuxictr.metrics`, and NE.

FuxiCTR sends one task per group to a process pool; here the rows are sorted once by (group, score) and every group
metric is a segmented sum over that order.
"""

import math
import re
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from flowctr.names import nearest
from numpy.typing import ArrayLike

LOG_METRICS = ("logloss", "binary_crossentropy", "NE")
GROUP_METRICS = ("gAUC", "avgAUC", "MRR", "NDCG@k")
METRICS = (*LOG_METRICS, "AUC", *GROUP_METRICS)

# NDCG@5 is the common spelling; NDCG(k=5), NDCG(5) and NDCG() are what FuxiCTR's configs hold.
_NDCG = re.compile(r"NDCG(?:@([1-9]\d*)|\(\s*(?:(?:k\s*=\s*)?([1-9]\d*))?\s*\))")

_UNDEFINED = {
    "AUC": "y_true has only one class",
    "gAUC": "no group has both classes",
    "avgAUC": "no group has both classes",
    "NE": "the base rate is 0 or 1, so its entropy is 0",
}


def evaluate_metrics(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    metrics: Sequence[str],
    group_id: ArrayLike | None = None,
    base_rate: float | None = None,
) -> dict[str, float]:
    """Evaluate predictions, exactly and in float64.

    | name | value |
    | --- | --- |
    | `logloss`, `binary_crossentropy` | mean of -log of the probability given to the true label |
    | `NE` | logloss / entropy of the base rate: below 1 beats predicting the base rate for every row |
    | `AUC` | share of (positive, negative) pairs in the right order, a tie counts one half |
    | `gAUC` | mean of AUC over groups, weighted by their rows; groups of one class are skipped |
    | `avgAUC` | the same, unweighted |
    | `MRR` | mean over groups of the mean of 1 / rank of the positives; 0 for a group without one |
    | `NDCG@k`, `NDCG(k=..)`, `NDCG(..)` | mean over groups of DCG@k / ideal DCG@k; 0 for a group without a positive |

    Logloss clips probabilities by the machine epsilon of `y_pred`'s own dtype, as scikit-learn does: pass float64, as
    FuxiCTR does, to compare saturated predictions. Equal scores in a group rank the later row first in MRR and NDCG;
    FuxiCTR leaves that order to numpy's unstable sort, which depends on the CPU.

    Args:
        y_true: Labels, shape (N,) or (N, 1): 0 or 1; MRR and NDCG also take graded relevance >= 0.
        y_pred: Scores of the same shape; probabilities for logloss and NE.
        metrics: Names from the table.
        group_id: Group of each row (integers or strings, in any order), for gAUC, avgAUC, MRR and NDCG.
        base_rate: Share of positives that NE is normalised by, usually that of the training data. Without it, NE uses
            the mean of `y_true`.

    Returns:
        Metric name, as asked and in that order, -> value. A value that is undefined is nan, with a `UserWarning`: AUC
        with one class, gAUC and avgAUC without a group of both classes, NE with a base rate of 0 or 1.

    Raises:
        ValueError: An unknown metric, arrays that are empty or of different lengths, a group metric without
            `group_id`, NaN in `y_pred`, labels or probabilities out of range.
    """
    rows = _rows(y_true, y_pred, metrics, group_id, base_rate)
    result = _values(rows, metrics, base_rate)
    for name, value in result.items():
        if name in _UNDEFINED and math.isnan(value):
            warnings.warn(f"{name} is undefined and given as nan: {_UNDEFINED[name]}", stacklevel=2)
    return result


def evaluate_metrics_within(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    segment: ArrayLike,
    metrics: Sequence[str],
    group_id: ArrayLike | None = None,
    base_rate: float | None = None,
) -> dict[int, dict[str, float]]:
    """Evaluate predictions within each segment of the rows, such as a scenario, sorting the rows once.

    Args:
        y_true, y_pred, metrics, group_id: As for `evaluate_metrics`.
        segment: Segment of each row, integers.
        base_rate: Share of positives that NE is normalised by in every segment. Without it, the mean of all `y_true`.

    Returns:
        Segment, in ascending order, -> what `evaluate_metrics` gives for its rows alone; nan without a warning where
        a metric is undefined.

    Raises:
        ValueError: As `evaluate_metrics`, on all rows.
    """
    rows = _rows(y_true, y_pred, metrics, group_id, base_rate)
    segment = _column("segment", segment)
    if len(segment) != len(rows.y_true):
        raise ValueError(f"segment has {len(segment)} rows, y_true has {len(rows.y_true)}")
    order = np.argsort(segment, kind="stable")  # keeps the order of rows, which decides between equal scores
    segments, starts = np.unique(segment[order], return_index=True)
    ordered = [None if values is None else values[order] for values in (rows.y_true, rows.y_pred, rows.group)]
    base_rate = rows.y_true.mean() if base_rate is None else base_rate
    result = {}
    for value, start, stop in zip(segments.tolist(), starts, [*starts[1:], len(order)]):
        parts = [None if values is None else values[start:stop] for values in ordered]
        result[value] = _values(_Rows(*parts, rows.epsilon), metrics, base_rate)
    return result


class GroupAUCs(NamedTuple):
    """The AUC of each group that has both classes; their mean, weighted by rows, is gAUC."""

    group: np.ndarray  # (G,) ids
    rows: np.ndarray  # (G,)
    auc: np.ndarray  # (G,)


def group_aucs(y_true: ArrayLike, y_pred: ArrayLike, group_id: ArrayLike) -> GroupAUCs:
    """Evaluate the AUC of every group that gAUC is the mean of.

    Args:
        y_true, y_pred, group_id: As for `evaluate_metrics`.

    Returns:
        The groups of both classes, in the order of their first rows; none of them, if gAUC is undefined.

    Raises:
        ValueError: As `evaluate_metrics`.
    """
    rows = _rows(y_true, y_pred, ["gAUC"], group_id, None)
    ranked = _rank(rows.y_true, rows.y_pred, rows.group)
    auc = _auc(ranked)
    _, first_row = np.unique(rows.group, return_index=True)  # in ranked's order of groups
    defined = ~np.isnan(auc)
    return GroupAUCs(_column("group_id", group_id)[first_row[defined]], ranked.size[defined], auc[defined])


class _Rows(NamedTuple):
    """Rows that were checked: labels and predictions in float64, group codes if there are groups."""

    y_true: np.ndarray  # (N,)
    y_pred: np.ndarray  # (N,)
    group: np.ndarray | None  # (N,)
    epsilon: float  # of the predictions' own dtype


def _rows(y_true: ArrayLike, y_pred: ArrayLike, metrics: Sequence[str], group_id, base_rate: float | None) -> _Rows:
    group_metrics = [name for name in metrics if name in GROUP_METRICS or _ndcg_cutoff(name)]
    if group_metrics and group_id is None:
        raise ValueError(f"{group_metrics[0]} needs group_id, the group of each row; got None")
    y_true = _column("y_true", y_true).astype(np.float64)
    y_pred = _column("y_pred", y_pred)
    epsilon = np.finfo(y_pred.dtype if y_pred.dtype in (np.float16, np.float32) else np.float64).eps
    y_pred = y_pred.astype(np.float64)
    arrays = {"y_true": y_true, "y_pred": y_pred}
    if group_id is not None:
        arrays["group_id"] = _column("group_id", group_id)
    _check(arrays, metrics, base_rate)
    # missing ids (-1) are one group, as in FuxiCTR
    group = pd.factorize(arrays["group_id"])[0] if group_metrics else None
    return _Rows(y_true, y_pred, group, epsilon)


def _values(rows: _Rows, metrics: Sequence[str], base_rate: float | None) -> dict[str, float]:
    y_true, y_pred = rows.y_true, rows.y_pred
    cutoffs = {name: _ndcg_cutoff(name) for name in metrics}
    if rows.group is not None:
        ranked = _rank(y_true, y_pred, rows.group)
    if any(cutoffs.values()):
        ideal = _rank(y_true, y_true, rows.group)
    result = {}
    for name in metrics:
        if name in LOG_METRICS:
            value = _logloss(y_true, y_pred, rows.epsilon)
            if name == "NE":
                entropy = _entropy(y_true.mean() if base_rate is None else base_rate)
                value = value / entropy if entropy > 0 else math.nan
        elif name == "AUC":
            value = _auc(_rank(y_true, y_pred, np.zeros(len(y_true), np.int64)))[0]
        elif name in ("gAUC", "avgAUC"):
            auc = _auc(ranked)
            weight = np.where(np.isnan(auc), 0, ranked.size if name == "gAUC" else 1)
            value = np.nansum(auc * weight) / weight.sum() if weight.any() else math.nan
        elif name == "MRR":
            value = _reciprocal_rank(ranked).mean()
        else:
            k = cutoffs[name]
            value = _ratio(_dcg(ranked, k), _dcg(ideal, k), default=0.0).mean()
        result[name] = float(value)
    return result


class _Ranked(NamedTuple):
    """Rows sorted by group, then by ascending score, equal scores in row order."""

    label: np.ndarray  # (N,)
    score: np.ndarray  # (N,)
    start: np.ndarray  # (G,) first row of each group
    size: np.ndarray  # (G,) rows of each group

    @property
    def rank(self) -> np.ndarray:
        """Rank of each row in its group, 1 for the highest score, (N,)."""
        return np.repeat(self.start + self.size, self.size) - np.arange(len(self.label))

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum (N,) values over each group, (G,)."""
        return np.add.reduceat(values, self.start)


def _rank(y_true: np.ndarray, y_pred: np.ndarray, group: np.ndarray) -> _Ranked:
    order = np.lexsort((y_pred, group))
    group = group[order]
    start = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
    return _Ranked(y_true[order], y_pred[order], start, np.diff(start, append=len(group)))


def _auc(ranked: _Ranked) -> np.ndarray:
    """AUC of each group from the mid-ranks of its positives (Mann-Whitney U / pairs), nan for one class, (G,)."""
    new_run = np.r_[True, ranked.score[1:] != ranked.score[:-1]]
    new_run[ranked.start] = True
    run_start = np.flatnonzero(new_run)  # a run is a set of equal scores in one group
    run_size = np.diff(run_start, append=len(ranked.label))
    mid_rank = np.repeat(run_start + (run_size + 1) / 2, run_size) - np.repeat(ranked.start, ranked.size)
    positives = ranked.sum(ranked.label)
    u = ranked.sum(ranked.label * mid_rank) - positives * (positives + 1) / 2
    return _ratio(u, positives * (ranked.size - positives), default=math.nan)


def _reciprocal_rank(ranked: _Ranked) -> np.ndarray:
    return _ratio(ranked.sum(ranked.label / ranked.rank), ranked.sum(ranked.label), default=0.0)


def _dcg(ranked: _Ranked, k: int) -> np.ndarray:
    rank = ranked.rank
    gain = np.where(rank <= k, np.exp2(ranked.label) - 1, 0.0)
    return ranked.sum(gain / np.log2(rank + 1))


def _logloss(y_true: np.ndarray, y_pred: np.ndarray, epsilon: float) -> float:
    probability_of_label = np.where(y_true == 1, y_pred, 1 - y_pred)
    return -np.log(np.clip(probability_of_label, epsilon, 1 - epsilon)).mean()


def _entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log1p(-p) if 0 < p < 1 else 0.0


def _ratio(numerator: np.ndarray, denominator: np.ndarray, default: float) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(len(numerator), default), where=denominator > 0)


def _ndcg_cutoff(name: str) -> int | None:
    """The k of an NDCG name, None for any other metric."""
    if match := _NDCG.fullmatch(name):
        return int(match[1] or match[2] or 1)
    if name in METRICS and name != "NDCG@k":
        return None
    raise ValueError(
        f"unknown metric {name!r}; the nearest valid name is {nearest(name, METRICS)!r} "
        f"(valid: {', '.join(METRICS)}; k >= 1)"
    )


def _column(name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"{name} must have one value per row, shape (N,) or (N, 1); got shape {array.shape}")
    return array


def _check(arrays: dict[str, np.ndarray], metrics: Sequence[str], base_rate: float | None) -> None:
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{', '.join(lengths)} must have the same length; got {', '.join(map(str, lengths.values()))}")
    y_true, y_pred = arrays["y_true"], arrays["y_pred"]
    if not len(y_true):
        raise ValueError("y_true and y_pred are empty; metrics need at least one row")
    if "NE" in metrics and base_rate is not None and not 0 <= base_rate <= 1:
        raise ValueError(f"base_rate must be a share of positives in [0, 1]; got {base_rate}")
    _require("y_pred must not be NaN", ~np.isnan(y_pred), y_pred)
    for name in metrics:
        if name == "MRR" or name.startswith("NDCG"):
            _require(f"{name} needs finite y_true >= 0", np.isfinite(y_true) & (y_true >= 0), y_true)
        else:
            _require(f"{name} needs y_true 0 or 1", (y_true == 0) | (y_true == 1), y_true)
        if name in LOG_METRICS:
            _require(f"{name} needs probabilities, y_pred in [0, 1]", (y_pred >= 0) & (y_pred <= 1), y_pred)


def _require(rule: str, valid: np.ndarray, values: np.ndarray) -> None:
    rows = np.flatnonzero(~valid)
    if len(rows):
        first = f"the first is row {rows[0]} (counted from 0), which is {values[rows[0]]}"
        raise ValueError(f"{rule}; {len(rows)} of {len(values)} rows break this, {first}")

"""The metrics of predictions: of each label, overall and within scenarios; and what a monitored one needs."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flowctr import metrics
from flowctr.data import scenario_names
from flowctr.data.format import UNSEEN
from flowctr.metrics import GroupAUCs
from flowctr.names import nearest
from fuxictr.features import FeatureMap

TWO_CLASS_METRICS = ("AUC", "gAUC", "avgAUC")
MAX_LOGGED_SCENARIOS = 20
OTHER_MONITOR = "monitor a metric that these validation data define, such as logloss, or take other data"


@dataclass
class Predictions:
    """What a model predicts for some data, and what it is scored by: one value per row, in the order of the data."""

    y_true: dict[str, np.ndarray]  # by label, float64, NaN where it is missing
    y_pred: dict[str, np.ndarray]  # by label, float64
    group_id: np.ndarray | None
    scenario: np.ndarray | None  # ids

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(next(iter(self.y_true.values())))

    def not_finite(self) -> list[str]:
        """Lists the labels for which a prediction is nan or inf."""
        return [label for label, values in self.y_pred.items() if not np.isfinite(values).all()]

    def group_aucs(self) -> dict[str, GroupAUCs]:
        """Gives for each label the AUC of the groups that gAUC is the mean of: of those that have both classes."""
        known = {label: ~np.isnan(values) for label, values in self.y_true.items()}
        return {
            label: metrics.group_aucs(self.y_true[label][rows], self.y_pred[label][rows], self.group_id[rows])
            for label, rows in known.items()
        }


class Scorer:
    """Computes, names and logs the metrics of all labels.

    Args:
        feature_map: FuxiCTR's feature map of the data.
        scenario: Categorical column within whose values the metrics are given too; None: overall only.

    Raises:
        ValueError: If ``scenario`` is no categorical column.
    """

    def __init__(self, feature_map: FeatureMap, scenario: str | None):
        self.scenario = scenario
        self.scenario_names = scenario_names(feature_map, scenario) if scenario else {}
        self._told_unseen: set[int] = set()

    def score(
        self,
        predictions: Predictions,
        data: Any,
        names: Sequence[str],
        base_rates: Mapping[str, float] | None,
    ) -> dict[str, float]:
        """Scores predictions.

        Args:
            predictions: What to score.
            data: What was predicted; rows that lack a label in its ``may_be_missing`` are left out of that label's
                metrics.
            names: Metrics.
            base_rates: Label -> the base rate of its NE; None: that of the predicted rows.

        Returns:
            Metric -> value, named as `flowctr.training.Engine.evaluate` says.
        """
        scenarios = {} if self.scenario is None else self._scenarios_in(predictions.scenario, data)
        scores = {}
        for label, y_true in predictions.y_true.items():
            known = ~np.isnan(y_true) if label in getattr(data, "may_be_missing", ()) else slice(None)
            rows = y_true[known], predictions.y_pred[label][known]
            groups = None if predictions.group_id is None else predictions.group_id[known]
            base_rate = base_rates[label] if base_rates else None
            scores[label] = metrics.evaluate_metrics(*rows, names, groups, base_rate)
            _log(label, scores[label])
            if self.scenario is not None:
                segments = predictions.scenario[known]
                within = metrics.evaluate_metrics_within(*rows, segments, names, groups, base_rate)
                scores[label] |= self._name_scenarios(label, within, scenarios, names)
        if len(scores) == 1:
            return scores[label]
        logs = {f"{label}_{name}": value for label, values in scores.items() for name, value in values.items()}
        means = {name: float(np.mean([values[name] for values in scores.values()])) for name in scores[label]}
        return {**logs, **means}

    def _scenarios_in(self, scenario: np.ndarray, data: Any) -> dict[int, str]:
        """Names the scenarios that occur, by id; says once for each data how many rows are of an unseen one."""
        ids, counts = np.unique(scenario, return_counts=True)
        rows = {self.scenario_names[i]: n for i, n in zip(ids.tolist(), counts) if i in self.scenario_names}
        if UNSEEN in rows and id(data) not in self._told_unseen:
            self._told_unseen.add(id(data))
            logging.warning(
                "%d of %d rows have an unknown %s (missing, rare or not in training); %s=%s is in no mean",
                *(rows[UNSEEN], len(scenario), self.scenario, self.scenario, UNSEEN),
            )
        return {i: name for i, name in self.scenario_names.items() if name in rows}

    def _name_scenarios(
        self, label: str, within: Mapping[int, dict[str, float]], scenarios: Mapping[int, str], names: Sequence[str]
    ) -> dict[str, float]:
        """Names the metrics of a label within each scenario and adds their means over scenarios."""
        undefined = dict.fromkeys(names, math.nan)  # of a scenario where no row has the label
        by_scenario = {name: within.get(i, undefined) for i, name in scenarios.items()}
        scores = {}
        for number, (scenario, values) in enumerate(by_scenario.items()):
            if number < MAX_LOGGED_SCENARIOS:
                _log(f"{label}, {self.scenario}={scenario}", values)
            scores |= {f"{name}@{self.scenario}={scenario}": value for name, value in values.items()}
        for name in names:
            values = [values[name] for scenario, values in by_scenario.items() if scenario != UNSEEN]
            defined = [value for value in values if not math.isnan(value)]
            scores[f"{name}@{self.scenario}"] = float(np.mean(defined)) if defined else math.nan
        return scores

    def check_monitor(self, monitored: Sequence[str], base_rates: Mapping[str, float]) -> None:
        """Checks what is known of monitored metrics before any training.

        Args:
            monitored: Metrics; a name without a label is the mean over all of them.
            base_rates: Mean of each label in the validation data, as far as it is known.

        Raises:
            ValueError: If one needs both classes of a label, of which the validation data have one, or is of a scenario
                that training has not seen.
        """
        one_class = [label for label, rate in base_rates.items() if rate in (0, 1)]
        seen = [name for name in self.scenario_names.values() if name != UNSEEN]
        for name in monitored:
            metric, _, value = name.partition(f"@{self.scenario}")
            undefined = [label for label in one_class if metric.removeprefix(f"{label}_") in TWO_CLASS_METRICS]
            if undefined:
                raise ValueError(
                    f"the monitored {name} needs both classes, but the validation labels of {', '.join(undefined)} are "
                    f"all of one class; {OTHER_MONITOR}"
                )
            if value and (value := value.removeprefix("=")) not in seen:
                raise ValueError(
                    f"the monitored {name} is of a {self.scenario} that training has not seen; the nearest is "
                    f"{nearest(value, seen)!r}"
                )

    def why_undefined(
        self, monitored: Sequence[str], logs: Mapping[str, float], y_true: Mapping[str, np.ndarray]
    ) -> str | None:
        """Says why a monitored metric is not a number; FuxiCTR would take one that is not there for 0.

        Args:
            monitored: Metrics.
            logs: What `score` gave for the validation data.
            y_true: Their labels.

        Returns:
            The reason, followed by "; ", empty if it is not known; None if all are numbers.
        """
        undefined = [name for name in monitored if not math.isfinite(logs.get(name, math.nan))]
        if not undefined:
            return None
        if missing := [name for name in undefined if name not in logs]:
            return f"these validation data have no {missing[0]}, the nearest is {nearest(missing[0], logs)}; "
        if one_class := [label for label, values in y_true.items() if np.nanmin(values) == np.nanmax(values)]:
            return f"the validation labels of {', '.join(one_class)} are all of one class; "
        if within := [name for name in undefined if f"@{self.scenario}" in name]:
            return f"no scenario of {', '.join(within)} has both classes among its validation labels; "
        return ""


def _log(task: str, values: Mapping[str, float]) -> None:
    listed = " - ".join(f"{name}: {value:.6f}" for name, value in values.items())
    logging.info("[Task: %s][Metrics] %s", task, listed)

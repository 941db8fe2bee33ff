"""All results on one page, a table per data set to sort and filter with plots; the best have a page of their own."""

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from flowctr.compare import best_marks
from flowctr.metrics import LOG_METRICS
from flowctr.pages import COLOR_INKS, DASH, LINE, STYLE, shown, svg, write_page
from flowctr.report import write_report
from flowctr.results import (
    MEAN,
    METRICS,
    Published,
    find_results,
    metric_of,
    read_published,
    settings_of,
    targets_of,
    unique,
)
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

PUBLISHED_FILE = "published_results.csv"
MAX_PAGES = 20  # experiments of a data set with a page of their own: plots take a second and a hundred kilobytes
MAX_COMPARED = 10  # more curves over each other are not told apart
MAX_FIGURES = 12
FIRST_ROWS = 200  # of a table, until all are asked for: so many are laid out and sorted at once
MAX_SETTINGS_LETTERS = 300
TRIAL = re.compile(r"_\d{3,}_[0-9a-f]{8,}$")  # what the tuner adds to the id of an experiment
# What follows the metrics in a row: title -> whether the best of it is small.
COST_COLUMNS = {"parameters, M": True, "non-embedding, M": True, "MFLOPs / row": True, "rows / s": False, "GiB": True}


@dataclass(frozen=True)
class Experiment:
    """Runs that differ in nothing but their seed: file and result of the newest one of each seed."""

    runs: tuple[tuple[Path, dict], ...]

    @property
    def result(self) -> dict:
        """The result of the first seed."""
        return self.runs[0][1]

    @property
    def page(self) -> str:
        """Name of its page; one for each setting."""
        identity = [self.result[key] for key in ("model", "dataset_id", "expid")] + [settings_of(self.result)]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return f"{_file_name(self.result['expid'])}-{digest[:8]}.html"

    def values(self, target: str, metric: str) -> np.ndarray:
        """Returns a metric on the test data for each seed; none if a run lacks it."""
        values = np.array([metric_of(result, "test", target, metric) for _, result in self.runs], dtype=float)
        return values if np.isfinite(values).all() else values[:0]

    def mean(self, target: str, metric: str = "AUC") -> float:
        """Returns its mean over the seeds, nan if there is none."""
        values = self.values(target, metric)
        return values.mean() if len(values) else math.nan


def write_leaderboard(paths: Sequence[Path], out: Path) -> Path:
    """Writes a page with all results, and pages with the plots and the origin of the best ones.

    Args:
        paths: Result files and folders of them, see `flowctr.results.find_results`. Rows that others have published
            come from csv files among them, and from each ``published_results.csv`` in the folders.
        out: Folder of the pages: ``index.html``, and ``runs/``.

    Returns:
        Path of ``index.html``. Neither it nor the others need a server or anything from outside.

    Raises:
        FileNotFoundError: If a path does not exist or a folder has no result.
        ValueError: If there is no result, or a file is not of the known format.
    """
    tables = unique(path for given in paths for path in _published_files(given))
    published = [row for path in tables for row in read_published(path)]
    experiments = group_runs(find_results(path for path in paths if path not in tables))
    if not experiments:
        raise ValueError("no results to report on; name results/*.json of finished runs, or folders of them")
    by_dataset: dict[str, list[Experiment]] = {}
    for experiment in experiments:
        by_dataset.setdefault(experiment.result["dataset_id"], []).append(experiment)
    with matplotlib.rc_context(STYLE):
        sections = [
            _section(dataset_id, members, [row for row in published if row.dataset_id == dataset_id], out / "runs")
            for dataset_id, members in sorted(by_dataset.items())
        ]
        return write_page(
            out / "index.html",
            "leaderboard.html.jinja",
            sections=sections,
            experiments=len(experiments),
            runs=sum(len(experiment.runs) for experiment in experiments),
            tasks=unique(target for section in sections for target in section["targets"]),
            metrics=METRICS,
            lower_is_better=LOG_METRICS,
            max_pages=MAX_PAGES,
            first_rows=FIRST_ROWS,
        )


def group_runs(runs: Iterable[tuple[Path, dict]]) -> list[Experiment]:
    """Groups runs by model, data set, experiment id and settings; of several runs of one seed the newest counts."""
    groups: dict[str, dict[int, tuple[Path, dict]]] = {}
    for path, result in sorted(runs, key=lambda run: run[1].get("started") or ""):
        identity = [result[key] for key in ("model", "dataset_id", "expid")] + [settings_of(result)]
        groups.setdefault(json.dumps(identity, sort_keys=True), {})[result["seed"]] = (path, result)
    return [Experiment(tuple(seeds[seed] for seed in sorted(seeds))) for seeds in groups.values()]


def _published_files(path: Path) -> list[Path]:
    return sorted(path.rglob(PUBLISHED_FILE)) if path.is_dir() else [path] * (path.suffix == ".csv")


def _section(dataset_id: str, experiments: list[Experiment], published: list[Published], folder: Path) -> dict:
    """Collects what the page says about one data set, and writes the pages that it links."""
    targets = targets_of(experiment.result for experiment in experiments)
    main = MEAN if MEAN in targets else targets[0]
    experiments = sorted(experiments, key=lambda e: (np.nan_to_num(-e.mean(main), nan=math.inf), e.result["expid"]))
    columns = [(target, metric) for target in targets for metric in METRICS]
    differing, wins = _differing_settings(experiments), _wins(experiments, columns)
    # What has curves to show comes first, then several seeds: a trial of a search is of less interest.
    paged = sorted(experiments, key=lambda e: (not e.result.get("curves"), len(e.runs) == 1))[:MAX_PAGES]
    for experiment in tqdm(paged, dataset_id, unit=" pages", leave=False, disable=None):  # None: only on a terminal
        write_report(experiment.runs, folder / experiment.page)
    compared = [experiment.runs[0] for experiment in paged if experiment.result.get("curves")][:MAX_COMPARED]
    comparison = f"compare-{_file_name(dataset_id)}.html" if len(compared) > 1 else None
    if comparison:
        write_report(compared, folder / comparison)
    return {
        "id": dataset_id,
        "main": main,
        "targets": targets,
        "columns": columns,
        "costs": COST_COLUMNS,
        "rows": [
            {
                "expid": experiment.result["expid"],
                "page": f"runs/{experiment.page}" if experiment in paged else None,
                "settings": differing[experiment.page],
                "cells": _cells(experiment, columns, wins.get(experiment.page, ())),
            }
            for experiment in experiments
        ],
        "comparison": comparison and f"runs/{comparison}",
        "compared": len(compared),
        "published": _published_table(published, targets),
        "figures": _figures([e for e in experiments if len(e.runs) > 1], main),
    }


def _differing_settings(experiments: list[Experiment]) -> dict[str, str]:
    """Names, by page, the settings in which the experiments of one id differ, or those of one search."""
    families: dict[tuple[str, str], list[Experiment]] = {}
    for experiment in experiments:
        result = experiment.result
        families.setdefault((result["model"], TRIAL.sub("", result["expid"])), []).append(experiment)
    differing = {}
    for members in families.values():
        settings = [settings_of(member.result) for member in members]
        keys = [
            key
            for key in unique(key for one in settings for key in one)
            if len({json.dumps(one.get(key), sort_keys=True) for one in settings}) > 1
        ]
        for member, one in zip(members, settings):
            text = ", ".join(f"{key} {_setting(key, one[key])}" for key in keys if key in one)
            is_long = len(text) > MAX_SETTINGS_LETTERS
            differing[member.page] = f"{text[: MAX_SETTINGS_LETTERS - 1]}…" if is_long else text
    return differing


def _wins(experiments: list[Experiment], columns: Sequence[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """Finds, by page, in which metrics an experiment is significantly better than every other one on the same data.

    One seed says nothing of what another would give: only experiments of several take part.
    """
    by_data: dict[str | None, list[Experiment]] = {}
    for experiment in experiments:
        if len(experiment.runs) > 1:
            by_data.setdefault((experiment.result.get("data") or {}).get("manifest"), []).append(experiment)
    wins: dict[str, list[tuple[str, str]]] = {}
    for members in by_data.values():
        seeds = [[result["seed"] for _, result in member.runs] for member in members]
        for column in columns:
            values = [dict(zip(own, member.values(*column))) for own, member in zip(seeds, members)]
            marks = best_marks(values, lower_is_better=column[1] in LOG_METRICS)
            for member in (member for member, is_best in zip(members, marks) if is_best):
                wins.setdefault(member.page, []).append(column)
    return wins


def _cells(experiment: Experiment, columns: Sequence[tuple[str, str]], wins: Collection[tuple[str, str]]) -> list[str]:
    """Returns the texts of a row, all but the first; wins are bold."""
    results = [result for _, result in experiment.runs]
    first = experiment.result
    parameters = first.get("parameters") or {}
    speeds = [(result.get("speed") or {}).get("train_rows_per_second") for result in results]
    memory = [_peak_memory(result) for result in results]
    commits = unique(result.get("commit") for result in results)
    return [
        first["model"],
        str(len(results)),
        *(_spread(experiment.values(*column), column in wins) for column in columns),
        *(_millions(count) for count in (parameters.get("total"), parameters.get("non_embedding"))),
        _millions(first.get("flops_per_row")),
        DASH if None in speeds else f"{np.mean(speeds):,.0f}",
        DASH if None in memory else f"{max(memory) / 2**30:.2f}",
        (first.get("hardware") or {}).get("gpu") or first.get("device") or DASH,
        ", ".join(DASH if commit is None else re.sub(r"^([0-9a-f]{7})[0-9a-f]*", r"\1", commit) for commit in commits),
    ]


def _setting(key: str, value: object) -> str:
    if key == "data":
        return shown(value)[:8]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _spread(values: np.ndarray, is_win: bool) -> str:
    """Shows mean and sample standard deviation, or a single value."""
    if not len(values):
        return DASH
    text = f"{values.mean():.4f}" + (f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else "")
    return Markup("<b>{}</b>").format(text) if is_win else text


def _millions(count: float | None) -> str:
    return DASH if count is None else f"{count / 1e6:,.4g}"


def _peak_memory(result: dict) -> int | None:
    """Returns the bytes of the device that the run trained on."""
    memory = result.get("peak_memory_bytes") or {}
    return memory.get("host") if memory.get("device") is None else memory["device"]


def _published_table(rows: list[Published], targets: list[str]) -> dict | None:
    """Lays out published rows, one for each model and source, the tasks side by side."""
    if not rows:
        return None
    tasks = [target for target in targets if any(row.task == target for row in rows)]
    metrics = [metric for metric in METRICS if any(metric in row.metrics for row in rows)]
    by_model: dict[tuple[str, str], dict[str, Published]] = {}
    for row in rows:
        by_model.setdefault((row.model, row.source), {})[row.task] = row
    columns = [(task, metric) for task in tasks for metric in metrics]
    return {
        "columns": columns,
        "rows": [
            {
                "model": model,
                "cells": [
                    *(shown(_published(by_task, *column), ".4f") for column in columns),
                    _millions(next(iter(by_task.values())).parameters),
                    source,
                ],
            }
            for (model, source), by_task in sorted(
                by_model.items(), key=lambda item: -(_published(item[1], *columns[0]) or 0) if columns else 0
            )
        ],
    }


def _published(by_task: dict[str, Published], task: str, metric: str) -> float | None:
    return by_task[task].metrics.get(metric) if task in by_task else None


def _figures(experiments: list[Experiment], target: str) -> list[Markup]:
    """Draws ablations and sweeps: what experiments with several seeds differ in from another one of them.

    An ablation has the id of the other one and a name more; a step of a sweep has its id and one other setting.
    """
    by_id: dict[str, list[Experiment]] = {}
    for experiment in experiments:
        by_id.setdefault(experiment.result["expid"], []).append(experiment)
    figures = []
    for expid, members in by_id.items():
        neighbours = {e.page: _one_setting_apart(e, members) for e in members}
        base = max(members, key=lambda e: sum(map(len, neighbours[e.page].values())))
        ablated = [
            (other.removeprefix(f"{expid}_"), variants[0])
            for other, variants in by_id.items()
            if other.startswith(f"{expid}_") and not TRIAL.search(other)
        ]
        if ablated:
            figures.append(_ablation_figure(base, ablated, target))
        figures += [_sweep_figure(base, key, steps, target) for key, steps in neighbours[base.page].items()]
    return figures[:MAX_FIGURES]


def _one_setting_apart(base: Experiment, experiments: list[Experiment]) -> dict[str, list[Experiment]]:
    """Finds, by setting, the experiments that differ from the base in this one only."""
    found: dict[str, list[Experiment]] = {}
    settings = settings_of(base.result)
    for experiment in experiments:
        other = settings_of(experiment.result)
        keys = [key for key in {**settings, **other} if settings.get(key) != other.get(key)]
        if len(keys) == 1:
            found.setdefault(keys[0], []).append(experiment)
    return found


def _ablation_figure(base: Experiment, ablated: list[tuple[str, Experiment]], target: str) -> Markup:
    names, experiments = zip(("as it is", base), *ablated)
    figure = Figure(figsize=(4.2, 0.8 + 0.22 * len(names)), layout="constrained")
    axes = figure.add_subplot(xlabel=f"test AUC, {target}", title=base.result["expid"])
    axes.xaxis.set_major_locator(MaxNLocator(5))  # more four-digit numbers run into each other
    axes.axvline(base.mean(target), color=LINE)
    _error_bars(axes, experiments, target, horizontal=True)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    return svg(figure, f"ablations of {base.result['expid']}")


def _sweep_figure(base: Experiment, key: str, steps: list[Experiment], target: str) -> Markup:
    """Draws the metric against a setting; its values are evenly spaced, since they may be anything."""
    experiments = [*steps, base]
    values = [settings_of(experiment.result).get(key) for experiment in experiments]
    numbers = all(isinstance(value, (int, float)) for value in values if value is not None)
    order = sorted(
        range(len(values)), key=lambda i: (values[i] is None, (values[i] or 0) if numbers else str(values[i]))
    )
    figure = Figure(figsize=(4.2, 2.3), layout="constrained")
    axes = figure.add_subplot(xlabel=key, ylabel=f"test AUC, {target}", title=base.result["expid"])
    _error_bars(axes, [experiments[i] for i in order], target, horizontal=False)
    axes.set_xticks(range(len(order)), ["default" if values[i] is None else _setting(key, values[i]) for i in order])
    return svg(figure, f"{key} of {base.result['expid']}")


def _error_bars(axes, experiments: Sequence[Experiment], target: str, horizontal: bool) -> None:
    """Draws mean and sample standard deviation over the seeds, evenly spaced."""
    values = [experiment.values(target, "AUC") for experiment in experiments]
    means = [one.mean() if len(one) else math.nan for one in values]
    errors = [one.std(ddof=1) if len(one) else math.nan for one in values]
    positions = range(len(means))
    x, y = (means, positions) if horizontal else (positions, means)
    error = {"xerr": errors} if horizontal else {"yerr": errors}
    axes.errorbar(x, y, **error, fmt="o", markersize=4, capsize=2, linewidth=1, color=COLOR_INKS[0])
    axes.grid(visible=True, axis="x" if horizontal else "y")


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]", "_", text, flags=re.ASCII)

"""Results as a table for the terminal, and a page that compares some runs: metrics, plots and provenance."""

import datetime
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from flowctr.pages import COLOR_INKS, COLORS, STYLE, shown, svg, write_page
from flowctr.results import (
    MEAN,
    METRICS,
    NOT_NPZ,
    SPLITS,
    metric_name,
    metric_of,
    scenarios_of,
    targets_of,
    unique,
)
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from rich.table import Table
from rich.text import Text

RUN_DASHES = ((), (5, 2), (1, 1), (5, 2, 1, 2))  # in points; the next one for runs beyond the last colour
MAX_CURVE_POINTS = 200
MAX_MARKERS = 30
MAX_TICKS = 24
MAX_TICK_LETTERS = 20
LETTER = 0.065  # inches that a letter of a tick takes, at most on average
MAX_SHARP_CELLS = 256  # per side of a heatmap; a larger one is drawn at screen resolution to bound the page's size


@dataclass(frozen=True)
class Run:
    """One run of the page: its result and the file it came from; ``number`` (from 1) ties table, curves and notes."""

    number: int
    path: Path
    result: dict

    @property
    def attention(self) -> Path | None:
        name = self.result.get("attention")
        return None if name is None else self.path.parent / name

    @property
    def color(self) -> int:
        return (self.number - 1) % len(COLORS)

    @property
    def dashes(self) -> tuple[float, ...]:
        return RUN_DASHES[(self.number - 1) // len(COLORS) % len(RUN_DASHES)]


def metrics_table(result: dict) -> Table:
    """Lays out one run's metrics for the terminal.

    Args:
        result: A run's result, as its JSON file holds it.

    Returns:
        One row per split and label (and one for their mean, if there are several) with AUC, gAUC, logloss and NE.
    """
    title = f"{result['expid']} on {result['dataset_id']}, seed {result['seed']}"
    table = Table(title=Text(title), caption=Text(f"NE base: {shown(result.get('ne_base'))}"))
    table.add_column("split")
    table.add_column("label", overflow="fold")
    for metric in METRICS:
        table.add_column(metric, justify="right", no_wrap=True)
    for split in SPLITS:
        for label in targets_of([result]):
            values = (metric_of(result, split, label, metric) for metric in METRICS)
            table.add_row(split, Text(label), *(shown(value, ".6f") for value in values))
        table.add_section()
    return table


def write_report(results: Sequence[tuple[Path, dict]], path: Path) -> Path:
    """Writes one HTML page that compares runs and tells how each came about; it needs no other file and no network.

    Args:
        results: File and result of each run; an attention file that a result names is read from beside its file.
        path: The page.

    Returns:
        The path.

    Raises:
        ValueError: If there is no result, or a file of attention maps is none.
    """
    if not results:
        raise ValueError("no results to report on; name at least one results/*.json of a finished run")
    runs = [Run(number, file, result) for number, (file, result) in enumerate(results, start=1)]
    by_dataset: dict[str, list[Run]] = {}
    for run in runs:
        by_dataset.setdefault(run.result["dataset_id"], []).append(run)
    with matplotlib.rc_context(STYLE):
        return write_page(
            path,
            "report.html.jinja",
            models=unique(run.result["model"] for run in runs),
            datasets=[_dataset_section(dataset_id, members) for dataset_id, members in by_dataset.items()],
            runs=[_run_section(run) for run in runs],
            metrics=METRICS,
            splits=SPLITS,
        )


def _dataset_section(dataset_id: str, runs: list[Run]) -> dict:
    """Collects what the page says about one data set: the comparison of its runs, and their curves."""
    results = [run.result for run in runs]
    tables = []
    for target in targets_of(results):
        rows = [
            (run, [metric_of(run.result, split, target, metric) for split in SPLITS for metric in METRICS])
            for run in runs
            if _has_scenario(run.result, target)
        ]
        tables.append((target, rows))
    return {
        "id": dataset_id,
        "runs": runs,
        "tables": tables,
        "ne_bases": unique(shown(result.get("ne_base")) for result in results),
        "curves": _curves(runs),
    }


def _run_section(run: Run) -> dict:
    """Collects how one run came about."""
    result = run.result
    sections = ("fuxictr", "parameters", "speed", "peak_memory_bytes", "data", "versions", "config")
    fuxictr, parameters, speed, memory, data, versions, config = (result.get(name) or {} for name in sections)
    wall_seconds = result.get("wall_seconds")
    attention = run.attention
    facts = {
        "command": result.get("command"),
        "seed": result["seed"],
        "data set": result["dataset_id"],
        **{f"data {name}": value for name, value in data.items()},
        "started": result.get("started"),
        "commit": result.get("commit"),
        "fuxictr version": fuxictr.get("version"),
        "fuxictr sha256": fuxictr.get("sha256"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or None,
        "device": result.get("device"),
        "parameters, total": shown(parameters.get("total"), ","),
        "parameters, non-embedding": shown(parameters.get("non_embedding"), ","),
        "rows/s, training": shown(speed.get("train_rows_per_second"), ",.0f"),
        "rows/s, evaluation": shown(speed.get("evaluate_rows_per_second"), ",.0f"),
        "FLOPs per row, forward": shown(result.get("flops_per_row"), ",.0f"),
        "wall time": None if wall_seconds is None else datetime.timedelta(seconds=round(wall_seconds)),
        "peak memory, host": _gibibytes(memory.get("host")),
        "peak memory, device": _gibibytes(memory.get("device")),
        "NE base": result.get("ne_base"),
        "result file": run.path.name,
        "attention maps": None if attention is None else attention.name + " (not found)" * (not attention.is_file()),
    }
    return {
        "run": run,
        "facts": {name: shown(value) for name, value in facts.items()},
        "config": {name: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for name, v in config.items()},
        "scenarios": _scenario_table(result),
        "kept_flows": _mask_picture(result.get("kept_flows")),
        "stages": [(name, _stage_curve(run, name, record)) for name, record in (result.get("stages") or {}).items()],
        "heatmaps": _heatmaps(run),
    }


def _scenario_table(result: dict) -> list[tuple[str, list[float | None]]]:
    """Lists the metrics of every label within every scenario, for validation and test; none without scenarios."""
    values = [scenario for scenario in scenarios_of(result) if "=" in scenario]
    targets = [f"{label}@{value}" for label in result["labels"] for value in values]
    return [(t, [metric_of(result, split, t, metric) for split in SPLITS for metric in METRICS]) for t in targets]


def _has_scenario(result: dict, target: str) -> bool:
    """Says whether a run has metrics over the target's scenarios, if it is about scenarios at all."""
    _, at, scenario = target.partition("@")
    return not at or scenario in scenarios_of(result)


def _gibibytes(count: int | None) -> str | None:
    return None if count is None else f"{count / 2**30:.2f} GiB"


def _curves(runs: list[Run]) -> list[Markup]:
    """Draws one panel for the training loss and one per validation metric, the runs overlaid."""
    panels = [_curve_panel("training loss", [(run, _curve(run, "train", "loss")) for run in runs])]
    targets = targets_of(run.result for run in runs)
    for target in [target for target in targets if "@" not in target or target.startswith(MEAN)]:
        for metric in METRICS:
            lines = [(run, _curve(run, "valid", metric_name(run.result, target, metric))) for run in runs]
            panels.append(_curve_panel(f"validation {metric}, {target}", lines))
    return [panel for panel in panels if panel is not None]


def _curve(run: Run, split: str, name: str | None) -> np.ndarray:
    """Returns the (step, value) pairs of one curve, averaged over neighbours down to ``MAX_CURVE_POINTS``."""
    points = (run.result.get("curves") or {}).get(split) or []
    curve = np.array([(point["step"], point[name]) for point in points if point.get(name) is not None]).reshape(-1, 2)
    if len(curve) <= MAX_CURVE_POINTS:
        return curve
    return np.array([part.mean(axis=0) for part in np.array_split(curve, MAX_CURVE_POINTS)])


def _curve_panel(title: str, curves: list[tuple[Run, np.ndarray]]) -> Markup | None:
    """Draws curves over each other; None where there is nothing to draw."""
    if not any(len(curve) for _, curve in curves):
        return None
    figure = Figure(figsize=(3.5, 2.3))
    figure.subplots_adjust(left=0.21, right=0.97, bottom=0.19, top=0.96)  # a layout engine would draw it twice
    axes = figure.add_subplot(xlabel="step", ylabel=title)
    axes.grid(visible=True)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for run, curve in curves:
        marker = "o" if len(curve) <= MAX_MARKERS else None  # without one, a curve of a single point is invisible
        axes.plot(*curve.T, color=COLOR_INKS[run.color], linestyle=(0, run.dashes), marker=marker, markersize=3)
    axes.set_xlim(left=0)
    return svg(figure, f"{title} against step")


def _heatmaps(run: Run) -> list[tuple[str, Markup]]:
    """Draws the run's attention maps, by name; none where their file was not kept beside the result."""
    if run.attention is None or not run.attention.is_file():
        return []
    try:
        with np.load(run.attention) as arrays:
            maps = {
                key: (arrays[key], arrays[f"{key}__rows"].tolist(), arrays[f"{key}__cols"].tolist())
                for key in arrays.files
                if not key.endswith(("__rows", "__cols"))
            }
    except NOT_NPZ as error:
        raise ValueError(f"{run.attention} is not a file of attention maps: {error}") from error
    return [(key, _heatmap(key, *values)) for key, values in maps.items()]


def _stage_curve(run: Run, name: str, record: dict) -> Markup | None:
    """Draws the training loss of a stage before the one that gave the result."""
    stage = Run(run.number, run.path, {"curves": record.get("curves")})
    return _curve_panel(f"training loss, {name}", [(run, _curve(stage, "train", "loss"))])


def _mask_picture(kept: dict | None) -> Markup | None:
    """Draws the share of rows that keep each flow, one panel per label, scenarios by flows."""
    if kept is None:
        return None
    shares = np.array(kept["kept"], dtype=float)  # (scenarios, labels, flows); nan for a scenario without rows
    figure = Figure(
        figsize=(1.2 + 2.0 * len(kept["labels"]), 1.5 + 0.22 * min(len(shares), MAX_TICKS)), layout="constrained"
    )
    panels = figure.subplots(1, len(kept["labels"]), sharey=True, squeeze=False)[0]
    for number, (axes, label) in enumerate(zip(panels, kept["labels"])):
        image = axes.imshow(shares[:, number], aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="none")
        axes.set_title(_shortened(label), fontsize=8)
        axes.spines[:].set_visible(False)
        axes.set_xticks(range(len(kept["flows"])), kept["flows"], rotation=90)
        axes.set_yticks(*_ticks([f"{kept['scenario']}={value}" for value in kept["scenarios"]]))
        for (row, column), share in np.ndenumerate(shares[:, number] if len(shares) <= MAX_TICKS else []):
            ink = "#ffffff" if not share > 0.6 else "#000000"  # readable on both ends of viridis
            axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=6, color=ink)
    figure.colorbar(image, ax=list(panels), label="kept", pad=0.02, aspect=15).outline.set_visible(False)
    return svg(figure, "share of rows that keep each flow, by scenario and label")


def _heatmap(name: str, weights: np.ndarray, row_names: list[str], column_names: list[str]) -> Markup:
    rows, columns = weights.shape
    below = LETTER * max(len(_shortened(column)) for column in column_names)  # where the columns' names stand upright
    figure = Figure(figsize=(4.2, 0.5 + max(1.0, 0.16 * min(rows, MAX_TICKS)) + below), layout="constrained")
    axes = figure.add_subplot(xlabel="key", ylabel="query")
    axes.spines[:].set_visible(False)
    sharp = max(rows, columns) <= MAX_SHARP_CELLS
    image = axes.imshow(weights, aspect="auto", vmin=0, cmap="viridis", interpolation="none" if sharp else "auto")
    axes.set_xticks(*_ticks(column_names), rotation=90, rotation_mode="anchor", ha="right", va="center")
    axes.set_yticks(*_ticks(row_names))
    colorbar = figure.colorbar(image, label="attention weight", pad=0.02, aspect=15)
    colorbar.outline.set_visible(False)
    return svg(figure, f"heatmap of {name}: {rows} queries by {columns} keys")


def _ticks(names: list[str]) -> tuple[list[int], list[str]]:
    """Picks evenly spaced positions, few enough to read, and shortens their names."""
    positions = list(range(0, len(names), math.ceil(len(names) / MAX_TICKS)))
    return positions, [_shortened(str(names[i])) for i in positions]


def _shortened(name: str) -> str:
    return name if len(name) <= MAX_TICK_LETTERS else name[: MAX_TICK_LETTERS - 1] + "…"

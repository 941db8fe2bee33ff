"""What a search leaves: the ranked table of its trials, on the terminal and as BARS' csv, and plots of the keys."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowctr.experiment import result_line
from flowctr.results import read_result
from flowctr.tuning.ids import canonical
from flowctr.tuning.ledger import Ledger, Run
from flowctr.tuning.space import Space
from matplotlib.figure import Figure
from rich.table import Table

PLOTS_PER_ROW, PLOT_INCHES = 3, (3.6, 2.8)


def ranked(ledger: Ledger, space: Space) -> list[Run]:
    """Lists the finished trials, each with the seed of its configuration, the best on the validation data first."""
    runs = [run for run in ledger.of_state("finished") if run["seed"] == space.find(run["trial"]).seed]
    return sorted(runs, key=lambda run: -space.sign * run["value"])


def write_csv(path: Path, runs: Iterable[Run], folder: Path) -> None:
    """Writes one line in FuxiCTR's result format for each run, from its result file.

    Args:
        path: The csv.
        runs: Finished runs.
        folder: The search's folder, from which the runs' result files are named.
    """
    lines = [f"{result_line(read_result(folder / run['result']))}\n" for run in runs]
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text("".join(lines), encoding="utf-8")
    os.replace(unfinished, path)


def best_table(runs: Sequence[Run], space: Space, rows: int = 5) -> Table:
    """Makes the table of the best trials."""
    table = Table(title=f"best of {len(runs)} finished trials", title_justify="left")
    table.add_column("trial", overflow="fold")
    for key in space.varied:
        table.add_column(key, justify="right")
    table.add_column(f"valid {monitor_name(space)}", justify="right")
    for run in runs[:rows]:
        table.add_row(run["trial"], *(str(run["settings"][key]) for key in space.varied), f"{run['value']:.6f}")
    return table


def monitor_name(space: Space) -> str:
    """Names what trials are ranked by, such as AUC or AUC + 0.5 gAUC."""
    weights = space.monitor.kv_pairs
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items())


def plot(path: Path, runs: Sequence[Run], space: Space) -> None:
    """Draws the value on the validation data of each finished trial against each varied parameter, and its mean."""
    varied = space.varied
    columns = min(PLOTS_PER_ROW, len(varied))
    rows = -(-len(varied) // columns)
    figure = Figure((PLOT_INCHES[0] * columns, PLOT_INCHES[1] * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, (key, values) in zip(grid.flat, varied.items()):
        position = {canonical(_plain(value)): i for i, value in enumerate(values)}
        points = [(position[canonical(run["settings"][key])], run["value"]) for run in runs]
        axes.scatter(*zip(*points), s=18, alpha=0.6)
        by_position: dict[int, list[float]] = {}
        for x, y in sorted(points):
            by_position.setdefault(x, []).append(y)
        axes.plot(list(by_position), [sum(ys) / len(ys) for ys in by_position.values()], color="C1")
        axes.set_xticks(range(len(values)), [str(value) for value in values], rotation=30, ha="right")
        axes.set_xlabel(key)
    for axes in list(grid.flat)[len(varied) :]:
        axes.set_axis_off()
    figure.supylabel(f"valid {monitor_name(space)}")
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, dpi=120)
    os.replace(unfinished, path)


def _plain(value: Any) -> Any:
    """Gives a value as JSON keeps it: a tuple is a list."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value

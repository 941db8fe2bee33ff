"""What a search leaves: the ranked table of its trials, on the terminal and as BARS' csv, and plots of the keys."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowctr.experiment import result_line
from flowctr.results import read_result
from flowctr.tuning.ids import canonical, plain
from flowctr.tuning.ledger import Ledger, Run
from flowctr.tuning.space import Space, write_whole
from matplotlib.figure import Figure
from rich.table import Table

PLOTS_PER_ROW, PLOT_INCHES = 3, (3.6, 2.8)


def ranked(ledger: Ledger, space: Space) -> list[Run]:
    """Lists the finished trials, each with the seed of its configuration, the best on the validation data first."""
    runs = [run for run in ledger.of_state("finished") if run["seed"] == space.find(run["trial"]).seed]
    return sorted(runs, key=lambda run: -space.sign * run["value"])


def measured(result: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """Gives what a ledger keeps of a result."""
    return {
        "metrics": result["metrics"],
        "value": space.value(result["metrics"]["valid"]),
        "evaluations": [space.value(evaluation) for evaluation in result["curves"]["valid"]],
    }


def check_results(ledger: Ledger, runs: Iterable[Run], space: Space) -> None:
    """Compares finished runs with their result files.

    Raises:
        FileNotFoundError: If a result is gone.
        ValueError: If a line of the ledger and the result that it names differ, or the runs had different data.
    """
    builds: dict[str, dict[str | None, list[str]]] = {}  # of each data set the trials, by the manifest of the data
    for run in runs:
        path = space.folder / run["result"]
        result = read_result(path)
        known = {"trial": result["expid"], "seed": result["seed"], **measured(result, space)}
        if differing := [key for key, value in known.items() if canonical(run[key]) != canonical(value)]:
            raise ValueError(
                f"{ledger.path}: {run['trial']}, seed {run['seed']}, is not as in its result {path}: "
                f"{', '.join(differing)}; put the line back as it was, or delete all lines of the trial, which will "
                "then be run again"
            )
        builds.setdefault(result["dataset_id"], {}).setdefault(result["data"]["manifest"], []).append(run["trial"])
    for dataset_id, trials in builds.items():
        if len(trials) > 1:
            listed = "".join(f"  - {', '.join(dict.fromkeys(names))}\n" for names in trials.values())
            raise ValueError(
                f"data set {dataset_id} was built from other files or settings during the search, so trials of a line "
                f"cannot be compared with those of another:\n{listed}delete the lines of the older ones in "
                f"{ledger.path}; they are run again"
            )


def write_csv(path: Path, runs: Iterable[Run], folder: Path) -> None:
    """Writes one line in FuxiCTR's result format for each run, from its result file.

    Args:
        path: The csv.
        runs: Finished runs.
        folder: The search's folder, from which the runs' result files are named.
    """
    lines = [f"{result_line(read_result(folder / run['result']))}\n" for run in runs]
    write_whole(path, "".join(lines).encode())


def best_table(runs: Sequence[Run], space: Space, rows: int = 5) -> Table:
    """Makes the table of the best trials."""
    table = Table(title=f"best of {len(runs)} finished trials", title_justify="left")
    table.add_column("trial", no_wrap=True)  # whole, to be copied; the others' headers may wrap
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
        position = {canonical(plain(value)): i for i, value in enumerate(values)}
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

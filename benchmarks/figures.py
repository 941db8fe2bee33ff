"""What papers claim of their ablations and sweeps, and the figures of a study's own beside it; curves; pairs.

A claim of ``paper_claims.csv`` is that one variant (``lower``) has a lower AUC than another (``higher``). Variants have
the names of a study's page: ``as tuned``, an ablation, or an option and its value. A row for each data set and task of
the paper has its two AUCs; they are empty where the paper, or what is known of it, states the order alone.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from flowctr.compare import paired_t_test
from flowctr.pages import COLORS
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

TUNED = "as tuned"
OURS, PAPER, FAINT = COLORS[0][0], COLORS[1][0], "#767676"  # told apart in every common colour blindness
PAPER_MARKERS = "Ds^v"  # one for each data set of the paper
SIGNIFICANT = 0.05
LINEAR = 0.02  # larger changes are drawn on a logarithmic scale: a failed variant would hide all others
WIDTH, PANELS_PER_ROW = 7.2, 3
MEAN, SEEDS = "here: mean and standard deviation", "here: each seed"
STYLE = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 8,
    "legend.frameon": False,
    "text.parse_math": False,
}
METADATA = {"Software": None}  # equal results give an equal file

AUCs = dict[str, dict[int, float]]  # name of a variant -> seed -> AUC


@dataclass(frozen=True)
class Claim:
    """A variant is below another; ``changes`` has the difference on each data set of the paper, None if unknown."""

    lower: str
    higher: str
    paper: str
    where: str
    changes: dict[str, float | None]


def read_claims(path: Path, study: str, aucs: AUCs) -> list[Claim]:
    """Reads what papers claim of the variants that were run, with the mean over the tasks of each data set."""
    found: dict[tuple[str, ...], dict[str, list[dict]]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["study"] == study and {row["lower"], row["higher"]} <= aucs.keys():
                datasets = found.setdefault(tuple(row[key] for key in ("lower", "higher", "paper", "where")), {})
                datasets.setdefault(row["dataset"], []).append(row)
    return [
        Claim(*what, {dataset: _mean_change(tasks) for dataset, tasks in datasets.items()})
        for what, datasets in found.items()
    ]


def _mean_change(tasks: list[dict[str, str]]) -> float | None:
    if not all(row["lower_auc"] for row in tasks):
        return None
    return float(np.mean([float(row["lower_auc"]) - float(row["higher_auc"]) for row in tasks]))


def changes(aucs: AUCs, name: str, reference: str = TUNED) -> np.ndarray:
    """Returns by how much a variant is above another with each seed that both have."""
    return np.array([auc - aucs[reference][seed] for seed, auc in aucs[name].items() if seed in aucs[reference]])


def verdict(differences: np.ndarray) -> str:
    """Says whether the differences are below zero: by a paired t-test over the seeds, p < .05, not corrected."""
    if len(differences) < 2:
        return "not decided, one seed"
    p = paired_t_test(differences, np.zeros_like(differences))
    if np.isnan(p):  # all the same
        p = float(differences.mean() == 0)
    holds = "not decided" if p >= SIGNIFICANT else "yes" if differences.mean() < 0 else "no"
    return f"{holds}, p {p:.2g}"


def compared(claims: list[Claim], aucs: AUCs) -> list[list[str]]:
    """Lists for each claim the two variants, the paper's difference and where it is, ours, and the verdict."""
    rows = []
    for claim in claims:
        ours = changes(aucs, claim.lower, claim.higher)
        paper = [f"{_number(change)}{f' ({dataset})' if dataset else ''}" for dataset, change in claim.changes.items()]
        rows.append([claim.lower, claim.higher, ", ".join(paper), claim.where, shown(ours), verdict(ours)])
    return rows


def shown(differences: np.ndarray) -> str:
    """Shows mean and sample standard deviation of differences, or a single one."""
    deviation = f" ± {differences.std(ddof=1):.4f}" if len(differences) > 1 else ""
    return f"{_number(differences.mean())}{deviation}"


def _number(change: float | None) -> str:
    return "no number" if change is None else f"{change:+.4f}".replace("-", "−")


def papers_changes(claims: list[Claim]) -> dict[str, dict[str, float]]:
    """Returns what papers report of variants against their whole model: paper and data set -> variant -> change."""
    found: dict[str, dict[str, float]] = {}
    for claim in claims:
        for dataset, change in claim.changes.items():
            if claim.higher == TUNED and change is not None:
                found.setdefault(", ".join(filter(None, (claim.paper, dataset))), {})[claim.lower] = change
    return found


def draw_ablations(path: Path, names: list[str], aucs: AUCs, claims: list[Claim], metric: str) -> None:
    """Draws by how much each ablation changes the AUC, from the first one at the top to the last."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.3 + 0.36 * len(names)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=FAINT, linewidth=0.8)
        ours = [changes(aucs, name) for name in names]
        rows = np.arange(len(names))
        means, deviations = zip(*map(_mean_and_deviation, ours))
        handles = [axes.errorbar(means, rows, xerr=deviations, fmt="o", color=OURS, capsize=3, label=MEAN)]
        handles += axes.plot(
            np.concatenate(ours), np.repeat(rows, [*map(len, ours)]) - 0.25, "|", color=FAINT, label=SEEDS
        )
        for marker, (paper, reported) in zip(PAPER_MARKERS, papers_changes(claims).items()):
            known = [row for row, name in enumerate(names) if name in reported]
            values = [reported[names[row]] for row in known]
            handles += axes.plot(values, np.add(known, 0.25), marker, mfc="white", mec=PAPER, ms=5, label=paper)
        for row, differences in enumerate(ours):
            beside = {"xy": (1, row), "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axes.annotate(shown(differences), xytext=(6, 0), va="center", **beside)
        axes.set_yticks(rows, names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        _label_changes(axes, f"change of the test {metric} against the tuned setting")
        figure.legend(handles=handles, loc="outside lower left", ncols=2)
        figure.savefig(path, dpi=130, metadata=METADATA)


def _mean_and_deviation(values: np.ndarray) -> tuple[float, float]:
    """Returns the mean and the sample standard deviation, zero for a single value."""
    return values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0


def _label_changes(axes: Axes, label: str) -> None:
    """Labels the x axis, which becomes logarithmic beyond ``LINEAR`` if something lies there."""
    low, high = axes.get_xlim()
    if max(-low, high) > LINEAR:
        label += f", logarithmic beyond {LINEAR}"
        axes.set_xscale("symlog", linthresh=LINEAR, linscale=2)
        axes.xaxis.minorticks_off()
        axes.xaxis.set_major_locator(FixedLocator([-0.2, -0.1, -0.05, -0.02, -0.01, 0, 0.01, 0.02, 0.05, 0.1, 0.2]))
        axes.set_xlim(*(1.2 * end if abs(end) > LINEAR else end for end in (low, high)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.3g}".replace("-", "−") if value else "0"))
    axes.set_xlabel(label)


def papers_best(claims: list[Claim], option: str) -> dict[str, str]:
    """Returns the values of a swept option that papers put above others, with the paper."""
    ends = [claim for claim in claims if claim.higher.startswith(f"{option} ")]
    return {claim.higher.removeprefix(f"{option} "): claim.paper for claim in ends}


def draw_sweeps(
    path: Path, sweeps: dict[str, list[object]], tuned: dict[str, object], aucs: AUCs, claims: list[Claim], metric: str
) -> None:
    """Draws the AUC against the values of each swept option, in a panel of its own; the tuned value is marked."""
    with matplotlib.rc_context(STYLE):
        lines, columns = -(-len(sweeps) // PANELS_PER_ROW), min(len(sweeps), PANELS_PER_ROW)
        figure = Figure(figsize=(WIDTH, 0.5 + 2.1 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
        for panel in panels.flat[len(sweeps) :]:
            panel.set_axis_off()
        handles = {}
        for panel, (option, values) in zip(panels.flat, sweeps.items()):
            names, places = [str(value) for value in values], np.arange(len(values))
            seeds = [np.array(list(aucs[f"{option} {name}"].values())) for name in names]
            means, deviations = zip(*map(_mean_and_deviation, seeds))
            panel.errorbar(places, means, deviations, fmt="o-", lw=1, color=OURS, capsize=3, label=MEAN)
            between = np.repeat(places, [*map(len, seeds)]) + 0.15
            panel.plot(between, np.concatenate(seeds), "_", color=FAINT, label=SEEDS)
            chosen = values.index(tuned[option])
            panel.plot(chosen, means[chosen], "o", ms=9, mfc="none", mec="black", label=TUNED)
            for best, paper in papers_best(claims, option).items():
                label = f"highest in {paper}"
                panel.axvline(names.index(best), color=PAPER, linestyle="--", zorder=0, label=label)
            panel.set_xticks(places, names)
            panel.set_xlim(-0.5, len(values) - 0.5)
            panel.set_xlabel(option)
            handles |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels())}
        for panel in panels[:, 0]:
            panel.set_ylabel(f"test {metric}")
        order = sorted(handles, key=lambda label: label != MEAN)  # matplotlib lists error bars last
        figure.legend([handles[label] for label in order], order, loc="outside lower left", ncols=2)
        figure.savefig(path, dpi=130, metadata=METADATA)


def draw_curves(path: Path, runs: dict[str, dict], metric: str) -> None:
    """Draws the training loss and a validation metric by epochs, of one run of each experiment, five at most."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        panels = figure.subplots(1, 2)
        for panel, split, key in zip(panels, ("train", "valid"), ("loss", metric)):
            for (color, _), (name, run) in zip(COLORS[: len(runs)], runs.items(), strict=True):
                style = "o-" if split == "valid" else "-"
                panel.plot(*curve_of(run, split, key).T, style, ms=3, lw=1, color=color, label=name)
            panel.set_xlabel("epochs")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[0].set_ylabel("training loss")
        panels[1].set_ylabel(f"validation {metric}")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
        figure.savefig(path, dpi=130, metadata=METADATA)


def draw_pairs(path: Path, names: list[str], pairs: dict[str, np.ndarray]) -> None:
    """Draws for each metric which experiment is told apart from which, the rows and columns in the order of ``names``.

    Args:
        path: The image.
        names: Experiments.
        pairs: Metric -> ``(experiments, experiments)``: 1 where that of the row is above that of the column, -1 where
            below, 0 where neither is known, nan where it could not be tested.
    """
    meanings = {-1: ("below", PAPER), 0: ("not told apart", "#eeeeee"), 1: ("above", OURS)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.6 + 0.25 * len(names), 1.2 + 0.125 * len(names)), layout="constrained")
        panels = figure.subplots(1, len(pairs), sharey=True, squeeze=False)[0]
        for panel, (metric, signs) in zip(panels, pairs.items()):
            colors = ListedColormap([color for _, color in meanings.values()])
            panel.imshow(signs, colors, vmin=-1, vmax=1, aspect="auto", interpolation="none")
            panel.set_xticks(range(len(names)), range(1, len(names) + 1), fontsize=5)
            panel.set_yticks(range(len(names)), [f"{name}  {i}" for i, name in enumerate(names, 1)], fontsize=5.5)
            panel.tick_params(length=0)
            panel.set_title(f"{metric}: is the row ... the column?", fontsize=8)
        handles = [Patch(color=color, label=label) for label, color in meanings.values()]
        handles.append(Patch(facecolor="white", edgecolor="#cccccc", label="not tested: fewer than two common seeds"))
        figure.legend(handles=handles, loc="outside lower right", ncols=4)
        figure.savefig(path, dpi=150, metadata=METADATA)


def median_run(results: list[dict], metric: str) -> dict:
    """Picks the run in the middle by its best value on the validation data; of an even number the lower one."""
    ranked = sorted(results, key=lambda result: curve_of(result, "valid", metric)[:, 1].max())
    return ranked[(len(ranked) - 1) // 2]


def curve_of(result: dict, split: str, key: str) -> np.ndarray:
    """Returns the points ``(epochs, value)`` of a run's curve; the epoch ends with its last evaluation."""
    points = result["curves"][split]
    steps_per_epoch = max(p["step"] for part in result["curves"].values() for p in part if p["epoch"] == 1)
    return np.array([(point["step"] / steps_per_epoch, point[key]) for point in points])

"""Writes the tables and pairs and draws the learning curves of benchmarks/README.md from the result files beside it.

python benchmarks/tables.py
"""

import csv
import io
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
from figures import SIGNIFICANT, draw_curves, draw_pairs, median_run
from flowctr.compare import best_marks, paired_t_test
from flowctr.metrics import LOG_METRICS
from flowctr.pages import COLORS
from flowctr.results import read_published
from study import final_results, markdown, read, spread, targets_of, value_of

HERE = Path(__file__).parent
README = HERE / "README.md"
METRICS = ("gAUC", "AUC", "logloss", "NE")
PAIRED_METRICS = ("AUC", "gAUC")
PAIR = ("experiment", "other", "metric", "seeds", "difference", "p")
SIGNIFICANCE = (
    "Bold: better than every other experiment of the table, each by a paired t-test over the seeds, p < .05 after "
    "Holm's correction."
)


def main() -> None:
    """Rewrites what stands between the markers of each table; for each table of studies the curves and the pairs."""
    page = README.read_text()
    README.write_text(filled(page))
    for dataset_id in re.findall("<!-- table: studies (.+) -->", page):
        draw_curves(HERE / f"curves_{dataset_id}.png", *leaders(dataset_id))
        tested = pairs_of_studies(dataset_id)
        (HERE / f"pairs_{dataset_id}.csv").write_text(as_csv(tested))
        draw_pairs(HERE / f"pairs_{dataset_id}.png", *told_apart(tested))


def leaders(dataset_id: str) -> tuple[dict[str, dict], str]:
    """Gives the median runs of the studies that are best on the test data, and the metric that ranks them.

    A model for each label has no curve of its mean, and is left out.
    """
    finals = {folder.name: final_results(folder) for folder in study_folders(dataset_id)}
    finals = {name: runs for name, runs in finals.items() if not any("runs" in run for run in runs)}
    *_, target = targets_of(next(iter(finals.values()))[0])
    metric = f"AUC{''.join(target.partition('@')[1:])}"
    names = sorted(finals, key=lambda name: -mean_auc(finals[name], target))[: len(COLORS)]
    return {name: median_run(finals[name], metric) for name in names}, metric


def filled(page: str) -> str:
    """Returns the page with every ``<!-- table: NAME -->`` followed by that table up to ``<!-- end -->``."""
    head, *sections = page.split("<!-- table: ")
    for section in sections:
        name, _, rest = section.partition(" -->")
        _, _, after = rest.partition("<!-- end -->")
        head += f"<!-- table: {name} -->\n\n{table(name)}\n\n<!-- end -->{after}"
    return head


def table(name: str) -> str:
    """Builds one table: what a speed script measured, or a data set's studies or published rows."""
    measured = (data_speed, scaling, pairs, distributed, buckets, precision)
    speed = {function.__name__.removesuffix("_speed"): function for function in measured}
    if name in speed:
        return speed[name]()
    kind, _, dataset_id = name.rpartition(" ")
    return {"studies": studies, "published": published, "training": training}[kind](dataset_id)


def studies(dataset_id: str) -> str:
    """Lists the studies on a data set, the best on the test data first: mean and deviation over the seeds.

    What is significantly better than all others is bold.
    """
    folders = study_folders(dataset_id)
    finals = {f"[{folder.name}]({folder.relative_to(HERE)}/README.md)": final_results(folder) for folder in folders}
    *_, summary = targets = targets_of(next(iter(finals.values()))[0])
    columns = [(target, "AUC") for target in targets if "@" not in target or target == summary]
    columns += [(summary, "gAUC"), (summary, "NE")]
    names = sorted(finals, key=lambda name: -mean_auc(finals[name], summary))
    cells = []
    for target, metric in columns:
        values = [{r["seed"]: value_of(r, "test", target, metric) for r in finals[name]} for name in names]
        marks = best_marks(values, lower_is_better=metric in LOG_METRICS)
        shown = [spread(list(by_seed.values())) for by_seed in values]
        cells.append([f"**{text}**" if mark else text for text, mark in zip(shown, marks)])
    rows = [
        [name, len(finals[name]), *values, f"{finals[name][0]['parameters']['non_embedding']:,}"]
        for name, values in zip(names, zip(*cells))
    ]
    lines = markdown(["experiment", "seeds", *(" ".join(column).strip() for column in columns), "parameters"], rows)
    return f"{lines}\n\n{SIGNIFICANCE}" if len(names) > 1 else lines


def pairs_of_studies(dataset_id: str) -> list[dict]:
    """Tests each pair of experiments on a data set by a paired t-test over the seeds that both have, test data.

    Returns:
        For each pair, the one with the higher mean AUC first, and each of ``PAIRED_METRICS``: the two, the number of
        common seeds, by how much the first is above the other on average over these, and p, not corrected for the
        number of pairs, and nan for fewer than two common seeds.
    """
    finals = {folder.name: final_results(folder) for folder in study_folders(dataset_id)}
    *_, target = targets_of(next(iter(finals.values()))[0])
    names = sorted(finals, key=lambda name: -mean_auc(finals[name], target))
    rows = []
    for (one, other), metric in itertools.product(itertools.combinations(names, 2), PAIRED_METRICS):
        a, b = ({r["seed"]: value_of(r, "test", target, metric) for r in finals[name]} for name in (one, other))
        seeds = sorted(a.keys() & b.keys())
        x, y = ([values[seed] for seed in seeds] for values in (a, b))
        difference = float(np.mean(np.subtract(x, y))) if seeds else float("nan")
        rows.append(dict(zip(PAIR, (one, other, metric, len(seeds), difference, paired_t_test(x, y)), strict=True)))
    return rows


def as_csv(tested: list[dict]) -> str:
    """Writes pairs as csv, differences with four digits and p with two."""
    text = io.StringIO()
    writer = csv.DictWriter(text, PAIR, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "difference": f"{row['difference']:+.4f}", "p": f"{row['p']:.2g}"} for row in tested)
    return text.getvalue()


def told_apart(tested: list[dict]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Gives the experiments in their order and for each metric which is above which, as `draw_pairs` takes it."""
    names = list(dict.fromkeys(row[end] for row in tested for end in ("experiment", "other")))
    signs = {metric: np.zeros((len(names), len(names))) for metric in PAIRED_METRICS}
    for row in tested:
        i, j, sign = names.index(row["experiment"]), names.index(row["other"]), np.sign(row["difference"])
        if np.isnan(row["p"]):
            sign = np.nan
        elif row["p"] >= SIGNIFICANT:
            sign = 0
        signs[row["metric"]][i, j], signs[row["metric"]][j, i] = sign, -sign
    return names, signs


def study_folders(dataset_id: str) -> list[Path]:
    """Lists the folders of the studies on a data set."""
    folders = [path.parent for path in sorted(HERE.glob("*/*/tuner_config.yaml"))]
    folders = [folder for folder in folders if read(folder)["dataset_id"] == dataset_id]
    if unfinished := [str(folder) for folder in folders if not (folder / "results").exists()]:
        sys.exit(f"studies without results: {', '.join(unfinished)}; run them and write them with study.py first")
    return folders


def mean_auc(results: list[dict], target: str) -> float:
    """Returns the mean over the seeds of a target's test AUC."""
    return float(np.mean([value_of(result, "test", target, "AUC") for result in results]))


def published(dataset_id: str) -> str:
    """Lists what others report on a data set, the best AUC first."""
    rows = [row for row in read_published(HERE / "published_results.csv") if row.dataset_id == dataset_id]
    rows.sort(key=lambda row: (row.task, -row.metrics["AUC"]))
    names = [name for name in METRICS if any(name in row.metrics for row in rows)]
    lines = [[row.model, row.task, *(f"{row.metrics[name]:.4f}" for name in names), row.source] for row in rows]
    return markdown(["model", "task", *(f"test {name}" for name in names), "source"], lines)


def data_speed() -> str:
    """Lists what `benchmarks/speed/data.py` measured last."""
    result = json.loads((HERE / "speed" / "results" / "data.json").read_text())
    rows = []
    for name, run in result["loader"]["runs"].items():
        what = f"loader, {result['loader']['rows']:,} rows in memory"
        rows.append([what, name, f"{run['rows_per_second']:,.0f} rows/s", f"{run['data_mb']:,.0f} MB of data"])
    for count, part in result["build"].items():
        for name, run in part["runs"].items():
            seconds = f"{run['seconds']:.2f} s"
            rows.append([f"build, {int(count):,} rows", name, seconds, f"{run['peak_mb']:,.0f} MB at most"])
    for name, run in result["streaming"]["runs"].items():
        size = f"{result['streaming']['file_bytes'] / 1e9:.1f} GB"
        speed = f"{run['rows_per_second']:,.0f} rows/s"
        rows.append([f"streaming a file of {size}", f"flowctr h5, {name}", speed, f"{run['peak_mb']:,.0f} MB at most"])
    return markdown(["what", "who", "speed", "memory"], rows)


def scaling() -> str:
    """Lists what `benchmarks/speed/scaling.py` measured last."""
    result = json.loads((HERE / "speed" / "results" / "scaling.json").read_text())
    rows = []
    for fit in result["exponents"]:
        line = [p for p in result["points"] if all(p[k] == fit[k] for k in ("model", "axis")) and "error" not in p]
        first, last = line[0], line[-1]
        sizes = f"{first['size']} to {last['size']}"
        seconds = f"{first['seconds']:.3f} to {last['seconds']:.3f}"
        memory = f"{first['peak_bytes'] / 2**20:,.0f} to {last['peak_bytes'] / 2**20:,.0f}"
        rows.append([fit["model"], fit["axis"], sizes, seconds, memory, f"{fit['exponent']:.2f}"])
    return markdown(["model", "against", "sizes", "seconds a step", "peak MiB", "exponent"], rows)


def training(names: str) -> str:
    """Lists what `benchmarks/speed/training.py` measured: ``cpu``, or on GPUs in several runs, ``cuda+cuda_BST``."""
    results = [
        json.loads((HERE / "speed" / "results" / f"training_{name}.json").read_text()) for name in names.split("+")
    ]
    shown = {
        "rows/s": ("rows_per_second", "{:,.0f}"),
        "over FuxiCTR": ("over_fuxictr", "{:.2f}"),
        "of the limit": ("limit", "{:.0%}"),
        "idle": ("idle", "{:.0%}"),
        "evaluation, s": ("evaluate_seconds", "{:.2f}"),
        "peak GB": ("peak_bytes", "{:.2f}"),
        "loss difference": ("loss_difference", "{:.0e}"),
    }
    models = [model for result in results for model in result["models"].items()]
    measured = [(model, name, run) for model, runs in models for name, run in runs.items()]
    shown = {heading: of for heading, of in shown.items() if any(run.get(of[0]) is not None for *_, run in measured)}
    rows = []
    for model, name, run in measured:
        if "error" in run:
            cells = [run["error"].splitlines()[0], *["–"] * (len(shown) - 1)]
        else:
            values = {**run, "peak_bytes": run["peak_bytes"] and run["peak_bytes"] / 1e9}
            cells = ["–" if values.get(key) is None else form.format(values[key]) for key, form in shown.values()]
        rows.append([model, name, *cells])
    return markdown(["model", "option", *shown], rows)


def distributed() -> str:
    """Lists how much faster several processes train than one."""
    result = json.loads((HERE / "speed" / "results" / "distributed.json").read_text())
    several = result["processes"]
    rows = [
        [name, len(run["turns"]), f"{run['one']:,.0f}", f"{run['several']:,.0f}", f"{run['ratio']:.2f}"]
        for name, run in result["runs"].items()
    ]
    return markdown(["option", "turns", "rows/s of 1", f"rows/s of {several}", "ratio"], rows)


def buckets() -> str:
    """Lists what `bucket_by_length` does to a model: runs with and without it, in pairs of a seed."""
    paths = sorted((HERE / "speed" / "results" / "bucket_by_length").glob("*.json"))
    results = sorted(
        (json.loads(path.read_text()) for path in paths),
        key=lambda r: (r["seed"], bool(r["config"].get("bucket_by_length"))),
    )
    rows = []
    for result in results:
        values = [value_of(result, "test", "mean", name) for name in METRICS]
        rate = result["speed"]["train_rows_per_second"]
        bucketed = "yes" if result["config"].get("bucket_by_length") else "no"
        rows.append([result["seed"], bucketed, *(f"{value:.4f}" for value in values), f"{rate:,.0f}"])
    return markdown(["seed", "bucket_by_length", *(f"test mean {name}" for name in METRICS), "rows/s"], rows)


def precision() -> str:
    """Lists what bfloat16, and float32 added up in another order, change: runs of a seed, in a folder for each."""
    folder, names = HERE / "speed" / "results" / "precision", ("fp32", "fp32, two threads", "bf16")
    runs: dict[tuple[str, int], dict[str, float]] = {}
    for path in sorted(folder.glob("*/*.json")):
        result = json.loads(path.read_text())
        runs.setdefault((result["model"], result["seed"]), {})[path.parent.name] = value_of(
            result, "test", "mean", "AUC"
        )
    rows = [
        [model, seed, f"{auc[names[0]]:.4f}", *(f"{auc[name] - auc[names[0]]:+.4f}" for name in names[1:])]
        for (model, seed), auc in runs.items()
    ]
    return markdown(["model", "seed", f"test mean AUC, {names[0]}", *(f"change, {name}" for name in names[1:])], rows)


def pairs() -> str:
    """Lists how INFNet's step compares with the all-to-all transformer's."""
    rows = []
    for path in sorted((HERE / "speed" / "results").glob("pairs_*.json")):
        result = json.loads(path.read_text())
        for run in result["runs"]:
            seconds = [f"{run['seconds'][model]:.3f}" for model in ("INFNet v2", "all-to-all")]
            rows.append([result["environment"]["device"], run["mode"], *seconds, f"{run['ratio']:.2f}"])
    return markdown(["device", "mode", "INFNet v2, s", "all-to-all, s", "median ratio"], rows)


if __name__ == "__main__":
    main()

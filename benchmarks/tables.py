"""Writes the tables of benchmarks/README.md from the result files beside it: python benchmarks/tables.py."""

import csv
import json
from pathlib import Path

import numpy as np
from study import markdown, read, spread, targets_of, value_of

HERE = Path(__file__).parent
README = HERE / "README.md"
METRICS = ("gAUC", "AUC", "logloss", "NE")
NOT_SETTINGS = ("model", "model_id", "model_root", "seed", "gpu", "cuda_graphs")  # where and how it ran, not what


def main() -> None:
    """Rewrites what stands between the markers of each table."""
    README.write_text(filled(README.read_text()))


def filled(page: str) -> str:
    """Returns the page with every ``<!-- table: NAME -->`` followed by that table up to ``<!-- end -->``."""
    head, *sections = page.split("<!-- table: ")
    for section in sections:
        name, _, rest = section.partition(" -->")
        _, _, after = rest.partition("<!-- end -->")
        head += f"<!-- table: {name} -->\n\n{table(name)}\n\n<!-- end -->{after}"
    return head


def table(name: str) -> str:
    """Builds one table: what a speed script measured, the studies on a data set, or its single runs."""
    speed = {"data": data_speed, "scaling": scaling, "pairs": pairs, "training": training}
    if name in speed:
        return speed[name]()
    return studies(name.removeprefix("studies ")) if name.startswith("studies ") else runs(name)


def studies(dataset_id: str) -> str:
    """Lists the studies on a data set, the best on the test data first: mean and deviation over the seeds."""
    folders = [path.parent for path in HERE.glob("*/*/tuner_config.yaml")]
    folders = [folder for folder in folders if read(folder)["dataset_id"] == dataset_id]
    finals = {f: [json.loads(path.read_text()) for path in sorted((f / "results").glob("*.json"))] for f in folders}
    *_, summary = targets = targets_of(finals[folders[0]][0])
    columns = [(target, "AUC") for target in targets if "@" not in target or target == summary]
    columns += [(summary, "gAUC"), (summary, "NE")]
    rows = []
    for folder in sorted(folders, key=lambda f: -np.mean([value_of(r, "test", summary, "AUC") for r in finals[f]])):
        values = [spread([value_of(result, "test", *column) for result in finals[folder]]) for column in columns]
        size = f"{finals[folder][0]['parameters']['non_embedding']:,}"
        rows.append([f"[{folder.name}]({folder.relative_to(HERE)}/README.md)", len(finals[folder]), *values, size])
    return markdown(["experiment", "seeds", *map(" ".join, columns), "parameters"], rows)


def runs(dataset_id: str) -> str:
    """Lists the single runs of a data set, the best on its validation data first, then the reference rows."""
    results = [json.loads(path.read_text()) for path in sorted(HERE.glob("*/*.json"))]
    results = [result for result in results if result["dataset_id"] == dataset_id]
    results.sort(key=lambda result: -result["metrics"]["valid"]["AUC"])
    labelled = any(len(result["labels"]) > 1 for result in results)
    rows = []
    for result in results:
        targets = [*result["labels"], "mean"] if labelled else [""]
        for target in targets:
            prefix = f"{target}_" if target not in ("", "mean") else ""
            values = [result["metrics"][split].get(prefix + name) for split in ("valid", "test") for name in METRICS]
            first = target == targets[0]
            rows.append(
                [
                    *([result["model"], settings(result, results), result["seed"]] if first else [""] * 3),
                    *([target] if labelled else []),
                    *("–" if value is None else f"{value:.4f}" for value in values),
                ]
            )
    with open(HERE / "reference_results.csv", newline="") as file:
        references = [row for row in csv.DictReader(file) if row["dataset_id"] == dataset_id]
    for row in references:
        test = [row["gAUC"], row["AUC"], row["logloss"], "–"]
        rows.append([row["model"], row["source"], "–", *([""] if labelled else []), *["–"] * 4, *test])
    columns = ["model", "settings", "seed", *(["label"] if labelled else [])]
    columns += [f"{split} {name}" for split in ("valid", "test") for name in METRICS]
    return markdown(columns, rows)


def settings(result: dict, results: list[dict]) -> str:
    """Names what the run has set and another run of the same model has not, or otherwise."""
    configs = [other["config"] for other in results if other["model"] == result["model"]]
    return ", ".join(
        f"{key} {value}"
        for key, value in result["config"].items()
        if key not in NOT_SETTINGS and any(config.get(key) != value for config in configs)
    )


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


def training() -> str:
    """Lists what `benchmarks/speed/training.py` measured last."""
    result = json.loads((HERE / "speed" / "results" / "training.json").read_text())
    rows = []
    for model, measured in result["models"].items():
        for name, run in measured.items():
            if "error" in run:
                rows.append([model, name, run["error"].splitlines()[0], *["–"] * 4])
                continue
            ratios = ["–" if run[key] is None else f"{run[key]:.2f}" for key in ("over_fuxictr", "over_plain")]
            peak = "–" if run["peak_bytes"] is None else f"{run['peak_bytes'] / 1e9:.2f}"
            rows.append([model, name, f"{run['rows_per_second']:,.0f}", *ratios, peak, f"{run['loss_difference']:.0e}"])
    return markdown(["model", "option", "rows/s", "over FuxiCTR", "over plain", "peak GB", "loss difference"], rows)


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

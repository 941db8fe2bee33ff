"""Runs and writes up a study: python benchmarks/study.py run benchmarks/INFNet/INFNet_v2_kuairand_pure_window --gpu 0.

A study is a folder laid out as BARS does, and this script fills it from its ``tuner_config.yaml``:

    tuner_config.yaml   base_config, base_expid and tuner_space, as FuxiCTR's tuner has them; trials, seeds, variants
    tuner_config.csv    one result line per trial, the best on the validation data first
    results.csv         one result line per seed of the best trial's settings; results/ has the files of these runs
    variants.csv        one result line per seed of every ablation and of every value of a sweep
    runs.jsonl          configuration, metrics and commit of every run
    environments.txt    hardware and software
    README.md           the page

Phase ``tune`` draws trials from the space; ``final`` runs the settings of the best one and ``variants`` these with one
thing changed, each with every seed. A run whose result is there already, in the model's results/ or in the folder, is
not repeated. ``write`` fills the folders from the results and needs no GPU.
"""

import argparse
import itertools
import json
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import yaml
from flowctr import config, experiment
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parent.parent
PHASES = ("tune", "final", "variants")
METRICS = ("AUC", "gAUC", "logloss", "NE")
# What runs.jsonl keeps of a result: enough to write everything again.
KEPT = (
    *("expid", "model", "dataset_id", "seed", "started", "command", "config"),
    *("labels", "metrics", "parameters", "speed", "peak_memory_bytes", "flops_per_row", "commit", "data"),
)
# Of a configuration: where it ran, and the columns of the data set, which its id names.
NOT_KEPT = ("model_id", "model_root", "verbose", "gpu", "feature_cols")


@dataclass(frozen=True)
class Job:
    """One run of a study: an experiment with some settings overridden, and a seed."""

    study: Path
    config_dir: Path
    expid: str
    seed: int
    overrides: tuple[tuple[str, object], ...] = ()

    @property
    def model_dir(self) -> Path:
        return self.config_dir.parent

    @property
    def arguments(self) -> list[str]:
        sets = [f"{key}={json.dumps(value)}" for key, value in self.overrides]
        return ["--expid", self.expid, "--seed", str(self.seed), *(part for text in sets for part in ("--set", text))]

    def result(self) -> dict | None:
        """Reads the newest result of this run, made with the configuration that it has now."""
        wanted = None
        for result in _known_results(self.study, self.model_dir / "results", f"{self.expid}-s{self.seed}-*.json"):
            if _what(shlex.split(result["command"])[2:]) == self.arguments:
                wanted = wanted or self._config()
                if all(result["config"].get(key) == value for key, value in wanted.items()):
                    return {**result, "command": shlex.join(["python", self._script, *self.arguments])}
        return None

    @property
    def _script(self) -> str:
        return f"{self.model_dir.relative_to(REPOSITORY)}/run_expid.py"

    def _config(self) -> dict:
        """Gives the configuration as a result holds it, without what says where it ran."""
        params = config.load(self.config_dir, self.expid, [*self.arguments[5::2], f"seed={self.seed}"])
        kept = {key: value for key, value in params.items() if key not in NOT_KEPT}
        return json.loads(json.dumps(experiment.portable(kept)))

    def run(self, gpu: int) -> str | None:
        """Runs it in a process of its own; returns what went wrong."""
        checkpoints = REPOSITORY / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        # Trials of one experiment and seed would share a checkpoint.
        with tempfile.TemporaryDirectory(prefix="study-", dir=checkpoints) as scratch:
            where = ["--gpu", str(gpu), "--set", f"model_root={Path(scratch).relative_to(REPOSITORY)}"]
            command = [sys.executable, self._script, *self.arguments, *where]
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        return f"{shlex.join(command)}\n{done.stderr[-2000:]}" if done.returncode else None


def _known_results(study: Path, results: Path, pattern: str) -> Iterator[dict]:
    """Reads results, the newest first: files with their ``path``, then what the study keeps of all its runs."""
    files = {path.name: path for folder in (results, study / "results") for path in folder.glob(pattern)}
    for name in sorted(files, reverse=True):
        yield {**json.loads(files[name].read_text()), "path": files[name]}
    if (study / "runs.jsonl").exists():
        yield from map(json.loads, (study / "runs.jsonl").read_text().splitlines())


def _what(arguments: list[str]) -> list[str]:
    """Leaves out the options that say where a run ran, not what it was."""
    pairs = zip(arguments[::2], arguments[1::2])
    return [part for pair in pairs if pair[0] != "--gpu" and not pair[1].startswith("model_root=") for part in pair]


def jobs(folder: Path, phase: str) -> list[Job]:
    """Lists the runs of one phase of a study; those after ``tune`` have the best trial's settings."""
    study = read(folder)
    config_dir, base, seeds = REPOSITORY / study["base_config"], study["base_expid"], study["seeds"]
    if phase == "tune":
        grid = list(itertools.product(*([(key, value) for value in v] for key, v in study["tuner_space"].items())))
        chosen = random.Random(seeds[0]).sample(grid, min(study["trials"], len(grid)))
        return [Job(folder, config_dir, base, seeds[0], trial) for trial in chosen]
    best = dict(ranked(folder)[0][0].overrides)
    if phase == "final":
        settings = [(base, best)]
    else:
        settings = [(expid, _unless_ablated(best, study, expid)) for expid in study["ablations"]]
        sweeps = [(key, value) for key, values in study["sweeps"].items() for value in values]
        settings += [(base, {**best, key: value}) for key, value in sweeps if best.get(key) != value]
    return [
        Job(folder, config_dir, expid, seed, tuple(overrides.items()))
        for expid, overrides in settings
        for seed in seeds
    ]


def _unless_ablated(best: dict, study: dict, expid: str) -> dict:
    """Leaves out the settings that an ablation itself changes."""
    base, ablation = (config.load(REPOSITORY / study["base_config"], name) for name in (study["base_expid"], expid))
    return {key: value for key, value in best.items() if ablation.get(key) == base.get(key)}


def ranked(folder: Path) -> list[tuple[Job, dict]]:
    """Gives the trials with their results, the best on the validation data first."""
    select = read(folder)["select"]
    return sorted(results(folder, "tune"), key=lambda trial: -trial[1]["metrics"]["valid"][select])


def results(folder: Path, phase: str) -> list[tuple[Job, dict]]:
    """Gives the runs of a phase with their results, all of them or none."""
    found = [(job, job.result()) for job in jobs(folder, phase)]
    missing = [job for job, result in found if result is None]
    if missing:
        sys.exit(
            f"{folder}: {len(missing)} of {len(found)} runs of phase {phase} have no result with this configuration in "
            f"{missing[0].model_dir / 'results'}; run them first, as {shlex.join(missing[0].arguments)}"
        )
    return found


def all_results(folder: Path) -> dict[str, list[tuple[Job, dict]]]:
    """Gives the runs of every phase with their results."""
    return {"tune": ranked(folder), "final": results(folder, "final"), "variants": results(folder, "variants")}


def read(folder: Path) -> dict:
    """Reads what a study is to run."""
    return {"ablations": [], "sweeps": {}, **yaml.safe_load((folder / "tuner_config.yaml").read_text())}


def run(folders: list[Path], phases: list[str], gpus: list[int], workers: int) -> None:
    """Runs what has no result yet, phase by phase, ``workers`` runs at a time on each GPU."""
    free: SimpleQueue[int] = SimpleQueue()
    for gpu in gpus * workers:
        free.put(gpu)

    def work(job: Job) -> str | None:
        gpu = free.get()
        try:
            return job.run(gpu)
        finally:
            free.put(gpu)

    failures = []
    with ThreadPoolExecutor(len(gpus) * workers) as pool:
        for phase in phases:
            wanted = dict.fromkeys(job for folder in folders for job in jobs(folder, phase))
            todo = [job for job in wanted if job.result() is None]
            failures += filter(None, tqdm(pool.map(work, todo), phase, total=len(todo), unit="run"))
    if failures:
        sys.exit("\n".join([*failures, f"{len(failures)} runs failed"]))


def write(folder: Path) -> None:
    """Writes what the result files say into the folder of a study."""
    done = all_results(folder)
    for phase, name in (("tune", "tuner_config.csv"), ("final", "results.csv"), ("variants", "variants.csv")):
        if done[phase]:
            (folder / name).write_text("".join(f"{experiment.result_line(result)}\n" for _, result in done[phase]))
    kept = [{key: result[key] for key in KEPT if key in result} for phase in done.values() for _, result in phase]
    for run in kept:
        run["config"] = {key: value for key, value in run["config"].items() if key not in NOT_KEPT}
    (folder / "runs.jsonl").write_text("".join(dict.fromkeys(f"{json.dumps(run)}\n" for run in kept)))
    (folder / "results").mkdir(exist_ok=True)
    finals = {path.name: path for _, result in done["final"] for path in _files_of(result)}
    for name, path in finals.items():
        if path.parent != folder / "results":
            shutil.copy(path, folder / "results" / name)
    for path in (folder / "results").iterdir():
        if path.name not in finals:
            path.unlink()
    (folder / "environments.txt").write_text(environment(done["final"][0][1]))
    (folder / "README.md").write_text(page(folder, done))


def _files_of(result: dict) -> list[Path]:
    path = result["path"]
    return list(path.parent.glob(f"{path.stem}.*"))  # the attention maps, too


def environment(result: dict) -> str:
    """Lists hardware and software as BARS does; fuxictr comes last."""
    hardware, versions = result["hardware"], dict(result["versions"])
    versions["fuxictr"] = versions.pop("fuxictr")
    lines = ["[Hardware]", f"CPU: {hardware['cpu']}", f"GPU: {hardware['gpu']}"]
    lines += [f"RAM: {hardware['memory_bytes'] / 2**30:.0f}G", "", "[Software]"]
    return "\n".join([*lines, *(f"{name}: {version}" for name, version in versions.items())]) + "\n"


def page(folder: Path, done: dict[str, list[tuple[Job, dict]]]) -> str:
    """Writes the page of a study."""
    study = read(folder)
    finals = [result for _, result in done["final"]]
    first = finals[0]
    targets, sizes = targets_of(first), first["parameters"]
    scenario = first["config"].get("scenario")
    parts = [
        f"# {study['base_expid']}",
        f"{first['model']} on `{first['dataset_id']}`, seeds {', '.join(str(result['seed']) for result in finals)}, "
        f"{first['hardware']['gpu']}, commit {' '.join(sorted({str(r['commit']) for r in finals}))}. "
        f"{sizes['total']:,} parameters, {sizes['non_embedding']:,} of them outside of embedding tables.",
        "## How to run it",
        "\n".join(
            [
                f"    flowctr prepare {first['dataset_id']} --raw DOWNLOADED --out data/prepared/{first['dataset_id']}",
                f"    {first['command']}",
            ]
        ),
        "## Results",
        "Mean and sample standard deviation over the seeds"
        + (f"; `@{scenario}` is the mean over the scenarios." if scenario else "."),
    ]
    columns = [(split, metric) for split in ("valid", "test") for metric in METRICS]
    rows = [
        [t, *(spread([value_of(r, split, t, metric) for r in finals]) for split, metric in columns)] for t in targets
    ]
    parts.append(markdown(["", *map(" ".join, columns)], rows))
    if done["variants"]:
        parts += [
            "## Ablations and sweeps",
            "Test data; one thing changed at a time, the same seeds.",
        ]
        variants: dict[tuple, list[dict]] = {}
        for job, result in done["final"] + done["variants"]:
            variants.setdefault((job.expid, job.overrides), []).append(result)
        parts.append(_variants_table(study, targets, variants, best=dict(done["tune"][0][0].overrides)))
    parts += [
        "## Tuning",
        f"{len(done['tune'])} trials drawn at random from [tuner_config.yaml](tuner_config.yaml), seed "
        f"{study['seeds'][0]}, ranked by `{study['select']}` on the validation data. All results above have the "
        "settings of the first; the test data took no part in the choice.",
        _trials_table(study, done["tune"]),
    ]
    if (folder / "NOTES.md").exists():
        parts += ["## Notes", (folder / "NOTES.md").read_text().strip()]
    return "\n\n".join(parts) + "\n"


def targets_of(result: dict) -> list[str]:
    """Names what metrics are shown for: labels, their mean, and both over scenarios if there are some."""
    labels, scenario = result["labels"], result["config"].get("scenario")
    plain = [*labels, "mean"] if len(labels) > 1 else [""]
    return [*plain, *(f"{target}@{scenario}" for target in plain)] if scenario else plain


def value_of(result: dict, split: str, target: str, metric: str) -> float | None:
    """Finds a metric of a target by its name in the result."""
    label, at, scenario = target.partition("@")
    name = metric if label in ("", "mean") else f"{label}_{metric}"
    return result["metrics"][split].get(f"{name}{at}{scenario}")


def spread(values: list[float | None]) -> str:
    """Shows mean and sample standard deviation, or a single value."""
    if None in values:  # undefined, as gAUC is where no user has both classes
        return "–"
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def _variants_table(study: dict, targets: list[str], variants: dict[tuple, list[dict]], best: dict) -> str:
    summary = targets[-1]
    rows = []
    for (expid, overrides), results in variants.items():
        changed = [(key, value) for key, value in overrides if best.get(key) != value]
        what = ", ".join(f"{key} {value}" for key, value in changed) or "as tuned"
        what = what if expid == study["base_expid"] else expid.removeprefix(f"{study['base_expid']}_")
        auc = [spread([value_of(r, "test", target, "AUC") for r in results]) for target in targets[:-1]]
        means = [spread([value_of(r, "test", summary, metric) for r in results]) for metric in ("AUC", "gAUC")]
        size, seeds = results[0]["parameters"]["non_embedding"], len(results)
        rows.append([what, seeds, *auc, *means, f"{size:,}"])
    columns = ["", "seeds", *(f"{target} AUC" for target in targets), f"{summary} gAUC", "parameters"]
    return markdown(columns, rows)


def _trials_table(study: dict, trials: list[tuple[Job, dict]]) -> str:
    rows, metrics = [], list(dict.fromkeys([study["select"], *METRICS]))
    for job, result in trials:
        overrides, valid = dict(job.overrides), result["metrics"]["valid"]
        rows.append([*(overrides[key] for key in study["tuner_space"]), *(spread([valid[name]]) for name in metrics)])
    return markdown([*study["tuner_space"], *(f"valid {name}" for name in metrics)], rows)


def markdown(columns: list[str], rows: list[list]) -> str:
    """Lays out a table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("run", "write"))
    parser.add_argument("folders", type=Path, nargs="+", help="folders with a tuner_config.yaml")
    parser.add_argument("--phase", choices=PHASES, nargs="+", default=list(PHASES))
    parser.add_argument("--gpu", type=int, nargs="+", default=[-1], help="GPU indices, -1 for the CPU")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time on each GPU")
    options = parser.parse_args()
    if options.action == "run":
        run(options.folders, options.phase, options.gpu, options.workers)
    else:
        for folder in options.folders:
            write(folder)


if __name__ == "__main__":
    main()

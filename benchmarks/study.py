"""Runs and writes up a study: python benchmarks/study.py run benchmarks/INFNet/INFNet_v2_kuairand_pure_window --gpu 0.

A study is a folder laid out as BARS does, and this script fills it from its ``tuner_config.yaml``:

    tuner_config.yaml   base_config, base_expid and tuner_space, as FuxiCTR's tuner has them; trials, seeds, ablations,
                        sweeps, and under defaults what a swept option is where the configuration does not name it;
                        labels, for a model for one label: it is trained for each of them, and judged by all; tuned_on,
                        the data set on which the one setting of a space without a choice was found
    tuner_config.csv    one result line per trial, the best on the validation data first
    results.csv         one result line per seed of the best trial's settings; results/ has the files of these runs
    variants.csv        one result line per seed of every ablation and of every value of a sweep
    ablations.png       what each ablation changes, beside what ../../paper_claims.csv has of the paper; sweeps.png
    runs.jsonl          configuration, metrics and commit of every run
    environments.txt    hardware and software
    README.md           the page

Phase ``tune`` draws trials from the space; ``final`` runs the settings of the best one and ``variants`` these with one
thing changed, each with every seed. A run whose result is there already, in the model's results/ or in the folder, is
not repeated. ``write`` fills the folders from the results and needs no GPU, and no checkout of FuxiCTR for its models.
"""

import argparse
import itertools
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from figures import TUNED, AUCs, compared, draw_ablations, draw_sweeps, read_claims
from flowctr import config, experiment
from flowctr.metrics import LOG_METRICS
from flowctr.tuning.engines import cores
from flowctr.tuning.space import write_whole
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parent.parent
CLAIMS = Path(__file__).with_name("paper_claims.csv")
PHASES = ("tune", "final", "variants")
METRICS = ("AUC", "gAUC", "logloss", "NE")
# Keys of a tuner_config.yaml.
NEEDED = ("base_config", "base_expid", "dataset_id", "tuner_space", "trials", "select", "seeds")
DEFAULTS = {"labels": [], "ablations": [], "sweeps": {}, "defaults": {}, "tuned_on": None}
# What runs.jsonl keeps of a result: enough to write everything again.
KEPT = (
    *("expid", "model", "dataset_id", "seed", "started", "command", "config"),
    *("labels", "metrics", "parameters", "speed", "peak_memory_bytes", "flops_per_row", "commit", "data", "zoo"),
)
# Of a configuration: where it ran and how it was launched, and the columns of the data set, which its id names.
NOT_KEPT = ("model_id", "model_root", "verbose", "gpu", "cuda_graphs", "resume", "zoo", "feature_cols")


@dataclass(frozen=True)
class Job:
    """One run of a study: an experiment with some settings overridden, and a seed."""

    study: Path
    config_dir: Path
    expid: str
    seed: int
    overrides: tuple[tuple[str, object], ...] = field(default=(), hash=False)  # values may be lists

    @property
    def model_dir(self) -> Path:
        return self.config_dir.parent

    @property
    def sets(self) -> list[str]:
        return [f"{key}={json.dumps(value)}" for key, value in self.overrides]

    @property
    def command(self) -> list[str]:
        """The command line, from the root of the repository; a folder without a script is run by ``flowctr run``."""
        script = self.model_dir.relative_to(REPOSITORY) / "run_expid.py"
        if (REPOSITORY / script).exists():
            return ["python", str(script), *self.arguments]
        return ["flowctr", "run", "--config", str(self.config_dir.relative_to(REPOSITORY)), *self.arguments]

    @property
    def arguments(self) -> list[str]:
        sets = [part for text in self.sets for part in ("--set", text)]
        return ["--expid", self.expid, "--seed", str(self.seed), *sets]

    def for_labels(self, labels: list[str]) -> list["Job"]:
        """Gives a run for each label; the run itself if there are none."""
        return [replace(self, overrides=(*self.overrides, ("label", label))) for label in labels] or [self]

    def result(self) -> dict | None:
        """Reads the newest result of this run, made with the configuration that it has now."""
        wanted = None
        for result in _known_results(self.study, self.model_dir / "results", f"{self.expid}-s{self.seed}-*.json"):
            if _what(shlex.split(result["command"])[2:]) == self.arguments:
                wanted = wanted or self._config()
                if all(result["config"].get(key) == value for key, value in wanted.items()):
                    return {**result, "command": shlex.join(self.command)}
        return None

    def _config(self) -> dict:
        """Gives the configuration as a result holds it, without what says where it ran."""
        params = config.read(self.config_dir, self.expid, [*self.sets, f"seed={self.seed}"])
        kept = {key: value for key, value in params.items() if key not in NOT_KEPT}
        return json.loads(json.dumps(experiment.portable(kept)))

    def run(self, gpu: int, threads: dict[str, str]) -> str | None:
        """Runs it in a process of its own; returns what went wrong. ``threads`` are variables of its environment."""
        checkpoints = REPOSITORY / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        # Trials of one experiment and seed would share a checkpoint.
        with tempfile.TemporaryDirectory(prefix="study-", dir=checkpoints) as scratch:
            where = ["--gpu", str(gpu), "--set", f"model_root={Path(scratch).relative_to(REPOSITORY)}"]
            program = {"python": sys.executable, "flowctr": str(Path(sys.executable).with_name("flowctr"))}
            command = [program[self.command[0]], *self.command[1:], *where]
            env = {**threads, **os.environ}
            done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
        return f"{shlex.join(command)}\n{done.stderr[-2000:]}" if done.returncode else None


def _known_results(study: Path, results: Path, pattern: str) -> Iterator[dict]:
    """Reads results, the newest first: files with their ``path``, then what the study keeps of all its runs."""
    files = {path.name: path for folder in (results, study / "results") for path in folder.glob(pattern)}
    for name in sorted(files, reverse=True):
        yield {**json.loads(files[name].read_text()), "path": files[name]}
    if (study / "runs.jsonl").exists():
        yield from map(json.loads, (study / "runs.jsonl").read_text().splitlines())


def _what(arguments: list[str]) -> list[str]:
    """Leaves out the options that say where a run ran and whether it was resumed, not what it was."""
    arguments = [argument for argument in arguments if argument != "--resume"]  # the one without a value
    pairs = [pair for pair in zip(arguments[::2], arguments[1::2]) if pair[0] not in ("--gpu", "--config")]
    return [part for pair in pairs if not pair[1].startswith("model_root=") for part in pair]


def jobs(folder: Path, phase: str) -> list[Job]:
    """Lists the runs of one phase of a study, one for each label if it names labels."""
    labels = read(folder)["labels"]
    return [run for job in settings(folder, phase) for run in job.for_labels(labels)]


def settings(folder: Path, phase: str) -> list[Job]:
    """Lists what a phase has a result for; what comes after ``tune`` has the best trial's settings."""
    study = read(folder)
    config_dir, base, seeds = REPOSITORY / study["base_config"], study["base_expid"], study["seeds"]
    if phase == "tune":
        grid = list(itertools.product(*([(key, value) for value in v] for key, v in study["tuner_space"].items())))
        chosen = random.Random(seeds[0]).sample(grid, min(study["trials"], len(grid)))
        return [Job(folder, config_dir, base, seeds[0], trial) for trial in chosen]
    best = dict(ranked(folder)[0][0].overrides)
    if phase == "final":
        chosen = [(base, best)]
    else:
        chosen = [(expid, _unless_ablated(best, study, expid)) for expid in study["ablations"]]
        sweeps = [(key, value) for key, values in study["sweeps"].items() for value in values]
        chosen += [(base, {**best, key: value}) for key, value in sweeps if best.get(key) != value]
    return [
        Job(folder, config_dir, expid, seed, tuple(overrides.items())) for expid, overrides in chosen for seed in seeds
    ]


def _unless_ablated(best: dict, study: dict, expid: str) -> dict:
    """Leaves out the settings that an ablation itself changes."""
    base, ablation = (config.read(REPOSITORY / study["base_config"], name) for name in (study["base_expid"], expid))
    return {key: value for key, value in best.items() if ablation.get(key) == base.get(key)}


def ranked(folder: Path) -> list[tuple[Job, dict]]:
    """Gives the trials with their results, the best on the validation data first."""
    select = read(folder)["select"]
    metric = select.partition("@")[0]  # within scenarios; of a label, behind its name
    sign = 1 if any(metric == loss or metric.endswith(f"_{loss}") for loss in LOG_METRICS) else -1
    return sorted(results(folder, "tune"), key=lambda trial: sign * trial[1]["metrics"]["valid"][select])


def results(folder: Path, phase: str) -> list[tuple[Job, dict]]:
    """Gives the settings of a phase with their results, all of them or none."""
    labels, wanted = read(folder)["labels"], settings(folder, phase)
    found = {run: run.result() for job in wanted for run in job.for_labels(labels)}
    missing = [run for run, result in found.items() if result is None]
    if missing:
        sys.exit(
            f"{folder}: {len(missing)} of {len(found)} runs of phase {phase} have no result with this configuration in "
            f"{missing[0].model_dir / 'results'}; run them first, as {shlex.join(missing[0].command)}"
        )
    return [(job, joined([found[run] for run in job.for_labels(labels)])) for job in wanted]


def final_results(folder: Path) -> list[dict]:
    """Reads what the folder keeps of the best trial's settings: a result for each seed."""
    labels, by_seed = read(folder)["labels"], {}
    for path in sorted((folder / "results").glob("*.json")):
        result = json.loads(path.read_text())
        by_seed.setdefault(result["seed"], []).append(result)
    order = {label: place for place, label in enumerate(labels)}
    return [joined(sorted(runs, key=lambda run: order.get(run["labels"][0], 0))) for runs in by_seed.values()]


def joined(runs: list[dict]) -> dict:
    """Makes one result of runs for a label each, as a model for all of these labels has it; keeps them as ``runs``."""
    if len(runs) == 1:
        return runs[0]
    metrics = {split: {} for split in runs[0]["metrics"]}
    for split, joint in metrics.items():
        by_label = {run["labels"][0]: run["metrics"][split] for run in runs}
        joint.update({f"{label}_{name}": value for label, values in by_label.items() for name, value in values.items()})
        for name in runs[0]["metrics"][split]:
            values = [run[name] for run in by_label.values()]
            joint[name] = None if None in values else float(np.mean(values))
    flops = [run.get("flops_per_row") for run in runs]
    # One after the other, the models take the sum of their times per row, and the memory of one.
    seconds_per_row = sum(1 / run["speed"]["train_rows_per_second"] for run in runs)
    memory = {where: [run["peak_memory_bytes"][where] for run in runs] for where in runs[0]["peak_memory_bytes"]}
    return {
        **runs[0],
        "labels": [run["labels"][0] for run in runs],
        "metrics": metrics,
        "parameters": {what: sum(run["parameters"][what] for run in runs) for what in runs[0]["parameters"]},
        "flops_per_row": None if None in flops else sum(flops),
        "speed": {"train_rows_per_second": 1 / seconds_per_row},
        "peak_memory_bytes": {where: None if None in sizes else max(sizes) for where, sizes in memory.items()},
        "runs": runs,
    }


def runs_of(results: list[tuple[Job, dict]]) -> list[dict]:
    """Lists the single runs of which results are made."""
    return [run for _, result in results for run in result.get("runs", [result])]


def all_results(folder: Path) -> dict[str, list[tuple[Job, dict]]]:
    """Gives the settings of every phase with their results."""
    return {"tune": ranked(folder), "final": results(folder, "final"), "variants": results(folder, "variants")}


def read(folder: Path) -> dict:
    """Reads what a study is to run."""
    path = folder / "tuner_config.yaml"
    try:
        content = config.read_yaml(path)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    if missing := sorted(set(NEEDED) - content.keys()):
        sys.exit(f"{path}: missing keys {missing}")
    if unknown := sorted(content.keys() - {*NEEDED, *DEFAULTS}):
        sys.exit(f"{path}: unknown keys {unknown}")
    for key in ("tuner_space", "sweeps"):
        if not isinstance(content.get(key, {}), dict):
            sys.exit(f"{path}: {key} must map options to lists of values; got {content[key]!r}")
    options = [*content["tuner_space"].items(), *content.get("sweeps", {}).items()]
    for key, values in [("seeds", content["seeds"]), *options]:
        if not isinstance(values, list) or not values or len({repr(value) for value in values}) < len(values):
            sys.exit(f"{path}: {key} must be a list of different values; got {values}")
    return {**DEFAULTS, **content}


def run(folders: list[Path], phases: list[str], gpus: list[int], workers: int) -> None:
    """Runs what has no result yet, ``workers`` runs at a time on each GPU; the other phases wait for all trials."""
    free: SimpleQueue[int] = SimpleQueue()
    for gpu in gpus * workers:
        free.put(gpu)

    # On a CPU, threads of several runs that wait for each other at a busy core take more time than they save.
    share = {"OMP_NUM_THREADS": str(max(1, cores() // workers))}

    def work(job: Job) -> str | None:
        gpu = free.get()
        try:
            return job.run(gpu, share if gpu == -1 else {})
        finally:
            free.put(gpu)

    failures = []
    with ThreadPoolExecutor(len(gpus) * workers) as pool:
        for phase in phases:
            wanted = dict.fromkeys(job for folder in folders for job in jobs(folder, phase))
            todo = [job for job in wanted if job.result() is None]
            failures += filter(None, tqdm(pool.map(work, todo), phase, total=len(todo), unit="run"))
            if failures and phase == "tune":  # what follows has the settings of the best trial
                break
    if failures:
        sys.exit("\n".join([*failures, f"{len(failures)} runs failed"]))


def write(folder: Path) -> None:
    """Writes what the result files say into the folder of a study."""
    done = all_results(folder)
    for phase, name in (("tune", "tuner_config.csv"), ("final", "results.csv"), ("variants", "variants.csv")):
        if done[phase]:
            write_text(folder / name, "".join(f"{experiment.result_line(run)}\n" for run in runs_of(done[phase])))
    kept = [{key: run[key] for key in KEPT if key in run} for phase in done.values() for run in runs_of(phase)]
    for run in kept:
        run["config"] = {key: value for key, value in run["config"].items() if key not in NOT_KEPT}
    write_text(folder / "runs.jsonl", "".join(dict.fromkeys(f"{json.dumps(run)}\n" for run in kept)))
    (folder / "results").mkdir(exist_ok=True)
    finals = {path.name: path for run in runs_of(done["final"]) for path in _files_of(run)}
    for name, path in finals.items():
        if path.parent != folder / "results":
            write_whole(folder / "results" / name, path.read_bytes())
    for path in (folder / "results").iterdir():
        if path.name not in finals:
            path.unlink()
    write_text(folder / "environments.txt", environment(done["final"][0][1]))
    draw(folder, done)
    write_text(folder / "README.md", page(folder, done))


def write_text(path: Path, text: str) -> None:
    """Writes a file as a whole: what it has of runs may be nowhere else."""
    write_whole(path, text.encode())


def draw(folder: Path, done: dict[str, list[tuple[Job, dict]]]) -> None:
    """Draws the ablations and the sweeps of a study, if it has some."""
    study, metric = read(folder), f"{targets_of(done['final'][0][1])[-1]} AUC".strip()
    aucs = aucs_of(study, done)
    claims = read_claims(CLAIMS, study["base_expid"], aucs)
    if study["ablations"]:
        draw_ablations(folder / "ablations.png", _ablations(study), aucs, claims, metric)
    if study["sweeps"]:
        draw_sweeps(folder / "sweeps.png", swept(study, done), tuned_values(study, done), aucs, claims, metric)


def variants_of(study: dict, done: dict[str, list[tuple[Job, dict]]]) -> dict[str, list[dict]]:
    """Gives the results of the tuned settings and of what differs from them in one thing, by name."""
    best, variants = dict(done["tune"][0][0].overrides), {}
    for job, result in done["final"] + done["variants"]:
        changed = [f"{key} {value}" for key, value in job.overrides if best.get(key) != value]
        name = _ablation_name(study, job.expid) if job.expid != study["base_expid"] else ", ".join(changed) or TUNED
        variants.setdefault(name, []).append(result)
    return variants


def _ablations(study: dict) -> list[str]:
    return [_ablation_name(study, expid) for expid in study["ablations"]]


def _ablation_name(study: dict, expid: str) -> str:
    return expid.removeprefix(f"{study['base_expid']}_")


def tuned_values(study: dict, done: dict[str, list[tuple[Job, dict]]]) -> dict[str, object]:
    """Gives what each swept option is in the tuned settings."""
    known = {**study["defaults"], **done["final"][0][1]["config"]}
    if unknown := study["sweeps"].keys() - known.keys():
        sys.exit(
            f"{study['base_expid']}: no configuration names {', '.join(sorted(unknown))}; say under defaults of "
            "its tuner_config.yaml what the model takes then"
        )
    return {option: known[option] for option in study["sweeps"]}


def swept(study: dict, done: dict[str, list[tuple[Job, dict]]]) -> dict[str, list[object]]:
    """Lists the values of each swept option with the tuned one among them, numbers in their order."""
    tuned = tuned_values(study, done)
    sweeps = {}
    for option, values in study["sweeps"].items():
        values = [tuned[option], *(value for value in values if value != tuned[option])]
        sweeps[option] = sorted(values) if all(isinstance(value, int | float) for value in values) else values
    return sweeps


def aucs_of(study: dict, done: dict[str, list[tuple[Job, dict]]]) -> AUCs:
    """Gives the test AUC of the last target for each variant and seed; the tuned value of a sweep has a name, too."""
    target = targets_of(done["final"][0][1])[-1]
    aucs = {
        name: {result["seed"]: value_of(result, "test", target, "AUC") for result in results}
        for name, results in variants_of(study, done).items()
    }
    return aucs | {f"{option} {value}": aucs[TUNED] for option, value in tuned_values(study, done).items()}


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
    targets = targets_of(first)
    scenario = first["config"].get("scenario")
    final_runs = runs_of(done["final"])
    devices = sorted({run["hardware"]["gpu"] or "CPU" for run in final_runs})
    parts = [
        f"# {folder.name}",
        f"{first['model']}{' of FuxiCTR' if first.get('zoo') else ''} on `{first['dataset_id']}`, "
        f"{'a model for each label, ' if study['labels'] else ''}"
        f"seeds {', '.join(str(result['seed']) for result in finals)}, {' and '.join(devices)}, "
        f"commit {' '.join(sorted(_commits(final_runs)))}.",
        "## How to run it",
        "\n".join(
            [
                *(_checkout(REPOSITORY / study["base_config"]) if first.get("zoo") else []),
                f"    flowctr prepare {first['dataset_id']} --raw DOWNLOADED --out data/prepared/{first['dataset_id']}",
                *(f"    {run['command']}" for run in final_runs if run["seed"] == first["seed"]),
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
    parts += ["## Cost", _cost(finals)]
    if done["variants"]:
        others = sorted(_commits(runs_of(done["variants"])) - _commits(final_runs))
        parts += [
            "## Ablations and sweeps",
            "Test data; one thing changed at a time, the same seeds."
            + (f" Some of the runs are of commit {' and '.join(others)}." if others else ""),
        ]
        parts += [_variants_table(targets, variants_of(study, done)), *_figures(study, done)]
    parts += ["## Tuning", _tuning(study, len(done["tune"])), _trials_table(study, done["tune"])]
    if (folder / "NOTES.md").exists():
        parts += ["## Notes", (folder / "NOTES.md").read_text().strip()]
    return "\n\n".join(parts) + "\n"


def _commits(runs: list[dict]) -> set[str]:
    return {str(run["commit"]) for run in runs}


def _checkout(config_dir: Path) -> list[str]:
    """Quotes the commands of a config folder's page that bring the models' code."""
    return [line for line in (config_dir / "README.md").read_text().splitlines() if line.startswith("    git ")]


def _cost(finals: list[dict]) -> str:
    """Shows what the model is and what its training took: the mean rate and the most memory of the runs."""
    first, flops = finals[0], finals[0].get("flops_per_row")
    finals = [result for result in finals if result["hardware"]["gpu"] == first["hardware"]["gpu"]]
    rate = np.mean([result["speed"]["train_rows_per_second"] for result in finals])
    memory = [result["peak_memory_bytes"] for result in finals]
    peak = max(sizes["host"] if sizes["device"] is None else sizes["device"] for sizes in memory)
    row = [f"{first['parameters'][what]:,}" for what in ("total", "non_embedding")]
    row += ["–" if flops is None else f"{flops:,.0f}", f"{rate:,.0f}", f"{peak / 2**30:.2f}"]
    columns = ["parameters", "outside of embedding tables", "FLOPs per row, forward", "training rows/s", "peak GiB"]
    table = markdown(columns, [row])
    joint = " The models for the labels count together, trained one after the other." if "runs" in first else ""
    device = first["hardware"]["gpu"] or "CPU"
    return f"Mean rate and highest memory of the runs on the {device}, which may have shared it.{joint}\n\n{table}"


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


def _variants_table(targets: list[str], variants: dict[str, list[dict]]) -> str:
    summary = targets[-1]
    rows = []
    for name, results in variants.items():
        auc = [spread([value_of(r, "test", target, "AUC") for r in results]) for target in targets[:-1]]
        means = [spread([value_of(r, "test", summary, metric) for r in results]) for metric in ("AUC", "gAUC")]
        size, seeds = results[0]["parameters"]["non_embedding"], len(results)
        rows.append([name, seeds, *auc, *means, f"{size:,}"])
    columns = ["", "seeds", *(f"{target} AUC" for target in targets), f"{summary} gAUC", "parameters"]
    return markdown(columns, rows)


def _figures(study: dict, done: dict[str, list[tuple[Job, dict]]]) -> list[str]:
    """Shows the figures, and the papers' claims beside what the study has."""
    parts = []
    if study["ablations"]:
        parts.append("![what each ablation changes](ablations.png)")
    if study["sweeps"]:
        parts.append("![the values of the swept options](sweeps.png)")
    aucs = aucs_of(study, done)
    claims = read_claims(CLAIMS, study["base_expid"], aucs)
    for paper in dict.fromkeys(claim.paper for claim in claims):
        stated = [claim for claim in claims if claim.paper == paper]
        claimed = {name for claim in stated for name in (claim.lower, claim.higher)}
        open_names = [name for name in _ablations(study) if name not in claimed]
        open_names += [option for option in study["sweeps"] if not any(n.startswith(f"{option} ") for n in claimed)]
        parts += [
            f"### What {paper}, claims",
            "The first variant has a lower AUC than the second. Differences are first minus second: the paper's on its "
            "own data, the mean over its tasks; here mean and sample standard deviation over the seeds, of the AUC in "
            "the figures. A claim holds, or not, by a paired t-test over the seeds, p < .05 without correction."
            + (f" Not known: what it says of {', '.join(open_names)}." if open_names else ""),
            markdown(["lower", "higher", "paper", "where", "here", "holds"], compared(stated, aucs)),
        ]
    return parts


def _tuning(study: dict, trials: int) -> str:
    """Says how the settings were found."""
    if study["tuned_on"]:
        found = f"the setting of [tuner_config.yaml](tuner_config.yaml) was found on `{study['tuned_on']}`"
        return f"No search on these data: {found}."
    return (
        f"{trials} trials drawn at random from [tuner_config.yaml](tuner_config.yaml), seed {study['seeds'][0]}, "
        f"ranked by `{study['select']}` on the validation data. All results above have the settings of the first; "
        "the test data took no part in the choice."
        + (" A trial is a run for each label, which the csv files list one by one." if study["labels"] else "")
    )


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

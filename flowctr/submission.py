"""BARS submissions: the folder of a finished search, or of one experiment, and its row for the leaderboard.

A folder holds what a reader needs to repeat the result and nothing of this machine: paths below the repository are
relative to it, others begin with YOUR_PATH. It appears whole, after `flowctr.validation` has found no defect in it.
"""

import csv
import html
import io
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import yaml
from flowctr import bars, tuning
from flowctr.bars import ENVIRONMENTS, LEADERBOARD, README, RESULTS, Finding
from flowctr.compare import find_runs
from flowctr.config import DATASET_KEYS, DATASET_PATHS, DEFAULTS, REPOSITORY
from flowctr.datasets import DATASETS
from flowctr.experiment import result_line
from flowctr.results import read_result
from flowctr.tuning.outcome import check_results, ranked
from flowctr.tuning.search import locked
from flowctr.tuning.space import Trial, known_trials, write_configs
from flowctr.validation import check_log, check_submission
from jinja2 import Environment, FileSystemLoader, StrictUndefined

YOUR_PATH = "YOUR_PATH"
METRICS = ("gAUC", "AUC", "logloss")  # BARS' metrics, in its order
NEEDED = ("config", "command", "started", "versions")  # of a result, beyond what every reader needs
SOFTWARE = ("cuda", "python", "pytorch", "pandas", "numpy", "scipy", "sklearn", "pyyaml", "h5py", "tqdm", "flowctr")
PACKAGES = {"pytorch": "torch", "sklearn": "scikit-learn"}  # BARS' names -> those of the packages
NOT_CONFIGURED = {"gpu", "model_id", "world_size", "zoo"}  # what a run adds to its configuration, or the command says
BARS_URL = "https://github.com/reczoo/BARS/tree/main/ranking/ctr"
_BEFORE_PATH = r"(?<![\w.~/:-])"
_PATH = re.compile(rf"""{_BEFORE_PATH}(?:/|(?:\.\./)+)[\w.@+~-][^\s'",;:()\[\]{{}}]*""")


@dataclass
class _Material:
    """What a submission is made of.

    Attributes:
        stem: The name of the search's files.
        results: A result for each seed; the log is that of the first.
        trials: Every experiment of the search.
        tuner_yaml: The search's YAML.
        tuner_csv: Its ranked table.
    """

    stem: str
    results: list[dict[str, Any]]
    trials: list[Trial]
    tuner_yaml: str
    tuner_csv: str

    @property
    def best(self) -> dict[str, Any]:
        return self.results[0]

    @property
    def dataset(self) -> str:
        """The data set's id, without the hash that a search adds when it varies the data set."""
        return re.sub(r"_[0-9a-f]{8}$", "", self.best["dataset_id"])

    @property
    def title(self) -> str:
        return f"{self.best['model']}_{self.dataset}"


def submit(what: str, out: str | Path, author: str | None = None, url: str | None = None) -> Path:
    """Writes a BARS submission.

    Args:
        what: A search's tuner YAML, or an experiment with results of one or more seeds, as
            `flowctr.compare.find_runs` takes it.
        out: The folder to write, which must not exist.
        author: Author; git's user.name by default.
        url: The author's page.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: If there is no such search, no result, or no log.
        RunningError: If the search is running.
        ValueError: If the folder exists, the search is not finished, a result is of another format or lacks what a
            submission needs, there is no author, the author's page is no URL, or ledger, log and result disagree.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists; name another folder with --out, or remove it")
    if url is not None and not re.fullmatch(r"https?://[^\s()]+", url):
        raise ValueError(f"--url must be the address of a page, such as https://github.com/NAME; got {url!r}")
    author = author or _git_user()
    material = _of_search(Path(what)) if what.endswith((".yaml", ".yml")) else _of_experiment(what)
    log = _read_log(material.best)
    with _written_whole(out) as folder:
        for name, text in (
            (f"{material.best['expid']}.log", log),
            (f"{material.stem}.yaml", _portable_text(material.tuner_yaml)),
            (f"{material.stem}.csv", _portable_text(material.tuner_csv)),
            (RESULTS, _portable_text("".join(f"{result_line(result)}\n" for result in material.results))),
            (ENVIRONMENTS, _environments(material.best)),
            (LEADERBOARD, _leaderboard(material, author, url)),
            (README, _readme(material, author, url, log)),
        ):
            (folder / name).write_text(text, encoding="utf-8")
        write_configs(folder / material.stem, [_portable_trial(trial) for trial in material.trials])
        defects = [finding for finding in check_submission(folder) if not finding.is_notice]
        for result, line in zip(material.results, bars.read_results(folder / RESULTS, []), strict=True):
            if (path := _log_of(result)).is_file():
                defects += check_log(path, path.read_text(encoding="utf-8", errors="replace").splitlines(), line)
        if defects:
            listed = "\n".join(f"  - {_shown(defect, folder)}" for defect in defects)
            raise ValueError(
                f"the log and the results of {material.best['expid']} do not fit together; run it again:\n{listed}"
            )
    return out


# What is submitted


def _of_search(path: Path) -> _Material:
    space = tuning.read_space(path)
    ledger_path = space.folder / "ledger.jsonl"
    if not ledger_path.is_file():
        raise FileNotFoundError(f"there is no {ledger_path}: the search has not run; flowctr tune {path}")
    with locked(space.folder):  # reading a ledger mends its last line
        trials, ledger = known_trials(space), tuning.Ledger(ledger_path, space)
    states = {f"{run['trial']}, seed {run['seed']}": run["state"] for run in ledger.runs.values()}
    ran = {run["trial"] for run in ledger.runs.values()}
    states |= {trial.expid: "not started" for trial in trials if trial.expid not in ran}
    unfinished = [f"{name}: {state}" for name, state in states.items() if state not in ("finished", "pruned")]
    best = ranked(ledger, space)
    if unfinished or not best:
        listed = "\n".join(f"  - {line}" for line in unfinished or ["no trial has finished"])
        raise ValueError(f"the search {path} is not finished:\n{listed}\ngo on with: flowctr tune {path}")
    check_results(ledger, ledger.of_state("finished"), space)
    own = [run for run in ledger.of_state("finished") if run["trial"] == best[0]["trial"]]
    own.sort(key=lambda run: run["seed"] != best[0]["seed"])  # the trial's own comes first
    table = space.path.with_suffix(".csv")
    if not table.is_file():
        raise FileNotFoundError(f"there is no {table}, which a finished search writes; flowctr tune {path}")
    name = space.folder.name
    return _Material(
        stem=name if "_config" in name else f"{name}_tuner_config_01",  # by which BARS' folders are known
        results=[_complete(space.folder / run["result"]) for run in own],
        trials=[replace(trial, dataset=_located(trial.dataset, space.path.parent)) for trial in trials],
        tuner_yaml=space.path.read_text(encoding="utf-8"),
        tuner_csv=table.read_text(encoding="utf-8"),
    )


def _of_experiment(what: str) -> _Material:
    """Makes a search of one trial from what the results say of their configuration."""
    results = [_complete(run.path) for run in find_runs(what)]
    first = results[0]
    config = {key: value for key, value in first["config"].items() if key not in NOT_CONFIGURED}
    dataset = {key: value for key, value in config.items() if key in DATASET_KEYS}
    model = {key: value for key, value in config.items() if key not in DATASET_KEYS or key == "dataset_id"}
    model["model_root"] = DEFAULTS["model_root"]  # the run's own is where it was
    trial = Trial(1, first["expid"], {}, model, dataset)
    settings = {key: [value] if isinstance(value, list) else value for key, value in model.items()}
    search = {
        "base_config": f"model_zoo/{first['model']}/config",
        "base_expid": first["expid"],
        "dataset_id": settings.pop("dataset_id"),
        "tuner_space": {**settings, "seed": [result["seed"] for result in results]},
    }
    return _Material(
        stem=f"{first['model']}_{first['dataset_id']}_tuner_config_01",
        results=results,
        trials=[trial],
        tuner_yaml=yaml.safe_dump(search, sort_keys=False, default_flow_style=None, indent=4),
        tuner_csv=f"{result_line(first)}\n",
    )


def _complete(path: Path) -> dict[str, Any]:
    result = read_result(path)
    if missing := [key for key in NEEDED if key not in result]:
        raise ValueError(f"{path} lacks {', '.join(missing)}, which a submission needs; run the experiment again")
    if not _metric_names(result):
        raise ValueError(f"{path} has none of {', '.join(METRICS)} on test data, which a submission is ranked by")
    return result


def _located(dataset: dict[str, Any], root: Path) -> dict[str, Any]:
    """Makes the relative paths of a data set absolute, so that they can be made portable."""

    def absolute(value: Any) -> Any:
        return os.path.normpath(root / value) if isinstance(value, str) else value

    located = {key: absolute(value) if key in DATASET_PATHS else value for key, value in dataset.items()}
    if "feature_cols" in located:
        located["feature_cols"] = [
            {key: absolute(value) if key == "pretrained_emb" else value for key, value in column.items()}
            for column in located["feature_cols"]
        ]
    return located


def _read_log(result: dict[str, Any]) -> str:
    path = _log_of(result)
    if not path.is_file():
        raise FileNotFoundError(
            f"a submission without a log: there is no {path}, which the run of {result['expid']} with seed "
            f"{result['seed']} has written; put it back, or run the experiment again"
        )
    return _portable_text(path.read_text(encoding="utf-8", errors="replace"))


def _log_of(result: dict[str, Any]) -> Path:
    """Names the log that the run has written beside its checkpoint."""
    name = f"{result['expid']}-s{result['seed']}.log"
    return REPOSITORY / result["config"]["model_root"] / result["dataset_id"] / name


def _git_user() -> str:
    try:
        name = subprocess.run(["git", "config", "user.name"], capture_output=True, text=True).stdout.strip()
    except OSError:
        name = ""
    if not name:
        raise ValueError("a submission names its author: give --author, or set git's user.name")
    return name


# What is written


@contextmanager
def _written_whole(out: Path) -> Iterator[Path]:
    """Yields a folder beside ``out`` that takes its place once the block has succeeded."""
    folder = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _shown(defect: Finding, folder: Path) -> Finding:
    """Names the file of a defect from the submission's folder; a log elsewhere has its name alone."""
    is_inside = defect.path.is_relative_to(folder)
    return defect._replace(path=defect.path.relative_to(folder) if is_inside else Path(defect.path.name))


def _portable_trial(trial: Trial) -> Trial:
    model = {key: value for key, value in trial.model.items() if key not in NOT_CONFIGURED}
    return replace(trial, model=_portable_values(model), dataset=_portable_values(trial.dataset))


def _portable_values(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _portable_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_portable_values, value))
    return _portable_text(value) if isinstance(value, str) else value


def _portable_text(text: str) -> str:
    """Makes paths in the repository relative to it, and leaves at most the last two names of other paths."""
    for folder, inside, itself in ((REPOSITORY, "", "."), (Path.home(), f"{YOUR_PATH}/", YOUR_PATH)):
        path = re.compile(rf"{_BEFORE_PATH}{re.escape(str(folder))}(/|(?![\w.-]))")
        text = path.sub(lambda match, inside=inside, itself=itself: inside if match[1] else itself, text)
    return _PATH.sub(_portable_path, text)


def _portable_path(match: re.Match[str]) -> str:
    path = Path(os.path.normpath(REPOSITORY / "model_zoo" / "MODEL" / match[0]))  # where runs and searches start
    if path.is_relative_to(REPOSITORY):
        return match[0]
    return "/".join([YOUR_PATH, *(path.parts[2:][-2:] or path.parts[1:])])  # never the whole path


def _environments(result: dict[str, Any]) -> str:
    hardware, versions = result.get("hardware") or {}, result["versions"]
    memory = hardware.get("memory_bytes")
    lines = [
        "[Hardware]",
        f"CPU: {hardware.get('cpu')}",
        f"GPU: {hardware.get('gpu')}",
        f"RAM: {f'{memory / 2**30:.0f}G' if memory else None}",
        "",
        "[Software]",
        *(f"{name}: {versions.get(PACKAGES.get(name, name))}" for name in SOFTWARE),
        f"fuxictr: {versions['fuxictr']}",
    ]
    return "\n".join([*lines, ""])


def _metric_names(result: dict[str, Any]) -> list[str]:
    """Lists BARS' metrics as the result has them: of each label, and then of the only one or of their mean."""
    labels = result["labels"] if len(result["labels"]) > 1 else []
    names = [f"{label}_{metric}" for label in labels for metric in METRICS] + list(METRICS)
    return [name for name in names if (result["metrics"].get("test") or {}).get(name) is not None]


def _rounded(result: dict[str, Any], name: str) -> Decimal:
    """Gives a test metric as every file shows it, so that their means agree."""
    value = result["metrics"]["test"].get(name)
    return Decimal("nan") if value is None else Decimal(f"{value:.6f}")


def _leaderboard(material: _Material, author: str, url: str | None) -> str:
    """Writes the row for BARS' leaderboard of the data set, below the header."""
    model, names = material.best["model"], _metric_names(material.best)
    paper = _paper(model)
    row = {
        "Year": paper.get("year", ""),
        "Publication": paper.get("publication", ""),
        "Model": model,
        "Paper URL": paper.get("url", ""),
        **{
            "Logloss"
            if name == "logloss"
            else name: f"{mean(_rounded(result, name) for result in material.results):.6f}"
            for name in names
        },
        "Running Steps": f"{BARS_URL}/{model}/{material.title}",
        "Contributor": f'<a href="{html.escape(url)}">{html.escape(author)}</a>' if url else html.escape(author),
    }
    text = io.StringIO()
    writer = csv.DictWriter(text, row, lineterminator="\n")
    writer.writeheader()
    writer.writerow(row)
    return text.getvalue()


def _paper(model: str) -> dict[str, Any]:
    """Reads where a model was published; nothing of a model that is not ours."""
    path = REPOSITORY / "model_zoo" / model / "paper.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _readme(material: _Material, author: str, url: str | None, log: str) -> str:
    best, names = material.best, _metric_names(material.best)
    columns = [[_rounded(result, name) for result in material.results] for name in names]
    versions, commit = best["versions"], best.get("commit")
    train_data = material.trials[0].dataset.get("train_data")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    hardware, software = (part.splitlines()[1:] for part in _environments(best).rstrip().split("\n\n"))
    return environment.get_template("submission.md.jinja").render(
        title=material.title,
        model=best["model"],
        dataset=material.dataset,
        known_dataset=DATASETS.get(material.dataset),
        data_folder=_portable_text(str(Path(train_data).parent)) if isinstance(train_data, str) else "DATA",
        author=f"[{author}]({url})" if url else author,
        hardware=hardware,
        software=software,
        code=f"flowctr {versions.get('flowctr')}" + (f", commit {commit}," if commit else ""),
        fuxictr=versions["fuxictr"],
        stem=material.stem,
        command=_command(material),
        seeds=[result["seed"] for result in material.results],
        names=names,
        rows=list(zip(*columns)),
        averages=[f"{mean(column):.6f}" for column in columns],
        deviations=[f"{pstdev(column):.8f}" for column in columns],
        log=log.rstrip("\n"),
    )


def _command(material: _Material) -> str:
    """Says how to repeat the run, from a checkout; a model of FuxiCTR's zoo, from beside its checkout."""
    best = material.best
    processes = best["config"].get("world_size", 1)
    gpu = 0 if (best.get("hardware") or {}).get("gpu") else -1
    options = f"--config {YOUR_PATH}/{material.title}/{material.stem} --expid {best['expid']} --gpu {gpu} > run.log &"
    if best.get("zoo"):
        return f"nohup flowctr run --zoo FuxiCTR/{best['zoo']['folder']} {options}"
    launcher = f"torchrun --nproc_per_node {processes}" if processes > 1 else "python"
    return f"cd flowctr/model_zoo/{best['model']}\nnohup {launcher} run_expid.py {options}"

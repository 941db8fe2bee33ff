"""Result files of runs: found, read, and their metrics by name."""

import csv
import json
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

FORMAT = 1
REQUIRED = {"expid": str, "model": str, "dataset_id": str, "seed": int, "labels": list, "metrics": dict}
OPTIONAL = dict.fromkeys(("config", "curves", "data", "parameters", "peak_memory_bytes", "speed"), dict)
# Raised by an .npz that is cut off, damaged or something else.
NOT_NPZ = (EOFError, KeyError, NotImplementedError, ValueError, zipfile.BadZipFile, zlib.error)
SPLITS = ("valid", "test")
METRICS = ("AUC", "gAUC", "logloss", "NE")
MEAN = "mean"

# Of a configuration: where and how a run ran, not what it was, and the columns of its data set, which have a digest.
# With cuda_graphs a step is the same up to rounding; a run whose capture CUDA refuses is repeated without it.
NOT_SETTINGS = {
    *("seed", "gpu", "model_id", "model_root", "zoo", "verbose", "resume", "checkpoint_steps", "tensorboard"),
    *("feature_cols", "data_root", "train_data", "valid_data", "test_data"),
    *("data_on_device", "num_workers", "pin_memory", "cuda_graphs"),
}

PUBLISHED_COLUMNS = ("dataset_id", "task", "model", "gAUC", "AUC", "logloss", "parameters", "source")


@dataclass(frozen=True)
class Published:
    """A row that others have published; ``metrics`` as a run of that one label has them."""

    dataset_id: str
    task: str
    model: str
    metrics: dict[str, float]
    parameters: float | None
    source: str


def read_result(path: Path) -> dict:
    """Reads a result file.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is not a result of the known format, or a key is missing or of another type.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a result file: no JSON in it ({error})") from error
    return _checked(result, str(path))


def find_results(paths: Iterable[Path]) -> list[tuple[Path, dict]]:
    """Finds runs: result files, and in folders and their folders all results and studies' ``runs.jsonl``.

    Args:
        paths: Files and folders. Files that are named have to hold results; in a folder other JSON files are passed
            over.

    Returns:
        File and result of each run, once: of a run that is found twice the result file comes before ``runs.jsonl``.

    Raises:
        FileNotFoundError: If a path does not exist or a folder has no result.
        ValueError: If a file is not a whole result of the known format.
    """
    files, lines = [], []
    for path in paths:
        found = _in_folder(path) if path.is_dir() else [(path, read_result(path))]
        studies = sorted(path.rglob("runs.jsonl"))
        if not found and not studies:
            raise FileNotFoundError(f"there is no result, no *.json, in the folder {path}")
        files += found
        lines += [(study, result) for study in studies for result in _read_lines(study)]
    runs = {}
    for path, result in files + lines:
        what = [result["expid"], result["seed"], result.get("started"), result["metrics"], settings_of(result)]
        runs.setdefault(json.dumps(what, sort_keys=True), (path, result))
    return list(runs.values())


def _in_folder(folder: Path) -> list[tuple[Path, dict]]:
    found = []
    for path in sorted(folder.rglob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not a result file: no JSON in it ({error})") from error
        if isinstance(content, dict) and "expid" in content:
            found.append((path, _checked(content, str(path))))
    return found


def _read_lines(path: Path) -> list[dict]:
    """Reads what a study keeps of its runs: results without their format and curves."""
    results = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            result = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not a result: no JSON in it ({error})") from error
        results.append(_checked({"format": FORMAT, **result}, f"{path}:{number}"))
    return results


def _checked(result: dict, name: str) -> dict:
    if not isinstance(result, dict) or "format" not in result:
        raise ValueError(f"{name} is not a result file: it has no `format`; expected format {FORMAT}")
    if result["format"] != FORMAT:
        raise ValueError(f"{name} has result format {result['format']!r}; this version of flowctr reads {FORMAT}")
    missing = [key for key in REQUIRED if key not in result]
    if missing:
        raise ValueError(f"{name} is not a complete result file of format {FORMAT}: it lacks {', '.join(missing)}")
    if wrong := _wrong_types(result):
        raise ValueError(f"{name} is not a result file of format {FORMAT}: {'; '.join(wrong)}")
    return result


def _wrong_types(result: dict) -> list[str]:
    """Says which keys of a result do not hold what a run writes, as after an edit by hand."""
    wrong = [
        f"`{key}` is {result[key]!r:.40}, no {expected.__name__}"
        for key, expected in {**REQUIRED, **OPTIONAL}.items()
        if key in result and not isinstance(result[key], expected) and not (key in OPTIONAL and result[key] is None)
    ]
    if wrong:
        return wrong
    if not result["labels"] or not all(isinstance(label, str) for label in result["labels"]):
        wrong.append(f"`labels` is {result['labels']!r:.40}, no list of names")
    for split in SPLITS:
        metrics = result["metrics"].get(split) or {}
        if not isinstance(metrics, dict) or not all(isinstance(v, (int, float, type(None))) for v in metrics.values()):
            wrong.append(f"the {split} metrics are not all numbers")
    return wrong


def read_published(path: Path) -> list[Published]:
    """Reads a csv of published results, whose columns are ``PUBLISHED_COLUMNS``; what is not published is empty.

    Raises:
        ValueError: If a column is missing or a number is none.
    """
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in PUBLISHED_COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} is not a csv of published results: it lacks the columns {', '.join(missing)}")
        try:
            return [
                Published(
                    **{name: row[name] for name in ("dataset_id", "task", "model", "source")},
                    metrics={name: float(row[name]) for name in METRICS if row.get(name)},
                    parameters=float(row["parameters"]) if row["parameters"] else None,
                )
                for row in reader
            ]
        except ValueError as error:
            raise ValueError(f"{path}:{reader.line_num}: {error}") from error


def targets_of(results: Iterable[dict]) -> list[str]:
    """Returns what metrics are given for: every label, their mean where a run has several, and both over scenarios."""
    results = list(results)
    labels = unique(label for result in results for label in result["labels"])
    targets = labels + [MEAN] * any(len(result["labels"]) > 1 for result in results)
    scenarios = unique(suffix for result in results for suffix in scenarios_of(result) if "=" not in suffix)
    return targets + [f"{target}@{scenario}" for scenario in scenarios for target in targets]


def scenarios_of(result: dict) -> list[str]:
    """Returns what follows the "@" of metrics: a scenario column (the mean over it) and ``<column>=<value>``."""
    names = (name for split in SPLITS for name in result["metrics"].get(split) or {})
    return unique(name.partition("@")[2] for name in names if "@" in name)


def metric_name(result: dict, target: str, metric: str) -> str | None:
    """Names a metric as FuxiCTR does: ``<label>_AUC`` of several labels, plain ``AUC`` of one label and of the mean."""
    label, at, scenario = target.partition("@")
    if len(result["labels"]) > 1:
        return f"{metric if label == MEAN else f'{label}_{metric}'}{at}{scenario}"
    return f"{metric}{at}{scenario}" if label in result["labels"] else None


def metric_of(result: dict, split: str, target: str, metric: str) -> float | None:
    """Finds a metric of a target in a result."""
    return (result["metrics"].get(split) or {}).get(metric_name(result, target, metric))


def settings_of(result: dict) -> dict:
    """Returns the settings that make a run another experiment, and the digest of its data."""
    settings = {key: value for key, value in (result.get("config") or {}).items() if key not in NOT_SETTINGS}
    return {**settings, "data": (result.get("data") or {}).get("manifest")}


def unique(values: Iterable) -> list:
    """Returns the values, each once, in their order."""
    return list(dict.fromkeys(values))

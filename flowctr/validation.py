"""Checks of BARS folders: every defect of submissions and leaderboards, with its file and line.

A submission is a folder with ``environments.txt`` and ``results.csv``; a leaderboard, a csv whose rows link to
submissions. The numbers of log, README, search and leaderboard are compared with those of ``results.csv``. Nothing is
executed, and no link into the network is followed.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from statistics import mean, pstdev
from urllib.parse import unquote

from flowctr import bars
from flowctr.bars import (
    COLLISION,
    DATASET_CONFIG,
    ENVIRONMENTS,
    EXPID,
    KINDS,
    LEADERBOARD,
    LINK,
    LOGGED,
    MISSING,
    MODEL_CONFIG,
    NOTICES,
    NUMBER,
    NUMBERS,
    README,
    REPEATED,
    RESULTS,
    SAME_DATA,
    UNKNOWN_RUN,
    UNREADABLE,
    VERSION,
    Entry,
    Evaluation,
    Finding,
    ResultLine,
    Submission,
)
from flowctr.names import nearest
from rich.console import Console
from rich.progress import track
from rich.table import Table

_COMMAND = re.compile(r"(?:run_expid\.py|flowctr run)\b.*--expid[ =](?P<expid>\S+)")
_CONFIG_OPTION = re.compile(r"--config[ =](?P<path>\S+)")
_LINK = re.compile(r"\]\((?P<target>[^)\s]+)")
_SCHEME = re.compile(r"[a-zA-Z][\w+.-]+:")  # of https://..., mailto:... or data:...
_BARS_PATH = re.compile(r"https?://github\.com/reczoo/BARS/(?:tree|blob)/main/(?P<path>[^#?]+)")
_FUXICTR = re.compile(r"fuxictr: \d+\.\d+\.\d+\S*")
_HASH = re.compile(r"_\d+_(?P<hash>[0-9a-f]{8,})$")


def validate(paths: Iterable[Path], console: Console | None = None) -> tuple[list[Path], list[Finding]]:
    """Checks all submissions and leaderboards of some folders.

    Args:
        paths: Submissions, or folders that contain some, such as a checkout of BARS.
        console: Where to show the progress.

    Returns:
        The submissions and leaderboards, and what was found in them, in the order of files and lines.

    Raises:
        FileNotFoundError: If a path is no folder, or has neither a submission nor a leaderboard.
    """
    findings: list[Finding] = []
    targets = list(dict.fromkeys(target for path in paths for target in _find(Path(path), findings)))
    for target in track(targets, "checking", console=console, disable=console is None, transient=True):
        findings += check_submission(target) if target.is_dir() else check_leaderboard(target)
    return targets, sorted(set(findings))


def summary_table(targets: Sequence[Path], findings: Sequence[Finding]) -> Table:
    """Counts findings by kind."""
    folders = sum(target.is_dir() for target in targets)
    table = Table(title=f"submissions: {folders}, leaderboards: {len(targets) - folders}", title_justify="left")
    table.add_column("defect")
    table.add_column("found", justify="right")
    table.add_column("in", justify="right")
    for kind in KINDS:
        found = [finding for finding in findings if finding.kind == kind]
        name = f"{kind} (notice)" if kind in NOTICES else kind
        if kind == NOTICES[0]:
            table.add_section()
        table.add_row(name, str(len(found)), str(len({_target_of(finding, targets) for finding in found})))
    return table


def check_submission(folder: Path) -> list[Finding]:
    """Checks one submission.

    Args:
        folder: Its folder.

    Returns:
        What was found, in no particular order.
    """
    findings: list[Finding] = []
    submission = bars.read_submission(folder, findings)
    for check in (
        _check_files,
        _check_environments,
        _check_commands,
        _check_links,
        _check_results_table,
        _check_log,
        _check_search,
        _check_experiment_ids,
        _check_tuner_ids,
        _check_data,
        _check_row,
    ):
        findings += check(submission)
    return findings


def check_leaderboard(path: Path) -> list[Finding]:
    """Checks the rows of a leaderboard whose links to submissions can be followed in its checkout of BARS.

    Args:
        path: The csv file.

    Returns:
        What was found, in the order of lines.
    """
    findings: list[Finding] = []
    root = _checkout(path)
    for line, row in bars.read_leaderboard(path, findings):
        link = _BARS_PATH.match(row.get("Running Steps", ""))
        if root is None or link is None:
            continue
        folder = root / unquote(link["path"])
        if not os.path.isdir(folder):
            findings.append(Finding(path, line, LINK, f"{row['Model']}: there is no folder {link['path']}"))
        else:
            findings += _row_differences(path, line, row, bars.read_results(folder / RESULTS, []))
    return findings


# Which folders, which files


def _find(path: Path, findings: list[Finding]) -> list[Path]:
    """Lists the submissions in a folder, and the leaderboards that are not part of one; adds folders without access."""
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}")

    def tell(error: OSError) -> None:
        findings.append(Finding(Path(error.filename), 1, UNREADABLE, f"this cannot be read: {error.strerror}"))

    found = []
    for name, folders, files in os.walk(path, onerror=tell):
        folder = Path(name)
        folders[:] = sorted(inner for inner in folders if not inner.startswith("."))
        if {ENVIRONMENTS, RESULTS} & set(files):
            found.append(folder)
            folders.clear()
        else:
            tables = (folder / file for file in sorted(files) if file.endswith(".csv"))
            found += [table for table in tables if bars.is_there(table) and _is_leaderboard(table, tell)]
    if not any(target.is_dir() for target in found) and any(path.glob("*_config*")):
        found = [path]  # a submission that lacks both
    if not found and not findings:
        raise FileNotFoundError(
            f"there is no submission in {path}, no folder with {ENVIRONMENTS} or {RESULTS}, and no leaderboard"
        )
    return found


def _is_leaderboard(path: Path, tell: Callable[[OSError], None]) -> bool:
    """Says whether a csv ranks CTR models; BARS has leaderboards of recall too, which are of another kind."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            columns = file.readline().strip().split(",")
    except OSError as error:
        tell(error)
        return False
    return {"Model", "AUC", "Running Steps"} <= set(columns)


def _checkout(path: Path) -> Path | None:
    """Finds the checkout of BARS that a path is in."""
    return next((parent for parent in path.resolve().parents if (parent / "ranking" / "ctr").is_dir()), None)


def _target_of(finding: Finding, targets: Iterable[Path]) -> Path:
    around = (finding.path, *finding.path.parents)
    return next((target for target in targets if target in around), finding.path)


# Checks of a submission


def _check_files(submission: Submission) -> Iterator[Finding]:
    folder = submission.folder
    configs = bars.config_folders(folder) or [path.with_suffix("") for path in folder.glob("*_config*.yaml")]
    expid = submission.results[0].expid if submission.results else folder.name
    expected = [folder / name for name in (README, ENVIRONMENTS, RESULTS)]
    expected.append(submission.log or folder / f"{expid}.log")
    for config in configs or [folder / f"{folder.name}_tuner_config_01"]:
        expected += [config / DATASET_CONFIG, config / MODEL_CONFIG]
        if not bars.is_there(folder / "run_expid.py"):  # the layout before FuxiCTR 2, which came without the search
            expected += [config.with_name(config.name + suffix) for suffix in (".yaml", ".csv")]
    for path in expected:
        if not bars.is_there(path):
            yield Finding(path, 1, MISSING, "this file is missing")


def _check_environments(submission: Submission) -> Iterator[Finding]:
    """The last line says with which version of FuxiCTR to reproduce the result."""
    path = submission.folder / ENVIRONMENTS
    lines = [(number, line.strip()) for number, line in enumerate(submission.environments, start=1) if line.strip()]
    for number, last in lines[-1:]:
        if not _FUXICTR.fullmatch(last):
            yield Finding(path, number, VERSION, f"the last line must be 'fuxictr: X.Y.Z'; it is {last[:20]!r}")


def _check_commands(submission: Submission) -> Iterator[Finding]:
    """The commands of the README run the experiment of the log from the folder's configuration."""
    path, log = submission.folder / README, submission.log
    commands = [(n, line, m) for n, line, _ in bars.before_logs(submission.readme) if (m := _COMMAND.search(line))]
    if submission.readme and not commands:
        yield Finding(path, 1, EXPID, "there is no command 'run_expid.py --config ... --expid ...'")
    known = submission.expids or {line.expid for line in submission.results}
    names = [log.stem, *sorted(known)] if log else sorted(known)
    for number, line, command in commands:
        expid = command["expid"]
        whole = next((name for name in names if name != expid and name.startswith(expid)), None)
        if expid not in known and whole:
            yield Finding(path, number, EXPID, f"--expid {expid} is truncated; the experiment is {whole}")
        elif expid not in known and known:
            source = MODEL_CONFIG if submission.expids else RESULTS
            yield Finding(
                path, number, EXPID, f"--expid {expid} is not in {source}; the nearest is {nearest(expid, known)}"
            )
        elif log and not os.path.isfile(submission.folder / f"{expid}.log"):
            yield Finding(path, number, EXPID, f"--expid {expid} is not the experiment of the log {log.name}")
        config = _CONFIG_OPTION.search(line)
        if config and not os.path.isdir(submission.folder / Path(config["path"]).name):
            yield Finding(path, number, LINK, f"--config {config['path']}: there is no such folder here")


def _check_links(submission: Submission) -> Iterator[Finding]:
    path, folder, root = submission.folder / README, submission.folder, _checkout(submission.folder)
    headings = {line.strip("# ").lower().replace(" ", "-") for line in submission.readme if line.startswith("#")}
    for number, line, is_code in bars.before_logs(submission.readme):
        for target in [] if is_code else _LINK.findall(line):
            in_bars = _BARS_PATH.match(target)
            if target.startswith("#"):
                is_alive = target[1:].lower() in headings
            elif in_bars:
                is_alive = root is None or os.path.exists(root / unquote(in_bars["path"]))
            else:
                is_alive = bool(_SCHEME.match(target)) or os.path.exists(folder / unquote(target.partition("#")[0]))
            if not is_alive:
                yield Finding(path, number, LINK, f"there is no {target}")


def _check_results_table(submission: Submission) -> Iterator[Finding]:
    """The table of the README has the test metrics of every run, and their mean and standard deviation."""
    path, results = submission.folder / README, submission.results
    if not results or not submission.readme:
        return
    (start, header), *rows = bars.read_results_table(submission.readme) or [(1, [""])]
    is_labelled = header[0].startswith("Run")
    shown = 0
    for number, cells in rows:
        label = cells[0] if is_labelled else ""
        values = [cell.replace("&#177;", "").replace("±", "").strip() for cell in cells[is_labelled:]]
        if label in ("Avg", "Std"):
            expected, source = _summary(results, mean if label == "Avg" else pstdev), f"that of {RESULTS}"
        else:
            expected, source = (results[shown].test, str(results[shown])) if shown < len(results) else ({}, "")
            shown += 1
        yield from _differences(path, _at(number, dict(zip(header[is_labelled:], values))), expected, source)
    if shown != len(results):
        yield Finding(path, start, NUMBERS, f"the table of results has {shown} runs; {RESULTS} has {len(results)}")


def _check_log(submission: Submission) -> Iterator[Finding]:
    """The log ends with the metrics of a result, and the README's copy of the log has the same metrics."""
    log, lines, path = submission.log, submission.log_lines, submission.folder / README
    if not lines:
        return
    own = [run for run in submission.results if run.expid == log.stem]
    yield from _unless_one_agrees(check_log(log, lines, run) for run in own or submission.results)
    copied = [(n, match[0].strip()) for n, text in bars.after_logs(submission.readme) if (match := LOGGED.search(text))]
    logged = [match[0].strip() for line in lines if (match := LOGGED.search(line))]
    for (number, copy), original in zip(copied, logged):
        if copy != original:
            yield Finding(path, number, NUMBERS, f"the copy of the log has {copy}; {log.name} has {original}")
            break


def check_log(log: Path, lines: Sequence[str], run: ResultLine) -> list[Finding]:
    """Compares the log of a run with its result.

    Args:
        log: The log's path, for the findings.
        lines: Its lines.
        run: The line of the run in a csv of results.

    Returns:
        What differs; a log without metrics is of no whole run.
    """
    evaluations = bars.read_evaluations(lines)
    if not evaluations:
        return [Finding(log, len(lines), NUMBERS, "this log has no [Metrics]: it is not of a whole run")]
    return list(_log_differences(log, lines, evaluations, run))


def _log_differences(
    log: Path, lines: Sequence[str], evaluations: Sequence[Evaluation], run: ResultLine
) -> Iterator[Finding]:
    training, validation, test = (
        [evaluation for evaluation in reversed(evaluations) if evaluation.part == part]
        for part in ("training", "validation", "test")
    )
    is_resumed = any("Resume after step" in line for line in lines)
    valid = validation[:1] or training  # without one at the end, it is the best evaluation of the training
    for choices, expected in ((valid, run.valid), (test[:1] or valid, run.test)):
        if choices is training and is_resumed:
            continue  # the best evaluation may have been before
        yield from _unless_one_agrees(
            _differences(log, _named(evaluation, expected), expected, str(run)) for evaluation in choices
        )


def _named(evaluation: Evaluation, expected: Mapping[str, str]) -> dict[str, tuple[int, str]]:
    """Names the metrics of a log as a result does, without the task if it is the only one."""
    is_only = len({task for task, _, _ in evaluation.metrics}) == 1
    named = {}
    for (task, scenario, metric), value in evaluation.metrics.items():
        suffix = f"@{scenario}" if scenario else ""
        full = f"{task}_{metric}{suffix}"
        named[f"{metric}{suffix}" if is_only and full not in expected else full] = value
    return named


def _check_search(submission: Submission) -> Iterator[Finding]:
    """The table of the search has the numbers of the results for their experiments."""
    for line in submission.tuner_lines:
        yield from _unless_one_agrees(
            [
                *_differences(line.path, _at(line.number, line.valid), run.valid, str(run)),
                *_differences(line.path, _at(line.number, line.test), run.test, str(run)),
            ]
            for run in submission.results
            if run.expid == line.expid
        )


def _check_experiment_ids(submission: Submission) -> Iterator[Finding]:
    """An id of model_config.yaml, and the hash at its end, stand for one set of settings."""
    first: dict[str, Entry] = {}
    for path, entry in submission.experiments:
        earlier = first.setdefault(_hash_of(entry.id), entry)
        keys = {**earlier.settings, **entry.settings}.keys() - {"gpu", "model_id"}
        differing = sorted(str(key) for key in keys if earlier.settings.get(key) != entry.settings.get(key))
        message = ""
        if earlier is not entry and earlier.id == entry.id:
            message = f"{entry.id} is given twice, first in line {earlier.line}; only the last one counts"
        elif differing:
            message = f"{entry.id} has the hash of {earlier.id}, line {earlier.line}, but other {', '.join(differing)}"
        if message:
            yield Finding(path, entry.line, COLLISION, message)
    unknown = [run for run in submission.results if run.expid not in submission.expids]
    if submission.expids and unknown:
        message = ", ".join(dict.fromkeys(run.expid for run in unknown)) + f": not in {MODEL_CONFIG}"
        yield Finding(unknown[0].path, unknown[0].number, UNKNOWN_RUN, message)


def _check_tuner_ids(submission: Submission) -> Iterator[Finding]:
    """An id of the search's table, and the hash at its end, stand for one run, as far as its numbers tell."""
    first: dict[str, ResultLine] = {}
    for line in submission.tuner_lines:
        earlier = first.setdefault(_hash_of(line.expid), line)
        is_told = earlier.expid != line.expid and {earlier.expid, line.expid} <= submission.expids  # by their settings
        if earlier is not line and not is_told:
            is_same = (earlier.valid, earlier.test) == (line.valid, line.test)
            kind, numbers = (REPEATED, "the same") if is_same else (COLLISION, "other")
            what = "the id" if line.expid == earlier.expid else "the hash"
            message = f"{line.expid} has {what} of {earlier.expid}, line {earlier.number}, with {numbers} numbers"
            yield Finding(line.path, line.number, kind, message)


def _hash_of(expid: str) -> str:
    """Returns the hash at the end of a tuner's experiment id, and all of another id."""
    match = _HASH.search(expid)
    return match["hash"] if match else expid


def _check_data(submission: Submission) -> Iterator[Finding]:
    """Every experiment has its data set; a validation on the test data is said."""
    dataset_ids = {entry.id for _, entry in submission.datasets}
    for path, entry in submission.datasets:
        valid_data, test_data = (entry.settings.get(key) for key in ("valid_data", "test_data"))
        if valid_data and valid_data == test_data:
            message = f"{entry.id}: validation and test are one file, {valid_data}"
            yield Finding(path, entry.lines.get("valid_data", entry.line), SAME_DATA, message)
    for path, entry in submission.experiments:
        dataset_id = entry.settings.get("dataset_id")
        if dataset_ids and dataset_id and str(dataset_id) not in dataset_ids:
            message = f"{entry.id}: {DATASET_CONFIG} has no data set {dataset_id}"
            yield Finding(path, entry.lines.get("dataset_id", entry.line), EXPID, message)


def _check_row(submission: Submission) -> Iterator[Finding]:
    """The row for a leaderboard links to the folder's place in BARS, which has the name of the README's title."""
    path = submission.folder / LEADERBOARD
    title = next((line.strip("# ") for line in submission.readme if line.startswith("#")), submission.folder.name)
    for line, row in submission.leaderboard:
        link = row.get("Running Steps", "")
        if Path(unquote(link)).name != title:
            yield Finding(path, line, LINK, f"'Running Steps' must end in the folder {title}; it is {link!r}")
        yield from _row_differences(path, line, row, submission.results)


# Numbers


def _row_differences(path: Path, line: int, row: Mapping[str, str], results: Sequence[ResultLine]) -> list[Finding]:
    """Compares a row of a leaderboard with one run or the mean of all."""
    if not results:
        return []
    names = {name.lower(): name for name in results[0].test}  # BARS writes Logloss
    written = {names[key.lower()]: value for key, value in row.items() if key and key.lower() in names}
    choices = (_summary(results, mean), *(run.test for run in results))
    return _unless_one_agrees(_differences(path, _at(line, written), expected, RESULTS) for expected in choices)


def _summary(results: Sequence[ResultLine], function: Callable[[list[Decimal]], Decimal]) -> dict[str, str]:
    """Gives the mean or standard deviation of each test metric, with more digits than BARS writes."""
    columns = {name: [Decimal(run.test.get(name, "nan")) for run in results] for name in results[0].test}
    return {
        name: f"{function(values):.10f}" if all(value.is_finite() for value in values) else "nan"
        for name, values in columns.items()
    }


def _at(line: int, metrics: Mapping[str, str]) -> dict[str, tuple[int, str]]:
    return {name: (line, value) for name, value in metrics.items()}


def _differences(
    path: Path, written: Mapping[str, tuple[int, str]], expected: Mapping[str, str], source: str
) -> Iterator[Finding]:
    """Compares numbers, line and text by name, with those that a source has under the same name."""
    for name in [name for name in written if name in expected]:
        line, value = written[name]
        if not re.fullmatch(NUMBER, value) or not _agree(Decimal(value), Decimal(expected[name])):
            yield Finding(path, line, NUMBERS, f"{name} is {value}; {source} has {expected[name]}")


def _unless_one_agrees(choices: Iterable[Iterable[Finding]]) -> list[Finding]:
    """Returns what differs from the first choice, nothing if a choice has no differences."""
    found = [list(choice) for choice in choices]
    return found[0] if found and all(found) else []


def _agree(a: Decimal, b: Decimal) -> bool:
    """Says whether two numbers are the same, rounded to the digits of the one that has fewer."""
    if not a.is_finite() or not b.is_finite():
        return str(a) == str(b)
    coarser = max(number.as_tuple().exponent for number in (a, b))
    return abs(a - b) <= Decimal(5).scaleb(coarser - 1)

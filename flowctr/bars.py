"""The files of a BARS submission, read: result lines, logs, README, YAML. Nothing of them is executed.

What cannot be read is a `Finding` too, so that one bad file hides no other.
"""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

README, ENVIRONMENTS, RESULTS, LEADERBOARD = "README.md", "environments.txt", "results.csv", "leaderboard.csv"
DATASET_CONFIG, MODEL_CONFIG = "dataset_config.yaml", "model_config.yaml"

MISSING, UNREADABLE, EXPID, LINK = "missing file", "unreadable", "experiment id", "dead link"
NUMBERS, VERSION, COLLISION = "numbers disagree", "fuxictr version", "id collision"
SAME_DATA, REPEATED, UNKNOWN_RUN = "validation is test", "repeated run", "run of an unknown id"
NOTICES = (SAME_DATA, REPEATED, UNKNOWN_RUN)  # nobody has to mend them
KINDS = (MISSING, UNREADABLE, EXPID, LINK, NUMBERS, VERSION, COLLISION, *NOTICES)

NUMBER = r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d{1,3})?|nan|inf)"
LOGGED = re.compile(r"(?:\[Task: (?P<task>.+?)(?:, (?P<scenario>.+))?\])?\[Metrics\] (?P<metrics>.*)")
_METRIC = re.compile(rf"(?:^| - )(.+?): ({NUMBER})(?= - |\s*$)")  # "-" alone separates nothing: 1e-05 has one
_FIELD = re.compile(r",?\[(command|exp_id|dataset_id|train|val|test)\] ?")


class Finding(NamedTuple):
    """Something to mend, or just to know; line 1 also stands for a whole file, and ``kind`` is one of `KINDS`."""

    path: Path
    line: int
    kind: str
    message: str

    @property
    def is_notice(self) -> bool:
        return self.kind in NOTICES

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {'notice: ' * self.is_notice}{self.message}"


class ResultLine(NamedTuple):
    """A line in FuxiCTR's result format; metrics are name -> number as written."""

    path: Path
    number: int
    expid: str
    valid: dict[str, str]
    test: dict[str, str]

    def __str__(self) -> str:
        return f"{self.path.name}:{self.number}"


class Evaluation(NamedTuple):
    """An evaluation in a log, of the ``training``, ``validation`` or ``test`` part of it.

    ``metrics`` are (task, scenario, metric) -> line and number as written; task and scenario may be empty.
    """

    part: str
    metrics: dict[tuple[str, str, str], tuple[int, str]]


class Entry(NamedTuple):
    """An id of a YAML, with its settings, its line and the lines of its settings."""

    id: str
    line: int
    settings: dict[str, Any]
    lines: dict[str, int]


@dataclass
class Submission:
    """A submission; None and empty for what is missing or cannot be read.

    Attributes:
        folder: Its folder.
        readme: Lines of the README.
        environments: Lines of environments.txt.
        results: Lines of results.csv.
        tuner_lines: Lines of the search's csv.
        log: Path of the log.
        log_lines: Its lines.
        leaderboard: Rows of leaderboard.csv, each with its line.
        datasets: Entries of dataset_config.yaml, each with the path of the file.
        experiments: Entries of model_config.yaml, each with the path of the file.
    """

    folder: Path
    readme: list[str]
    environments: list[str]
    results: list[ResultLine]
    tuner_lines: list[ResultLine]
    log: Path | None
    log_lines: list[str]
    leaderboard: list[tuple[int, dict[str, str]]]
    datasets: list[tuple[Path, Entry]]
    experiments: list[tuple[Path, Entry]]

    @property
    def expids(self) -> set[str]:
        """Ids of model_config.yaml."""
        return {entry.id for _, entry in self.experiments}


def read_submission(folder: Path, findings: list[Finding]) -> Submission:
    """Reads a submission; what cannot be read is added to the findings."""
    tuner_csvs = [path for path in sorted(folder.glob("*.csv")) if path.name not in (RESULTS, LEADERBOARD)]
    datasets, experiments = (
        [(config / name, entry) for config in config_folders(folder) for entry in _read_yaml(config / name, findings)]
        for name in (DATASET_CONFIG, MODEL_CONFIG)
    )
    log = next(iter(sorted(folder.glob("*.log"))), None)
    for path in folder.glob("*_config*.yaml"):
        read_lines(path, findings)  # nothing is compared with it, but it has to be there
    return Submission(
        folder,
        readme=read_lines(folder / README, findings),
        environments=read_lines(folder / ENVIRONMENTS, findings),
        results=read_results(folder / RESULTS, findings),
        tuner_lines=[line for path in tuner_csvs for line in read_results(path, findings)],
        log=log,
        log_lines=read_lines(log, findings) if log else [],
        leaderboard=read_leaderboard(folder / LEADERBOARD, findings),
        datasets=datasets,
        experiments=experiments,
    )


def config_folders(folder: Path) -> list[Path]:
    """Lists the folders of a submission that hold a search's configuration; there should be one."""
    return sorted(path for path in folder.iterdir() if os.path.isdir(path) and "_config" in path.name)


def is_there(path: Path) -> bool:
    """Says whether there is a file; also of one in a folder that may not be entered, which reading it will tell."""
    try:
        return path.is_file()
    except OSError:
        return True


def read_lines(path: Path, findings: list[Finding]) -> list[str]:
    """Reads the lines of a text file, none of one that is not there."""
    if not is_there(path):
        return []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        findings.append(Finding(path, 1, UNREADABLE, f"this cannot be read: {error.strerror}"))
        return []
    if not text.strip():
        findings.append(Finding(path, 1, UNREADABLE, "this file is empty"))
        return []
    return text.splitlines()


def read_results(path: Path, findings: list[Finding]) -> list[ResultLine]:
    """Reads a csv in FuxiCTR's result format; lines in another format are added to the findings."""
    lines = []
    for number, text in enumerate(read_lines(path, findings), start=1):
        start, *pieces = _FIELD.split(text)
        fields = dict(zip(pieces[::2], pieces[1::2]))
        valid, test = (parse_metrics(fields.get(split, "")) for split in ("val", "test"))
        if damaged := next(filter(None, (_no_metric(fields.get(split, "")) for split in ("val", "test"))), None):
            findings.append(Finding(path, number, UNREADABLE, f"this is no metric: {damaged[:60]!r}"))
        if fields.get("exp_id") and test:
            lines.append(ResultLine(path, number, fields["exp_id"].strip(), valid, test))
        elif text.strip(" ,"):  # a spreadsheet writes rows of commas alone
            message = f"this is no line in FuxiCTR's result format: {start.strip()[:60]!r}"
            findings.append(Finding(path, number, UNREADABLE, message))
    return lines


def parse_metrics(text: str) -> dict[str, str]:
    """Reads metrics as FuxiCTR writes them: ``AUC: 0.7 - logloss: 1e-05``."""
    return dict(_METRIC.findall(text.strip()))


def _no_metric(text: str) -> str:
    """Gives what is left of metrics, or joined to the name of the next one, where a number cannot be read."""
    left = _METRIC.sub("", text.strip()).strip(" -,")
    return next((name for name in parse_metrics(text) if re.search(r": .* - ", name)), "" if left == "N.A." else left)


def read_evaluations(lines: Sequence[str]) -> list[Evaluation]:
    """Reads the evaluations of a log; metrics of several tasks belong together until one of them comes again."""
    evaluations: list[Evaluation] = []
    part, is_new = "training", True
    for number, line in enumerate(lines, start=1):
        logged = LOGGED.search(line)
        if "evaluation ***" in line:
            part, is_new = "test" if "Test" in line else "validation", True
        elif logged:
            metrics = {
                (logged["task"] or "", logged["scenario"] or "", name): (number, value)
                for name, value in parse_metrics(logged["metrics"]).items()
            }
            if is_new or metrics.keys() & evaluations[-1].metrics.keys():
                evaluations.append(Evaluation(part, {}))
                is_new = False
            evaluations[-1].metrics.update(metrics)
    return evaluations


def before_logs(readme: Sequence[str]) -> Iterator[tuple[int, str, bool]]:
    """Yields number, text and whether it is code for each line before the README's copy of the log."""
    is_code = False
    for number, line in enumerate(readme, start=1):
        if line.strip().startswith("```"):
            is_code = not is_code
        elif not is_code and re.match(r"#+ *Logs", line):
            return
        else:
            yield number, line, is_code


def after_logs(readme: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yields number and text of each line of the README's copy of the log."""
    before = max((number for number, _, _ in before_logs(readme)), default=0)
    return ((number, line) for number, line in enumerate(readme, start=1) if number > before)


def read_results_table(readme: Sequence[str]) -> list[tuple[int, list[str]]]:
    """Reads the first table below the heading Results: header and rows, each as line number and cells."""
    rows: list[tuple[int, list[str]]] = []
    is_below = False
    for number, line, _ in before_logs(readme):
        if line.startswith("#"):
            is_below = line.strip("# ") == "Results"
        elif is_below and line.strip().startswith("|"):
            rows.append((number, [cell.strip() for cell in line.strip().strip("|").split("|")]))
        elif rows:
            break
    return [*rows[:1], *rows[2:]]


def read_leaderboard(path: Path, findings: list[Finding]) -> list[tuple[int, dict[str, str]]]:
    """Reads the rows of a leaderboard with their lines; cells that a row lacks are empty."""
    if not read_lines(path, findings):
        return []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file, restval="")
        rows = []
        try:
            rows += ((reader.line_num, row) for row in reader)
        except csv.Error as error:
            findings.append(Finding(path, reader.line_num + 1, UNREADABLE, f"this is no csv: {error}"))
        return rows


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Executes nothing and knows the tuples that BARS writes; in C, for the 7 MB of YAML that BARS has."""


_Loader.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node, deep=True))
)


def _read_yaml(path: Path, findings: list[Finding]) -> list[Entry]:
    """Reads a mapping of ids to settings, also an id that is given twice."""
    lines = read_lines(path, findings)
    if not lines:
        return []
    loader = _Loader("\n".join(lines))
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            findings.append(Finding(path, 1, UNREADABLE, "this must map ids to settings"))
            return []
        return [_entry(loader, key, value) for key, value in node.value]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or getattr(error, "reason", error)
        findings.append(Finding(path, mark.line + 1 if mark else 1, UNREADABLE, f"this is no YAML: {reason}"))
        return []
    finally:
        loader.dispose()


def _entry(loader: yaml.SafeLoader, key: yaml.Node, value: yaml.Node) -> Entry:
    is_mapping = isinstance(value, yaml.MappingNode)
    lines = {str(name.value): name.start_mark.line + 1 for name, _ in value.value} if is_mapping else {}
    try:
        settings = loader.construct_object(value, deep=True) if is_mapping else {}
    except (ValueError, LookupError, AttributeError, TypeError) as error:  # of a date like 2020-13-45, or !!bool maybe
        raise yaml.constructor.ConstructorError(None, None, f"{error} in a value", value.start_mark) from error
    return Entry(str(key.value), key.start_mark.line + 1, settings, lines)

"""The ledger of a search: what became of each run, in a file that survives a kill at any moment.

Each line is a JSON object with ``trial``, ``seed`` and ``state``. A run begins with a ``started`` line, to which a
later line of the run adds what it says:

    started     settings, attempts, gpu, time
    finished    exit_code, seconds, metrics, value, evaluations, result (relative to the ledger's folder)
    pruned      exit_code, seconds, value, evaluations
    failed      exit_code, seconds, error

Lines are only appended; when a search is complete, they are replaced by one line for each run, in the trials' order.
"""

import json
import logging
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from flowctr.tuning.ids import canonical, plain
from flowctr.tuning.space import Space, write_whole

FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "started": {"settings": dict, "attempts": int, "gpu": (int, type(None)), "time": str},
    "finished": {
        **{"exit_code": int, "seconds": (int, float), "metrics": dict},
        **{"value": (int, float), "evaluations": list, "result": str},
    },
    "pruned": {"seconds": (int, float), "value": (int, float), "evaluations": list},
    "failed": {"exit_code": int, "seconds": (int, float), "error": str},
}

Run = Mapping[str, Any]


class Ledger:
    """The runs of a search.

    Args:
        path: The file; it need not exist.
        space: The space of the trials.

    Attributes:
        runs: ``(trial, seed)`` -> what the lines say of the run, in the order in which they started.

    Raises:
        ValueError: If a line is damaged or does not fit the space; a last line that was cut off by a kill is dropped.
    """

    def __init__(self, path: Path, space: Space):
        self.path = path
        self.runs: dict[tuple[str, int], dict[str, Any]] = {}
        self._space = space
        content = path.read_bytes() if path.exists() else b""
        *lines, last = content.split(b"\n")
        for number, line in enumerate(lines, 1):
            self._add(self._parse(number, line))
        if last:
            self._recover(len(lines) + 1, last, len(content) - len(last))

    def record(self, trial: str, seed: int, state: str, **fields: Any) -> None:
        """Appends a line, which is on the disk when this returns."""
        record = {"trial": trial, "seed": seed, "state": state, **fields}
        with open(self.path, "ab") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())
        self._add(plain(record))

    def compact(self) -> None:
        """Replaces the lines by one for each run, in the trials' order."""
        write_whole(self.path, b"".join(_line(run) for run in sorted(self.runs.values(), key=self._order)))

    def of_state(self, *states: str) -> list[Run]:
        """Lists the runs in some state, in the trials' order."""
        return sorted((run for run in self.runs.values() if run["state"] in states), key=self._order)

    def _order(self, run: Run) -> tuple[int, int]:
        return self._space.find(run["trial"]).number, run["seed"]

    def _add(self, record: dict[str, Any]) -> None:
        key = record["trial"], record["seed"]
        earlier = {} if "settings" in record else self.runs[key]  # a new start forgets how the last one failed
        self.runs[key] = {**earlier, **record}

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise self._wrong(number, f"this is no JSON ({error})") from error
        if not isinstance(record, dict):
            raise self._wrong(number, f"a line is a JSON object; this is {record!r}")
        expid, seed, state = (record.get(key) for key in ("trial", "seed", "state"))
        trial = self._space.find(str(expid))
        if trial is None:
            raise self._wrong(number, f"{expid!r} is no trial of {self._space.path}")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise self._wrong(number, f"'seed' must be an integer; got {seed!r}")
        if state not in FIELDS:
            raise self._wrong(number, f"'state' must be one of {', '.join(FIELDS)}; got {state!r}")
        if (expid, seed) not in self.runs and "settings" not in record:
            raise self._wrong(number, f"{expid}, seed {seed}, is {state} but was never started")
        for key, kind in {**FIELDS[state], **(FIELDS["started"] if "settings" in record else {})}.items():
            if not isinstance(record.get(key), kind) or isinstance(record.get(key), bool):
                raise self._wrong(number, f"{key!r} is missing or of a wrong type; got {record.get(key)!r}")
        if "settings" in record:
            settings = plain(trial.settings)
            if canonical(record["settings"]) != canonical(settings):
                raise self._wrong(number, f"{expid} has the settings {settings}; got {record['settings']}")
            try:
                datetime.fromisoformat(record["time"])
            except ValueError as error:
                raise self._wrong(number, f"'time' is no date and time; got {record['time']!r}") from error
        return record

    def _recover(self, number: int, line: bytes, start: int) -> None:
        """Ends a last line that lacks only its end, and takes away one that was cut in the middle."""
        try:
            json.loads(line)
        except ValueError:
            logging.warning("%s:%d: the line was cut off by a kill and is dropped: %r", self.path, number, line[:60])
            os.truncate(self.path, start)
            return
        self._add(self._parse(number, line))
        with open(self.path, "ab") as file:
            file.write(b"\n")

    def _wrong(self, number: int, what: str) -> ValueError:
        return ValueError(
            f"{self.path}:{number}: {what}; put the line back as it was, or delete all lines of its trial, which will "
            "then be run again"
        )


def _line(record: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(record)}\n".encode()

"""A search, top to bottom: checks, data sets, trials, seeds of the best one, and what is left of it.

The search's folder is the YAML's path without ``.yaml``. It has the configuration of every trial, the ledger, the
output of every run in ``logs/`` and a plot of every parameter; the ranked table is beside it.
"""

import contextlib
import glob
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import ModuleType

from filelock import FileLock, Timeout
from flowctr import config
from flowctr.data import build_h5
from flowctr.experiment import EVALUATIONS, RunningError
from flowctr.results import read_result
from flowctr.tuning.display import Display
from flowctr.tuning.engines import Command, Engine, Process, make_engine
from flowctr.tuning.ledger import Ledger, Run
from flowctr.tuning.outcome import best_table, check_results, measured, plot, ranked, write_csv
from flowctr.tuning.space import Space, Trial, known_trials, read_space, write_configs
from flowctr.tuning.strategies import Strategy, make_strategy
from rich.console import Console

ATTEMPTS = 2  # of a run: one that has failed is tried again, when nothing else runs on its device
POLL_SECONDS = 0.1
ERROR_LINES = 15


class TuningError(RuntimeError):
    """Trials have failed."""


@dataclass
class Job:
    """A run of a trial with a seed.

    Attributes:
        trial: The trial.
        seed: The seed.
        attempt: Counts from 1.
        resume: Whether to go on with a run that was killed together with its search.
        started: When it started, in seconds as `time.time` gives them.
    """

    trial: Trial
    seed: int
    attempt: int = 1
    resume: bool = False
    started: float = 0.0

    @property
    def name(self) -> str:
        """What `flowctr.experiment` names its log and its result by."""
        return f"{self.trial.expid}-s{self.seed}"


def tune(
    path: str | Path,
    gpus: Sequence[int] = (-1,),
    search: str = "grid",
    trials: int | None = None,
    engine: str = "local",
    seeds: int = 1,
    tag: str | None = None,
    workers: str = "auto",
    sampler: str = "TPESampler",
    model_dir: str | Path | None = None,
    src: ModuleType | None = None,
) -> Path:
    """Runs those trials of a tuner YAML that have not been run yet, and ranks them.

    Args:
        path: The YAML, see `flowctr.tuning.space`.
        gpus: GPU indices, -1 for the CPU.
        search: ``grid``: all trials; ``random``: some of them; ``optuna``: those that Optuna suggests, each stopped
            when it falls behind the others.
        trials: Number of trials of a search that is no grid.
        engine: ``local`` or ``ray``.
        seeds: Number of runs of the best trial, with its seed and those that follow.
        tag: Part of the ids of the trials to run.
        workers: Trials at a time on each GPU or on the CPU, or ``auto``.
        sampler: Optuna's sampler.
        model_dir: The model's folder, see `read_space`.
        src: Module with the model class, see `flowctr.config.load`.

    Returns:
        Path of the ranked table.

    Raises:
        ValueError: If an argument, the space, the configuration of a trial or the ledger is wrong.
        RunningError: If another search uses the same ledger.
        TuningError: If trials have failed; after all others have run.
    """
    if seeds < 1:
        raise ValueError(f"--seeds counts the trial's own, so that it is at least 1; got {seeds}")
    space = read_space(path, model_dir)
    space.check(src)
    strategy = make_strategy(space, search, trials, tag, sampler)
    with contextlib.closing(make_engine(engine, gpus, workers)) as devices, locked(space.folder):
        known, ledger = known_trials(space), Ledger(space.folder / "ledger.jsonl", space)
        try:
            with Display(space, ledger, strategy.count + seeds - 1) as display:
                _Search(space, strategy, ledger, devices, display, known).run(seeds)
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", file=sys.stderr)
            raise
        table = _conclude(space, ledger, seeds)
    _report(space, ledger, table)
    return table


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other searches from a search's folder.

    Raises:
        RunningError: If one uses it.
    """
    folder.mkdir(exist_ok=True)
    try:
        with FileLock(folder / ".ledger.lock", timeout=0):
            yield
    except Timeout as error:
        raise RunningError(f"another search is running in {folder}; wait for its end, or stop it") from error


class _Search:
    """The runs of a search, until all are done."""

    def __init__(
        self,
        space: Space,
        strategy: Strategy,
        ledger: Ledger,
        engine: Engine,
        display: Display,
        known: Iterable[Trial],
    ):
        self._space, self._strategy, self._ledger = space, strategy, ledger
        self._engine, self._display = engine, display
        self._configured = {trial.expid: trial for trial in known}
        self._built: set[str] = set()
        self._running: list[tuple[Job, Process]] = []
        self._logs = space.folder / "logs"

    def run(self, seeds: int) -> None:
        """Runs the trials, and then the best one with further seeds."""
        self._logs.mkdir(exist_ok=True)
        unfinished = {(job.trial.expid, job.seed): job for job in self._unfinished()}
        planned = {trial.expid for trial in self._strategy.planned}
        self._prepare(self._strategy.planned)
        trials = [job for job in unfinished.values() if job.seed == job.trial.seed]
        self._run_all([job for job in trials if not planned or job.trial.expid in planned], self._propose)
        best = ranked(self._ledger, self._space)
        if seeds > 1 and best:
            trial = self._space.find(best[0]["trial"])
            runs = [(trial.expid, trial.seed + i) for i in range(1, seeds)]
            new = {run: Job(trial, run[1]) for run in runs if run not in self._ledger.runs}
            self._run_all([job for run, job in {**new, **unfinished}.items() if run in runs])

    def _prepare(self, trials: Sequence[Trial]) -> None:
        """Writes the configuration of trials and builds their data sets."""
        self._configured |= {trial.expid: trial for trial in trials}
        write_configs(self._space.folder, self._configured.values())
        for dataset_id in dict.fromkeys(trial.dataset["dataset_id"] for trial in trials):
            if dataset_id not in self._built:
                build_h5(config.load_dataset(dataset_id, self._space.folder))
                self._built.add(dataset_id)

    def _unfinished(self) -> list[Job]:
        """Lists what an earlier search has left to do, after recording the runs that finished without its knowing."""
        jobs = []
        for run in self._ledger.of_state("started", "failed", "finished"):
            job = Job(self._space.find(run["trial"]), run["seed"])
            if run["state"] == "finished" and not self._has_result(run):
                jobs.append(job)
            elif run["state"] == "failed":
                # After the last attempt the search has told of it: who starts it again has mended what was wrong.
                job.attempt = run["attempts"] + 1 if run["attempts"] < ATTEMPTS else 1
                jobs.append(job)
            elif run["state"] == "started":
                job.attempt, job.resume = run["attempts"], True
                job.started = datetime.fromisoformat(run["time"]).timestamp()
                self._wait_for_orphan(job)
                if (path := self._find_result(job)) is None:
                    jobs.append(job)
                else:
                    self._finish(job, path)
        return jobs

    def _has_result(self, run: Run) -> bool:
        """Compares a finished run with its result file."""
        path = self._space.folder / run["result"]
        if not path.is_file():
            logging.warning("%s, the result of %s, is gone; the trial is run again", path, run["trial"])
            return False
        check_results(self._ledger, [run], self._space)
        return True

    def _wait_for_orphan(self, job: Job) -> None:
        """Waits for the end of a run whose search was killed, where the system does not kill it too."""
        path = _checkpoints(self._space, job.trial) / f".{job.name}.lock"
        if not path.is_file():
            return
        lock = FileLock(path)
        try:
            lock.acquire(timeout=1)
        except Timeout:
            logging.warning("%s of a search that was killed still runs; waiting for its end", job.name)
            lock.acquire()
        lock.release()

    def _propose(self) -> Job | None:
        """Gives the next new trial, ready to run."""
        trial = self._strategy.propose(self._ledger)
        if trial is None:
            return None
        if trial.expid not in self._configured:
            self._prepare([trial])
        return Job(trial, trial.seed)

    def _run_all(self, jobs: list[Job], more: Callable[[], Job | None] = lambda: None) -> None:
        """Runs some jobs, then those that ``more`` gives; last, each alone on its device, those that have failed."""
        retries = [job for job in jobs if job.attempt > 1]
        jobs = [job for job in jobs if job.attempt == 1]
        while True:
            while (gpu := self._engine.place()) is not None and (job := jobs.pop(0) if jobs else more()):
                self._start(job, gpu)
            if retries and (gpu := self._engine.place(alone=True)) is not None:
                self._start(retries.pop(0), gpu)
            if not self._running:
                return
            time.sleep(POLL_SECONDS)
            retries += filter(None, [self._look_after(job, process) for job, process in list(self._running)])

    def _start(self, job: Job, gpu: int) -> None:
        job.started = time.time()
        self._evaluations(job).unlink(missing_ok=True)
        fields = {"settings": dict(job.trial.settings), "attempts": job.attempt, "gpu": gpu}
        now = datetime.fromtimestamp(job.started).astimezone().isoformat(timespec="seconds")
        self._ledger.record(job.trial.expid, job.seed, "started", **fields, time=now)
        self._running.append((job, self._engine.start(self._command(job), gpu)))
        self._show()

    def _command(self, job: Job) -> Command:
        """Makes the command of a run, as one would type it in the model's folder."""
        folder = self._space.model_dir or self._space.folder.parent
        arguments = [str(Path(sys.executable).with_name("flowctr")), "run"]
        if self._space.model_dir:
            arguments = [sys.executable, "run_expid.py"]
        arguments += ["--config", os.path.relpath(self._space.folder, folder), "--expid", job.trial.expid]
        if job.seed != job.trial.seed:
            arguments += ["--seed", str(job.seed)]
        # Not --resume: the command in the result is to repeat the whole run.
        variables = {EVALUATIONS: str(self._evaluations(job)), "FLOWCTR_RESUME": str(int(job.resume))}
        return Command(arguments, folder, variables, self._log(job), alone=job.attempt > 1)

    def _look_after(self, job: Job, process: Process) -> Job | None:
        """Records a run that has ended, and stops one that is hopeless; gives its next attempt if it has failed."""
        path = self._evaluations(job)
        curve = json.loads(path.read_text()) if path.is_file() else []
        values = [self._space.value(evaluation) for evaluation in curve]
        process.evaluated = bool(values)
        code = self._engine.exit_code(process)
        if code is None:
            hopeless = self._first_hopeless(job, values)
            if hopeless is None:
                return None
            self._engine.stop(process)
            values = values[:hopeless]
            self._end(job, "pruned", exit_code=None, value=values[-1], evaluations=values)
        elif code == 0 and (result := self._find_result(job)):
            self._finish(job, result)
        else:
            self._end(job, "failed", exit_code=code, error=self._error(job, code))
        self._running.remove((job, process))
        path.unlink(missing_ok=True)
        self._show()
        failed = self._ledger.runs[job.trial.expid, job.seed]["state"] == "failed"
        return Job(job.trial, job.seed, job.attempt + 1) if failed and job.attempt < ATTEMPTS else None

    def _first_hopeless(self, job: Job, values: Sequence[float]) -> int | None:
        """Counts the evaluations after which the strategy gives a trial up; None if it does not."""
        if job.seed != job.trial.seed:
            return None
        counts = range(1, len(values) + 1)
        return next((n for n in counts if self._strategy.is_hopeless(self._ledger, job.trial, values[:n])), None)

    def _finish(self, job: Job, path: Path) -> None:
        """Records a run that has written its result."""
        fields = {**measured(read_result(path), self._space), "result": os.path.relpath(path, self._space.folder)}
        self._end(job, "finished", exit_code=0, **fields)

    def _end(self, job: Job, state: str, **fields) -> None:
        seconds = round(time.time() - job.started, 1)
        self._ledger.record(job.trial.expid, job.seed, state, seconds=seconds, **fields)
        self._display.ended(self._ledger.runs[job.trial.expid, job.seed])

    def _find_result(self, job: Job) -> Path | None:
        """Finds the result that a run has written since it started."""
        folder = (self._space.model_dir or self._space.folder.parent) / "results"
        for path in sorted(folder.glob(f"{glob.escape(job.name)}-*.json"), reverse=True):
            # Both are in whole seconds.
            if datetime.fromisoformat(read_result(path)["started"]).timestamp() >= int(job.started):
                return path
        return None

    def _error(self, job: Job, code: int) -> str:
        if code == 0:
            return f"no result of it is in {(self._space.model_dir or self._space.folder.parent) / 'results'}"
        log = self._log(job)
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
        return "\n".join(lines[-ERROR_LINES:])

    def _log(self, job: Job) -> Path:
        return self._logs / f"{job.name}-{job.attempt}.log"

    def _evaluations(self, job: Job) -> Path:
        return self._logs / f".{job.name}.evaluations.json"

    def _show(self) -> None:
        self._display.show(job.name for job, _ in self._running)


def _checkpoints(space: Space, trial: Trial) -> Path:
    """The folder of a trial's weights and log."""
    folder = space.model_dir or space.folder.parent
    return folder / trial.model.get("model_root", config.DEFAULTS["model_root"]) / trial.dataset["dataset_id"]


def _conclude(space: Space, ledger: Ledger, seeds: int) -> Path:
    """Writes the ranked tables and the plot, and removes the weights of all trials but the best."""
    check_results(ledger, ledger.of_state("finished"), space)
    best = ranked(ledger, space)
    table = space.path.with_suffix(".csv")
    write_csv(table, best, space.folder)
    if best and space.varied:
        plot(space.folder / "parameters.png", best, space)
    if best and seeds > 1:
        of_best = [run for run in ledger.of_state("finished") if run["trial"] == best[0]["trial"]]
        write_csv(table.with_name(f"{table.stem}_seeds.csv"), of_best, space.folder)
    for run in ledger.runs.values():
        if not best or run["trial"] != best[0]["trial"]:
            _remove_weights(space, run)
    ledger.compact()
    return table


def _remove_weights(space: Space, run: Run) -> None:
    """Removes what a run has saved, also of its stages, but for its log, and unless another search has this trial."""
    name = f"{run['trial']}-s{run['seed']}"
    folder = _checkpoints(space, space.find(run["trial"]))
    others = set(space.folder.parent.glob("*/ledger.jsonl")) - {space.folder / "ledger.jsonl"}
    if any(f'"{run["trial"]}"' in path.read_text(encoding="utf-8") for path in others):
        return
    for suffix in (".model", ".resume"):
        for path in (*folder.glob(f"{glob.escape(name)}{suffix}"), *folder.glob(f"{glob.escape(name)}-*{suffix}")):
            path.unlink()


def _report(space: Space, ledger: Ledger, table: Path) -> None:
    """Shows the best trials and what to do next; raises for trials that have failed."""
    console = Console(soft_wrap=True, highlight=False)
    best = ranked(ledger, space)
    if best:
        console.print(best_table(best, space))
        console.print(f"all trials: {table}", markup=False)
    if failed := ledger.of_state("failed"):
        told = "\n".join(
            f"{run['trial']}, seed {run['seed']}, exit code {run['exit_code']}:\n{run['error']}" for run in failed
        )
        raise TuningError(
            f"{told}\n{len(failed)} of {len(ledger.runs)} runs failed, {ATTEMPTS} times each; their whole output is in "
            f"{space.folder / 'logs'}; the same command tries them again"
        )
    if best:
        yaml, result = (_from_here(path) for path in (space.path, space.folder / best[0]["result"]))
        console.print(f"next: flowctr submit {yaml} --out submission", markup=False)
        console.print(f"  or: flowctr report {result} --out report", markup=False)


def _from_here(path: Path) -> str:
    """Writes a path for a shell, relative to the working directory if it is in it."""
    path = Path(os.path.normpath(path))
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))

"""Which trial comes next: all of a grid, some drawn at random, or what Optuna suggests.

A strategy has no state of its own. What it says follows from the ledger, so that a search that was killed goes on as if
it had not been.
"""

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from flowctr.checks import is_number
from flowctr.names import nearest
from flowctr.tuning.ids import canonical, plain
from flowctr.tuning.ledger import Ledger
from flowctr.tuning.space import Space, Trial

if TYPE_CHECKING:
    import optuna

GRID_LIMIT = 10_000  # trials; more are never run to the end, and listing them takes minutes and gigabytes
SEARCHES = ("grid", "random", "optuna")
# Until this many trials have finished, none is pruned; nor is any at its first evaluation.
TRIALS_BEFORE_PRUNING, EVALUATIONS_BEFORE_PRUNING = 5, 1
SUGGESTIONS = 50  # before a trial that nobody suggested is taken: samplers repeat themselves


class Strategy(Protocol):
    """How a search chooses its trials.

    Attributes:
        count: Number of trials.
        planned: The trials as far as they are known beforehand.
    """

    count: int
    planned: Sequence[Trial]

    def propose(self, ledger: Ledger) -> Trial | None:
        """Gives a trial that the ledger does not have; None when there are enough."""

    def is_hopeless(self, ledger: Ledger, trial: Trial, values: Sequence[float]) -> bool:
        """Says whether to stop a trial, from the monitored value at each of its evaluations so far."""


class Listed:
    """Trials that are known beforehand: those of a grid or a random draw."""

    def __init__(self, trials: Sequence[Trial]):
        self.count, self.planned = len(trials), trials

    def propose(self, ledger: Ledger) -> Trial | None:
        return next((trial for trial in self.planned if (trial.expid, trial.seed) not in ledger.runs), None)

    def is_hopeless(self, ledger: Ledger, trial: Trial, values: Sequence[float]) -> bool:
        return False


class Optuna:
    """Trials that a sampler of Optuna suggests, stopped when they fall behind the median of the others.

    Args:
        space: The space.
        count: Number of trials.
        sampler: Class of optuna.samplers.

    Raises:
        ValueError: If Optuna is not installed, has no such sampler, or one that cannot be made from a seed.
    """

    def __init__(self, space: Space, count: int, sampler: str):
        try:
            import optuna
        except ImportError as error:
            raise ValueError("--search optuna needs optuna: pip install 'flowctr[tune]'") from error
        samplers = [name for name in dir(optuna.samplers) if name.endswith("Sampler") and name != "BaseSampler"]
        if sampler not in samplers:
            raise ValueError(f"optuna has no sampler {sampler!r}; the nearest is {nearest(sampler, samplers)!r}")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._space = optuna, space
        self.count, self.planned = min(count, len(space)), []
        self._sampler = getattr(optuna.samplers, sampler)
        self._seed = space.trial(1).seed
        try:
            self._sampler(seed=self._seed)
        except (TypeError, ImportError) as error:
            raise ValueError(f"--sampler {sampler} needs more than a seed: {error}; take another") from error

    def propose(self, ledger: Ledger) -> Trial | None:
        tried = {expid for expid, _ in ledger.runs}
        if len(tried) >= self.count:
            return None
        study = self._study(ledger)
        for suggestion in range(SUGGESTIONS):
            # A sampler remembers nothing but its seed, which thus has to be another one each time.
            study.sampler = self._sampler(seed=self._seed + len(tried) * SUGGESTIONS + suggestion)
            try:
                suggested = study.ask(self._distributions())
            except ImportError as error:  # of CmaEsSampler, which looks for its package only now
                raise ValueError(f"optuna's {self._sampler.__name__} needs another package: {error}") from error
            study.tell(suggested, state=self._optuna.trial.TrialState.FAIL)
            trial = self._space.trial(self._space.number(suggested.params))
            if trial.expid not in tried:
                return trial
        order = draw(self._space, len(tried) + 1)
        return next(trial for trial in order if trial.expid not in tried)

    def is_hopeless(self, ledger: Ledger, trial: Trial, values: Sequence[float]) -> bool:
        pruner = self._optuna.pruners.MedianPruner(TRIALS_BEFORE_PRUNING, EVALUATIONS_BEFORE_PRUNING)
        run = {"settings": trial.settings, "state": "started", "evaluations": values}
        return bool(pruner.prune(self._study(ledger), self._trial(run)))

    def _study(self, ledger: Ledger) -> "optuna.Study":
        study = self._optuna.create_study(direction="maximize" if self._space.sign > 0 else "minimize")
        # By number: which of several workers was first does not matter.
        study.add_trials([self._trial(run) for run in ledger.of_state("finished", "pruned", "started")])
        return study

    def _trial(self, run: Mapping[str, Any]) -> "optuna.trial.FrozenTrial":
        states = self._optuna.trial.TrialState
        settings = plain(run["settings"])
        return self._optuna.trial.create_trial(
            state={"finished": states.COMPLETE, "pruned": states.PRUNED, "started": states.RUNNING}[run["state"]],
            value=run.get("value"),
            params={
                key: [canonical(plain(value)) for value in values].index(canonical(settings[key]))
                for key, values in self._space.varied.items()
            },
            distributions=self._distributions(),
            intermediate_values=dict(enumerate(run.get("evaluations", ()))),
        )

    def _distributions(self) -> dict[str, "optuna.distributions.BaseDistribution"]:
        """Describes each varied key by the positions of its values; those of ascending numbers have neighbours."""
        distributions = self._optuna.distributions
        return {
            key: distributions.IntDistribution(0, len(values) - 1)
            if all(map(is_number, values)) and values == sorted(values)
            else distributions.CategoricalDistribution(range(len(values)))
            for key, values in self._space.varied.items()
        }


def draw(space: Space, count: int) -> list[Trial]:
    """Draws different trials; a larger count draws the same ones first."""
    generator, numbers = random.Random(space.trial(1).seed), {}
    while len(numbers) < min(count, len(space)):
        numbers[generator.randint(1, len(space))] = None
    return [space.trial(number) for number in numbers]


def make_strategy(space: Space, search: str, count: int | None, tag: str | None, sampler: str) -> Strategy:
    """Makes a strategy.

    Args:
        space: The space.
        search: ``grid``, ``random`` or ``optuna``.
        count: Number of trials of the last two.
        tag: What the ids of the trials to run contain; None: all.
        sampler: Optuna's sampler.

    Raises:
        ValueError: If the arguments do not fit each other, or no id contains the tag.
    """
    if search not in SEARCHES:
        raise ValueError(f"--search must be one of {', '.join(SEARCHES)}; got {search!r}")
    if (count is None) != (search == "grid") or (count is not None and count < 1):
        remedy = "a grid has all trials: leave --trials out" if search == "grid" else "say how many with --trials"
        raise ValueError(f"--search {search} with --trials {count}: {remedy}")
    if search == "optuna":
        if tag is not None:
            raise ValueError(
                f"--tag {tag} chooses among trials that are known beforehand, which those of optuna are not"
            )
        return Optuna(space, count, sampler)
    if search == "grid" and len(space) > GRID_LIMIT:
        raise ValueError(
            f"the grid of {space.path} has {len(space):,} trials, more than {GRID_LIMIT:,}; leave out values, or draw "
            "some with --search random --trials N"
        )
    trials = draw(space, count) if search == "random" else [space.trial(i + 1) for i in range(len(space))]
    tagged = [trial for trial in trials if tag is None or tag in trial.expid]
    if not tagged:
        raise ValueError(f"--tag {tag} is in no id of the {len(trials)} trials, which are like {trials[0].expid}")
    return Listed(tagged)

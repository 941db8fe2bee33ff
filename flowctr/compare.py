"""Says whether one experiment beats another: over seeds for every metric, over users for gAUC.

Two questions, one test for each; a difference that is to be relied on passes both:

* Would other seeds show it too? A paired t-test over the seeds that both experiments have, on the same rows.
* Would other users show it too? A bootstrap over users. What is estimated is the difference of the two gAUCs, each the
  mean over its seeds, in the population of which the test users are a sample; the trained models are given. gAUC is a
  weighted mean of AUCs, one for each user with both classes, and the weights are those of the data, so its mean over
  seeds is that of each user's mean AUC. A resample draws as many users as there are, with replacement, the same ones
  for both experiments and all labels.

The p-values are two-sided, and of one metric each: whoever picks the smallest of many has to correct for that.

Runs save their users' AUCs beside the result, as ``<name>.users.npz``. That file, and the time of a resample, grow
linearly with the users that have both classes of a label.
"""

import glob
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from flowctr.config import REPOSITORY
from flowctr.metrics import GroupAUCs
from flowctr.names import nearest
from flowctr.results import NOT_NPZ, NOT_SETTINGS, find_results, read_result
from numpy.typing import ArrayLike
from rich.table import Table
from rich.text import Text
from scipy import stats

ALPHA = 0.05
RESAMPLES = 2000
FEW_USERS = 30
BLOCK_USERS = 2**16


@dataclass(frozen=True)
class Run:
    """A run: its result and the file that it is from."""

    path: Path
    result: dict

    @property
    def seed(self) -> int:
        return self.result["seed"]

    @property
    def manifest(self) -> str | None:
        return (self.result.get("data") or {}).get("manifest")

    @property
    def settings(self) -> dict:
        config = self.result.get("config") or {}
        return {key: value for key, value in config.items() if key not in NOT_SETTINGS}

    @property
    def users(self) -> Path | None:
        """The file of the users' AUCs; None if it is not there."""
        path = self.path.parent / (self.result.get("users") or "")
        return path if path.is_file() else None


@dataclass(frozen=True)
class Difference:
    """How two experiments differ in a metric; what is not known is nan.

    Attributes:
        metric: Its name in the results; without a label, the mean over several.
        a, b: The values of the first and the second experiment, one per seed.
        value: Mean of ``a`` less mean of ``b``.
        seeds_p: p-value of the t-test over seeds.
        interval: 95 % interval of the difference for other users.
        users_p: p-value of the bootstrap over users.
    """

    metric: str
    a: tuple[float, ...]
    b: tuple[float, ...]
    value: float
    seeds_p: float
    interval: tuple[float, float] = (math.nan, math.nan)
    users_p: float = math.nan


@dataclass(frozen=True)
class Comparison:
    """Two experiments, compared.

    Attributes:
        a, b: Their ids.
        dataset_id: Data set.
        split: ``valid`` or ``test``.
        seeds: Seeds that were compared, of each.
        differences: One per metric, in the results' order.
        notes: What was left out, and what to do about it.
    """

    a: str
    b: str
    dataset_id: str
    split: str
    seeds: tuple[tuple[int, ...], tuple[int, ...]]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]


def compare(
    a: Sequence[Run], b: Sequence[Run], split: str = "test", resamples: int = RESAMPLES, seed: int = 0
) -> Comparison:
    """Compares two experiments.

    With two or more seeds in common, these alone are compared, in pairs; else all runs, without a t-test.

    Args:
        a: Runs of the first experiment, of different seeds.
        b: Runs of the second one.
        split: ``valid`` or ``test``; the bootstrap is for ``test``.
        resamples: Resamples of the bootstrap.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If the runs of ``a`` or of ``b`` are not those of one experiment, the data sets or labels of the two
            differ, there is no metric that all have, or there is nothing to test by.
    """
    if resamples < 1:
        raise ValueError(f"resamples={resamples}; the bootstrap needs at least 1, better {RESAMPLES}")
    a, b = _by_seed(a), _by_seed(b)
    _check_same_data([*a.values(), *b.values()])
    names = _common_metrics([*a.values(), *b.values()], split)
    common, alone = sorted(a.keys() & b.keys()), sorted(a.keys() ^ b.keys())
    paired, notes = len(common) > 1, []
    if paired:
        a, b = ({seed: runs[seed] for seed in common} for runs in (a, b))
        notes += [f"left out, as only one of the two has it: seed {_listed(alone)}"] if alone else []
    else:
        notes.append(
            f"no t-test: it needs two seeds that both have; A has {_listed(a)}, B has {_listed(b)}; run more seeds"
        )
    users, remark = _test_over_users(list(a.values()), list(b.values()), split, resamples, seed)
    notes += [remark] if remark else []
    if not paired and not users:
        raise ValueError(f"there is nothing to test by: {'; '.join(notes)}")
    differences = []
    for name in names:
        values = [[_value(run, split, name) for run in side.values()] for side in (a, b)]
        p = paired_t_test(*values) if paired else math.nan
        means = [float(np.mean(side)) for side in values]
        differences.append(Difference(name, *map(tuple, values), means[0] - means[1], p, **users.get(name, {})))
    first, second = (next(iter(side.values())).result for side in (a, b))
    seeds = tuple(a), tuple(b)
    return Comparison(
        first["expid"], second["expid"], first["dataset_id"], split, seeds, tuple(differences), tuple(notes)
    )


def find_runs(what: str) -> list[Run]:
    """Finds the runs of one experiment.

    Args:
        what: A result file, a folder of them, or a glob of either; or an experiment id, or a glob of it, which is
            looked for in ``model_zoo/*/results`` of the checkout and in ``results`` here.

    Returns:
        The newest run of each seed.

    Raises:
        FileNotFoundError: If there is no such result.
        ValueError: If a file is no result of the known format, or the results are not of one experiment.
    """
    paths = [Path(path) for path in sorted(glob.glob(what))]
    if paths:
        runs = [Run(path, result) for path, result in find_results(paths)]
    else:
        folders = [*REPOSITORY.glob("model_zoo/*/results"), Path("results")]
        known = [file for folder in folders for file in sorted(folder.glob("*-s*.json"))]
        named = [Run(file, read_result(file)) for file in known if fnmatchcase(file.name, f"{what}-s*.json")]
        runs = [run for run in named if fnmatchcase(run.result["expid"], what)]
        if not runs:
            others = {file.name.rpartition("-s")[0] for file in known}
            hint = f", the nearest is {nearest(what, others)!r}" if others else ""
            raise FileNotFoundError(
                f"there is no result of {what!r}: it is neither a file nor an experiment with results in "
                f"model_zoo/*/results or ./results{hint}; run it first"
            )
    return list(_by_seed(runs).values())


def paired_t_test(a: ArrayLike, b: ArrayLike) -> float:
    """Tests whether the mean difference of pairs is 0, by Student's t.

    Args:
        a, b: Values in pairs.

    Returns:
        The two-sided p-value; nan for less than two pairs, and for differences that are all the same.
    """
    differences = np.subtract(a, b, dtype=np.float64)
    if len(differences) < 2 or not np.ptp(differences) > 1e-12:  # up to rounding
        return math.nan
    return float(stats.ttest_rel(a, b).pvalue)


def best_marks(experiments: Sequence[Mapping[int, float | None]], lower_is_better: bool = False) -> list[bool]:
    """Marks the experiment that is significantly better than every other one.

    The best on average is compared with each of the others by a paired t-test over the seeds that both have; it wins if
    every test rejects at 5 % after Holm's correction for their number. Nobody may win.

    Args:
        experiments: Seed -> value of a metric, for each experiment; one with an undefined value takes no part.
        lower_is_better: Whether the metric is one of errors.

    Returns:
        Whether it wins, for each experiment.
    """
    sign = -1 if lower_is_better else 1
    values = {
        number: {seed: sign * value for seed, value in by_seed.items()}
        for number, by_seed in enumerate(experiments)
        if by_seed and all(value is not None and math.isfinite(value) for value in by_seed.values())
    }
    if len(values) < 2:
        return [False] * len(experiments)
    best = max(values, key=lambda number: np.mean(list(values[number].values())))
    p_values = []
    for others in (others for number, others in values.items() if number != best):
        p_values.append(_p_of_win(values[best], others))
        if p_values[-1] >= ALPHA:  # which no correction mends: nobody wins, and the other tests are spared
            return [False] * len(experiments)
    wins = all(p * (len(p_values) - rank) < ALPHA for rank, p in enumerate(sorted(p_values)))
    return [wins and number == best for number in range(len(experiments))]


def _p_of_win(a: Mapping[int, float], b: Mapping[int, float]) -> float:
    """Gives the p-value of ``a`` being above ``b``; 1 if it is not, or cannot be tested."""
    common = a.keys() & b.keys()
    pairs = [[side[seed] for seed in common] for side in (a, b)]
    p = paired_t_test(*pairs)
    return p if p < 1 and np.mean(pairs[0]) > np.mean(pairs[1]) else 1.0


def bootstrap(weights: np.ndarray, differences: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Draws users with replacement and gives the weighted mean difference of each draw.

    How often each user was drawn is counted block by block, in the processor's cache, and not kept.

    Args:
        weights: Weight of each user for each label, (U, K); 0 where a user takes no part.
        differences: What is averaged, (U, K).
        resamples: Number of draws R.
        seed: Seed of the draws.

    Returns:
        (R, K); nan where no user of a label was drawn.
    """
    rng, users = np.random.default_rng(seed), len(weights)
    terms = np.hstack([weights * differences, weights])  # (U, 2K)
    blocks = np.array_split(terms, math.ceil(users / BLOCK_USERS))
    shares = [len(block) / users for block in blocks]
    sums = np.zeros((resamples, terms.shape[1]))
    for i in range(resamples):
        for block, draws in zip(blocks, rng.multinomial(users, shares)):
            times_drawn = np.bincount(rng.integers(len(block), size=draws), minlength=len(block))
            sums[i] += times_drawn @ block
    weighted, weight = np.split(sums, 2, axis=1)  # (R, K)
    return np.divide(weighted, weight, out=np.full(weight.shape, np.nan), where=weight > 0)


def comparison_table(comparison: Comparison) -> Table:
    """Lays out a comparison for the terminal; p-values below 5 % are bold."""
    title = f"A: {comparison.a}, seeds {_listed(comparison.seeds[0])}\n"
    title += f"B: {comparison.b}, seeds {_listed(comparison.seeds[1])}\n"
    title += f"{comparison.split} data of {comparison.dataset_id}; mean ± standard deviation over the seeds"
    caption = (
        "p, seeds: paired t-test over the seeds; users: bootstrap over users of the difference of gAUC, 95 % interval "
        "and p; two-sided, bold below 0.05, not corrected for the number of metrics."
    )
    table = Table(title=Text(title), caption=Text("\n".join([caption, *comparison.notes])))
    table.title_justify = table.caption_justify = "left"
    table.add_column("metric", overflow="fold")
    for name in ("A", "B", "A - B", "p, seeds", "users: interval", "p, users"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in comparison.differences:
        interval = "–" if math.isnan(row.users_p) else "{:+.4f} to {:+.4f}".format(*row.interval)
        difference = "–" if math.isnan(row.value) else f"{row.value:+.4f}"
        table.add_row(
            Text(row.metric), _spread(row.a), _spread(row.b), difference, _p(row.seeds_p), interval, _p(row.users_p)
        )
    return table


def _by_seed(runs: Sequence[Run]) -> dict[int, Run]:
    """Sorts the runs of one experiment by seed, the newest of each; raises ValueError if they are of several ones."""
    first = runs[0]
    expids = sorted({run.result["expid"] for run in runs})
    if len(expids) > 1:
        raise ValueError(f"these results are of {len(expids)} experiments, {', '.join(expids)}; name one of them")
    for run in runs[1:]:
        here, there = (other.settings | {"dataset_id": other.result["dataset_id"]} for other in (first, run))
        differing = [key for key in {**here, **there} if here.get(key) != there.get(key)]
        if differing:
            changes = ", ".join(f"{key} ({here.get(key)!r}, {there.get(key)!r})" for key in differing)
            raise ValueError(
                f"runs of {expids[0]} have different settings, {first.path.name} and {run.path.name}: {changes}; name "
                "the result files of one setting"
            )
    _check_same_data(runs)
    newest = {run.seed: run for run in sorted(runs, key=lambda run: (run.result.get("started") or "", run.path.name))}
    return dict(sorted(newest.items()))


def _check_same_data(runs: Sequence[Run]) -> None:
    """Raises ValueError unless all runs have the same data and labels."""
    first = runs[0]
    for run in runs[1:]:
        pair = f"{first.path.name} and {run.path.name}"
        ids = [other.result["dataset_id"] for other in (first, run)]
        if ids[0] != ids[1]:
            raise ValueError(f"{pair} are of different data sets, {ids[0]} and {ids[1]}; compare on one of them")
        if first.manifest != run.manifest:
            raise ValueError(
                f"{pair} are of different splits: data set {ids[0]} was built from other files or settings in between "
                f"(manifest {_short(first.manifest)} and {_short(run.manifest)}); run one of them again"
            )
        labels = [", ".join(other.result["labels"]) for other in (first, run)]
        if labels[0] != labels[1]:
            raise ValueError(f"{pair} have different labels, {labels[0]} and {labels[1]}; compare on the same ones")


def _common_metrics(runs: Sequence[Run], split: str) -> list[str]:
    """Lists the metrics that all runs have, without those of single scenarios."""
    metrics = [run.result["metrics"].get(split) or {} for run in runs]
    names = [name for name in metrics[0] if "=" not in name and all(name in others for others in metrics)]
    if not names:
        files = ", ".join(run.path.name for run in runs)
        raise ValueError(f"there is no metric of the {split} data that all of {files} have; splits are valid and test")
    return names


def _test_over_users(
    a: Sequence[Run], b: Sequence[Run], split: str, resamples: int, seed: int
) -> tuple[dict[str, dict[str, object]], str | None]:
    """Gives interval and p-value of each gAUC by its name, as keywords of `Difference`, and what there is to note."""
    if split != "test":
        return {}, "no bootstrap: the users' AUCs are of the test data"
    without = [run.path.name for run in (*a, *b) if run.users is None]
    if without:
        return {}, (
            f"no bootstrap: {len(without)} of {len(a) + len(b)} results are without their users' AUCs (*.users.npz), "
            f"such as {without[0]}; run it again, with gAUC among its metrics"
        )
    first, second = _mean_aucs(a), _mean_aucs(b)
    _check_same_users(first, second, a[0], b[0])
    labels = [label for label, groups in first.items() if len(groups.group)]
    if not labels:
        return {}, "no bootstrap: no user has both classes of a label"
    few = [f"{label} {len(first[label].group)}" for label in labels if len(first[label].group) < FEW_USERS]
    remark = f"few users with both classes for a bootstrap: {', '.join(few)}" if few else None
    users = np.unique(np.concatenate([first[label].group for label in labels]))
    weights, differences = np.zeros((2, len(users), len(labels)))
    for k, label in enumerate(labels):
        position = np.searchsorted(users, first[label].group)
        weights[position, k] = first[label].rows
        differences[position, k] = first[label].auc - second[label].auc
    samples = bootstrap(weights, differences, resamples, seed)
    if len(first) == 1:
        return {"gAUC": _interval_and_p(samples[:, 0])}, remark
    tests = {f"{label}_gAUC": _interval_and_p(samples[:, k]) for k, label in enumerate(labels)}
    if len(labels) == len(first):
        tests["gAUC"] = _interval_and_p(samples.mean(axis=1))
    return tests, remark


def _mean_aucs(runs: Sequence[Run]) -> dict[str, GroupAUCs]:
    """Averages the users' AUCs over runs, by label."""
    mean = _read_users(runs[0])
    for run in runs[1:]:
        others = _read_users(run)
        _check_same_users(mean, others, runs[0], run)
        for label, groups in others.items():
            mean[label].auc[:] += groups.auc
    for groups in mean.values():
        groups.auc[:] /= len(runs)
    return mean


def _read_users(run: Run) -> dict[str, GroupAUCs]:
    """Reads the users' AUCs of a run, by label."""
    try:
        with np.load(run.users) as arrays:
            labels = [label for label in run.result["labels"] if f"{label}__auc" in arrays.files]
            return {label: GroupAUCs(*(arrays[f"{label}__{name}"] for name in GroupAUCs._fields)) for label in labels}
    except NOT_NPZ as error:
        raise ValueError(f"{run.users} is not a file of users' AUCs: {error}; run again") from error


def _check_same_users(a: Mapping[str, GroupAUCs], b: Mapping[str, GroupAUCs], run_a: Run, run_b: Run) -> None:
    same = a.keys() == b.keys() and all(
        np.array_equal(a[label].group, b[label].group) and np.array_equal(a[label].rows, b[label].rows) for label in a
    )
    if not same:
        raise ValueError(
            f"{run_a.path.name} and {run_b.path.name} are of different splits: users, or their rows, differ in "
            f"{run_a.users.name} and {run_b.users.name}; run one of them again"
        )


def _interval_and_p(samples: np.ndarray) -> dict[str, object]:
    """Gives the percentile interval and the two-sided p-value, that of the largest interval without 0."""
    samples = samples[~np.isnan(samples)]
    if not len(samples):
        return {}
    beyond = min((samples <= 0).sum(), (samples >= 0).sum())
    low, high = np.quantile(samples, (ALPHA / 2, 1 - ALPHA / 2)).tolist()
    return {"interval": (low, high), "users_p": min(1.0, float(2 * (beyond + 1) / (len(samples) + 1)))}


def _value(run: Run, split: str, name: str) -> float:
    value = run.result["metrics"][split][name]
    return math.nan if value is None else value  # JSON has no nan


def _spread(values: Sequence[float]) -> str:
    mean = np.mean(values)
    if math.isnan(mean):
        return "–"
    return f"{mean:.4f} ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else f"{mean:.4f}"


def _p(p: float) -> Text:
    return Text("–") if math.isnan(p) else Text(f"{p:.2g}", style="bold" if p < ALPHA else "")


def _listed(seeds: Sequence[int] | Mapping[int, Run]) -> str:
    return ", ".join(map(str, seeds))


def _short(manifest: str | None) -> str:
    return "unknown" if manifest is None else manifest[:8]

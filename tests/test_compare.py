"""Comparisons of experiments: against formulas, loops over users, every possible resample, and simulated nulls."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from flowctr import compare, experiment
from flowctr.compare import Run, best_marks, bootstrap, find_runs, paired_t_test
from flowctr.metrics import evaluate_metrics, group_aucs
from test_experiment import call, folder, full_disk, src  # noqa: F401  fixtures
from toy import damage

LABELS = ("click", "like")


def rows_of_users(labels=LABELS, users=40, rows=400):
    """Draws a test split: group ids, and labels by name; some users have one class."""
    rng = np.random.default_rng(0)
    groups = rng.integers(0, users, rows)
    taste = rng.uniform(0.1, 0.9, users)
    return groups, {label: (rng.random(rows) < taste[groups]).astype(float) for label in labels}


def write_run(results, expid="A", seed=1, skill=1.0, split=None, started="2026-01-01", **changes):
    """Writes a result with the users' AUCs of predictions that know the label up to noise, as a run does."""
    groups, y_true = split or rows_of_users()
    rng = np.random.default_rng([seed, *expid.encode()])
    values, arrays = {}, {}
    for label, y in y_true.items():
        y_pred = skill * y + rng.normal(size=len(y))
        prefix = f"{label}_" if len(y_true) > 1 else ""
        values |= {prefix + k: v for k, v in evaluate_metrics(y, y_pred, ["AUC", "gAUC"], groups).items()}
        for name, array in group_aucs(y, y_pred, groups)._asdict().items():
            arrays[f"{label}__{name}"] = array
    if len(y_true) > 1:
        values |= {m: float(np.mean([values[f"{label}_{m}"] for label in y_true])) for m in ("AUC", "gAUC")}
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{expid}-s{seed}-{started}.json"
    np.savez_compressed(path.with_suffix(".users.npz"), **arrays)
    result = {
        "format": 1,
        "expid": expid,
        "model": "Toy",
        "dataset_id": "tiny",
        "seed": seed,
        "started": started,
        "config": {"seed": seed, "learning_rate": 0.1, "model_root": f"checkpoints/{seed}"},
        "labels": list(y_true),
        "metrics": {"valid": values, "test": values},
        "data": {"manifest": "beef" * 16},
        "users": path.with_suffix(".users.npz").name,
    } | changes
    path.write_text(json.dumps(result))
    return Run(path, result)


def write_runs(results, expid, skill, seeds=(1, 2, 3), **changes):
    return [write_run(results, expid, seed, skill, **changes) for seed in seeds]


def gauc(result, name):
    return result["metrics"]["test"][name]


# ------------------------------------------------------------------------------------------------- what a run saves


def test_group_aucs_are_those_of_each_group_alone():
    groups, y_true = rows_of_users(("click",))
    groups = groups.astype(str)
    y, y_pred = y_true["click"], np.round(np.random.default_rng(1).random(len(groups)), 1)
    found = group_aucs(y, y_pred, groups)
    both = [g for g in dict.fromkeys(groups) if 0 < y[groups == g].mean() < 1]
    assert found.group.tolist() == both and len(both) < len(set(groups))
    for group, rows, auc in zip(*found):
        assert rows == (groups == group).sum()
        assert auc == pytest.approx(evaluate_metrics(y[groups == group], y_pred[groups == group], ["AUC"])["AUC"])
    mean = np.average(found.auc, weights=found.rows)
    assert mean == pytest.approx(evaluate_metrics(y, y_pred, ["gAUC"], groups)["gAUC"], abs=1e-12)


def test_group_aucs_without_a_group_of_both_classes():
    assert [values.tolist() for values in group_aucs([1, 0, 0], [0.1, 0.2, 0.3], [7, 8, 8])] == [[], [], []]


@pytest.mark.parametrize("expid", ["Toy_test", "Toy_one"])  # Toy_one is tested on its validation data
def test_a_run_saves_the_users_of_its_gauc(folder, src, expid):  # noqa: F811
    path = experiment.run(folder / "config", expid, src, overrides=["epochs=1"])
    result = json.loads(path.read_text())
    assert result["users"] == f"{path.stem}.users.npz"
    with np.load(path.with_name(result["users"]), allow_pickle=False) as arrays:
        for label in result["labels"]:
            group, rows, auc = (arrays[f"{label}__{name}"] for name in ("group", "rows", "auc"))
            reported = gauc(result, f"{label}_gAUC" if len(result["labels"]) > 1 else "gAUC")
            assert np.average(auc, weights=rows) == pytest.approx(reported, abs=1e-12, rel=0)
            assert set(group.tolist()) <= set(range(15)) and len(set(group.tolist())) == len(group) > 10


def test_a_label_that_may_be_missing_leaves_its_rows_out_of_the_users(folder, src):  # noqa: F811
    config = folder / "config" / "dataset_config.yaml"
    config.write_text(config.read_text().replace("{name: like, ", "{name: like, may_be_missing: true, "))
    for split in ("train", "valid", "test"):
        table = folder / "data" / f"{split}.csv"
        head, *lines = table.read_text().splitlines()
        lines[::3] = [line.rpartition(",")[0] + "," for line in lines[::3]]
        table.write_text("\n".join([head, *lines]) + "\n")
    path = experiment.run(folder / "config", "Toy_test", src, overrides=["epochs=1"])
    result = json.loads(path.read_text())
    with np.load(path.with_name(result["users"])) as arrays:
        rows, auc = arrays["like__rows"], arrays["like__auc"]
        assert rows.sum() < arrays["click__rows"].sum()
    assert np.average(auc, weights=rows) == pytest.approx(gauc(result, "like_gAUC"), abs=1e-12, rel=0)


def test_no_users_without_gauc_test_data_or_room(folder, src, monkeypatch):  # noqa: F811
    def users(*overrides):
        path = experiment.run(folder / "config", "Toy_test", src, overrides=["epochs=1", *overrides])
        assert not list(path.parent.glob("*.users.npz"))
        return json.loads(path.read_text())["users"]

    assert users("metrics=[AUC,logloss]") is None
    assert users("test_data=null", f"data_root={folder / 'elsewhere'}") is None
    monkeypatch.setattr(np, "savez_compressed", full_disk)
    assert users() is None
    assert "The users' AUCs are not saved" in (folder / "checkpoints" / "two_labels" / "Toy_test-s1.log").read_text()


# --------------------------------------------------------------------------------------------------------- the tests


def test_paired_t_test_by_hand():
    a, b = [0.71, 0.75, 0.72], [0.70, 0.71, 0.70]
    d = [x - y for x, y in zip(a, b)]
    mean = sum(d) / 3
    t = mean / math.sqrt(sum((x - mean) ** 2 for x in d) / 2 / 3)
    assert paired_t_test(a, b) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)  # Student's t, 2 degrees
    assert paired_t_test(b, a) == pytest.approx(paired_t_test(a, b))


@pytest.mark.parametrize(
    ("a", "b"),
    [([], []), ([0.7], [0.6]), ([0.7, 0.8], [0.6, 0.7]), ([0.7, 0.8], [0.7, 0.8]), ([0.7, math.nan], [0, 0])],
)
def test_paired_t_test_without_a_spread_to_judge_by(a, b):
    assert math.isnan(paired_t_test(a, b))


@pytest.mark.parametrize("block_users", [4, 3, 1])
def test_bootstrap_has_the_distribution_of_all_resamples(monkeypatch, block_users):
    """All 4^4 resamples are equally likely."""
    monkeypatch.setattr(compare, "BLOCK_USERS", block_users)
    weights = np.array([[3.0, 0], [2, 1], [5, 0], [4, 2]])
    differences = np.array([[0.3, 0], [-0.2, 0.1], [0.1, 0], [-0.4, 0.4]])
    exact = []
    for drawn in itertools.product(range(4), repeat=4):
        weight, sums = weights[list(drawn)].sum(axis=0), (weights * differences)[list(drawn)].sum(axis=0)
        exact.append([s / w if w else math.nan for s, w in zip(sums, weight)])
    exact, samples = np.array(exact), bootstrap(weights, differences, 20000, seed=0)
    assert np.isnan(samples).mean(axis=0) == pytest.approx(np.isnan(exact).mean(axis=0), abs=0.01)  # 0 and 1/16
    for value in np.unique(exact[:, 0].round(12)):
        for sign in (-1e-9, 1e-9):
            assert (samples[:, 0] < value + sign).mean() == pytest.approx(
                (exact[:, 0] < value + sign).mean(), abs=0.015
            )
    assert np.nanmean(samples, axis=0) == pytest.approx(np.nanmean(exact, axis=0), abs=0.005)
    assert np.nanmean(samples[:, 0] * samples[:, 1]) == pytest.approx(np.nanmean(exact[:, 0] * exact[:, 1]), abs=0.005)


def test_compare_equals_loops_over_users_and_seeds(tmp_path):
    """Each resample is evaluated as a data set of its own; the labels' users differ."""
    split = rows_of_users(users=12, rows=60)
    a, b = write_runs(tmp_path, "A", 1.5, split=split), write_runs(tmp_path, "B", 1.2, split=split)
    found = {row.metric: row for row in compare.compare(a, b, resamples=50, seed=3).differences}

    def user_aucs(run, label):
        with np.load(run.users) as arrays:
            return dict(zip(arrays[f"{label}__group"].tolist(), zip(arrays[f"{label}__rows"], arrays[f"{label}__auc"])))

    aucs = {label: [user_aucs(run, label) for run in (*a, *b)] for label in LABELS}
    users = sorted({group for label in LABELS for group in aucs[label][0]})
    rng, samples = np.random.default_rng(3), {f"{label}_gAUC": [] for label in LABELS}
    for _ in range(50):
        rng.multinomial(len(users), [1.0])
        drawn = [users[i] for i in rng.integers(len(users), size=len(users))]
        for label in LABELS:
            gaucs = []
            for of_run in aucs[label]:
                parts = [of_run[user] for user in drawn if user in of_run]
                gaucs.append(sum(n * auc for n, auc in parts) / sum(n for n, _ in parts))
            samples[f"{label}_gAUC"].append(sum(gaucs[:3]) / 3 - sum(gaucs[3:]) / 3)
    samples["gAUC"] = [sum(pair) / 2 for pair in zip(*samples.values())]
    for name, values in samples.items():
        row = found[name]
        assert row.value == pytest.approx(np.mean([gauc(r.result, name) for r in a]) - np.mean(row.b), abs=1e-12)
        assert row.interval == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=1e-12)
        tail = min(sum(v <= 0 for v in values), sum(v >= 0 for v in values))
        assert row.users_p == pytest.approx(min(1, 2 * (tail + 1) / 51))
        assert row.seeds_p == pytest.approx(paired_t_test(row.a, row.b))
    assert math.isnan(found["click_AUC"].users_p) and found["click_AUC"].seeds_p > 0


def test_swapping_the_experiments_swaps_the_signs(tmp_path):
    a, b = write_runs(tmp_path, "A", 1.0), write_runs(tmp_path, "B", 0.8)
    for row, swapped in zip(compare.compare(a, b).differences, compare.compare(b, a).differences):
        assert (row.metric, row.a, row.b) == (swapped.metric, swapped.b, swapped.a)
        assert row.value == pytest.approx(-swapped.value) and row.seeds_p == pytest.approx(swapped.seeds_p)
        assert row.users_p == pytest.approx(swapped.users_p, nan_ok=True)
        assert row.interval == pytest.approx((-swapped.interval[1], -swapped.interval[0]), nan_ok=True)


def test_a_clear_difference_is_significant_and_none_is_not(tmp_path):
    better, worse = write_runs(tmp_path, "A", 3.0), write_runs(tmp_path, "B", 0.5)
    for row in compare.compare(better, worse).differences:
        assert row.value > 0 and row.seeds_p < 0.05
        assert row.metric.endswith("gAUC") == (row.users_p < 0.05) and not row.interval[0] <= 0
    for row in compare.compare(better, better).differences:
        assert row.value == 0 and math.isnan(row.seeds_p) and row.users_p in (1, pytest.approx(math.nan, nan_ok=True))


def test_users_that_do_not_differ_are_found_different_in_one_of_twenty_cases():
    rng, rejected = np.random.default_rng(0), 0
    for trial in range(400):
        weights, differences = rng.integers(2, 9, (60, 1)), rng.normal(0, 0.2, (60, 1))
        rejected += compare._interval_and_p(bootstrap(weights, differences, 200, trial)[:, 0])["users_p"] < 0.05
    assert 0.03 <= rejected / 400 <= 0.08  # 0.05 and two standard deviations, and what 60 users cost


# ------------------------------------------------------------------------------------------------------------ seeds


def test_only_common_seeds_are_compared(tmp_path):
    a = write_runs(tmp_path, "A", 1.0, seeds=(3, 1, 2))
    b = write_runs(tmp_path, "B", 1.0, seeds=(4, 3, 2))
    found = compare.compare(a, b)
    assert found.seeds == ((2, 3), (2, 3)) and found.notes == ("left out, as only one of the two has it: seed 1, 4",)
    assert found.differences[0].a == (gauc(a[2].result, "click_AUC"), gauc(a[0].result, "click_AUC"))
    assert found.differences == compare.compare(a[::2], b[1:]).differences


def test_without_two_common_seeds_only_users_are_tested(tmp_path):
    a, b = write_runs(tmp_path, "A", 3.0, seeds=(1,)), write_runs(tmp_path, "B", 0.5, seeds=(1, 2))
    found = compare.compare(a, b)
    assert found.seeds == ((1,), (1, 2))
    assert found.notes == ("no t-test: it needs two seeds that both have; A has 1, B has 1, 2; run more seeds",)
    assert all(math.isnan(row.seeds_p) for row in found.differences)
    assert {row.metric: row.users_p < 0.05 for row in found.differences}["gAUC"]


def test_the_newest_run_of_a_seed_counts(tmp_path):
    old = write_run(tmp_path, started="2026-01-01", config={"gpu": 0})
    new = write_run(tmp_path, skill=2.0, started="2026-01-02", config={"gpu": 1, "model_root": "elsewhere"})
    assert find_runs(str(tmp_path)) == [new]
    found = compare.compare([new, old], [write_run(tmp_path, "B")])
    assert found.seeds == ((1,), (1,)) and found.differences[0].a == (gauc(new.result, "click_AUC"),)


# ------------------------------------------------------------------------------------------------------- best_marks


def series(*values):
    return dict(enumerate(values))


LOW, MIDDLE = series(0.70, 0.71, 0.69), series(0.71, 0.70, 0.72)
HIGH = series(0.80, 0.811, 0.79)


def test_the_best_is_marked_if_it_beats_every_other_one():
    assert best_marks([LOW, HIGH, MIDDLE]) == [False, True, False]
    assert best_marks([LOW, MIDDLE]) == [False, False]
    errors = [{seed: -value for seed, value in row.items()} for row in (LOW, HIGH, MIDDLE)]
    assert best_marks(errors, lower_is_better=True) == [False, True, False]
    assert best_marks(errors) == [False, False, False]


def test_holms_correction_by_hand():
    """Of two comparisons the smaller p has to be below .025, the larger one below .05."""

    def other(spread):
        return series(*(value - 0.01 - spread * sign for value, sign in zip(HIGH.values(), (-1, 0, 1))))

    near, far = other(0.0035), other(0.0018)
    assert 0.025 < paired_t_test(list(HIGH.values()), list(near.values())) < 0.05
    assert paired_t_test(list(HIGH.values()), list(far.values())) < 0.025
    assert best_marks([HIGH, near]) == best_marks([HIGH, far]) == [True, False]
    assert best_marks([HIGH, near, far]) == [True, False, False]
    assert best_marks([HIGH, near, near]) == [False, False, False]


def test_one_lost_test_spares_the_others(monkeypatch):
    tests = []
    monkeypatch.setattr(compare, "paired_t_test", lambda a, b: tests.append(1) or paired_t_test(a, b))
    assert not any(best_marks([HIGH] + 1000 * [series(*HIGH.values())])) and len(tests) == 1


@pytest.mark.parametrize(
    ("table", "marks"),
    [
        ([], []),
        ([HIGH], [False]),
        ([HIGH, {0: 0.1}], [False, False]),  # one seed in common
        ([HIGH, {7: 0.1, 8: 0.2, 9: 0.1}], [False, False]),  # none
        ([HIGH, {}, series(0.9, None, 0.9), series(0.9, math.nan), LOW], [True, False, False, False, False]),
        ([series(0.8, 0.7, 0.7, 0.7, 5), series(0.9, 0.8, 0.79, 0.8)], [False, False]),  # below on the common seeds
    ],
)
def test_tables_with_gaps(table, marks):
    assert best_marks(table) == marks


def test_equal_experiments_are_marked_in_at_most_one_of_twenty_tables():
    rng = np.random.default_rng(0)
    marked = sum(any(best_marks([series(*rng.normal(size=3)) for _ in range(3)])) for _ in range(400))
    assert marked / 400 <= 0.05


# ------------------------------------------------------------------------------------------------------- bad input


def refused(tmp_path, message, a=None, b=None, error=ValueError):
    with pytest.raises(error, match=message):
        compare.compare(a or write_runs(tmp_path, "A", 1), b or write_runs(tmp_path, "B", 1))


def test_other_data_are_refused(tmp_path):
    other = write_runs(tmp_path / "id", "B", 1, dataset_id="other")
    refused(tmp_path, r"A-s1-.*json and B-s1-.*json are of different data sets, tiny and other", b=other)
    other = write_runs(tmp_path / "manifest", "B", 1, data={"manifest": "f00d" * 16})
    refused(tmp_path, r"are of different splits: data set tiny was built .*beefbeef and f00df00d", b=other)
    other = write_runs(tmp_path / "old", "B", 1, data=None)
    refused(tmp_path, r"different splits.*beefbeef and unknown", b=other)
    groups, y_true = rows_of_users()
    other = write_runs(tmp_path / "users", "B", 1, split=(groups + 1, y_true))
    refused(tmp_path, r"are of different splits: users, or their rows, differ in A-s1.*npz and B-s1.*npz", b=other)
    repeated = {label: np.append(values, values[0]) for label, values in y_true.items()}
    other = write_runs(tmp_path / "rows", "B", 1, split=(np.append(groups, groups[0]), repeated))
    refused(tmp_path, r"are of different splits: users, or their rows, differ", b=other)
    other = write_runs(tmp_path / "labels", "B", 1, split=rows_of_users(("click",)))
    refused(tmp_path, r"different labels, click, like and click; compare on the same ones", b=other)


def test_runs_of_several_experiments_or_settings_are_refused(tmp_path):
    mixed = [*write_runs(tmp_path, "A", 1), *write_runs(tmp_path, "B", 1)]
    refused(tmp_path, "these results are of 2 experiments, A, B; name one of them", a=mixed)
    other = write_run(tmp_path, "A", 9, config={"seed": 9, "learning_rate": 0.2, "dropout": 0.1})
    message = r"A have different settings, A-s1-.* and A-s9-.*: learning_rate \(0.1, 0.2\), dropout \(None, 0.1\); name"
    refused(tmp_path, message, a=[*write_runs(tmp_path, "A", 1), other])


def test_how_a_run_was_launched_makes_no_other_settings(tmp_path):
    """As one that is repeated without captured steps, which CUDA refused."""
    config = {"seed": 9, "learning_rate": 0.1, "cuda_graphs": False, "data_on_device": True, "num_workers": 2}
    runs = [*write_runs(tmp_path, "A", 1), write_run(tmp_path, "A", 9, config=config)]
    other = write_runs(tmp_path, "B", 1, seeds=(1, 2, 3, 9))
    assert compare.compare(runs, other).seeds == ((1, 2, 3, 9), (1, 2, 3, 9))


def test_results_without_users_are_told_and_refused_if_seeds_cannot_tell_either(tmp_path):
    old = write_runs(tmp_path / "old", "B", 1, users=None)
    found = compare.compare(write_runs(tmp_path, "A", 1), old)
    (note,) = found.notes
    assert "3 of 6 results are without their users' AUCs" in note and f"{old[0].path.name}; run it again" in note
    assert all(row.seeds_p > 0 and math.isnan(row.users_p) for row in found.differences)
    refused(tmp_path, r"nothing to test by: no t-test: .* run more seeds; no bootstrap: 1 of 4", b=old[:1])
    lost = write_runs(tmp_path / "lost", "B", 1)
    lost[2].users.unlink()
    assert "1 of 6 results" in compare.compare(write_runs(tmp_path, "A", 1), lost).notes[0]
    broken = write_runs(tmp_path / "broken", "B", 1)
    broken[0].users.write_bytes(b"PK\x03\x04 cut off")
    refused(tmp_path, r"B-s1-.*users\.npz is not a file of users' AUCs: .*; run again", b=broken)
    for how in ("stream", "method"):
        damaged = write_runs(tmp_path / how, "B", 1)
        damage(damaged[0].users, how)
        refused(tmp_path, r"B-s1-.*users\.npz is not a file of users' AUCs: .*; run again", b=damaged)


def test_a_metric_that_is_undefined_stays_so(tmp_path):
    groups, y_true = rows_of_users()
    split = groups, {"click": y_true["click"], "like": (groups % 2).astype(float)}  # no user has both classes of like
    with pytest.warns(UserWarning, match="gAUC is undefined"):
        a, b = (write_runs(tmp_path, name, 1, split=split) for name in "AB")
    runs = [Run(run.path, json.loads(json.dumps(run.result).replace("NaN", "null"))) for run in (*a, *b)]
    found = {row.metric: row for row in compare.compare(runs[:3], runs[3:]).differences}
    assert found["click_gAUC"].users_p > 0
    for name in ("like_gAUC", "gAUC"):
        assert all(math.isnan(value) for value in (found[name].value, found[name].seeds_p, found[name].users_p))


def test_splits_and_scenarios(tmp_path):
    metrics = {"valid": {"AUC": 0.5, "AUC@tab": 0.6, "AUC@tab=1": 0.7}, "test": {}}
    a, b = (write_runs(tmp_path, name, 1, metrics=metrics) for name in "AB")
    found = compare.compare(a, b, "valid")
    assert [row.metric for row in found.differences] == ["AUC", "AUC@tab"]
    assert found.notes == ("no bootstrap: the users' AUCs are of the test data",)
    refused(tmp_path, r"no metric of the test data that all of A-s1.*", a, b)
    with pytest.raises(ValueError, match="resamples=0"):
        compare.compare(a, b, "valid", resamples=0)


# ----------------------------------------------------------------------------------------------------- finding runs


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with results of two models, and a working directory with others."""
    monkeypatch.setattr(compare, "REPOSITORY", tmp_path / "checkout")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    zoo = tmp_path / "checkout" / "model_zoo"
    return SimpleNamespace(
        one=write_runs(zoo / "One" / "results", "One_x", 1.0),
        long=write_runs(zoo / "One" / "results", "One_x-s1", 1.0, seeds=(1,)),
        two=write_runs(zoo / "Two" / "results", "Two_x", 2.0),
        here=write_runs(here / "results", "Here", 1.0),
    )


def test_runs_are_found_by_id_glob_folder_and_file(checkout):
    assert find_runs("One_x") == checkout.one
    assert find_runs("One_x-s1") == checkout.long
    assert find_runs("Two*") == checkout.two
    assert [run.result for run in find_runs("Here")] == [run.result for run in checkout.here]
    assert find_runs(str(checkout.two[0].path.parent)) == checkout.two
    assert find_runs(str(checkout.two[1].path)) == checkout.two[1:2]
    assert find_runs(str(checkout.one[0].path.with_name("One_x-s[12]-2*.json"))) == checkout.one[:2]


def test_what_is_no_experiment_is_refused(checkout, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no result of 'Two_y': .*, the nearest is 'Two_x'; run it first"):
        find_runs("Two_y")
    with pytest.raises(ValueError, match="2 experiments, One_x, One_x-s1; name one of them"):
        find_runs("One_x*")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no result, no \*\.json, in the folder"):
        find_runs(str(tmp_path / "empty"))
    (tmp_path / "new.json").write_text(json.dumps(checkout.one[0].result | {"format": 99}))
    with pytest.raises(ValueError, match=r"new\.json has result format 99; this version of flowctr reads 1"):
        find_runs(str(tmp_path / "new.json"))


def test_command_compare(checkout, capsys):
    assert call("compare", "Two_x", "One_x", "--resamples", "200") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {
        cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("│")[1:-1]] for line in lines) if cells
    }
    assert lines[0].strip() == "A: Two_x, seeds 1, 2, 3" and lines[1].strip() == "B: One_x, seeds 1, 2, 3"
    expected = compare.compare(checkout.two, checkout.one, resamples=200).differences
    assert list(rows) == [row.metric for row in expected]
    for row in expected:
        a, b, difference, seeds_p, interval, users_p = rows[row.metric]
        assert a == f"{np.mean(row.a):.4f} ± {np.std(row.a, ddof=1):.4f}" and b.startswith(f"{np.mean(row.b):.4f} ±")
        assert (difference, seeds_p) == (f"{row.value:+.4f}", f"{row.seeds_p:.2g}")
        bounds = "–" if math.isnan(row.users_p) else f"{row.interval[0]:+.4f} to {row.interval[1]:+.4f}"
        assert (interval, users_p) == (bounds, "–" if math.isnan(row.users_p) else f"{row.users_p:.2g}")
    assert call("compare", "Two_x", "Here", "--split", "train") == 2
    assert "splits are valid and test" in capsys.readouterr().err
    assert call("compare", "Two_x", "nothing") == 2
    assert "no result of 'nothing'" in capsys.readouterr().err


def test_two_trained_experiments_are_compared(folder, src, monkeypatch, capsys):  # noqa: F811
    config = folder / "config" / "model_config.yaml"
    config.write_text(config.read_text() + "\nToy_slow:\n    dataset_id: two_labels\n    learning_rate: 1e-4\n")
    paths = {
        expid: [
            experiment.run(folder / "config", expid, src, overrides=["epochs=2", f"seed={seed}"]) for seed in (1, 2, 3)
        ]
        for expid in ("Toy_test", "Toy_slow")
    }
    capsys.readouterr()
    monkeypatch.chdir(folder)
    assert call("compare", "Toy_test", "Toy_slow") == 0
    assert "few users with both classes for a bootstrap: click 15" in " ".join(capsys.readouterr().out.split())
    fast, slow = (find_runs(expid) for expid in paths)
    assert [run.path for run in fast] == [path.relative_to(folder) for path in paths["Toy_test"]]
    found = {row.metric: row for row in compare.compare(fast, slow).differences}
    assert found["click_gAUC"].value > 0 and found["click_gAUC"].users_p < 0.05 and found["NE"].value < 0

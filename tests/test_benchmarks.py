"""The published tables and figures are what the result files say."""

import csv
import importlib.util
import inspect
import itertools
import json
import re
import shlex
import sys
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import yaml
from flowctr import config

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def study(tables):
    return sys.modules["study"]  # which tables.py imports


@pytest.fixture(scope="module")
def tables():
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.syspath_prepend(BENCHMARKS)  # as for a script, tables.py imports study.py
    spec = importlib.util.spec_from_file_location("tables", BENCHMARKS / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.undo()
    return module


def test_the_page_is_what_the_result_files_say(tables):
    page = (BENCHMARKS / "README.md").read_text()
    assert tables.filled(page) == page, "run: python benchmarks/tables.py"
    assert page.count("<!-- table: ") == page.count("<!-- end -->") > 0


def test_studies_without_results_are_named(tables, tmp_path, monkeypatch):
    (tmp_path / "FM" / "FM_data").mkdir(parents=True)
    (tmp_path / "FM" / "FM_data" / "tuner_config.yaml").write_text(
        "{base_config: FM, base_expid: FM_data, dataset_id: data, tuner_space: {}, trials: 1, select: AUC, seeds: [1]}"
    )
    monkeypatch.setattr(tables, "HERE", tmp_path)
    with pytest.raises(SystemExit, match=r"studies without results: .*FM_data; run them"):
        tables.table("studies data")


def test_a_study_has_the_mean_over_its_seeds(tables):
    folder = BENCHMARKS / "INFNet" / "INFNet_v1_kuairand_pure_window"
    results = [json.loads(path.read_text())["metrics"]["test"] for path in folder.glob("results/*.json")]
    assert len(results) == 3
    values = [result["is_like_AUC"] for result in results]
    assert f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" in tables.table("studies kuairand_pure_window")
    lines = (folder / "results.csv").read_text().splitlines()
    assert [f"is_like_AUC: {value:.6f}" in line for line in lines for value in values].count(True) >= 3


def test_every_study_page_is_what_its_lines_say():
    """The best trial comes first, and the experiment has its settings."""
    folders = [path.parent for path in BENCHMARKS.glob("*/*/tuner_config.yaml")]
    assert folders
    for folder in folders:
        study = yaml.safe_load((folder / "tuner_config.yaml").read_text())
        runs = len(study.get("labels", ["all"]))  # of each trial
        trials = (folder / "tuner_config.csv").read_text().splitlines()
        select = re.compile(rf"\[val\].*?\b{study['select']}: ([\d.]+)")
        scores = np.mean(np.reshape([float(select.search(line)[1]) for line in trials], (-1, runs)), axis=1).tolist()
        assert len(scores) == study["trials"] and scores == sorted(scores, reverse=True)
        variants = folder / "variants.csv"
        ran = re.findall(r"\[exp_id\] (\w+)", variants.read_text()) if variants.exists() else []
        for expid in study.get("ablations", []):
            assert ran.count(expid) == len(study["seeds"]) * runs
        params = config.read(BENCHMARKS.parent / study["base_config"], study["base_expid"])
        command = shlex.split(re.search(r"\[command\] (.*?),\[exp_id\]", trials[0])[1])
        best = dict(text.split("=") for option, text in pairwise(command) if option == "--set")
        defaults = {} if params.get("zoo") else _defaults(params["model"])  # the code of a zoo need not be here
        for key in study["tuner_space"]:
            if key == "dataset_id":  # an experiment of other data, with the settings that were found there
                assert (study["dataset_id"], study["tuned_on"]) == (json.loads(best[key]), params[key])
            else:
                assert json.loads(best[key]) == params.get(key, defaults.get(key)), (folder, key)


def test_every_study_page_is_written_by_what_the_folder_keeps(study):
    for folder in (path.parent for path in BENCHMARKS.glob("*/*/tuner_config.yaml")):
        done = study.all_results(folder)
        for image in re.findall(r"\]\((\w+\.png)\)", (folder / "README.md").read_text()):
            assert (folder / image).read_bytes().startswith(b"\x89PNG"), folder / image
        assert study.page(folder, done) == (folder / "README.md").read_text(), f"run: study.py write {folder}"
        lines = "".join(f"{study.experiment.result_line(run)}\n" for run in study.runs_of(done["tune"]))
        assert lines == (folder / "tuner_config.csv").read_text()


LABELS = ["is_click", "is_like", "long_view"]
AUCS = {  # of the validation data, by the tuned setting: the second is better for is_click, the first in the mean
    4: {"is_click": 0.5, "is_like": 0.9, "long_view": 0.7},
    8: {"is_click": 0.6, "is_like": 0.6, "long_view": 0.6},
}


@pytest.fixture
def baseline(study, tmp_path, monkeypatch):
    """A study of a model for one label of FuxiCTR, whose code is not there; in a repository of its own."""
    monkeypatch.setattr(study, "REPOSITORY", tmp_path)
    configs, folder = tmp_path / "benchmarks" / "baselines", tmp_path / "benchmarks" / "FM" / "FM_tiny"
    for path in (configs, folder, configs.parent / "results"):
        path.mkdir(parents=True)
    (configs / "README.md").write_text("# Baselines\n\n    git clone URL FuxiCTR\n    flowctr run\n")
    settings = {"zoo": "FuxiCTR/model_zoo/FM", "model": "FM", "dataset_id": "kuairand_tiny", "batch_size": 64}
    (configs / "model_config.yaml").write_text(json.dumps({"FM_tiny": settings}))
    wanted = {"base_config": "benchmarks/baselines", "base_expid": "FM_tiny", "dataset_id": "kuairand_tiny"}
    wanted |= {"labels": LABELS, "tuner_space": {"embedding_dim": [8, 4], "units": [[16, 8]]}, "trials": 2}
    wanted |= {"select": "AUC", "seeds": [1, 2], "sweeps": {"embedding_dim": [8]}}
    (folder / "tuner_config.yaml").write_text(json.dumps(wanted))
    return folder


def _run_as(job, number):
    """Writes a result as a resumed run does, on a GPU of its choice and with a folder of its own for checkpoints."""
    like = json.loads(next(BENCHMARKS.glob("STEM/*/results/*.json")).read_text())
    settings = dict(job.overrides)
    label = settings["label"]
    auc = AUCS[settings["embedding_dim"]][label]
    result = {
        **{**like, "expid": job.expid, "model": "FM", "dataset_id": "kuairand_tiny", "seed": job.seed},
        **{"labels": [label], "zoo": {"folder": "model_zoo/FM"}, "attention": None, "users": None},
        "command": f"{shlex.join(job.command)} --resume --gpu 3 --set model_root=elsewhere",
        "config": {**job._config(), "gpu": 3, "resume": True, "model_root": "elsewhere", "zoo": "elsewhere/FM"},
        "metrics": {
            "valid": dict.fromkeys(("AUC", "logloss", "NE"), auc) | {"gAUC": None if label == "is_like" else auc},
            "test": dict.fromkeys(("AUC", "gAUC", "logloss", "NE"), auc + job.seed / 100),
        },
        "parameters": {"total": 1000, "non_embedding": 10},
        "flops_per_row": 7.0,
        "speed": {"train_rows_per_second": {"is_click": 600.0, "is_like": 300.0, "long_view": 200.0}[label]},
        "peak_memory_bytes": {"host": 2**33, "device": 2**30 * (1 + LABELS.index(label))},
    }
    (job.model_dir / "results" / f"{job.expid}-s{job.seed}-{number:03}.json").write_text(json.dumps(result))


def _run_all(study, folder):
    numbers = count(900, -1)  # the files' order is not that of the labels
    for phase in study.PHASES:
        for job in study.jobs(folder, phase):
            if job.result() is None:
                _run_as(job, next(numbers))


def test_models_for_one_label_are_ranked_and_shown_together(study, baseline):
    _run_all(study, baseline)
    study.write(baseline)
    best, trial = study.ranked(baseline)[0]
    assert dict(best.overrides) == {"embedding_dim": 4, "units": [16, 8]}
    assert trial["metrics"]["valid"]["is_like_AUC"] == 0.9
    assert trial["metrics"]["valid"]["AUC"] == pytest.approx(0.7)
    assert trial["metrics"]["valid"]["gAUC"] is None  # it is of one label

    page = (baseline / "README.md").read_text()
    assert page.startswith("# FM_tiny\n\nFM of FuxiCTR on `kuairand_tiny`, ")
    spread = [f"{auc + 0.015:.4f} ± {0.01 / 2**0.5:.4f}" for auc in (0.5, 0.9, 0.7)]
    assert f"| is_like | 0.9000 ± 0.0000 | – | 0.9000 ± 0.0000 | 0.9000 ± 0.0000 | {spread[1]} |" in page
    assert "| 3,000 | 30 | 21 | 100 | 3.00 |" in page  # rows/s: 1 / (1/600 + 1/300 + 1/200)
    assert f"| as tuned | 2 | {' | '.join(spread)} | {spread[2]} | {spread[2]} | 30 |" in page
    assert "| embedding_dim 8 | 2 | 0.6150 ± 0.0071 |" in page
    assert "| 4 | [16, 8] | 0.7000 | – | 0.7000 | 0.7000 |\n| 8 | [16, 8] | 0.6000 |" in page
    settings = "--seed 1 --set embedding_dim=4 --set 'units=[16, 8]'"
    commands = [
        f"    flowctr run --config benchmarks/baselines --expid FM_tiny {settings} --set 'label=\"{label}\"'\n"
        for label in LABELS
    ]
    assert "".join(commands) in page and page.count("flowctr run") == 3
    assert "\n\n    git clone URL FuxiCTR\n    flowctr prepare" in page

    assert [(r["seed"], r["labels"], r["metrics"]) for r in study.final_results(baseline)] == [
        (r["seed"], LABELS, r["metrics"]) for _, r in study.results(baseline, "final")
    ]
    lines = (baseline / "results.csv").read_text().splitlines()
    assert [re.search(r'label="(\w+)"', line)[1] for line in lines] == LABELS * 2


def test_what_the_folder_of_a_baseline_keeps_is_enough(study, baseline):
    _run_all(study, baseline)
    study.write(baseline)
    written = {path: path.read_bytes() for path in baseline.rglob("*") if path.is_file() and path.suffix != ".png"}
    for path in (baseline.parent.parent / "results").iterdir():
        path.unlink()
    study.write(baseline)
    assert {path: path.read_bytes() for path in written} == written
    assert (baseline / "sweeps.png").exists() and not (baseline / "ablations.png").exists()


def test_a_result_of_another_configuration_is_none(study, baseline):
    _run_all(study, baseline)
    path = baseline.parent.parent / "baselines" / "model_config.yaml"
    path.write_text(path.read_text().replace('"batch_size": 64', '"batch_size": 32'))
    with pytest.raises(SystemExit, match=r"6 of 6 runs of phase tune .* as flowctr run --config benchmarks/baselines"):
        study.write(baseline)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trials", None, r"missing keys \['trials'\]"),
        ("sweep", {}, r"unknown keys \['sweep'\]"),
        ("seeds", [1, 1], r"seeds must be a list of different values; got \[1, 1\]"),
        ("tuner_space", [8], r"tuner_space must map options to lists of values; got \[8\]"),
        ("sweeps", {"units": 8}, "units must be a list of different values; got 8"),
        ("tuner_space", {"embedding_dim": 8}, "embedding_dim must be a list of different values; got 8"),
        ("tuner_space", {"embedding_dim": []}, r"embedding_dim must be a list of different values; got \[\]"),
    ],
)
def test_a_wrong_study_is_refused(study, baseline, key, value, message):
    path = baseline / "tuner_config.yaml"
    wanted = {**json.loads(path.read_text()), key: value}
    path.write_text(json.dumps({name: given for name, given in wanted.items() if given is not None}))
    with pytest.raises(SystemExit, match=rf"tuner_config\.yaml: .*{message}"):
        study.read(baseline)


@pytest.mark.parametrize(("select", "best"), [("AUC", 4), ("is_click_AUC", 8), ("logloss", 8), ("is_click_logloss", 4)])
def test_the_best_trial_has_the_highest_auc_or_the_lowest_loss(study, baseline, select, best):
    path = baseline / "tuner_config.yaml"
    path.write_text(json.dumps({**json.loads(path.read_text()), "select": select}))
    for number, job in enumerate(study.jobs(baseline, "tune")):
        _run_as(job, number)
    assert dict(study.ranked(baseline)[0][0].overrides)["embedding_dim"] == best


def test_every_file_of_a_study_is_there_as_a_whole(study, baseline, monkeypatch):
    def files():
        paths = [path for path in baseline.rglob("*") if path.is_file() and path.suffix not in (".png", ".tmp")]
        return {path: path.read_bytes() for path in paths}

    _run_all(study, baseline)
    study.write(baseline)
    before = files()
    monkeypatch.setitem(AUCS, 4, {label: auc + 0.01 for label, auc in AUCS[4].items()})
    for number, job in enumerate(study.jobs(baseline, "final")):
        _run_as(job, 950 + number)  # newer than the runs before
    write_whole, left = study.write_whole, iter(range(3))

    def disk_that_fills(path, content):
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        write_whole(path, content)

    monkeypatch.setattr(study, "write_whole", disk_that_fills)
    with pytest.raises(OSError, match="No space"):
        study.write(baseline)
    halfway = files()
    monkeypatch.setattr(study, "write_whole", write_whole)
    study.write(baseline)
    after = files()
    assert any(halfway[path] != before[path] for path in before if path in halfway)
    assert all(content in (before.get(path), after.get(path)) for path, content in halfway.items())


def test_without_all_trials_nothing_else_is_run(study, baseline, monkeypatch):
    ran = []

    def fail(job, gpu, threads):
        ran.append(job)
        return f"{job.seed} failed"

    monkeypatch.setattr(study.Job, "run", fail)
    with pytest.raises(SystemExit, match=r"(?s)1 failed.*6 runs failed"):
        study.run([baseline], ["tune", "final"], [-1], 2)
    assert len(ran) == 6


@pytest.mark.parametrize(
    ("gpu", "workers", "set_by_user", "wanted"), [(-1, 3, None, "2"), (-1, 3, "5", "5"), (0, 3, None, None)]
)
def test_runs_on_a_cpu_share_its_cores(study, baseline, monkeypatch, gpu, workers, set_by_user, wanted):
    seen = []

    def note(command, env, **_):
        seen.append(env.get("OMP_NUM_THREADS"))
        return SimpleNamespace(returncode=1, stderr="")

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if set_by_user:
        monkeypatch.setenv("OMP_NUM_THREADS", set_by_user)
    monkeypatch.setattr(study, "cores", lambda: 8)
    monkeypatch.setattr(study.subprocess, "run", note)
    with pytest.raises(SystemExit):
        study.run([baseline], ["tune"], [gpu], workers)
    assert set(seen) == {wanted}


def _defaults(model):
    arguments = inspect.signature(config.model_class(model).__init__).parameters
    return {name: argument.default for name, argument in arguments.items()}


def test_the_figures_have_the_numbers_of_the_runs(study):
    folder = BENCHMARKS / "INFNet" / "INFNet_v1_kuairand_pure_window"
    wanted, done = study.read(folder), study.all_results(folder)
    aucs, runs = study.aucs_of(wanted, done), [json.loads(line) for line in open(folder / "runs.jsonl")]

    def run_with(ablation="", **settings):
        runs_of_it = [run for run in runs if run["expid"] == wanted["base_expid"] + ablation]
        best = {**dict(done["tune"][0][0].overrides), "num_field_hubs": None, "hubs_per_behavior": None, **settings}
        runs_of_it = [run for run in runs_of_it if all(run["config"].get(key) == best[key] for key in best)]
        return {
            run["seed"]: run["metrics"]["test"]["AUC"] for run in runs_of_it if "num_task_hubs" not in run["config"]
        }

    assert aucs["no_pgu"] == run_with("_no_pgu") and len(aucs["no_pgu"]) == 3
    assert aucs["num_field_hubs 8"] == run_with(num_field_hubs=8) and len(aucs["num_field_hubs 8"]) == 3
    assert aucs["as tuned"] == run_with() == aucs["num_field_hubs 4"] == aucs["num_task_hubs 2"]
    assert study.swept(wanted, done)["num_field_hubs"] == [2, 4, 8]  # 4 is the tuned value
    assert list(aucs)[:4] == ["as tuned", "no_task_tokens", "no_pgu", "no_cross_attention"]


def test_what_a_swept_option_is_by_default_is_what_the_model_takes(study):
    for path in BENCHMARKS.glob("*/*/tuner_config.yaml"):
        wanted = study.read(path.parent)
        for option, value in wanted["defaults"].items():
            params = config.read(BENCHMARKS.parent / wanted["base_config"], wanted["base_expid"])
            taken = _defaults(params["model"])[option]
            if taken is None:  # INFNet: it depends on the version
                taken = sys.modules[config.model_class(params["model"]).__module__].PRESETS[params["version"]][option]
            assert option not in params and value == taken, (path, option)


def test_the_claims_are_of_variants_that_the_studies_have(study):
    with open(BENCHMARKS / "paper_claims.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = {}
    for path in BENCHMARKS.glob("*/*/tuner_config.yaml"):
        wanted = study.read(path.parent)
        configured = yaml.safe_load((BENCHMARKS.parent / wanted["base_config"] / "model_config.yaml").read_text())
        base = f"{wanted['base_expid']}_"
        known = {"as tuned", *(expid.removeprefix(base) for expid in configured if expid.startswith(base))}
        for option, values in wanted["sweeps"].items():
            known |= {f"{option} {value}" for value in [*values, wanted["defaults"].get(option)]}
        names[wanted["base_expid"]] = known
    for row in rows:
        assert {row["lower"], row["higher"]} <= names[row["study"]], row
        assert row["paper"] and row["where"] and bool(row["lower_auc"]) == bool(row["higher_auc"]), row
        assert not row["lower_auc"] or -0.05 < float(row["lower_auc"]) - float(row["higher_auc"]) < 0.001, row


CLAIMS = """study,lower,higher,dataset,task,lower_auc,higher_auc,paper,where
FM_tiny,embedding_dim 8,embedding_dim 4,Theirs,click,0.70,0.75,"FM, ICDM 2010",Table 1
FM_tiny,embedding_dim 8,embedding_dim 4,Theirs,like,0.60,0.75,"FM, ICDM 2010",Table 1
FM_tiny,embedding_dim 4,embedding_dim 8,Others,,,,"FM, ICDM 2010",text
FM_tiny,small_batch,as tuned,,,,,"FM, ICDM 2010",text
FM_tiny,never_run,as tuned,,,,,"FM, ICDM 2010",text
FM_other,small_batch,as tuned,,,0.1,0.2,"FM, ICDM 2010",text
"""


def test_a_study_is_shown_beside_what_the_paper_claims(study, baseline, monkeypatch):
    claims = baseline / "claims.csv"
    claims.write_text(CLAIMS)
    monkeypatch.setattr(study, "CLAIMS", claims)
    wanted = json.loads((baseline / "tuner_config.yaml").read_text())
    ablations = ["FM_tiny_small_batch", "FM_tiny_smaller_batch"]
    (baseline / "tuner_config.yaml").write_text(json.dumps({**wanted, "ablations": ablations}))
    path = baseline.parent.parent / "baselines" / "model_config.yaml"
    tiny = json.loads(path.read_text())["FM_tiny"]
    sizes = dict(zip(ablations, (32, 16)))
    path.write_text(json.dumps({"FM_tiny": tiny} | {expid: {**tiny, "batch_size": sizes[expid]} for expid in sizes}))
    _run_all(study, baseline)
    study.write(baseline)
    page = (baseline / "README.md").read_text()
    assert "### What FM, ICDM 2010, claims" in page and "Not known: what it says of smaller_batch.\n" in page
    section = page.split("| lower |")[1].split("## Tuning")[0].strip().splitlines()[2:]
    assert section == [  # 8 is .1 below 4 with each seed
        "| embedding_dim 8 | embedding_dim 4 | −0.1000 (Theirs) | Table 1 | −0.1000 ± 0.0000 | yes, p 0 |",
        "| embedding_dim 4 | embedding_dim 8 | no number (Others) | text | +0.1000 ± 0.0000 | no, p 0 |",
        "| small_batch | as tuned | no number | text | +0.0000 ± 0.0000 | not decided, p 1 |",
    ]
    for name in ("ablations.png", "sweeps.png"):
        assert f"]({name})" in page
        assert (baseline / name).read_bytes().startswith(b"\x89PNG") and (baseline / name).stat().st_size < 150_000


def test_a_sweep_says_what_the_model_takes_otherwise(study, baseline):
    wanted = json.loads((baseline / "tuner_config.yaml").read_text())
    (baseline / "tuner_config.yaml").write_text(json.dumps({**wanted, "sweeps": {"gate": [1]}}))
    _run_all(study, baseline)
    with pytest.raises(SystemExit, match="FM_tiny: no configuration names gate; say under defaults"):
        study.write(baseline)


def run_with(*aucs):
    """A run that is evaluated twice in each epoch of 40 steps."""
    valid = [{"step": 20 * i, "epoch": (i + 1) // 2, "AUC": auc} for i, auc in enumerate(aucs, 1)]
    return {"curves": {"train": [{"step": 10, "epoch": 1, "loss": 2.0}], "valid": valid}}


def test_a_curve_counts_epochs(study):
    run = run_with(0.6, 0.7, 0.8)
    curves = [sys.modules["figures"].curve_of(run, *of) for of in (("valid", "AUC"), ("train", "loss"))]
    np.testing.assert_allclose(curves[0], [[0.5, 0.6], [1.0, 0.7], [1.5, 0.8]])
    np.testing.assert_allclose(curves[1], [[0.25, 2.0]])


def test_of_each_experiment_the_run_in_the_middle_is_drawn(study):
    runs = [run_with(0.6, 0.9, 0.5), run_with(0.7, 0.7), run_with(0.8, 0.6)]
    for order in itertools.permutations(runs):
        assert sys.modules["figures"].median_run(list(order), "AUC") is runs[2]
    assert sys.modules["figures"].median_run(runs[:2], "AUC") is runs[1]


def test_the_curves_are_those_of_the_leaders(tables, monkeypatch):
    """Without those that have a model for each label, and so no curve of the mean."""
    for dataset_id, metric in {"kuairand_pure_window": "AUC", "kuairand_pure_window_tabs": "AUC@tab"}.items():
        pages = re.findall(r"^\| \[(\w+)]\((.+?)\)", tables.table(f"studies {dataset_id}"), re.MULTILINE)
        studies = {name: tables.read((tables.HERE / page).parent) for name, page in pages}
        ranked = [name for name, study in studies.items() if not study["labels"]]
        runs, ranked_by = tables.leaders(dataset_id)
        assert (list(runs), ranked_by) == (ranked[:5], metric)
        assert all(run["expid"] == name for name, run in runs.items())
        with monkeypatch.context() as patch:
            patch.setattr(tables, "COLORS", range(100))
            assert list(tables.leaders(dataset_id)[0]) == ranked


def test_the_pairs_are_what_the_result_files_say(tables):
    dataset_ids = re.findall("<!-- table: studies (.+) -->", (BENCHMARKS / "README.md").read_text())
    assert dataset_ids
    for dataset_id in dataset_ids:
        pairs = tables.as_csv(tables.pairs_of_studies(dataset_id))
        assert (BENCHMARKS / f"pairs_{dataset_id}.csv").read_text() == pairs, "run: python benchmarks/tables.py"
        assert (BENCHMARKS / f"pairs_{dataset_id}.png").read_bytes().startswith(b"\x89PNG")


def test_each_pair_is_compared_over_its_common_seeds(tables, monkeypatch):
    aucs = {"A": {1: 0.7, 2: 0.71, 3: 0.72}, "B": {1: 0.6, 2: 0.62, 3: 0.61, 4: 0.2}, "C": {3: 0.5, 5: 0.4}}
    finals = {name: [run_of(seed, auc) for seed, auc in values.items()] for name, values in aucs.items()}
    monkeypatch.setattr(tables, "study_folders", lambda _: [Path(name) for name in ("B", "C", "A")])
    monkeypatch.setattr(tables, "final_results", lambda folder: finals[folder.name])
    rows = tables.pairs_of_studies("data")
    assert [(row["experiment"], row["other"], row["metric"], row["seeds"]) for row in rows] == [
        *[("A", "B", "AUC", 3), ("A", "B", "gAUC", 3)],
        *[("A", "C", "AUC", 1), ("A", "C", "gAUC", 1)],
        *[("B", "C", "AUC", 1), ("B", "C", "gAUC", 1)],
    ]
    assert [row["difference"] for row in rows[:3]] == pytest.approx([0.1, -0.1, 0.22])
    p = 2 * scipy.stats.t.sf(0.1 / np.std([0.1, 0.09, 0.11], ddof=1) * np.sqrt(3), df=2)
    assert [row["p"] for row in rows[:2]] == pytest.approx([p, p])
    assert all(np.isnan(row["p"]) for row in rows[2:])  # one seed
    assert tables.as_csv(rows[:1]) == f"experiment,other,metric,seeds,difference,p\nA,B,AUC,3,+0.1000,{p:.2g}\n"
    names, signs = tables.told_apart(rows)
    assert names == ["A", "B", "C"]
    nan = float("nan")
    np.testing.assert_array_equal(signs["AUC"], [[0, 1, nan], [-1, 0, nan], [nan, nan, 0]])
    np.testing.assert_array_equal(signs["gAUC"], [[0, -1, nan], [1, 0, nan], [nan, nan, 0]])


def run_of(seed, auc):
    """A result with a gAUC that goes the other way."""
    return {"seed": seed, "labels": ["label"], "config": {}, "metrics": {"test": {"AUC": auc, "gAUC": 1 - auc}}}


def test_the_page_of_a_setting_from_elsewhere_claims_no_search(study):
    read = {"seeds": [2025], "select": "AUC", "labels": [], "tuned_on": "other"}
    found = "No search on these data: the setting of [tuner_config.yaml](tuner_config.yaml) was found on `other`."
    assert study._tuning(read, 1) == found
    assert study._tuning({**read, "tuned_on": None}, 1).startswith("1 trials drawn at random")


def test_differences_are_seed_by_seed(study):
    figures = sys.modules["figures"]
    aucs = {"as tuned": {1: 0.7, 2: 0.8, 3: 0.6}, "a": {2: 0.79, 1: 0.67}, "b": {3: 0.65}}
    np.testing.assert_allclose(figures.changes(aucs, "a"), [-0.01, -0.03])
    np.testing.assert_allclose(figures.changes(aucs, "as tuned", "b"), [-0.05])
    assert figures.shown(figures.changes(aucs, "a")) == "−0.0200 ± 0.0141"
    assert figures.shown(figures.changes(aucs, "b")) == "+0.0500"


@pytest.mark.parametrize(
    ("differences", "holds"),
    [
        ([-0.010, -0.012, -0.011], "yes, p 0.0027"),
        ([0.010, 0.012, 0.011], "no, p 0.0027"),
        ([-0.03, 0.01], "not decided, p 0.7"),
        ([-0.01, -0.03], "not decided, p 0.3"),
        ([-0.01, -0.01], "yes, p 0"),
        ([0.0, 0.0], "not decided, p 1"),
        ([-0.001], "not decided, one seed"),
    ],
)
def test_a_claim_holds_if_a_t_test_says_so(study, differences, holds):
    assert sys.modules["figures"].verdict(np.array(differences)) == holds


def test_the_papers_change_is_the_mean_over_its_tasks(study):
    """INFNet v1's Table 3, without task tokens."""
    figures = sys.modules["figures"]
    known = dict.fromkeys(("as tuned", "no_task_tokens"))
    reported = figures.papers_changes(figures.read_claims(study.CLAIMS, "INFNet_v1_kuairand_pure_window", known))
    assert reported == {
        "INFNet, arXiv 2508.11565v1, KuaiRand-Pure": {
            "no_task_tokens": pytest.approx((0.7720 - 0.7736 + 0.8925 - 0.8960 + 0.7707 - 0.7727) / 3)
        },
        "INFNet, arXiv 2508.11565v1, QB-Video": {
            "no_task_tokens": pytest.approx((0.9747 - 0.9749 + 0.9185 - 0.9225 + 0.8842 - 0.8881 + 0.7747 - 0.8091) / 4)
        },
    }


def test_what_a_paper_says_of_two_ablations_is_no_change_of_the_whole(study):
    figures = sys.modules["figures"]
    known = dict.fromkeys(("as tuned", "avg", "mlp", "mha"))
    claims = figures.read_claims(study.CLAIMS, "InterFormer_kuairand_pure_window", known)
    assert ("avg", "mlp") in [(claim.lower, claim.higher) for claim in claims]
    taobao = figures.papers_changes(claims)["InterFormer, arXiv 2411.09852v4, TaobaoAd"]
    assert taobao == pytest.approx({"avg": 0.6437 - 0.6528, "mlp": 0.6451 - 0.6528, "mha": 0.6502 - 0.6528})
    known = dict.fromkeys(("num_task_hubs 2", "num_task_hubs 4", "num_field_hubs 8", "num_field_hubs 32"))
    claims = figures.read_claims(study.CLAIMS, "INFNet_v2_kuairand_pure_window", known)
    assert figures.papers_best(claims, "num_task_hubs") == {"4": "INFNet, arXiv 2508.11565v2"}
    assert figures.papers_changes(claims) == {}


def test_result_files_name_no_path_of_a_machine():
    files = [*BENCHMARKS.glob("*/*.json"), *BENCHMARKS.glob("*/*/results/*.json")]
    files = [path for path in files if path.parent != BENCHMARKS / "results"]  # what was run from here
    assert files
    for path in files:
        config = json.loads(path.read_text())["config"]
        assert not any(str(config[key]).startswith("/") for key in ("data_root", "train_data", "test_data")), path

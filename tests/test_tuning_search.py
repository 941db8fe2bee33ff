"""Searches that run: on a stand-in for training that takes a moment, killed at any time, and once for real."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from filelock import FileLock
from flowctr import cli, config
from flowctr.experiment import RunningError
from flowctr.tuning import TuningError, engines, search, tune
from flowctr.tuning.engines import Command, LocalEngine, make_engine
from rich.console import Console
from typer.testing import CliRunner

# Takes the place of run_expid.py: three evaluations, whose AUC follows from the settings, and a result.
STAND_IN = """
import argparse, fcntl, json, os, sys, time
from datetime import datetime
from pathlib import Path
import yaml

parser = argparse.ArgumentParser()
for option in ("config", "expid", "gpu", "seed"):
    parser.add_argument(f"--{option}")
args = parser.parse_args()
params = yaml.safe_load(Path(args.config, "model_config.yaml").read_text())[args.expid]
plan = json.loads(Path("plan.json").read_text())
seed = int(args.seed or params["seed"])
name, started = f"{args.expid}-s{seed}", datetime.now().astimezone()
checkpoints = Path("checkpoints", params["dataset_id"])
checkpoints.mkdir(parents=True, exist_ok=True)
Path("results").mkdir(exist_ok=True)

def note(event):
    with open("events.jsonl", "a") as file:
        told = {"event": event, "name": name, "pid": os.getpid(), "resume": os.environ["FLOWCTR_RESUME"]}
        file.write(json.dumps({**told, "threads": os.environ.get("OMP_NUM_THREADS"), "gpu": args.gpu}) + "\\n")

lock = open(checkpoints / f".{name}.lock", "w")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    note("twice at once")
note("begin")
failures = sum(json.loads(line)["event"] == f"fail {name}" for line in open("events.jsonl"))
if any(part in name and failures < times for part, times in plan["failures"].items()):
    note(f"fail {name}")
    sys.exit("this trial was planned to fail")
auc = 0.5 + 10 * params["learning_rate"] + params["embedding_dim"] / 100 + seed / 10000
curve = []
for step in (1, 2, 3):
    time.sleep(plan["seconds"] / 3)
    curve.append({"step": step, "epoch": step, "AUC": auc - 0.01 * (3 - step), "logloss": 0.5})
    unfinished = Path(os.environ["FLOWCTR_EVALUATIONS"] + ".tmp")
    unfinished.write_text(json.dumps(curve))
    unfinished.rename(os.environ["FLOWCTR_EVALUATIONS"])
for suffix in (".model", "-search.model", ".resume", ".log"):
    (checkpoints / f"{name}{suffix}").write_text("x")
metrics = {"valid": {"AUC": auc, "logloss": 0.5}, "test": {"AUC": auc - 0.02, "logloss": 0.5}}
result = {
    "format": 1, "expid": args.expid, "model": "DOT", "dataset_id": params["dataset_id"], "seed": seed,
    "started": started.isoformat(timespec="seconds"), "command": "python run_expid.py", "labels": ["click"],
    "metrics": metrics, "curves": {"train": [], "valid": curve}, "config": {}, "parameters": {},
    "data": {"manifest": f"{params.get('min_categr_count')} {Path('data/train.csv').exists()}"},
}
path = Path("results", f"{name}-{started:%Y%m%d-%H%M%S-%f}.json")
Path(f"{path}.tmp").write_text(json.dumps(result))
Path(f"{path}.tmp").rename(path)
note("end")
"""
EXPERIMENT = """
DOT_small:
    model: DOT
    metrics: [AUC, logloss]
    optimizer: adam
    loss: binary_crossentropy
    batch_size: 64
    epochs: 1
    seed: 7
    model_root: ./checkpoints/
    dataset_id: tiny
"""
DATASET = """
tiny:
    data_root: data
    data_format: csv
    train_data: data/train.csv
    valid_data: data/valid.csv
    feature_cols: [{name: [item, cate], active: true, dtype: str, type: categorical}]
    label_col: {name: click, dtype: float}
"""
SPACE = {"learning_rate": [1e-3, 1e-2], "embedding_dim": [4, 8, 16]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model's folder with the stand-in, a space of six trials, and data sets that need not be built."""
    monkeypatch.setattr(search, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(search, "build_h5", lambda params: None)
    return make_folder(tmp_path / "Model")


def make_folder(path, space=None):
    (path / "config").mkdir(parents=True)
    (path / "run_expid.py").write_text(STAND_IN)
    (path / "config" / "model_config.yaml").write_text(EXPERIMENT)
    (path / "config" / "dataset_config.yaml").write_text(DATASET)
    content = {"base_expid": "DOT_small", "tuner_space": space or SPACE}
    (path / "config" / "tuner.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    plan(path)
    return path


def plan(folder, seconds=0.03, **failures):
    (folder / "plan.json").write_text(json.dumps({"seconds": seconds, "failures": failures}))


def run(folder, **options):
    return tune(folder / "config" / "tuner.yaml", **{"workers": "2", **options})


def events(folder, *kinds):
    path = folder / "events.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [event for event in found if not kinds or event["event"] in kinds]


def ledger_of(folder):
    """Reads the ledger without times, and the result's name without its time."""
    lines = [json.loads(line) for line in (folder / "config" / "tuner" / "ledger.jsonl").read_text().splitlines()]
    for line in lines:
        for key in ("time", "seconds"):
            del line[key]
        if "result" in line:
            line["result"] = re.sub(r"-\d{8}-\d{6}-\d{6}", "", line["result"])
    return lines


def csv_of(folder, name="tuner.csv"):
    return [line[len(" 20300101-000000") :] for line in (folder / "config" / name).read_text().splitlines()]


def aucs(folder, name="tuner.csv"):
    return [float(re.search(r"\[val\] AUC: ([\d.]+)", line)[1]) for line in csv_of(folder, name)]


def test_a_grid_is_run_ranked_and_left_in_order(folder, capsys):
    table = run(folder)
    assert table == folder / "config" / "tuner.csv"
    assert aucs(folder) == [0.7607, 0.6807, 0.6707, 0.6407, 0.5907, 0.5507]
    ledger, configs = ledger_of(folder), yaml.safe_load((folder / "config" / "tuner" / "model_config.yaml").read_text())
    assert [line["trial"] for line in ledger] == list(configs)
    assert [line["settings"] for line in ledger] == [
        {"learning_rate": lr, "embedding_dim": dim} for lr in (1e-3, 1e-2) for dim in (4, 8, 16)
    ]
    best = ledger[-1]
    assert (best["state"], best["attempts"], best["exit_code"], best["gpu"]) == ("finished", 1, 0, -1)
    assert best["metrics"]["test"] == {"AUC": best["value"] - 0.02, "logloss": 0.5}
    assert best["evaluations"] == pytest.approx([best["value"] - 0.02, best["value"] - 0.01, best["value"]])
    weights = sorted(path.name for path in (folder / "checkpoints" / "tiny").glob("*.*") if path.suffix != ".lock")
    kept = [f"{best['trial']}-s7{suffix}" for suffix in ("-search.model", ".log", ".model", ".resume")]
    assert weights == sorted([*kept, *(f"{line['trial']}-s7.log" for line in ledger[:-1])])
    assert (folder / "config" / "tuner" / "parameters.png").read_bytes()[:4] == b"\x89PNG"
    shown = capsys.readouterr().out
    assert "[6/6]" in shown and shown.strip().splitlines()[-1].startswith("  or: flowctr report ")

    run(folder)  # there is nothing left to do
    assert len(events(folder, "begin")) == 6 and ledger_of(folder) == ledger


def test_ids_of_the_best_trials_are_shown_whole_on_a_narrow_terminal(folder):
    space = search.read_space(folder / "config" / "tuner.yaml")
    trial = space.trial(1)
    console = Console(width=60, file=io.StringIO())
    console.print(search.best_table([{"trial": trial.expid, "settings": trial.settings, "value": 0.5}], space))
    assert trial.expid in console.file.getvalue()


def in_a_child(function):
    """Runs a function in a copy of this process, with its imports done; returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        function()
    finally:
        os._exit(0)


def progress(folder):
    path = folder / "config" / "tuner" / "ledger.jsonl"
    return len(events(folder)), path.stat().st_size if path.exists() else 0


def test_a_search_killed_at_ten_moments_ends_as_if_it_had_not_been(folder, tmp_path):
    space = {"learning_rate": [1e-3, 1e-2, 3e-2], "embedding_dim": [4, 8, 16]}
    shutil.rmtree(folder)
    killed, undisturbed = make_folder(folder, space), make_folder(tmp_path / "other" / "Model", space)
    for path in (killed, undisturbed):
        plan(path, 0.25, **{"003_": 99})
    with pytest.raises(TuningError):
        run(undisturbed, seeds=2)
    generator = random.Random(3)
    pauses = [generator.uniform(0.0, 0.4) for _ in range(10)]
    for pause in pauses:
        before = progress(killed)
        child = in_a_child(lambda: run(killed, seeds=2))
        while progress(killed) == before and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.005)
        time.sleep(pause)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with pytest.raises(TuningError):
        run(killed, seeds=2)
    assert ledger_of(killed) == ledger_of(undisturbed)
    assert csv_of(killed) == csv_of(undisturbed)
    assert csv_of(killed, "tuner_seeds.csv") == csv_of(undisturbed, "tuner_seeds.csv")
    ended = [event["name"] for event in events(killed, "end")]
    assert sorted(ended) == sorted(event["name"] for event in events(undisturbed, "end"))  # none is run twice
    assert events(killed, "twice at once") == []


def test_trials_do_not_outlive_a_search_that_is_killed(folder):
    plan(folder, 30)
    child = in_a_child(lambda: run(folder))
    while len(events(folder, "begin")) < 2:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pids = [event["pid"] for event in events(folder, "begin")]
    deadline = time.time() + 20
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.time() < deadline
        time.sleep(0.05)


def test_only_what_is_missing_is_run(folder):
    """A trial whose end was not recorded, one that was killed, one without a result and one that was never begun."""
    run(folder)
    path = folder / "config" / "tuner" / "ledger.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    whole, names = ledger_of(folder), [line["trial"] for line in lines]
    started = ("trial", "seed", "settings", "attempts", "gpu", "time")
    for line in lines[:2]:
        line |= {"state": "started"}
        for key in set(line) - {*started, "state"}:
            del line[key]
    for name in (names[1], names[2]):
        next((folder / "results").glob(f"{name}-*")).unlink()
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines[:5]))
    (folder / "events.jsonl").unlink()
    run(folder)
    assert {event["name"]: event["resume"] for event in events(folder, "begin")} == {
        f"{names[1]}-s7": "1",  # goes on from its checkpoint
        f"{names[2]}-s7": "0",
        f"{names[5]}-s7": "0",
    }
    assert ledger_of(folder) == whole


def test_a_run_that_outlived_its_search_is_waited_for(folder, caplog):
    """Where the system does not kill it: its lock is held until it ends."""
    run(folder, tag="_001_")
    path = folder / "config" / "tuner" / "ledger.jsonl"
    line = json.loads(path.read_text())
    started = {key: line[key] for key in ("trial", "seed", "settings", "attempts", "gpu", "time")}
    path.write_text(json.dumps({**started, "state": "started"}) + "\n")
    result = next((folder / "results").glob("*.json"))
    result.rename(folder / "later.json")
    name = folder / "checkpoints" / "tiny" / f".{line['trial']}-s7.lock"
    orphan = in_a_child(lambda: _hold(name, folder, result))
    while not (folder / "held").exists():
        time.sleep(0.01)
    run(folder, tag="_001_")
    os.waitpid(orphan, 0)
    assert len(events(folder, "begin")) == 1 and ledger_of(folder)[0]["state"] == "finished"
    assert f"{line['trial']}-s7 of a search that was killed still runs" in caplog.text


def _hold(lock, folder, result):
    with FileLock(lock):
        (folder / "held").touch()
        time.sleep(2)
        (folder / "later.json").rename(result)


def test_failures_are_tried_again_alone_told_and_fail_the_search(folder):
    plan(folder, 0.1, **{"002_": 1, "004_": 5})
    with pytest.raises(TuningError) as caught:
        run(folder, workers="3")
    message = str(caught.value)
    name = ledger_of(folder)[3]["trial"]
    assert f"{name}, seed 7, exit code 1:" in message and "this trial was planned to fail" in message
    assert "1 of 6 runs failed, 2 times each" in message and "the same command tries them again" in message
    assert [(line["state"], line["attempts"]) for line in ledger_of(folder)] == [
        ("finished", 1), ("finished", 2), ("finished", 1), ("failed", 2), ("finished", 1), ("finished", 1),
    ]  # fmt: skip
    assert len(csv_of(folder)) == 5
    # The retry of 002 began when everything else had ended.
    order = [event["event"] for event in events(folder) if "002_" in event["name"] or event["event"] == "end"]
    assert order[-2:] == ["begin", "end"] and order.count("end") == 5
    logs = sorted(path.name for path in (folder / "config" / "tuner" / "logs").iterdir())
    assert [log for log in logs if name in log] == [f"{name}-s7-1.log", f"{name}-s7-2.log"]

    plan(folder)
    (folder / "events.jsonl").unlink()
    run(folder)
    assert [event["name"] for event in events(folder, "begin")] == [f"{name}-s7"]
    assert len(csv_of(folder)) == 6


def test_a_trial_without_a_result_has_failed(folder):
    (folder / "run_expid.py").write_text("print('nothing to see')")
    with pytest.raises(TuningError, match=r"(?s)exit code 0:\nno result of it is in .*6 of 6 runs failed"):
        run(folder)
    assert csv_of(folder) == []


def test_seeds_repeat_the_best_trial(folder):
    run(folder, seeds=3)
    assert aucs(folder, "tuner_seeds.csv") == [0.7607, 0.7608, 0.7609]
    assert len(aucs(folder)) == 6  # the table has each trial once
    runs = [(line["trial"], line["seed"]) for line in ledger_of(folder)]
    assert len(runs) == 8 and [seed for trial, seed in runs if trial == runs[-1][0]] == [7, 8, 9]
    kept = {path.name[-9:] for path in (folder / "checkpoints" / "tiny").glob("*.model") if "search" not in path.name}
    assert kept == {f"-s{seed}.model"[-9:] for seed in (7, 8, 9)}
    run(folder, seeds=4)
    assert len(events(folder, "begin")) == 9


def test_a_tag_and_a_draw_run_some_trials(folder):
    run(folder, tag="_002_")
    assert [event["name"][:13] for event in events(folder, "begin")] == ["DOT_small_002"]
    run(folder, search="random", trials=3)
    drawn = {event["name"] for event in events(folder, "begin")}
    assert len(drawn) in (3, 4)
    run(folder, search="random", trials=5)
    assert drawn < {event["name"] for event in events(folder, "begin")}
    assert len(events(folder, "begin")) == len(csv_of(folder))


def test_optuna_chooses_and_stops_trials(folder):
    shutil.rmtree(folder)
    make_folder(folder, {"embedding_dim": list(range(1, 21)), "learning_rate": [1e-3]})
    plan(folder, 1.5)  # half a second between evaluations, in which a trial is stopped on a busy machine too
    run(folder, search="optuna", trials=12)
    ledger = ledger_of(folder)
    states = [line["state"] for line in ledger]
    assert len(ledger) == 12 and set(states) == {"finished", "pruned"}
    pruned = [line for line in ledger if line["state"] == "pruned"]
    finished = [line["value"] for line in ledger if line["state"] == "finished"]
    assert all(len(line["evaluations"]) == 2 and line["exit_code"] is None for line in pruned)
    assert max(line["value"] for line in pruned) < sorted(finished)[len(finished) // 2]
    assert len(events(folder, "end")) == len(csv_of(folder)) == states.count("finished")
    configured = yaml.safe_load((folder / "config" / "tuner" / "model_config.yaml").read_text())
    assert list(configured) == [line["trial"] for line in ledger]
    run(folder, search="optuna", trials=12)
    assert ledger_of(folder) == ledger


def test_as_many_trials_run_at_once_as_there_are_workers(folder, monkeypatch):
    shutil.rmtree(folder)
    make_folder(folder, {"embedding_dim": list(range(1, 13)), "learning_rate": [1e-3]})
    plan(folder, 0.3)
    start, running = LocalEngine.start, []

    def counted(engine, command, gpu):
        process = start(engine, command, gpu)
        running.append(len(engine._running))
        return process

    monkeypatch.setattr(LocalEngine, "start", counted)
    run(folder, workers="4")
    assert running[:4] == [1, 2, 3, 4] and max(running) == 4 and len(running) == len(csv_of(folder)) == 12


def test_data_sets_are_built_once_and_before_any_trial(folder, monkeypatch):
    shutil.rmtree(folder)
    make_folder(folder, {**SPACE, "min_categr_count": [1, 12, 21]})
    built = []
    monkeypatch.setattr(search, "build_h5", lambda params: built.append((dict(params), len(events(folder)))))
    run(folder, workers="4")
    assert [(params["min_categr_count"], begun) for params, begun in built] == [(1, 0), (12, 0), (21, 0)]
    assert len({params["dataset_id"] for params, _ in built}) == 3
    assert built[0][0]["train_data"] == str(folder / "data" / "train.csv")


def test_two_searches_on_one_ledger_are_refused(folder):
    (folder / "config" / "tuner").mkdir()
    with FileLock(folder / "config" / "tuner" / ".ledger.lock"):
        with pytest.raises(RunningError, match=r"another search is running in .*tuner; wait for its end"):
            run(folder)
    assert events(folder) == []


@pytest.mark.parametrize(
    ("old", "new", "differing"),
    [
        ('"logloss": 0.5', '"logloss": 0.4', "metrics"),
        ('"value": 0.', '"value": 0.9', "value"),
        ('"evaluations": [', '"evaluations": [0.9, ', "evaluations"),
    ],
)
def test_numbers_edited_in_the_ledger_are_refused(folder, old, new, differing):
    run(folder)
    path = folder / "config" / "tuner" / "ledger.jsonl"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"ledger\.jsonl.*seed 7, is not as in its result \S+: {differing}; put the"):
        run(folder)


def test_results_of_different_data_are_not_ranked(folder):
    run(folder, tag="_001_")
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "train.csv").write_text("other rows")
    with pytest.raises(ValueError, match=r"data set tiny was built .*\n  - DOT_small_001_\w+\n  - DOT_small_002_"):
        run(folder)
    ledger = folder / "config" / "tuner" / "ledger.jsonl"
    ledger.write_text("".join(line for line in ledger.open() if "_001_" not in line))
    run(folder)
    assert len(csv_of(folder)) == 6 and len(events(folder, "begin")) == 7


def test_weights_of_a_trial_that_another_search_has_too_stay(folder):
    content = {"base_expid": "DOT_small", "tuner_space": {"learning_rate": [1e-3], "embedding_dim": [4, 8]}}
    (folder / "config" / "fewer.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    tune(folder / "config" / "fewer.yaml", workers="2")
    run(folder)
    kept = {path.name[10:13] for path in (folder / "checkpoints" / "tiny").glob("*.model") if "search" not in path.name}
    assert kept == {"001", "002", "006"}  # the best of each, and what both have


def test_a_changed_experiment_is_refused(folder):
    run(folder, tag="_001_")
    path = folder / "config" / "model_config.yaml"
    path.write_text(path.read_text().replace("batch_size: 64", "batch_size: 128"))
    with pytest.raises(config.ConfigError, match=r"batch_size was 64 and is 128 \(trial 1\)"):
        run(folder)
    assert len(events(folder, "begin")) == 1


# engines


def a_command(folder, alone=False):
    return Command([sys.executable, "-c", "import time; time.sleep(60)"], folder, {}, folder / "log", alone)


def test_a_gpu_takes_as_many_trials_as_its_memory_allows(tmp_path, monkeypatch):
    free = {0: 80 * 2**30}
    monkeypatch.setattr(engines, "_free_memory", free.get)
    monkeypatch.setattr(engines, "cores", lambda: 16)
    engine = LocalEngine([0], None)
    first = engine.start(a_command(tmp_path), engine.place())
    assert engine.place() is None  # how much it needs is not known yet
    free[0] -= 20 * 2**30
    assert engine.place() is None
    first.evaluated = True
    others = []
    while (gpu := engine.place()) is not None:
        others.append(engine.start(a_command(tmp_path), gpu))
    assert len(others) == 2  # 3 x 20 GiB and a spare tenth have room in 80 GiB, 4 have not
    free[0] = 8 * 2**30
    for process in others:
        process.evaluated = True
    engine.stop(others.pop())
    assert engine.place() is None  # two have taken 72 GiB
    engine.close()
    assert engine.place(alone=True) == 0
    engine.start(a_command(tmp_path, alone=True), 0)
    assert engine.place() is None
    engine.close()


def test_workers_share_the_cores_and_the_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "_free_memory", lambda gpu: 80 * 2**30)
    monkeypatch.setattr(engines, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    engine, placed = LocalEngine([0, 1], 2), []
    while (gpu := engine.place()) is not None:
        placed.append(gpu)
        engine.start(a_command(tmp_path), gpu)
    assert placed == [0, 1, 0, 1]
    engine.close()
    engine, count = make_engine("local", [-1], "auto"), 0
    while engine.place() is not None:
        process, count = engine.start(a_command(tmp_path), -1), count + 1
    assert count == 4 and psutil.Process(process.handle.pid).environ()["OMP_NUM_THREADS"] == "2"
    engine.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": [99]}, "no GPU left: --gpu 99 does not exist"),
        ({"gpus": [-2]}, "--gpu takes indices from 0, or -1 for the CPU; got -2"),
        ({"workers": "0"}, "--workers must be auto or a number above 0; got '0'"),
        ({"engine": "spark"}, "--engine must be one of local, ray; got 'spark'"),
        ({"seeds": 0}, "it is at least 1; got 0"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(folder, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(folder, **options)
    assert not (folder / "config" / "tuner").exists()


def test_a_full_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(engines, "_free_memory", lambda gpu: 2**29)
    with pytest.raises(ValueError, match=r"no GPU left: GPU 0 has 0\.5 GiB of free memory"):
        make_engine("local", [0], "auto")


def test_ray_runs_the_same_search(folder, tmp_path):
    plan(folder, 0.1, **{"003_": 1})
    run(folder, engine="ray", workers="2")
    other = make_folder(tmp_path / "other" / "Model")
    plan(other, 0.1, **{"003_": 1})
    run(other)
    assert ledger_of(folder) == ledger_of(other) and csv_of(folder) == csv_of(other)


# the command line


def test_several_gpus_follow_one_option(folder, monkeypatch):
    given = []
    monkeypatch.setattr("flowctr.tuning.tune", lambda *arguments: given.append(arguments))
    for arguments in (["x.yaml", "--gpu", "0", "1", "--seeds", "3"], ["--gpu", "-1", "x.yaml"], ["x.yaml"]):
        result = CliRunner().invoke(cli.app, ["tune", *arguments])
        assert result.exit_code == 0, result.output
    assert [arguments[1] for arguments in given] == [[0, 1], [-1], [-1]]
    assert [arguments[5] for arguments in given] == [3, 1, 1] and {arguments[0] for arguments in given} == {
        Path("x.yaml")
    }


def test_exit_codes(folder):
    path = str(folder / "config" / "tuner.yaml")
    assert CliRunner().invoke(cli.app, ["tune", str(folder / "no.yaml")]).exit_code == cli.WRONG_INPUT
    assert CliRunner().invoke(cli.app, ["tune", path, "--search", "random"]).exit_code == cli.WRONG_INPUT
    plan(folder, **{"_": 9})
    assert CliRunner().invoke(cli.app, ["tune", path]).exit_code == cli.FAILED_RUN
    plan(folder)
    result = CliRunner().invoke(cli.app, ["tune", path])
    assert result.exit_code == 0 and "[6/6]" in result.output


def test_every_model_has_a_tuner_and_an_example():
    folders = [path.parent for path in sorted(config.REPOSITORY.glob("model_zoo/*/run_expid.py"))]
    assert folders
    for folder in folders:
        expected = (folders[0] / "run_param_tuner.py").read_text().replace(folders[0].name, folder.name)
        assert (folder / "run_param_tuner.py").read_text() == expected
        (example,) = folder.glob("config/*_tuner_config_01.yaml")
        space = search.read_space(example)
        space.check()
        assert space.model_dir == folder and 2 <= len(space) <= 4


def test_a_real_search_resumes_a_trial_that_was_killed(tmp_path):
    """DOT on the data that come along: the search is killed in its first trial, after an evaluation."""
    folder = tmp_path / "DOT"
    shutil.copytree(
        config.REPOSITORY / "model_zoo" / "DOT", folder, ignore=shutil.ignore_patterns("checkpoints", "results")
    )
    (folder / "config" / "search.yaml").write_text(
        "base_expid: DOT_test\ntuner_space: {learning_rate: [1.0e-3, 3.0e-3], epochs: 1, eval_steps: 5}\n"
    )
    command = [sys.executable, "run_param_tuner.py", "--config", "config/search.yaml", "--gpu", "-1", "--workers", "1"]
    killed = subprocess.Popen(command, cwd=folder)
    while not list(folder.glob("checkpoints/*/*.resume")):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    (watched,) = folder.glob("config/search/logs/.*.evaluations.json")
    evaluations = json.loads(watched.read_text())
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "config" / "search" / "ledger.jsonl").read_text().splitlines()]
    assert [line["state"] for line in lines] == ["finished", "finished"]
    log = (folder / "config" / "search" / "logs" / f"{lines[0]['trial']}-s2025-1.log").read_text()
    assert "Resume after step" in log
    first = json.loads((folder / "config" / "search" / lines[0]["result"]).read_text())
    assert evaluations and evaluations == first["curves"]["valid"][: len(evaluations)]
    weights = list(folder.glob("checkpoints/*/*.model"))
    best = max(lines, key=lambda line: line["value"])["trial"]
    assert [path.name for path in weights] == [f"{best}-s2025.model"]
    for line in lines:
        result = json.loads((folder / "config" / "search" / line["result"]).read_text())
        assert result["metrics"] == line["metrics"]
        assert result["config"]["learning_rate"] == line["settings"]["learning_rate"]
        assert f"--config config/search --expid {line['trial']} --gpu -1" in result["command"]
    assert re.findall(r"\[exp_id\] (\w+)", (folder / "config" / "search.csv").read_text())[0] == best

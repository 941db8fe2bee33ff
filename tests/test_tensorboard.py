"""TensorBoard's event files say what the learning curves say, after an interruption too."""

import logging
import sys

import numpy as np
import pytest
from flowctr.tensorboard import CurveEvents
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import fit
from test_training import SingleTask, TwoTasks, build

SETTINGS = {"tensorboard": True, "checkpoint_steps": 4, "eval_steps": 5, "early_stop_patience": 9}


def read_curves(folder):
    """Reads the events as TensorBoard does, ``{curve/name: [(step, value), ...]}``."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def curves_of(history):
    curves = {}
    for curve, points in history.items():
        for point in points:
            for name in set(point) - {"step", "epoch"}:
                curves.setdefault(f"{curve}/{name}", []).append((point["step"], float(np.float32(point[name]))))
    return curves


@pytest.mark.parametrize("model_class", [SingleTask, TwoTasks])
def test_events_are_the_learning_curves(tmp_path, model_class):
    model = fit(tmp_path, model_class, SETTINGS)
    curves = read_curves(tmp_path / "toy" / "runTrue.tensorboard")
    assert curves == curves_of(model.history) and len(curves["valid/AUC"]) == 5 and len(curves["train/loss"]) > 20


def test_events_of_an_interrupted_run_go_on_without_repeated_steps(tmp_path):
    folder = tmp_path / "toy" / "runTrue.tensorboard"
    for stop_at in (8, 15):  # it goes on after steps 5 and 12, from before the last events
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path, SingleTask, SETTINGS, stop_at=stop_at)
        assert [step for step, _ in read_curves(folder)["train/loss"]] == [*range(1, stop_at)], "none is lost"
    model = fit(tmp_path, SingleTask, SETTINGS)
    assert len(list(folder.iterdir())) == 3
    assert read_curves(folder) == curves_of(model.history)


def test_a_run_that_starts_anew_leaves_no_events_of_the_one_before(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, SingleTask, {**SETTINGS, "learning_rate": 0.5}, stop_at=16)
    model = fit(tmp_path, SingleTask, SETTINGS, resumed=False)
    folder = tmp_path / "toy" / "runTrue.tensorboard"
    assert len(list(folder.iterdir())) == 1
    assert read_curves(folder) == curves_of(model.history)


def test_without_the_key_there_are_none(tmp_path):
    fit(tmp_path, SingleTask, {})
    assert not list(tmp_path.rglob("*tensorboard*"))


def test_a_missing_package_is_said_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ValueError, match=r"needs the package tensorboard; pip install 'flowctr\[tensorboard\]'"):
        build(SingleTask, tmp_path, tensorboard=True)
    build(SingleTask, tmp_path)


def test_a_point_is_there_at_once(tmp_path):
    events = CurveEvents(tmp_path)
    for step in range(1, 4):
        events.add("train", {"step": step, "epoch": 1, "loss": 1 / step})
        assert len(read_curves(tmp_path)["train/loss"]) == step
    events.close()


def test_a_full_disk_costs_the_events_and_not_the_run(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError("No space left on device")

    events = CurveEvents(tmp_path)
    monkeypatch.setattr(events._writer, "flush", full)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            events.add("train", {"step": step, "epoch": 1, "loss": 0.5})
        events.close()
    assert caplog.text.count("No space left on device") == 1

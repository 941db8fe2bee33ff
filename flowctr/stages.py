"""Training in stages: the record of a finished stage, by which a run that was interrupted goes on with the next one.

A model class may define ``stages(params) -> {stage: parameters}``, in their order. Each stage is a training by itself,
with a checkpoint of its own; the last one is validated and gives the result. ``stage: <name>`` of a configuration runs
one of them, ``stage: both`` all that are not done yet.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowctr import resume

ALL = "both"
# What a stage without validation does not depend on.
NO_EFFECT = {
    *resume.NO_EFFECT,
    *("model_id", "stage", "metrics", "group_id"),
    *("monitor", "monitor_mode", "early_stop_patience", "eval_steps", "save_best_only", "reduce_lr_on_plateau"),
    "lr_decay_factor",
}


def select(stages: Mapping[str, dict[str, Any]], wanted: str, data: str | None) -> dict[str, dict[str, Any]]:
    """Picks the stages to train now.

    Args:
        stages: Stage -> its parameters, in order.
        wanted: The one stage to train, or ``both``: all but those that are done.
        data: Digest of the data.

    Returns:
        The part of ``stages`` to train.

    Raises:
        ValueError: If the wanted stage does not exist, or one before it is absent or was made with other settings.
    """
    *earlier, _ = stages
    if wanted == ALL:
        done = 0
        for name in earlier:
            found = differences(stages[name], data)
            if found:
                logging.info("Stage %s was made with other settings and is made again: %s", name, "; ".join(found))
            if found != []:
                break
            logging.info("Stage %s is done already, with these settings", name)
            done += 1
        return dict(list(stages.items())[done:])
    if wanted not in stages:
        raise ValueError(f"stage {wanted!r} does not exist here; this experiment has {', '.join(stages)}")
    for name in earlier[: list(stages).index(wanted)]:
        found = differences(stages[name], data)
        if found is None:
            raise ValueError(
                f"stage {wanted} starts from stage {name}, which is absent: there is no {_record(stages[name])}; "
                f"run it first with --set stage={name}, or all with --set stage={ALL}"
            )
        if found:
            raise ValueError(
                f"stage {wanted} starts from stage {name}, which was made with other settings: {'; '.join(found)}; "
                f"run it again with --set stage={name}, or take its settings"
            )
    return {wanted: stages[wanted]}


def differences(stage: Mapping[str, Any], data: str | None) -> list[str] | None:
    """Compares a stage's parameters with those of its record; None when it was not finished."""
    path = _record(stage)
    if not path.is_file() or not _checkpoint(stage).is_file():
        return None
    return resume.differences(json.loads(path.read_text())["settings"], _settings(stage, data))


def read(stage: Mapping[str, Any]) -> dict[str, Any]:
    """Reads what `finish` kept of a finished stage."""
    content = json.loads(_record(stage).read_text())
    del content["settings"]
    return content


def finish(stage: Mapping[str, Any], data: str | None, content: Mapping[str, Any]) -> None:
    """Records that a stage is done, beside its checkpoint.

    Args:
        stage: Its parameters.
        data: Digest of the data.
        content: What else to keep of it, such as its learning curve.
    """
    path = _record(stage)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps({"settings": _settings(stage, data), **content}, indent=1))
    os.replace(unfinished, path)


def forget(stage: Mapping[str, Any]) -> None:
    """Removes the record of a stage that is about to be trained again: its checkpoint will be another."""
    _record(stage).unlink(missing_ok=True)


def _settings(stage: Mapping[str, Any], data: str | None) -> dict[str, Any]:
    settings = {key: value for key, value in stage.items() if key not in NO_EFFECT}
    return json.loads(json.dumps({**settings, "data": data}))  # as a file gives them back


def _checkpoint(stage: Mapping[str, Any]) -> Path:
    return Path(stage["model_root"]) / stage["dataset_id"] / f"{stage['model_id']}.model"


def _record(stage: Mapping[str, Any]) -> Path:
    return _checkpoint(stage).with_suffix(".json")

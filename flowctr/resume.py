"""Continuing a run that was interrupted: a file beside the weights with all that the rest of the training depends on.

The file is written while a run trains and removed when the run is done. What is in it is up to
`flowctr.training.Engine`; here is how it is kept: whole or absent, and only for the configuration it was made with.
"""

import json
import logging
import os
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flowctr import weights

FORMAT = 3
# What the training does not depend on, or depends on by its data's digest or by what is in the state.
NO_EFFECT = {
    *("gpu", "verbose", "model_root", "resume", "checkpoint_steps", "num_workers", "pin_memory", "data_on_device"),
    *("streaming", "tensorboard", "data_root", "train_data", "valid_data", "test_data", "searched"),
}
START_ANEW = "start anew, without --resume and resume: auto"


class ResumeFile:
    """The file ``<model_id>.resume`` of one training.

    Args:
        params: Parameters of the training: they say where the file is, and are compared with those in it.
        data: Digest of the data.
        started: When this start of the run began, by ``time.perf_counter``.

    Attributes:
        state: What `load` found, for the training to go on from; None to start anew.
        earlier_seconds: What the run's earlier starts took, each until it last saved.
    """

    def __init__(self, params: Mapping[str, Any], data: str, started: float):
        self.started, self.earlier_seconds = started, 0.0
        self.path = Path(params["model_root"]) / params["dataset_id"] / f"{params['model_id']}.resume"
        self.state: dict[str, Any] | None = None
        settings = {key: value for key, value in params.items() if key not in NO_EFFECT}
        self._settings = json.loads(json.dumps({**settings, "data": data}, default=str))  # plain values, lists
        self._told_unwritable = False

    @property
    def _unfinished(self) -> Path:
        return self.path.with_name(f"{self.path.name}.tmp")  # one name: a run that is killed leaves one file at most

    @property
    def wall_seconds(self) -> float:
        """Seconds of the run until now, over all its starts."""
        return self.earlier_seconds + time.perf_counter() - self.started

    def load(self) -> None:
        """Reads the state, if there is a file.

        Raises:
            ValueError: If the file is damaged, or was made with another configuration or other data.
        """
        if not self.path.exists():
            logging.info("There is no %s to resume: the training starts anew", self.path)
            return
        content = self._read()
        changes = differences(content["settings"], self._settings)
        if changes:
            raise ValueError(
                f"{self.path} was made with other settings: {'; '.join(changes)}; take its settings, or {START_ANEW}"
            )
        self.state, self.earlier_seconds = content["state"], content["wall_seconds"]

    def _read(self) -> dict[str, Any]:
        try:
            content = weights.read(self.path)
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged ({error}); {START_ANEW}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{self.path} is no resume checkpoint of format {FORMAT}; {START_ANEW}")
        return content

    def save(self, state: Mapping[str, Any]) -> None:
        """Replaces the file; when it cannot be written the old one stays, with one warning: the training goes on.

        Args:
            state: Tensors, numbers, texts, and lists and dicts of them.
        """
        content = {
            "format": FORMAT,
            "settings": self._settings,
            "wall_seconds": self.wall_seconds,
            "state": dict(state),
        }
        try:
            with open(self._unfinished, "wb") as file:
                torch.save(content, file)
            os.replace(self._unfinished, self.path)
        except (OSError, RuntimeError) as error:  # torch makes the latter of a write that fails midway
            self._unfinished.unlink(missing_ok=True)
            if not self._told_unwritable:
                logging.warning("%s cannot be written: %s; --resume would go on from an older state", self.path, error)
            self._told_unwritable = True

    def discard(self) -> None:
        """Removes the file of an earlier run, before its weights are replaced, and says so."""
        if self.path.exists():
            logging.warning("%s of an interrupted run is removed; --resume would have continued it", self.path)
        self.remove()

    def remove(self) -> None:
        """Removes the file of a training that is done."""
        self.path.unlink(missing_ok=True)
        self._unfinished.unlink(missing_ok=True)


def is_interrupted(params: Mapping[str, Any]) -> bool:
    """Says whether a run was interrupted: it has left a resume file, maybe that of one of its stages."""
    model_id = params["model_id"]
    files = (Path(params["model_root"]) / params["dataset_id"]).glob("*.resume")
    return any(file.stem == model_id or file.stem.startswith(f"{model_id}-") for file in files)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Says of every setting that has changed what it was and is."""
    return [
        f"{key} was {old.get(key, 'not set')} and is {new.get(key, 'not set')}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]


def random_state(device: torch.device) -> dict[str, Any]:
    """Gathers the state of all random number generators that a training may use."""
    version, numbers, gauss = random.getstate()
    name, keys, *counts = np.random.get_state()
    states = {
        "python": [version, torch.tensor(numbers), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *counts],
        "cpu": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Any], device: torch.device) -> None:
    """Puts back what `random_state` gathered; a run that has changed from the CPU to a GPU keeps the GPU's."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    name, keys, *counts = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *counts))
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)

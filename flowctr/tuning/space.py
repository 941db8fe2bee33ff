"""A tuner YAML -> the trials of a search and their configurations.

The YAML is FuxiCTR's: ``base_config``, ``base_expid`` and ``tuner_space``, in which a list holds the values to try and
anything else is the only value; ``dataset_id`` for another data set than the experiment's; ``dataset_config`` and
``model_config`` for entries of the two files of that name, as if these were beside the YAML. The trials are numbered
from 1 as in a grid, in which the last key changes first, however they are chosen.
"""

import contextlib
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from flowctr import config
from flowctr.names import nearest
from flowctr.resume import differences
from flowctr.tuning.ids import canonical, canonical_id
from fuxictr.utils import Monitor

REQUIRED_KEYS = ("base_expid", "tuner_space")
KEYS = ("base_config", *REQUIRED_KEYS, "dataset_id", "dataset_config", "model_config")
TEXTS = ("base_config", "base_expid", "dataset_id")
# What trials must have in common to be compared.
SHARED_KEYS = (
    *("monitor", "monitor_mode", "model", "label", "label_col", "group_id", "scenario"),
    *("valid_data", "test_data"),
)
# Of a data set's keys those that an experiment may have as well: they change nothing of its files.
OF_EITHER = {"dataset_id", "group_id", "scenario", "use_features", "feature_specs", "label"}


@dataclass(frozen=True)
class Trial:
    """One point of a space.

    Attributes:
        number: Its number in the grid, from 1.
        expid: Its experiment id, ``<base>_<number>_<8 digits of the hash of its configuration>``.
        settings: Tuned key -> value.
        model: Its entry of model_config.yaml.
        dataset: Its entry of dataset_config.yaml, with the paths relative to the folder of the YAML.
    """

    number: int
    expid: str
    settings: Mapping[str, Any]
    model: Mapping[str, Any]
    dataset: Mapping[str, Any]

    @property
    def seed(self) -> int:
        """The seed of its configuration."""
        return self.model["seed"]


@dataclass
class Space:
    """A search space.

    Attributes:
        path: The YAML.
        prefix: What the trials' ids begin with.
        values: Tuned key -> its values.
        model: The base experiment.
        dataset: The base data set, with the paths relative to the folder of the YAML.
        model_dir: The model's folder, in which trials run; none: an installed model without a folder.
    """

    path: Path
    prefix: str
    values: Mapping[str, list]
    model: Mapping[str, Any]
    dataset: Mapping[str, Any]
    model_dir: Path | None

    def __len__(self) -> int:
        return math.prod(map(len, self.values.values()))

    @property
    def folder(self) -> Path:
        """The search's folder, a config folder with all its trials."""
        return self.path.with_suffix("")

    @property
    def varied(self) -> dict[str, list]:
        """The keys with more than one value."""
        return {key: values for key, values in self.values.items() if len(values) > 1}

    @cached_property
    def monitor(self) -> Monitor:
        """What trials are ranked by."""
        return Monitor(self.trial(1).model.get("monitor", "AUC"))

    @cached_property
    def sign(self) -> int:
        """1 if that value is to be large, -1 if it is to be small."""
        return -1 if self.trial(1).model.get("monitor_mode") == "min" else 1

    def value(self, metrics: Mapping[str, float | None]) -> float:
        """Makes the monitored value from the metrics of an evaluation; nan if one of them is undefined."""
        return self.monitor.get_value({name: math.nan if v is None else v for name, v in metrics.items()})

    def trial(self, number: int) -> Trial:
        """Makes the trial with a number."""
        rest, chosen = number - 1, {}
        for key, values in reversed(self.values.items()):
            rest, position = divmod(rest, len(values))
            chosen[key] = values[position]
        return self._trial(number, {key: chosen[key] for key in self.values})

    def number(self, positions: Mapping[str, int]) -> int:
        """Numbers the trial that has the value at a position of each varied key."""
        number = 0
        for key, values in self.values.items():
            number = number * len(values) + positions.get(key, 0)
        return number + 1

    def find(self, expid: str) -> Trial | None:
        """Finds a trial by its id."""
        match = re.fullmatch(rf"{re.escape(self.prefix)}_(\d+)_[0-9a-f]{{8}}", expid)
        if not match or not 1 <= int(match[1]) <= len(self):
            return None
        trial = self.trial(int(match[1]))
        return trial if trial.expid == expid else None

    def _trial(self, number: int, settings: Mapping[str, Any]) -> Trial:
        keys = {*self.dataset, *(config.DATASET_KEYS - OF_EITHER)}
        of_dataset = {key: value for key, value in settings.items() if key in keys}
        dataset = {**self.dataset, **of_dataset}
        if of_dataset and canonical(dataset) != canonical(self.dataset):
            dataset["dataset_id"] = f"{dataset['dataset_id']}_{canonical_id(dataset)[:8]}"
        of_model = {key: v for key, v in settings.items() if key not in of_dataset or key in self.model}
        model = {**self.model, **of_model, "dataset_id": dataset["dataset_id"]}
        return Trial(number, f"{self.prefix}_{number:03d}_{canonical_id(model)[:8]}", settings, model, dataset)

    def check(self, src: ModuleType | None = None) -> None:
        """Checks the configuration of the first trial and of every other value, before anything is run.

        Args:
            src: Module with the model class, see `flowctr.config.load`.

        Raises:
            ConfigError: With all mistakes.
        """
        first = {key: values[0] for key, values in self.values.items()}
        others = [{**first, key: value} for key, values in self.values.items() for value in values[1:]]
        mistakes: dict[str, None] = {}
        with self._config_folder() as folder:
            for trial in (self._trial(1, settings) for settings in [first, *others]):
                write_configs(folder, [trial])
                try:
                    config.load(folder, trial.expid, src=src)
                except config.ConfigError as error:
                    mistakes |= dict.fromkeys(str(error).splitlines()[1:] or [f"  - {error}"])
        if not self.trial(1).dataset.get("valid_data"):
            mistakes[f"  - data set {self.dataset['dataset_id']!r} has no valid_data, by which trials are ranked"] = (
                None
            )
        if mistakes:
            count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
            raise config.ConfigError("\n".join([f"{count} in the trials of {self.path}:", *mistakes]))

    @contextlib.contextmanager
    def _config_folder(self):
        """Gives a folder for a moment from which relative paths count as from the search's."""
        folder = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}-", dir=self.path.parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


def read_space(path: str | Path, model_dir: str | Path | None = None) -> Space:
    """Reads a tuner YAML.

    Args:
        path: The YAML. ``base_config`` counts from its folder, else from the folder above, else from the working
            directory; it is the YAML's folder by default.
        model_dir: The model's folder; by default, the one that contains ``base_config``, or the model's of model_zoo,
            whichever has a run_expid.py.

    Raises:
        FileNotFoundError: If there is no such file.
        ConfigError: With all mistakes that can be seen without the model: unknown and missing keys, an empty space,
            an unknown experiment or data set.
    """
    path = Path(path).resolve()
    if path.is_dir():
        raise config.ConfigError(f"{path} is a folder; name the tuner YAML, such as {path}.yaml")
    if not path.is_file():
        raise FileNotFoundError(f"there is no tuner YAML {path}")
    if path.suffix not in (".yaml", ".yml"):
        raise config.ConfigError(f"the name of {path} must end in .yaml; the search's folder has its name without that")
    if re.search(r"\s", path.name):
        raise config.ConfigError(
            f"{path.name!r} has a blank, which commands and links of a submission cannot have; rename it"
        )
    content = config.read_yaml(path)
    mistakes = [f"missing key {key!r}" for key in REQUIRED_KEYS if key not in content]
    mistakes += [f"unknown key {key!r}; the nearest is {nearest(key, KEYS)!r}" for key in content if key not in KEYS]
    no_texts = {key: content[key] for key in TEXTS if not isinstance(content.get(key, ""), str)}
    mistakes += [f"{key!r} must be a text; got {value!r}" for key, value in no_texts.items()]
    content = {key: value for key, value in content.items() if key not in no_texts}
    values, wrong = _values(content.get("tuner_space"))
    mistakes += wrong if "tuner_space" in content else []

    base_dir, model, dataset = path.parent, {}, {}
    expid = content.get("base_expid")
    with _collecting(mistakes):
        base_dir = _base_dir(path, content.get("base_config"))
        if "base_expid" in content:
            model = _entry(content, "model_config", expid, lambda: config.read_experiment(base_dir, expid))
        if isinstance(model.get("zoo"), str):
            model["zoo"] = os.path.relpath(base_dir / model["zoo"], path.with_suffix(""))
    if "zoo" in values:
        values["zoo"] = [os.path.relpath(path.parent / str(folder), path.with_suffix("")) for folder in values["zoo"]]
    dataset_id = content.get("dataset_id", model.get("dataset_id"))
    with _collecting(mistakes):
        if dataset_id is not None:
            dataset = _dataset(path, content, dataset_id, base_dir)
    if mistakes:
        raise config.ConfigError("\n".join([f"mistakes in {path}:", *(f"  - {mistake}" for mistake in mistakes)]))
    if dataset_id is None:
        raise config.ConfigError(f"{path}: neither it nor experiment {expid!r} has a dataset_id")
    named = model.get("dataset_id") not in (None, "TBD")  # TBD: FuxiCTR's *_default, to be named after its data
    return Space(
        path=path,
        prefix=str(expid) if named else f"{model.get('model')}_{dataset_id}",
        values=values,
        model={**model, "dataset_id": dataset_id},
        dataset=dataset,
        model_dir=Path(model_dir) if model_dir else None if "zoo" in values else _model_dir(base_dir, model),
    )


def _values(space: Any) -> tuple[dict[str, list], list[str]]:
    """Gives the values of each key and what is wrong with them."""
    if not space or not isinstance(space, dict):
        return {}, [f"'tuner_space' must map keys to lists of values, at least one; got {space!r}"]
    values = {str(key): value if isinstance(value, list) else [value] for key, value in space.items()}
    mistakes = [f"tuner_space: {key!r} has no value; list at least one" for key, value in values.items() if not value]
    mistakes += [
        f"tuner_space: {key!r} has several values; trials are compared only if they share it"
        for key in SHARED_KEYS
        if len(values.get(key, ())) > 1
    ]
    if "dataset_id" in values:
        mistakes.append("tuner_space: 'dataset_id' cannot be tuned; write it beside tuner_space")
    for key, value in values.items():
        ids = [canonical(item) for item in value]
        mistakes += [f"tuner_space: {key!r} lists {item} twice" for item in sorted(set(ids)) if ids.count(item) > 1]
    return values, mistakes


@contextlib.contextmanager
def _collecting(mistakes: list[str]):
    try:
        yield
    except config.ConfigError as error:
        mistakes.append(str(error))


def _base_dir(path: Path, base_config: str | None) -> Path:
    if base_config is None:
        return path.parent
    places = dict.fromkeys(
        Path(os.path.normpath(p / base_config)) for p in (path.parent, path.parent.parent, Path.cwd())
    )
    for place in places:
        if place.is_dir():
            return place
    raise config.ConfigError(f"'base_config': there is no folder {' or '.join(map(str, places))}")


def _entry(content: Mapping[str, Any], key: str, name: str, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Takes an entry that the YAML itself has under a key, else reads it."""
    own = content.get(key)
    if own is None:
        return read()
    if not isinstance(own, dict):
        raise config.ConfigError(f"{key!r} must map ids to settings; got {own!r}")
    if not isinstance(own.get(name), dict):
        raise config.ConfigError(f"{key!r} has no entry {name!r}; it holds {', '.join(map(str, own)) or 'nothing'}")
    return dict(own[name])


def _dataset(path: Path, content: Mapping[str, Any], dataset_id: str, base_dir: Path) -> dict[str, Any]:
    """Gives the data set with its paths relative to the YAML's folder, as a config folder in it counts them."""
    found = _entry(content, "dataset_config", dataset_id, lambda: config.read_dataset(dataset_id, base_dir))
    root = path.parent.parent  # of relative paths, as in a dataset_config.yaml beside the YAML

    def relative(value: Any) -> Any:
        return os.path.relpath(root / value, path.parent) if isinstance(value, str) else value

    dataset = {**found, "dataset_id": dataset_id}
    dataset |= {key: relative(dataset[key]) for key in config.DATASET_PATHS if key in dataset}
    if isinstance(columns := dataset.get("feature_cols"), list):
        dataset["feature_cols"] = [
            {**column, "pretrained_emb": relative(column["pretrained_emb"])}
            if isinstance(column, dict) and "pretrained_emb" in column
            else column
            for column in columns
        ]
    return dataset


def _model_dir(base_dir: Path, model: Mapping[str, Any]) -> Path | None:
    if model.get("zoo"):  # nothing is written to FuxiCTR's checkout
        return None
    places = (base_dir.parent, config.REPOSITORY / "model_zoo" / str(model.get("model")))
    return next((place for place in places if (place / "run_expid.py").is_file()), None)


# The search's folder


class _Dumper(yaml.SafeDumper):
    """Writes as FuxiCTR's tuner does: no aliases, and tuples, which `flowctr.config` reads."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:python/tuple", list(value))
)


def write_configs(folder: Path, trials: Iterable[Trial]) -> None:
    """Writes dataset_config.yaml and model_config.yaml of a search's folder, as FuxiCTR's tuner does."""
    trials = sorted(trials, key=lambda trial: trial.number)
    datasets = {}
    for trial in trials:
        datasets[trial.dataset["dataset_id"]] = {k: v for k, v in trial.dataset.items() if k != "dataset_id"}
    folder.mkdir(parents=True, exist_ok=True)
    _write_yaml(folder / "dataset_config.yaml", datasets)
    _write_yaml(folder / "model_config.yaml", {trial.expid: dict(trial.model) for trial in trials})


def _write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, yaml.dump(dict(content), Dumper=_Dumper, default_flow_style=None, indent=4).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that has the old or the new content whenever the program is killed or the power fails."""
    unfinished = path.with_name(f".{path.name}.tmp")
    with open(unfinished, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def known_trials(space: Space) -> list[Trial]:
    """Lists the trials that the search's folder has already.

    Raises:
        ConfigError: If the folder was made by another space or from other settings; names the keys.
    """
    path = space.folder / "model_config.yaml"
    if not path.is_file():
        return []
    trials = []
    remedy = f"give the changed search a file name of its own, or remove {space.folder}"
    for expid, old in config.read_yaml(path).items():
        number = re.search(r"_(\d+)_[0-9a-f]{8}$", str(expid))
        if not number or not 1 <= int(number[1]) <= len(space):
            raise config.ConfigError(f"{path} has {expid!r}, which is no trial of {space.path}; {remedy}")
        trial = space.trial(int(number[1]))
        changes = _changes(old, trial.model)
        if expid != trial.expid or changes:
            changes = changes or [f"the trial was {expid} and is {trial.expid}"]
            raise config.ConfigError(
                f"{path} was made from other settings than {space.path} has now: {'; '.join(changes)} "
                f"(trial {trial.number}); {remedy}"
            )
        trials.append(trial)
    datasets_path = space.folder / "dataset_config.yaml"
    datasets = config.read_yaml(datasets_path) if datasets_path.is_file() else {}
    for trial in trials:
        dataset_id = trial.dataset["dataset_id"]
        changes = _changes({**(datasets.get(dataset_id) or {}), "dataset_id": dataset_id}, trial.dataset)
        if changes:
            raise config.ConfigError(
                f"{datasets_path} has other settings for {dataset_id!r} than {space.path} has now: "
                f"{'; '.join(changes)}; {remedy}"
            )
    return trials


def _changes(old: Any, new: Mapping[str, Any]) -> list[str]:
    """Says what has changed; 1, 1.0 and true are not the same."""
    old = old if isinstance(old, dict) else {}
    changed = {
        key for key in {*old, *new} if key not in old or key not in new or canonical(old[key]) != canonical(new[key])
    }
    return differences({k: repr(old[k]) for k in changed & {*old}}, {k: repr(new[k]) for k in changed & {*new}})

"""Model and data set YAML -> the checked parameters of one run; all mistakes come in one message.

FuxiCTR loses a misspelt key in ``**kwargs``. Here every key is compared with the constructors and functions that read
it, and every value with what they take. Nothing of a YAML is executed.
"""

import importlib
import inspect
import os
import pkgutil
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import flowctr.models
import yaml
from flowctr import checks, zoo
from flowctr.data import H5DataLoader
from flowctr.metrics import evaluate_metrics
from flowctr.names import nearest
from flowctr.training import Engine
from fuxictr.pytorch.models import BaseModel, MultiTaskModel
from torch import nn

REPOSITORY = Path(__file__).resolve().parent.parent

REQUIRED_KEYS = ("model", "dataset_id", "metrics", "optimizer", "loss", "batch_size", "epochs", "seed")
# Raised for text that is no YAML, and for a value that does not fit its tag.
NOT_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError)
REQUIRED_DATASET_KEYS = ("data_root", "data_format", "train_data")
DEFAULTS = {"model_root": "./checkpoints/", "verbose": 1, "shuffle": True, "resume": None}
DATASET_PATHS = ("data_root", "train_data", "valid_data", "test_data")
# Read by name from the parameters: by build_h5, and the last three by FuxiCTR's FeatureMap.
DATASET_KEYS = {
    *DATASET_PATHS,
    *("dataset_id", "data_format", "sep", "feature_cols", "label_col", "min_categr_count", "data_block_size"),
    *("h5_compression", "behaviors", "group_id", "scenario", "use_features", "feature_specs", "label"),
}
ZOO_KEYS = {"zoo", "padding", "init_linear"}  # see `flowctr.zoo`
FEATURE_KEYS = {"name", "source", "fill_na", "share_embedding", *checks.COLUMN_CHECKS}
LABEL_KEYS = {"name", "active", "dtype", "fill_na", "may_be_missing", "preprocess"}
# Keys of FuxiCTR that have no effect here, accepted so that its YAML files run unchanged.
IGNORED_KEYS = frozenset({"pickle_feature_encoder", "debug_mode", "feature_config"})
# Arguments that the runner passes itself.
RUNNER_ARGUMENTS = {
    *("feature_map", "model_id", "gpu", "data_generator", "validation_data", "lr", "data_path", "split", "searched"),
}


class ConfigError(ValueError):
    """A configuration that cannot run, with everything that is wrong with it."""


def load(
    config_dir: str | Path, expid: str, overrides: Iterable[str] = (), src: ModuleType | None = None
) -> dict[str, Any]:
    """Reads and checks the parameters of one experiment.

    The experiment updates ``Base``, the data set is added, then the overrides apply. The data set is looked up in
    ``dataset_config.yaml`` or ``dataset_config/*.yaml`` of the folder, else in ``data_configs/<dataset_id>.yaml`` of a
    folder above it, of the working directory or of the repository. Relative paths of a data set count from the folder
    that contains its config folder, ``zoo`` from the config folder, those of an override from the working directory.

    Args:
        config_dir: Folder with ``model_config.yaml`` or ``model_config/*.yaml``.
        expid: Experiment id.
        overrides: ``key=value`` each; the value is read as YAML, and ``a.b=1`` reaches into the mapping ``a``.
        src: Module with the model class; without it, or if it has none, ``flowctr.models.<model>`` is imported.

    Returns:
        The merged parameters, with ``model_id`` as FuxiCTR sets it.

    Raises:
        ConfigError: With all mistakes: unknown and missing keys, wrong values, unknown experiment, data set or model.
    """
    config_dir = Path(config_dir).resolve()
    params, dataset, mistakes = _merge(config_dir, expid, overrides)
    model = None
    try:
        if params.get("model"):
            model = find_model(params, src)
    except ValueError as error:
        mistakes.append(str(error))
    mistakes += _check_experiment(params, model)
    mistakes += _check_metrics(params, has_groups=bool(params.get("group_id")) or not dataset)
    if dataset:
        mistakes += _check_dataset(params)
    _raise_all(mistakes, f"experiment {expid!r} of {config_dir}")
    return _as_meant(params)


def read(config_dir: str | Path, expid: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Reads the parameters of one experiment as `load` does, but does not check them: it needs no code of the model.

    Args:
        config_dir, expid, overrides: As for `load`.

    Raises:
        ConfigError: If there is no such experiment or data set, they contradict each other, or an override is none.
    """
    config_dir = Path(config_dir).resolve()
    params, _, mistakes = _merge(config_dir, expid, overrides)
    _raise_all(mistakes, f"experiment {expid!r} of {config_dir}")
    return _as_meant(params)


def load_dataset(
    dataset_id: str, config_dir: str | Path | None = None, overrides: Iterable[str] = ()
) -> dict[str, Any]:
    """Reads and checks a data set alone, to build it without an experiment.

    Args:
        dataset_id: Data set id.
        config_dir: Config folder, searched as in `load`; the working directory by default.
        overrides: As in `load`.

    Returns:
        The parameters of the data set.

    Raises:
        ConfigError: With all mistakes.
    """
    params = read_dataset(dataset_id, Path(config_dir or ".").resolve())
    changes, mistakes = _parse_overrides(overrides)
    mistakes += _apply(changes, params)
    mistakes += _unknown_keys(params, DATASET_KEYS)
    mistakes += checks.complaints(params, checks.KEY_CHECKS)
    mistakes += _check_dataset(params)
    _raise_all(mistakes, f"data set {dataset_id!r}")
    return _as_meant(params)


def find_model(params: Mapping[str, Any], src: ModuleType | None = None) -> type[BaseModel]:
    """Finds the model class of an experiment: in the folder that its ``zoo`` names, else as `model_class` does.

    Raises:
        ValueError: If there is none, or the folder cannot be imported.
    """
    if not params.get("zoo"):
        return model_class(params["model"], src)
    models = zoo.models(params["zoo"])
    if params["model"] not in models:
        raise ConfigError(f"{_unknown('model', params['model'], models)} in {params['zoo']}")
    return models[params["model"]]


def model_class(name: str, src: ModuleType | None = None) -> type[BaseModel]:
    """Finds a model class by name, in ``src`` or else in ``flowctr.models.<name>``.

    Raises:
        ConfigError: If there is none, with the names there are.
    """
    in_src = {key for key, value in vars(src).items() if checks.is_subclass(value, BaseModel)} if src else set()
    installed = {module.name for module in pkgutil.iter_modules(flowctr.models.__path__)}
    installed |= {path.parent.name for path in REPOSITORY.glob("model_zoo/*/src")}
    if str(name) in in_src:
        return getattr(src, name)
    if str(name) in installed:
        return getattr(importlib.import_module(f"flowctr.models.{name}"), name)
    raise ConfigError(_unknown("model", name, in_src | installed))


# From files and the command line to one dict


def _merge(config_dir: Path, expid: str, overrides: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Merges experiment, data set and overrides; gives the settings of the data set alone, too, and all mistakes."""
    changes, mistakes = _parse_overrides(overrides)
    params, dataset = {**DEFAULTS, **read_experiment(config_dir, expid), "model_id": expid}, {}
    if isinstance(params.get("zoo"), str):
        params["zoo"] = os.path.normpath(config_dir / params["zoo"])
    try:
        if dataset_id := changes.get("dataset_id", params.get("dataset_id")):
            dataset = read_dataset(dataset_id, config_dir)
    except ConfigError as error:
        mistakes.append(str(error))
    mistakes += [
        f"{key!r} is {params[key]!r} in the experiment and {value!r} in the data set; keep one of them"
        for key, value in dataset.items()
        if key not in changes and params.get(key) not in (None, value)
    ]
    params.update(dataset)
    return params, dataset, mistakes + _apply(changes, params)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # libyaml's parser, where there is one, is far faster
    """SafeLoader that reads 1e-3 as a number, as YAML 1.2 does, and tuples, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key.value!r} is given twice, in lines {lines[key.value]} and {line}; keep one"
                )
            lines[key.value] = line
        return super().construct_mapping(node, deep)


# BARS writes the columns that are embedded together as a tuple. The other python tags stay unknown.
_Loader.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node, deep=True))
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML that maps ids to settings.

    Raises:
        ConfigError: If it is something else.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except NOT_YAML as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must map ids to settings; it holds {content!r}")
    return content


def _read_all(config_dir: Path, stem: str) -> dict[Path, dict[str, Any]]:
    """Reads ``<stem>.yaml``, or all of ``<stem>/*.yaml`` where there is no such file."""
    single = config_dir / f"{stem}.yaml"
    paths = [single] if single.is_file() else sorted((config_dir / stem).glob("*.yaml"))
    return {path: read_yaml(path) for path in paths}


def _settings(name: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{name!r} must be a mapping of keys to values; got {value!r}")
    return {str(key): setting for key, setting in (value or {}).items()}


def read_experiment(config_dir: Path, expid: str) -> dict[str, Any]:
    """Reads the settings of an experiment, which update those of ``Base``, unchecked.

    Raises:
        ConfigError: If there is no such experiment, or a file cannot be read.
    """
    files = _read_all(config_dir, "model_config")
    if not files:
        raise ConfigError(f"there is no model_config.yaml and no model_config/*.yaml in {config_dir}")
    owners = [path for path, content in files.items() if expid in content and expid != "Base"]
    if not owners:
        known = {str(key) for content in files.values() for key in content} - {"Base"}
        raise ConfigError(f"{_unknown('experiment', expid, known)} in {config_dir}")
    if len(owners) > 1:
        raise ConfigError(f"experiment {expid!r} is in {owners[0]} and in {owners[1]}; keep one of them")
    own = files[owners[0]]
    base = next((content["Base"] for content in (own, *files.values()) if "Base" in content), None)
    return {**_settings("Base", base), **_settings(expid, own[expid])}


def read_dataset(dataset_id: str, config_dir: Path) -> dict[str, Any]:
    """Reads the settings of a data set, searched as in `load` and with its paths made absolute, unchecked.

    Raises:
        ConfigError: If there is no such data set, or a file cannot be read.
    """
    own = {key: path for path, content in _read_all(config_dir, "dataset_config").items() for key in content}
    roots = (REPOSITORY, Path.cwd(), *reversed(config_dir.parents), config_dir)
    shared = {path.stem: path for root in roots for path in root.glob("data_configs/*.yaml")}
    if str(dataset_id) not in {**own, **shared}:
        raise ConfigError(_unknown("data set", dataset_id, {**own, **shared}))
    path = own.get(dataset_id) or shared[dataset_id]
    content = read_yaml(path)
    if dataset_id not in content:
        raise ConfigError(f"{path} has no entry {dataset_id!r}; it has {', '.join(map(str, content))}")
    dataset = {**_settings(dataset_id, content[dataset_id]), "dataset_id": dataset_id}
    root = config_dir.parent if dataset_id in own else path.parent.parent
    columns = dataset.get("feature_cols")
    columns = [column for column in columns if isinstance(column, dict)] if isinstance(columns, list) else []
    for settings, keys in [(dataset, DATASET_PATHS), *((column, ["pretrained_emb"]) for column in columns)]:
        settings.update(
            {key: os.path.normpath(root / settings[key]) for key in keys if isinstance(settings.get(key), str)}
        )
    return dataset


def _parse_overrides(overrides: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    changes, mistakes = {}, []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not key or not equals:
            mistakes.append(f"--set takes key=value; got {text!r}")
            continue
        try:
            value = yaml.load(value, _Loader)
        except NOT_YAML as error:
            mistakes.append(f"--set {text}: the value is not valid YAML: {error}")
            continue
        is_path = key in (*DATASET_PATHS, "model_root", "zoo") and isinstance(value, str)
        changes[key] = os.path.abspath(value) if is_path else value
    return changes, mistakes


def _apply(changes: Mapping[str, Any], params: dict[str, Any]) -> list[str]:
    mistakes = []
    for dotted, value in changes.items():
        *outer, key = dotted.split(".")
        target: Any = params
        for name in outer:
            target = target.get(name) if isinstance(target, dict) else None
        if isinstance(target, dict):
            target[key] = value
        else:
            mistakes.append(f"--set {dotted}: {'.'.join(outer)!r} is not a mapping")
    return mistakes


def _as_meant(params: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces what would be read as something else than it is meant to be."""
    # FuxiCTR's regularisers take no int: 1 would silently be none at all.
    meant = {key: float(value) for key, value in params.items() if "regularizer" in key and checks.is_integer(value)}
    if params.get("data_block_size") == -1:  # how BARS says that there are no blocks
        meant["data_block_size"] = 0
    return {**params, **meant}


# What is wrong with an experiment


def _check_experiment(params: Mapping[str, Any], model: type[BaseModel] | None) -> list[str]:
    arguments = _arguments(model) if model else {}
    required = {name for name, argument in arguments.items() if argument.default is argument.empty}
    missing = [key for key in dict.fromkeys([*REQUIRED_KEYS, *sorted(required)]) if params.get(key) is None]
    mistakes = [f"missing key {key!r}" for key in missing]
    if model:
        known = {*arguments, *REQUIRED_KEYS, *DEFAULTS, *DATASET_KEYS, *ZOO_KEYS, *IGNORED_KEYS}
        mistakes += _unknown_keys([key for key in params if key != "model_id"], known)
        if not params.get("zoo"):
            astray = sorted(params.keys() & ZOO_KEYS - {"zoo", *arguments})
            mistakes += [
                f"{key!r} is for FuxiCTR's model folders; name one with zoo, or leave it out" for key in astray
            ]
    implied = {name: checks.like(argument.default) for name, argument in arguments.items() if name not in required}
    by_part = {key: check for key in params for part, check in checks.NAME_PART_CHECKS.items() if part in key}
    present = {key: value for key, value in params.items() if key not in missing}
    mistakes += checks.complaints(present, {**implied, **by_part, **checks.KEY_CHECKS})
    if model and "loss_weight" in params and not issubclass(model, MultiTaskModel):
        mistakes.append(f"'loss_weight' weighs the losses of several labels; {params['model']} predicts one: remove it")
    return mistakes + _check_labels(params, model)


def _arguments(model: type[BaseModel]) -> dict[str, inspect.Parameter]:
    """Finds the arguments that a YAML key can reach: of constructors, compile, fit and the data loader."""
    functions = []
    for parent in model.__mro__:
        if issubclass(parent, BaseModel) and "__init__" in vars(parent):
            functions.append(parent.__init__)
            if all(p.kind != p.VAR_KEYWORD for p in inspect.signature(parent.__init__).parameters.values()):
                break  # the constructors above get nothing from the YAML
    arguments: dict[str, inspect.Parameter] = {}
    for function in (*functions, Engine.__init__, model.compile, model.fit, H5DataLoader.__init__):
        for argument in list(inspect.signature(function).parameters.values())[1:]:  # without self
            if (
                argument.kind not in (argument.VAR_KEYWORD, argument.VAR_POSITIONAL)
                and argument.name not in RUNNER_ARGUMENTS
            ):
                arguments.setdefault(argument.name, argument)
    return arguments


def _all_labels(params: Mapping[str, Any]) -> list[str]:
    return [str(name) for name in _columns(params, "label_col", LABEL_KEYS, {}, ())[0]]


def _labels(params: Mapping[str, Any]) -> list[str]:
    """Lists the labels that are trained on, none if only the data set knows them."""
    labels, chosen = _all_labels(params), params.get("label")
    return [chosen] if chosen in labels else labels


def _check_labels(params: Mapping[str, Any], model: type[BaseModel] | None) -> list[str]:
    labels, known, chosen = _labels(params), _all_labels(params), params.get("label")
    if known and chosen is not None and chosen not in known:
        return [_unknown("label", chosen, known)]
    complaint = model and zoo.label_complaint(model, labels)
    return ([complaint] if complaint else []) + _check_label_counts(params, labels)


def _check_label_counts(params: Mapping[str, Any], labels: Sequence[str]) -> list[str]:
    counts = {key: len(params[key]) for key in ("task", "loss", "loss_weight") if isinstance(params.get(key), list)}
    counts |= {"num_tasks": params["num_tasks"]} if "num_tasks" in params else {}
    return [
        f"{key!r} is for {count} labels; the data set has {len(labels)}: {', '.join(labels)}"
        for key, count in counts.items()
        if labels and count != len(labels)
    ]


def _check_metrics(params: Mapping[str, Any], has_groups: bool) -> list[str]:
    metrics = params.get("metrics") or []
    if not isinstance(metrics, list) or not all(isinstance(name, str) for name in metrics):
        return [f"'metrics' must be a list of names; got {metrics!r}"]
    mistakes = []
    for name in metrics:
        try:  # two rows will do: evaluate_metrics knows the names, and which of them need groups
            evaluate_metrics([0, 1], [0.25, 0.75], [name], group_id=[0, 0] if has_groups else None)
        except ValueError as error:
            mistakes.append(f"'metrics': {error}")
    labels = _labels(params)
    known = [*metrics, *(f"{label}_{name}" for label in labels if len(labels) > 1 for name in metrics)]
    scenario = params.get("scenario")
    known += [f"{name}@{scenario}" for name in known] if scenario else []
    monitor = params.get("monitor", "AUC")
    if not isinstance(monitor, (str, dict)):
        return [*mistakes, f"'monitor' must be a metric or a mapping of metrics to weights; got {monitor!r}"]
    for name, weight in ({monitor: 1} if isinstance(monitor, str) else monitor).items():
        # Which values a scenario has is known once the data set is built.
        metric, given, _ = str(name).partition(f"@{scenario}=")
        if metrics and metric + given.rstrip("=") not in known:
            mistakes.append(f"'monitor': {_unknown('metric', name, known)}; 'metrics' must have it")
        if not checks.is_number(weight):
            mistakes.append(f"'monitor' must give {name!r} a number as its weight; got {weight!r}")
    return mistakes


# What is wrong with a data set


def _check_dataset(params: Mapping[str, Any]) -> list[str]:
    required = [*REQUIRED_DATASET_KEYS, *([] if params.get("data_format") == "h5" else ["feature_cols", "label_col"])]
    missing = [key for key in required if not params.get(key)]
    mistakes = [f"missing key {key!r} of the data set" for key in missing]
    if "feature_cols" in missing:
        mistakes[missing.index("feature_cols")] += (
            "; npz or parquet files that FuxiCTR has encoded already are not read: give the raw csv or parquet files "
            "with their feature_cols, or h5 files"
        )
    features, wrong_features = _columns(params, "feature_cols", FEATURE_KEYS, checks.COLUMN_CHECKS, ("type", "dtype"))
    labels, wrong_labels = _columns(params, "label_col", LABEL_KEYS, checks.LABEL_CHECKS, ("dtype",))
    specs, wrong_specs = _columns(params, "feature_specs", FEATURE_KEYS, checks.COLUMN_CHECKS, ())
    mistakes += [*wrong_features, *wrong_labels, *wrong_specs]
    if not features:
        return mistakes  # the feature map of an h5 data set knows them

    active = {name: feature for name, feature in features.items() if feature.get("active", True)}
    mistakes += [
        f"label {name!r} is a feature too; the model would read its target" for name in labels if name in active
    ]
    earlier: set[str] = set()
    for name, feature in active.items():
        layered = feature.get("type") in ("categorical", "sequence", "embedding")
        if layered and ("." in name or hasattr(nn.ModuleDict(), name)):
            mistakes.append(f"feature {name!r}: torch has no layer of that name; rename the column, such as {name}_id")
        share = feature.get("share_embedding")
        if share is not None and str(share) not in earlier:
            mistakes.append(f"feature {name!r}: share_embedding={share!r} must be an active feature listed before it")
        earlier.add(name)
    group, scenario, used = params.get("group_id"), params.get("scenario"), params.get("use_features")
    names_by_key = {
        "group_id": [group] if group else [],
        "scenario": [scenario] if scenario else [],
        "use_features": used or [],
        "feature_specs": specs,
    }
    for key, names in names_by_key.items():
        if _is_valid(params, key):
            mistakes += [f"{key!r}: {_unknown('feature', name, active)}" for name in names if name not in active]
    if isinstance(group, str) and group in active and active[group].get("type") in ("sequence", "embedding"):
        mistakes.append(f"'group_id': {group!r} is {active[group]['type']}; a group is one value: take a meta column")
    kind = active[scenario].get("type") if isinstance(scenario, str) and scenario in active else "categorical"
    if kind != "categorical":
        mistakes.append(f"'scenario': {scenario!r} is {kind}; a scenario is a categorical feature")
    elif isinstance(scenario, str) and scenario in active:  # its ids must be those of its own values in training
        mistakes += [
            f"'scenario': {scenario!r} has {key}={active[scenario][key]!r}; take that out"
            for key, usual in (("remap", True), ("share_embedding", None))
            if active[scenario].get(key, usual) != usual
        ]
    mistakes += [
        f"label_col {name!r}: fill_na and may_be_missing exclude each other; keep one"
        for name, label in labels.items()
        if label.get("may_be_missing") and "fill_na" in label
    ]
    if not wrong_features and params.get("behaviors") and _is_valid(params, "behaviors"):
        mistakes += _check_behaviors(params["behaviors"], active)
    return mistakes


def _is_valid(params: Mapping[str, Any], key: str) -> bool:
    return not checks.complaints({key: params.get(key)}, checks.KEY_CHECKS)


def _columns(
    params: Mapping[str, Any],
    key: str,
    keys: set[str],
    column_checks: Mapping[str, checks.Check],
    required: Sequence[str],
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Gives the columns by name, each of a list of names by itself, and what is wrong with them."""
    entries = params.get(key) or []
    entries = [entries] if isinstance(entries, dict) else entries
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return {}, [f"{key!r} must list mappings with name, dtype, ...; got {entries!r}"]
    columns, mistakes = {}, []
    for entry in entries:
        where = f"{key} {entry.get('name')!r}: "
        mistakes += [f"{where}missing key {name!r}" for name in ("name", *required) if name not in entry]
        mistakes += [where + mistake for mistake in _unknown_keys(entry, keys)]
        mistakes += checks.complaints(entry, column_checks, where)
        names = entry.get("name", [])
        for name in map(str, names if isinstance(names, list) else [names]):
            mistakes += [f"{key} has {name!r} twice"] if name in columns else []
            columns[name] = entry
    return columns, mistakes


def _check_behaviors(behaviors: Mapping[str, Any], features: Mapping[str, dict[str, Any]]) -> list[str]:
    mistakes = []
    sequences = {name: feature for name, feature in features.items() if feature["type"] == "sequence"}
    for behavior, columns in behaviors.items():
        unknown = [name for name in columns if name not in sequences]
        mistakes += [f"behavior {behavior!r}: {_unknown('sequence', name, sequences)}" for name in unknown]
        lengths = {name: sequences[name].get("max_len") for name in columns if name in sequences}
        if len(set(lengths.values())) > 1:
            mistakes.append(
                f"behavior {behavior!r} aligns columns of different max_len: {lengths}; give them one max_len"
            )
    return mistakes


# Messages


def _unknown(kind: str, name: Any, known: Iterable[str]) -> str:
    known = sorted(map(str, known))
    if not known:
        return f"unknown {kind} {name!r}; there is none"
    return f"unknown {kind} {name!r}; the nearest is {nearest(name, known)!r} (known: {', '.join(known)})"


def _unknown_keys(keys: Iterable[str], known: set[str]) -> list[str]:
    unknown = [key for key in keys if key not in known]
    return [f"unknown key {key!r}; the nearest valid name is {nearest(key, known)!r}" for key in unknown]


def _raise_all(mistakes: Sequence[str], subject: str) -> None:
    if mistakes:
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise ConfigError("\n".join([f"{count} in {subject}:", *(f"  - {mistake}" for mistake in mistakes)]))

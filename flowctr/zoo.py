"""FuxiCTR's model folders, unchanged: their code imported, and our data sets put the way it expects them.

A folder is ``model_zoo/<MODEL>`` or ``model_zoo/multitask/<MODEL>`` of a FuxiCTR checkout; its classes are in ``src``.
They name their sequences and the targets of these in arguments such as ``din_sequence_field`` and ``din_target_field``,
want sequences that no such argument names to be pooled, and some want the padding on one side.
"""

import copy
import functools
import hashlib
import importlib.util
import inspect
import logging
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import flowctr  # noqa: F401  before fuxictr, so that it needs no ray
import fuxictr
import h5py
import torch
from flowctr._fuxictr import python_digest
from flowctr.data.format import find_h5, h5_files
from flowctr.names import did_you_mean
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FeatureEmbeddingDict, LogisticRegression
from fuxictr.pytorch.models import BaseModel, MultiTaskModel
from torch import Tensor
from torch.nn import Linear

POOLING = "layers.MaskedAveragePooling()"  # BARS' choice
# The last steps of a sequence are read as the most recent ones. What packs sequences is found by `_padding_side`.
PADDING_SIDES = {"TransAct": "pre", "DMR": "pre"}


def models(folder: str | Path) -> dict[str, type[BaseModel]]:
    """Imports the classes of a model folder, under a module name of its own.

    Args:
        folder: A model folder.

    Returns:
        Name -> class of each model.

    Raises:
        ValueError: If it is no model folder, or one of another generation of FuxiCTR; says what is missing.
    """
    classes = _models_of(_import(Path(folder).resolve()))
    if not classes:
        raise ValueError(f"{folder}: src/__init__.py has no model, no subclass of fuxictr.pytorch.models.BaseModel")
    return classes


def origin(folder: str | Path) -> dict[str, str]:
    """Names the code of a model folder: its place below ``model_zoo`` and a digest over its Python files."""
    folder = Path(folder).resolve()
    parts = folder.parts
    first = len(parts) - parts[::-1].index("model_zoo") - 1 if "model_zoo" in parts else -1
    return {"folder": "/".join(parts[first:]), "sha256": python_digest(folder / "src")}


def label_complaint(model_class: type[BaseModel], labels: Sequence[str]) -> str | None:
    """Says what is wrong with training a model on some labels; None if nothing is."""
    if len(labels) < 2 or issubclass(model_class, MultiTaskModel):
        return None
    return (
        f"{model_class.__name__} predicts one label, the data set has {', '.join(labels)}; "
        f"choose one of them, such as label: {labels[0]}"
    )


def adapt(
    model_class: type[BaseModel], feature_map: FeatureMap, params: dict[str, Any], train_data: str | Path
) -> type[BaseModel]:
    """Fits a model of a zoo folder and a data set to each other.

    Arguments of the model that name fields and are not set in ``params`` are added to them: sequences are the columns
    of each of the data set's ``behaviors`` that share the embedding of a field, which is their target; negative samples
    and context are none. In the feature map, the sequences that the model names get no encoder, all others are pooled
    if they have none.

    Args:
        model_class: The model.
        feature_map: The data set's; changed.
        params: Parameters of the experiment; changed.
        train_data: An h5 file of the data set, or its folder; it tells on which side sequences are padded.

    Returns:
        A subclass of the same name: it regularises as FuxiCTR does, moves the padding of sequences to the other side
        first if the model wants that, and starts its linear part small if the experiment says ``init_linear``.

    Raises:
        ValueError: If the model needs a field that the data set lacks, or predicts one label and there are several.
    """
    if complaint := label_complaint(model_class, feature_map.labels):
        raise ValueError(complaint)
    arguments = {name: p.default for name, p in inspect.signature(model_class.__init__).parameters.items()}
    params.setdefault("task", "binary_classification")  # FuxiCTR's default is a list for one label
    if "embedding_dim" in arguments:  # FuxiCTR's feature map knows no model's default
        feature_map.default_emb_dim = params.setdefault("embedding_dim", arguments["embedding_dim"])
    for spec in feature_map.features.values():
        spec.setdefault("source", "")  # which meta columns lack
    fields = _fields(model_class.__name__, arguments, feature_map, params)
    params.update(fields)
    read = [list(_names(entry)) for name, value in fields.items() if "seq" in name for entry in _entries(value)]
    _set_encoders(model_class.__name__, feature_map, {name for columns in read for name in columns})

    methods = {}
    if issubclass(model_class, MultiTaskModel):  # our engine has another one for several tasks
        methods["regularization_loss"] = lambda self: model_class.regularization_loss(self)
    if params.get("init_linear"):

        def reset_parameters(self):
            model_class.reset_parameters(self)
            _start_linear(self)

        methods["reset_parameters"] = reset_parameters
    side = _padding_side(model_class, params)
    sequences = [name for name, spec in feature_map.features.items() if spec["type"] == "sequence"]
    if side and _paddings(train_data, sequences) - {side}:
        logging.info("%s wants sequences padded '%s': the padding is moved there", model_class.__name__, side)
        behaviors = list((params.get("behaviors") or {}).values()) or read
        joint = [names for columns in behaviors if (names := [name for name in columns if name in sequences])]
        joint += [[name] for name in sequences if not any(name in columns for columns in joint)]
        methods["forward"] = lambda self, inputs: model_class.forward(self, align(inputs, joint, side))
    namespace = {"__module__": model_class.__module__, "__doc__": model_class.__doc__, **methods}
    return type(model_class.__name__, (model_class,), namespace)


def align(inputs: Mapping[str, Tensor], behaviors: Iterable[Iterable[str]], side: str) -> dict[str, Tensor]:
    """Moves the padding of each sequence to one side by rotating its row; the events keep their order.

    Args:
        inputs: A batch, sequences ``(B, T)`` padded with 0.
        behaviors: Sequences whose steps belong together, which rotate together.
        side: ``pre`` or ``post``: where the padding goes.

    Returns:
        The batch with these sequences rotated.
    """
    aligned = dict(inputs)
    for columns in behaviors:
        real = torch.stack([inputs[name] != 0 for name in columns]).any(dim=0).int()  # (B, T)
        # The first maximum is the first real step; a row without any stays as it is.
        shift = real.argmax(dim=1) if side == "post" else -real.flip(1).argmax(dim=1)
        steps = real.shape[1]
        source = (torch.arange(steps, device=real.device) + shift.unsqueeze(1)) % steps
        aligned.update({name: inputs[name].gather(1, source) for name in columns})
    return aligned


def warn_of_linear(model: BaseModel) -> None:
    """Warns of linear weights that FuxiCTR leaves at N(0, 1), unless the model was made with ``init_linear``."""
    for tables in _linear_parts(model):
        shared = [name for name in tables.embedding_layers if "share_embedding" in tables._feature_map.features[name]]
        if shared:
            logging.warning(
                "%s: FuxiCTR starts the linear weights of %s at N(0, 1), which can spoil the training; "
                "init_linear: true starts them as small as embeddings",
                type(model).__name__,
                ", ".join(shared),
            )


# The linear part


def _linear_parts(model: BaseModel) -> list[FeatureEmbeddingDict]:
    return [layer.embedding_layer.embedding_layer for layer in model.modules() if isinstance(layer, LogisticRegression)]


def _start_linear(model: BaseModel) -> None:
    """Draws all weights of the linear part as FuxiCTR draws the tables of embeddings.

    A linear part shares no table, yet FuxiCTR skips the columns that share an embedding elsewhere when it draws weights
    and leaves theirs at N(0, 1), and those of numeric columns. A sequence's weights are summed over its events, so that
    a model of many events starts with logits of tens.

    Raises:
        ValueError: If the model has no linear part.
    """
    parts = _linear_parts(model)
    if not parts:
        raise ValueError(f"init_linear: {type(model).__name__} has no linear part as it is set; leave init_linear out")
    features = {
        name: {key: value for key, value in spec.items() if key != "share_embedding"}
        for name, spec in model.feature_map.features.items()
    }
    for tables in parts:
        tables._feature_map = copy.copy(tables._feature_map)  # also for tables that are drawn anew in each epoch
        tables._feature_map.features = features
        tables.init_weights()
        for column in tables.embedding_layers.values():
            if isinstance(column, Linear):
                tables.embedding_initializer(column.weight)


# A folder's code


def _import(folder: Path) -> ModuleType:
    name = f"flowctr_zoo_{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    _check_folder(folder)
    src = folder / "src"
    spec = importlib.util.spec_from_file_location(name, src / "__init__.py", submodule_search_locations=[str(src)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the code of another generation runs into
        for imported in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            del sys.modules[imported]
        raise ValueError(
            f"{folder} is of another generation than the installed fuxictr {fuxictr.__version__}, or needs what is not "
            f"installed{_line(error, folder)}: {error}; take the folder from a FuxiCTR checkout of that version"
        ) from error
    for model_class in _models_of(module).values():
        for method, function in list(vars(model_class).items()):
            if inspect.isfunction(function) and hasattr(BaseModel, method):
                setattr(model_class, method, _explained(function, folder))
    return module


def _models_of(module: ModuleType) -> dict[str, type[BaseModel]]:
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, BaseModel) and value.__module__.startswith(module.__name__)
    }


def _explained(function: Callable, folder: Path) -> Callable:
    """Says of a method that overrides FuxiCTR's, or calls its layers, how it does not fit what is installed.

    The code of some generations is imported without a complaint, and fails as soon as it runs.
    """

    @functools.wraps(function)
    def method(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"{folder} does not run with the installed fuxictr {fuxictr.__version__}{_line(error, folder)}: {error}"
                "; if no setting is to blame, take the folder from a FuxiCTR checkout of that version"
            ) from error

    return method


def _line(error: Exception, folder: Path) -> str:
    """Names the line of a folder's code that an error comes from."""
    calls = [call for call in traceback.extract_tb(error.__traceback__) if call.filename.startswith(f"{folder}/src/")]
    return f" in line {calls[-1].lineno} of {Path(calls[-1].filename).relative_to(folder)}" if calls else ""


def _check_folder(folder: Path) -> None:
    if not (folder / "src" / "__init__.py").is_file():
        inner = sorted(path.parent.name for path in folder.glob("*/src"))
        remedy = f"it holds model folders, name one: {', '.join(inner)}" if inner else "name FuxiCTR/model_zoo/<MODEL>"
        what = "lacks src/__init__.py, so it is no model folder of FuxiCTR 2.3" if folder.is_dir() else "does not exist"
        raise ValueError(f"zoo folder {folder} {what}; {remedy}")
    needed = _needed_version(folder / "fuxictr_version.py")
    if needed > _version(fuxictr.__version__):
        raise ValueError(
            f"{folder} is for fuxictr {'.'.join(map(str, needed))} or later, {fuxictr.__version__} is installed; "
            "upgrade it, or take the folder from an earlier FuxiCTR checkout"
        )


def _needed_version(path: Path) -> tuple[int, ...]:
    """The version that a folder's ``fuxictr_version.py`` asserts; empty if none."""
    found = re.search(r"""["'](\d+(\.\d+)*)["']""", path.read_text(encoding="utf-8")) if path.is_file() else None
    return _version(found[1]) if found else ()


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:3]))


# Fields


def _entries(value: Any) -> list:
    """The fields, or tuples of fields that are concatenated, of an argument: a list, or one alone."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _names(value: Any) -> Iterator[str]:
    """Flattens nested lists and tuples of names."""
    for entry in value if isinstance(value, (list, tuple)) else [value]:
        yield from _names(entry) if isinstance(entry, (list, tuple)) else [entry]


def _fields(
    model: str, arguments: Mapping[str, Any], feature_map: FeatureMap, params: Mapping[str, Any]
) -> dict[str, Any]:
    """Gives the arguments that name fields: what the parameters say, what is derived, else the model's defaults."""
    fields = {name: params.get(name, default) for name, default in arguments.items() if name.endswith("_field")}
    derived = _derived([name for name in fields if params.get(name) is None], feature_map, params)
    for name, value in derived.items():
        logging.info("%s reads %s=%s", model, name, value)
    fields.update(derived)
    _check_fields(model, fields, feature_map)
    _check_negatives(model, fields, {**arguments, **params})
    return fields


def _derived(fields: Iterable[str], feature_map: FeatureMap, params: Mapping[str, Any]) -> dict[str, list]:
    """Derives the field arguments from the behaviours; those of sequences and targets only if there are any."""
    sequences, targets = [], []
    for columns in (params.get("behaviors") or {}).values():
        pairs = {name: _target(name, feature_map) for name in columns if name in feature_map.features}
        if pairs := {name: target for name, target in pairs.items() if target}:
            sequences.append(_joined(pairs))
            targets.append(_joined(pairs.values()))
    derived = {}
    for name in fields:
        if "neg" in name or "context" in name:
            derived[name] = []
        elif sequences and ("sequence" in name or "target" in name):
            derived[name] = sequences if "sequence" in name else targets
    return derived


def _joined(names: Iterable[str]) -> str | tuple[str, ...]:
    """Names a field, or several that are concatenated, as FuxiCTR does."""
    first, *others = names
    return (first, *others) if others else first


def _target(sequence: str, feature_map: FeatureMap) -> str | None:
    """The field whose embedding a sequence shares, maybe by way of another sequence."""
    name = feature_map.features[sequence].get("share_embedding")
    while name in feature_map.features and feature_map.features[name]["type"] == "sequence":
        name = feature_map.features[name].get("share_embedding")
    return name if name in feature_map.features else None


def _set_encoders(model: str, feature_map: FeatureMap, read: Collection[str]) -> None:
    """Gives the sequences that a model reads as such no encoder, and the others one if they have none."""
    for name, spec in feature_map.features.items():
        if spec["type"] == "sequence" and name in read:
            spec["feature_encoder"] = None
        elif spec["type"] == "sequence" and not spec.get("feature_encoder"):
            spec["feature_encoder"] = POOLING
            logging.info("%s reads no sequence %s; it is averaged", model, name)


def _check_fields(model: str, fields: Mapping[str, Any], feature_map: FeatureMap) -> None:
    known = [name for name, spec in feature_map.features.items() if spec["type"] != "meta"]
    missing = [
        f"{name!r} ({argument}){did_you_mean(name, known)}"
        for argument, value in fields.items()
        for entry in _entries(value)
        for name in _names(entry)
        if name not in known
    ]
    if missing:
        raise ValueError(
            f"{model} needs fields that data set {feature_map.dataset_id} lacks: {', '.join(missing)}; "
            "name the data set's in these keys, or give it behaviors whose columns share the embedding of a field"
        )
    pairs = {name: _entries(value) for name, value in fields.items() if "sequence" in name or "target" in name}
    widths = {name: [len(list(_names(entry))) for entry in entries] for name, entries in pairs.items()}
    if any(width != next(iter(widths.values())) for width in widths.values()):
        listed = ", ".join(f"{name}={entries}" for name, entries in pairs.items())
        raise ValueError(f"{model} needs a target for each sequence, of as many fields; got {listed}; name them all")
    for name in (name for name in pairs if "sequence" in name):
        for column in _names(pairs[name]):
            if (kind := feature_map.features[column]["type"]) != "sequence":
                raise ValueError(f"{model}: {name} names {column!r}, which is {kind}; name a sequence")


def _check_negatives(model: str, fields: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    missing = [name for name, value in fields.items() if "neg" in name and not _entries(value)]
    losses = [key for key, value in arguments.items() if key.startswith("aux_loss_") and value]
    if missing and losses:
        raise ValueError(
            f"{model}: {losses[0]}={arguments[losses[0]]} needs sequences of negative samples; "
            f"name them in {missing[0]}, or take {losses[0]}: 0"
        )


# Padding


def _padding_side(model_class: type[BaseModel], params: Mapping[str, Any]) -> str | None:
    """The side on which a model wants padding, None for either: that of the experiment, else of the model's code."""
    if side := params.get("padding"):
        return None if side == "any" else side
    files = Path(inspect.getfile(model_class)).parent.rglob("*.py")
    packs = any("pack_padded_sequence(" in file.read_text(encoding="utf-8") for file in files)
    return "post" if packs else PADDING_SIDES.get(model_class.__name__)


def _paddings(data: str | Path, sequences: Iterable[str]) -> set[str | None]:
    """The sides on which sequences are padded in an h5 file; None where it does not tell."""
    with h5py.File(h5_files(find_h5(data))[0], "r") as file:
        return {file[name].attrs.get("padding") for name in sequences}

"""What may stand in a configuration: a check for each key, whose complaints `flowctr.config` collects.

FuxiCTR evaluates some of these strings as Python. They have to be one of the few forms that are meant; they are parsed,
never executed.
"""

import ast
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import flowctr  # noqa: F401  before fuxictr, so that it needs no ray
import fuxictr.pytorch.layers
import torch
from flowctr.acceleration import PRECISIONS
from flowctr.names import nearest
from torch import nn

Check = Callable[[Any], str | None]
"""Takes a value and returns what it must be, None if it is that."""


def is_number(value: Any) -> bool:
    """Says whether a value is an int or a float; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    """Says whether a value is an int; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_positive_integer(value: Any) -> bool:
    """Says whether a value is an int above 0."""
    return is_integer(value) and value > 0


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < 1


def is_subclass(value: Any, parent: type) -> bool:
    """Says whether a value is a class derived from ``parent``."""
    return inspect.isclass(value) and issubclass(value, parent)


def complaints(values: Mapping[str, Any], checks: Mapping[str, Check], where: str = "") -> list[str]:
    """Returns one sentence for every value that its check refuses."""
    checked = {key: (value, checks[key](value)) for key, value in values.items() if key in checks}
    return [f"{where}{key!r} must be {rule}; got {value!r}" for key, (value, rule) in checked.items() if rule]


def like(default: Any) -> Check:
    """Returns the check that a constructor's default implies; None implies nothing."""
    if isinstance(default, bool):
        return _boolean
    if is_integer(default) and default > 1:
        return _require(is_integer, f"an integer, like its default {default}")
    if is_number(default):  # an int of 0 or 1 as well: FuxiCTR writes dropout=0 and temperature=1
        return _require(is_number, f"a number, like its default {default}")
    if isinstance(default, str):
        return _require(
            lambda value: not isinstance(value, (bool, int, float)), f"a text, like its default {default!r}"
        )
    if isinstance(default, (list, tuple)):
        return _or_null(_like_list(default))
    return lambda value: None


def _like_list(default: list | tuple) -> Check:
    example = f"like its default {list(default)}"
    if default and all(map(is_number, default)):
        types = (list, type(default))  # not a tuple for a list: FuxiCTR adds other lists to it
        whole = all(map(is_integer, default)) and max(default) > 1
        is_item, items = (is_positive_integer, "integers above 0") if whole else (is_number, "numbers")
        return _require(
            lambda value: isinstance(value, types) and all(map(is_item, value)), f"a list of {items}, {example}"
        )
    if any(isinstance(item, (str, tuple)) for item in default):  # features, of which one stands for itself
        return _require(lambda value: isinstance(value, (list, tuple, str)), f"a list or a name, {example}")
    return _require(lambda value: isinstance(value, (list, tuple)), f"a list, {example}")


def _require(is_valid: Callable[[Any], bool], rule: str) -> Check:
    return lambda value: None if is_valid(value) else rule


def _one_of(*choices: Any) -> Check:
    names = ", ".join("null" if choice is None else str(choice) for choice in choices)
    return _require(lambda value: value in choices, f"one of {names}")


def _named(kind: str, names: set[str]) -> Check:
    def check(value: Any) -> str | None:
        if isinstance(value, str) and value in names:
            return None
        return f"{kind}, the nearest is {nearest(value, names)!r}"

    return check


def _or_null(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _each(check: Check) -> Check:
    """Checks a value by itself, a list item by item."""
    return lambda value: next(filter(None, map(check, value)), None) if isinstance(value, list) else check(value)


_positive_integer = _require(is_positive_integer, "an integer above 0")
_natural_number = _require(lambda value: is_integer(value) and value >= 0, "an integer of at least 0")
_positive_number = _require(lambda value: is_number(value) and value > 0, "a number above 0")
_non_negative_number = _require(lambda value: is_number(value) and value >= 0, "a number of at least 0")
_between_0_and_1 = _require(lambda value: is_number(value) and 0 < value < 1, "a number between 0 and 1")
_boolean = _require(lambda value: isinstance(value, bool), "true or false")
_text = _require(lambda value: isinstance(value, str) and value != "", "a text")


def _subclasses(module: Any, parent: type) -> set[str]:
    return {name for name in dir(module) if is_subclass(getattr(module, name), parent)}


def _losses() -> set[str]:
    functions = inspect.getmembers(nn.functional, inspect.isfunction)
    return {name for name, fn in functions if {"target", "reduction"} <= set(inspect.signature(fn).parameters)}


_NUMBER = r"(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
_REGULARIZER = re.compile(rf"l[12]\({_NUMBER}\)|l1_l2\({_NUMBER},\s*{_NUMBER}\)")
_ACTIVATIONS = {"relu", "sigmoid", "tanh", "softmax", "prelu", "PReLU", "dice", "Dice"} | _subclasses(nn, nn.Module)


def _is_regularizer(value: Any) -> bool:
    return value is None or (is_number(value) and value >= 0) or bool(_REGULARIZER.fullmatch(str(value)))


def _is_initializer(value: Any) -> bool:
    """``nn.init.<name>_`` or ``partial(nn.init.<name>_, key=literal, ...)`` with keys that it has."""
    try:
        function, arguments = ast.parse(value, mode="eval").body, {}
        if isinstance(function, ast.Call) and ast.unparse(function.func) == "partial":
            arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in function.keywords}
            (function,) = function.args
        name = re.fullmatch(r"(?:torch\.)?nn\.init\.([a-z]\w*_)", ast.unparse(function))[1]
        inspect.signature(getattr(nn.init, name)).bind_partial(**arguments)
    except (SyntaxError, TypeError, ValueError, AttributeError):
        return False
    return True


def _is_feature_encoder(value: Any) -> bool:
    """``layers.<Name>(literals)`` or ``nn.<Name>(literals)`` with arguments that it takes."""
    if value in (None, "null", "None", "none"):
        return True
    try:
        call = ast.parse(value, mode="eval").body
        module, name = re.fullmatch(r"(layers|nn)\.(\w+)", ast.unparse(call.func)).groups()
        layer = getattr(fuxictr.pytorch.layers if module == "layers" else nn, name)
        arguments = [ast.literal_eval(argument) for argument in call.args]
        keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        inspect.signature(layer).bind(*arguments, **keywords)
    except (SyntaxError, TypeError, ValueError, AttributeError):
        return False
    return is_subclass(layer, nn.Module)


def _is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _is_loss_weight(value: Any) -> bool:
    if not isinstance(value, list):
        return value in ("EQ", "UW")
    return all(is_number(weight) and 0 <= weight < math.inf for weight in value) and any(value)


def _is_behaviors(value: Any) -> bool:
    return isinstance(value, dict) and all(columns and _is_texts(columns) for columns in value.values())


_feature_encoder = _require(
    _is_feature_encoder, "layers.<Name>(...) or nn.<Name>(...) with plain arguments that it takes"
)

KEY_CHECKS: dict[str, Check] = {
    "seed": _natural_number,
    "verbose": _natural_number,
    "model_root": _text,
    "zoo": _or_null(_text),
    "padding": _one_of(None, "pre", "post", "any"),
    "init_linear": _boolean,
    "batch_size": _positive_integer,
    "epochs": _positive_integer,
    "eval_steps": _or_null(_positive_integer),
    "checkpoint_steps": _or_null(_positive_integer),
    "resume": _one_of(None, "auto"),
    "early_stop_patience": _positive_integer,
    "monitor_mode": _one_of("max", "min"),
    "max_gradient_norm": _positive_number,
    "precision": _one_of(*PRECISIONS),
    "gradient_accumulation": _positive_integer,
    "fused_regularizer": _boolean,  # these are no regulariser, activation or embedding, as their names have it
    "activation_checkpointing": _boolean,
    "reset_embeddings": _boolean,
    "ema_decay": _or_null(_between_0_and_1),
    "lr_decay_factor": _between_0_and_1,
    "learning_rate": _positive_number,
    "weight_decay": _non_negative_number,
    "search_weight_decay": _non_negative_number,
    "search_learning_rate": _positive_number,
    "embedding_dim": _positive_integer,
    "optimizer": _named("an optimizer of torch.optim", {"adam"} | _subclasses(torch.optim, torch.optim.Optimizer)),
    "loss": _each(_named("a loss of torch.nn.functional", {"bce", "binary_crossentropy"} | _losses())),
    "gate_penalty": _each(_non_negative_number),
    "loss_weight": _require(_is_loss_weight, "EQ, UW or a list of numbers of at least 0, not all of them 0"),
    "task": _each(_one_of("binary_classification", "regression")),
    "data_format": _one_of("csv", "parquet", "h5"),
    "sep": _text,
    "data_root": _text,
    "train_data": _text,
    "valid_data": _or_null(_text),
    "test_data": _or_null(_text),
    "group_id": _or_null(_text),
    "scenario": _or_null(_text),
    "label": _or_null(_text),
    "use_features": _or_null(_require(_is_texts, "a list of features")),
    "min_categr_count": _positive_integer,
    "data_block_size": _require(lambda value: is_integer(value) and value >= -1, "an integer of at least 0, or -1"),
    "h5_compression": _one_of(None, "gzip", "lzf"),
    "behaviors": _or_null(_require(_is_behaviors, "a mapping of each behaviour to the list of its columns")),
}
"""By key of an experiment or data set."""

NAME_PART_CHECKS: dict[str, Check] = {
    "regularizer": _require(_is_regularizer, "a number of at least 0, l1(x), l2(x) or l1_l2(x, y)"),
    "initializer": _require(_is_initializer, "nn.init.<name>_ or partial(nn.init.<name>_, key=value, ...)"),
    "activation": _each(_or_null(_named("an activation of torch.nn", _ACTIVATIONS))),
    "dropout": _each(_or_null(_require(_is_share, "a number of at least 0, below 1"))),
}
"""By a part of the key: models name their own."""

COLUMN_CHECKS: dict[str, Check] = {
    "type": _one_of("categorical", "numeric", "sequence", "meta", "embedding"),
    "dtype": _one_of("str", "int", "float"),
    "padding": _one_of("pre", "post"),
    "normalizer": _one_of("StandardScaler", "MinMaxScaler"),
    "pretrain_usage": _one_of("init", "sum", "concat"),
    "min_categr_count": _positive_integer,
    "max_len": _natural_number,
    "vocab_size": _positive_integer,
    "embedding_dim": _positive_integer,
    "emb_output_dim": _positive_integer,
    "pretrain_dim": _positive_integer,
    "active": _boolean,
    "remap": _boolean,
    "freeze_emb": _boolean,
    "pretrained_emb": _text,
    "splitter": _text,
    "feature_encoder": _each(_feature_encoder),
    "preprocess": _require(lambda value: bool(re.fullmatch(r"copy_from\(\w+\)", str(value))), "copy_from(<column>)"),
}
"""By key of a column in feature_cols or feature_specs."""

LABEL_CHECKS: dict[str, Check] = {**COLUMN_CHECKS, "dtype": _one_of("int", "float"), "may_be_missing": _boolean}
"""By key of a column in label_col."""

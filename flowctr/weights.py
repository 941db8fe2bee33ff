"""A model's weights: written whole or not at all, read only where they fit; their average; tables that start anew."""

import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from flowctr import distributed
from fuxictr.pytorch.layers import FeatureEmbeddingDict, PretrainedEmbedding
from fuxictr.pytorch.models import BaseModel
from torch import nn


def save(model: BaseModel, path: Path) -> None:
    """Writes the weights, so that the file is whole at any time: the old ones or the new ones.

    Raises:
        OSError: If they cannot be written, for a full disk among others.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(path)
    try:
        torch.save(model.state_dict(), unfinished)
        os.replace(unfinished, path)
    except RuntimeError as error:  # what torch makes of a failed write
        raise OSError(f"the checkpoint {path} cannot be written; is the disk full? {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Removes what a run that was killed while it wrote has left."""
    _unfinished(path).unlink(missing_ok=True)


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp")


def load(model: BaseModel, path: str | Path) -> None:
    """Loads weights that `save` or FuxiCTR wrote.

    Raises:
        ValueError: If the file holds no weights, or those of another model or feature map; names the first few.
    """
    try:
        weights = read(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a file of model weights: {error}") from error
    if not isinstance(weights, dict) or not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
        raise ValueError(f"{path} is not a file of model weights: it holds something else")
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    differences = [
        f"{name} is {shapes.get(name, 'missing')} there and {expected.get(name, 'missing')} here"
        for name in {**expected, **shapes}
        if shapes.get(name) != expected.get(name)
    ]
    if differences:
        raise ValueError(
            f"{path} does not fit {type(model).__name__} on data set {model.feature_map.dataset_id!r}; "
            "the model's arguments or the feature map have changed since it was saved. "
            f"{len(differences)} weights differ: {'; '.join(differences[:5])}"
        )
    model.load_state_dict(weights)


def read(path: str | Path) -> Any:
    """Reads what torch.save wrote: tensors and plain values; executes nothing.

    Raises:
        ValueError: If the file is damaged, in any of its bytes; says how.
        FileNotFoundError, PermissionError: If it is not there to be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # of many types, by where the file was cut off
        raise ValueError(f"{error or type(error).__name__}") from error


def fingerprint(path: str | Path) -> int:
    """Tells the weights in a file from others: a checksum of the checksums that the file has of its tensors."""
    with zipfile.ZipFile(path) as archive:
        return zlib.crc32(repr([(entry.filename, entry.CRC) for entry in archive.infolist()]).encode())


class AveragedWeights:
    """The exponential moving average of what a model trains over its steps, to be evaluated and saved in its place.

    After step t, from 1: ``average = d average + (1 - d) weights`` with ``d = min(decay, (1 + t) / (10 + t))``, which
    soon forgets the untrained weights, as in https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage.
    The statistics that batch norms evaluate with are averaged like weights; other buffers are not.

    Args:
        model: The model; its weights have to stay where they are in memory.
        decay: The decay, between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
        statistics = [value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None]
        self.weights = [*trained, *statistics]
        self.average = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights after a step, without waiting for the device."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.average, self.weights, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Puts the average into the model, and the model's weights in its place; called again, back."""
        for weight, average in zip(self.weights, self.average):
            trained = weight.clone()
            weight.copy_(average)
            average.copy_(trained)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Lends the average to the model."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def forget(self, tables: list[nn.Parameter]) -> None:
        """Starts the average of some weights anew, from what they are; the decay does not rise again."""
        anew = {id(table) for table in tables}
        for weight, average in zip(self.weights, self.average):
            if id(weight) in anew:
                average.copy_(weight)

    def state(self) -> dict[str, Any]:
        """Gives what `restore` goes on from."""
        return {"steps": self.steps, "average": self.average}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave."""
        self.steps = state["steps"]
        for average, kept in zip(self.average, state["average"], strict=True):
            average.copy_(kept)


# Optimisers whose state is zero before the first step.
START_AT_ZERO = (torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.RAdam, torch.optim.SGD)


def embedding_tables(model: BaseModel) -> list[nn.Parameter]:
    """Lists the embedding tables that a model trains, those in FuxiCTR's ``FeatureEmbeddingDict``, each once."""
    tables = [
        table.weight for owner in _table_owners(model) for table in owner.modules() if isinstance(table, nn.Embedding)
    ]
    return list(dict.fromkeys(tables))


def _table_owners(model: BaseModel) -> list[FeatureEmbeddingDict]:
    """Lists what holds embedding tables, without those that are frozen, as a search's are while AutoIFS retrains."""
    owners = [module for module in model.modules() if isinstance(module, FeatureEmbeddingDict)]
    return [owner for owner in owners if any(weight.requires_grad for weight in owner.parameters())]


def check_redrawable(model: BaseModel, in_place: bool) -> None:
    """Raises ValueError if `redraw_embeddings` cannot do it for a model."""
    name, optimizer = type(model).__name__, model.optimizer
    if not embedding_tables(model):
        raise ValueError(f"reset_embeddings: {name} has no embedding tables; turn it off")
    if any(isinstance(module, PretrainedEmbedding) for module in model.modules()):
        raise ValueError(f"reset_embeddings: {name} has pretrained tables, which cannot be drawn anew; turn it off")
    if in_place and not isinstance(optimizer, START_AT_ZERO):
        raise ValueError(
            f"reset_embeddings with cuda_graphs cannot start {type(optimizer).__name__} anew in place; use adam, or "
            "turn one of them off"
        )


@torch.no_grad()
def redraw_embeddings(model: BaseModel, in_place: bool) -> None:
    """Draws the embedding tables as at first, and lets the optimiser forget them.

    Rare ids make tables overfit at once when a row comes a second time, while the layers behind them could still learn
    (Liu et al., "Multi-epoch learning for deep click-through rate prediction models", 2023,
    https://arxiv.org/abs/2305.19531).

    Args:
        model: The model, with its optimiser.
        in_place: Whether to overwrite the optimiser's state, for a captured step, which goes on reading that memory.
    """
    tables = embedding_tables(model)
    versions = [table._version for table in tables]
    for owner in _table_owners(model):
        owner.init_weights()
    modules = {id(module.weight): module for module in model.modules() if isinstance(module, nn.Embedding)}
    for table, version in zip(tables, versions):
        if table._version == version:  # FuxiCTR leaves `share_embedding` alone, even where nothing is shared
            modules[id(table)].reset_parameters()
    distributed.broadcast(tables)
    for table in tables:
        if not in_place:
            model.optimizer.state.pop(table, None)
        for value in model.optimizer.state.get(table, {}).values():
            value.zero_()

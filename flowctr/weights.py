"""A model's weights: on disk, written whole or not at all, read only where they fit; and tables that start anew."""

import os
import pickle
from pathlib import Path

import torch
from flowctr import distributed
from fuxictr.pytorch.layers import FeatureEmbeddingDict
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
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
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


def embedding_tables(model: BaseModel) -> list[nn.Parameter]:
    """Lists the embedding tables of a model, those in FuxiCTR's ``FeatureEmbeddingDict``, each once."""
    owners = [module for module in model.modules() if isinstance(module, FeatureEmbeddingDict)]
    tables = [module.weight for owner in owners for module in owner.modules() if isinstance(module, nn.Embedding)]
    return list(dict.fromkeys(tables))


@torch.no_grad()
def redraw_embeddings(model: BaseModel) -> None:
    """Draws the embedding tables as at first, and lets the optimiser forget them.

    Rare ids make tables overfit at once when a row comes a second time, while the layers behind them could still learn
    (Liu et al., "Multi-epoch learning for deep click-through rate prediction models", 2023,
    https://arxiv.org/abs/2305.19531). Everything is overwritten in place, where a captured step reads it.
    """
    for module in model.modules():
        if isinstance(module, FeatureEmbeddingDict):
            module.init_weights()
    tables = embedding_tables(model)
    distributed.broadcast(tables)
    for table in tables:
        for value in model.optimizer.state.get(table, {}).values():
            if isinstance(value, torch.Tensor):
                value.zero_()

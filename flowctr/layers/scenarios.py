"""The scenario of a row: which of the values of a categorical column that training has seen."""

import torch
from fuxictr.features import FeatureMap
from torch import Tensor


def count_scenarios(feature_map: FeatureMap, scenario: str | None, model: str) -> int:
    """Counts the scenarios: the ids of a column but padding, the first, and unseen, the last.

    Args:
        feature_map: FuxiCTR's feature map of the data set.
        scenario: The column.
        model: Name of the model that needs it, for the message.

    Raises:
        ValueError: If the column is not a categorical one of the data, or training has seen none of its values.
    """
    spec = feature_map.features.get(scenario)
    if spec is None or spec["type"] != "categorical":
        columns = [name for name, spec in feature_map.features.items() if spec["type"] == "categorical"]
        kind = "not in the data" if spec is None else f"of type {spec['type']}"
        given = "none" if scenario is None else f"{scenario!r}, which is {kind}"
        raise ValueError(
            f"{model} needs the column of scenarios, scenario: <a categorical column>; got {given}; data set "
            f"{feature_map.dataset_id!r} has {', '.join(columns) or 'none'}"
        )
    count = spec["vocab_size"] - 2
    if count < 1:
        raise ValueError(
            f"{model} needs a column of scenarios; training has seen no value of {scenario!r} of data set "
            f"{feature_map.dataset_id!r} often enough"
        )
    return count


def own_scenario(ids: Tensor, num_scenarios: int) -> Tensor:
    """Marks each row's scenario among all.

    Args:
        ids: Ids of the scenario column, ``(B,)``; scenarios count from 1.
        num_scenarios: Scenarios M.

    Returns:
        ``torch.bool``, ``(B, M)``: True at the row's scenario, nowhere if training has not seen it.
    """
    return ids.view(-1, 1) == torch.arange(1, num_scenarios + 1, device=ids.device)

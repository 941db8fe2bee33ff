"""A small data set in memory for the layer and model tests."""

from collections import OrderedDict

import flowctr  # noqa: F401  before fuxictr, so that it needs no ray
import torch
from fuxictr.features import FeatureMap

BEHAVIORS = {"watch": ["watch_item", "watch_author"], "like": ["like_item"]}
MODEL_ARGUMENTS = {"verbose": 0, "model_root": "checkpoints", "metrics": ["AUC"], "scenario": "author"}
VOCABULARY = 30
WIDE_INITIALIZER = "partial(nn.init.normal_, std=0.3)"  # so that every path carries a signal


def toy_feature_map(labels=("click",), max_len=8) -> FeatureMap:
    """Builds a feature map: three categorical fields, two numeric ones, two behaviours, a group id."""

    def categorical():
        return {"type": "categorical", "source": "", "vocab_size": VOCABULARY, "padding_idx": 0}

    def sequence(shared):
        return {**categorical(), "type": "sequence", "max_len": max_len, "share_embedding": shared}

    feature_map = FeatureMap("toy", "toy")
    feature_map.features = OrderedDict(
        user_group={"type": "meta"},
        item=categorical(),
        author=categorical(),
        user=categorical(),
        age={"type": "numeric", "source": ""},
        hour={"type": "numeric", "source": ""},
        watch_item=sequence("item"),
        watch_author=sequence("author"),
        like_item=sequence("item"),
    )
    feature_map.labels = list(labels)
    feature_map.group_id = "user_group"
    feature_map.num_fields = feature_map.get_num_fields()
    feature_map.set_column_index()
    return feature_map


def toy_batch(feature_map, rows=12, seed=0, padding="post", longest=7) -> dict[str, torch.Tensor]:
    """Draws a batch with histories up to ``longest``, the first row's empty; the same events for either padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (rows, 1), generator=generator)
    lengths[0] = 0
    batch = {}
    for name, spec in feature_map.features.items():
        if spec["type"] == "sequence":
            events = torch.randint(1, VOCABULARY, (rows, 8), generator=generator)
            batch[name] = pad(
                events, lengths // (2 if name.startswith("like") and longest > 1 else 1), spec["max_len"], padding
            )
        elif spec["type"] == "numeric":
            batch[name] = torch.randn(rows, generator=generator)
        else:
            batch[name] = torch.randint(1, VOCABULARY, (rows,), generator=generator)
    for label in feature_map.labels:
        batch[label] = torch.randint(0, 2, (rows,), generator=generator).float()
    return batch


def pad(events, lengths, max_len, padding) -> torch.Tensor:
    """Keeps the first ``lengths`` events of each row and pads them to ``max_len`` on the given side."""
    padded = torch.zeros(len(events), max_len, dtype=torch.long)
    for row, length in enumerate(lengths.flatten().tolist()):
        start = max_len - length if padding == "pre" else 0
        padded[row, start : start + length] = events[row, :length]
    return padded


def damage(archive, how):
    """Overwrites a part of an .npz: of the ``stream`` of an array, or the ``method`` that it is compressed by."""
    content = bytearray(archive.read_bytes())
    if how == "stream":
        content[100:120] = b"\xff" * 20
    else:
        content[content.find(b"PK\x01\x02") + 10] = 99
    archive.write_bytes(content)

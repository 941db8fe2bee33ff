"""From a FuxiCTR batch to field tokens and behaviour events; the only layer that knows FuxiCTR's FeatureMap."""

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from flowctr.layers.masks import masked_mean, right_align
from flowctr.layers.matches import MatchToken
from flowctr.layers.towers import TargetTowers
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import DIN_Attention, FeatureEmbeddingDict
from torch import Tensor, nn

MEAN_POOLING = "layers.MaskedAveragePooling()"


class FeatureTokens(nn.Module):
    """Embeds a batch: every field becomes a token, every event of a behaviour one step.

    * Sequence columns named in ``behaviors`` become events: the columns of one behaviour are aligned step by step, and
      an event is real when any of them is not padding (id 0). Events are right-aligned, so padding side and length of
      the data do not matter.
    * All numeric fields together become one dense token, ``Linear(values)``.
    * Every other field that is not ``meta`` becomes a token: categorical ones by their table, ``embedding`` ones by a
      linear map, remaining sequences pooled by their feature encoder (the mean unless the data set names one).
    * With ``target_matches``, every behaviour whose columns share tables with fields adds a token of how its events
      match these fields, the target (`MatchToken`).
    * With ``target_attention``, such a behaviour also adds a token for each of these columns: its events, summed with
      the weights that DIN's attention gives them for the target (Zhou et al., "Deep interest network", 2018).
    * With ``target_softmax``, all such behaviours together add a token of how well they fit the target, which learns by
      `target_loss` too, from the targets of the other rows (`TargetTowers`).

    The tables live in FuxiCTR's ``FeatureEmbeddingDict``, which its ``embedding_regularizer`` looks for. A column
    whose own ``embedding_dim`` differs from the token width gets a linear map to it.

    Args:
        feature_map: FuxiCTR's feature map of the data set.
        dim: Token width D.
        behaviors: Behaviour name -> its columns; none: every sequence column is a behaviour of its own.
        embedding_initializer: FuxiCTR's initialiser string of the tables.
        target_matches: Whether to add the tokens of what matches the target.
        target_attention: Hidden units of DIN's attention for the target; none: no such tokens. Its activation, Dice,
            takes batch statistics from padded steps too, so the length of the batch has a small say while training.
        target_softmax: Weight of `target_loss`; none: no such token.

    Raises:
        ValueError: If ``behaviors`` names a column that is not a sequence of the data set, names one twice, or aligns
            columns of different ``max_len``; if there is no field to make a token of; if a column shares the embedding
            of one that does not exist; or if no sequence shares a field's, which all that compares with the target
            needs.
    """

    def __init__(
        self,
        feature_map: FeatureMap,
        dim: int,
        behaviors: Mapping[str, Sequence[str]] | None = None,
        embedding_initializer: str = "partial(nn.init.normal_, std=1e-4)",
        target_matches: bool = False,
        target_attention: Sequence[int] | None = None,
        target_softmax: float | None = None,
    ):
        super().__init__()
        specs = feature_map.features
        self.output_dim = dim
        self.behaviors = _check_behaviors(feature_map, behaviors)
        columns = [column for names in self.behaviors.values() for column in names]
        self.numeric = [name for name, spec in specs.items() if spec["type"] == "numeric"]
        self.fields = [
            name for name, spec in specs.items() if spec["type"] not in ("meta", "numeric") and name not in columns
        ]
        if not self.fields and not self.numeric:
            raise ValueError(f"data set {feature_map.dataset_id!r} has no field beside its sequences and meta columns")
        view = _embedding_view(feature_map, columns)
        self.embedding = FeatureEmbeddingDict(
            view,
            dim,
            embedding_initializer=embedding_initializer,
            not_required_feature_columns=self.numeric,
        )
        self.dense = nn.Linear(len(self.numeric), dim) if self.numeric else None
        widths = {name: _embedded_width(view.features[name], dim) for name in self.fields + columns}
        self.resize = nn.ModuleDict(
            {name: nn.Linear(width, dim, bias=False) for name, width in widths.items() if width != dim}
        )
        if target_attention is not None:
            _check_units(target_attention)
        if target_softmax is not None:
            _check_weight(target_softmax)
        wanted = {
            "target_matches": target_matches,
            "target_attention": target_attention is not None,
            "target_softmax": target_softmax is not None,
        }
        self.targets = self._targets(feature_map) if any(wanted.values()) else {}
        if any(wanted.values()) and not self.targets:
            raise ValueError(
                f"{' and '.join(name for name, on in wanted.items() if on)}: no sequence of data set "
                f"{feature_map.dataset_id!r} shares the embedding of a field"
            )
        sizes = [len(own) for own in self.targets.values()]
        self.matches = nn.ModuleList(MatchToken(size, dim) for size in sizes) if target_matches else None
        self.attentions = None
        if target_attention is not None:
            self.attentions = nn.ModuleList(
                DIN_Attention(size * dim, list(target_attention), "Dice", use_softmax=True) for size in sizes
            )
        self.target_softmax, self.towers = target_softmax, None
        if target_softmax is not None:
            self.towers = TargetTowers(2 * sum(sizes) * dim, len(self.target_fields) * dim, dim)
        self._compared: tuple[Tensor, Tensor, Tensor] | None = None  # by the towers, until the model takes it
        self.rare_ids = {
            name: specs[name].get("oov_idx", specs[name]["vocab_size"] - 1)
            for own in self.targets.values()
            for name in own.values()
        }
        self.num_columns = len(columns)
        self.max_len = max((specs[column]["max_len"] for column in columns), default=0)

    @property
    def num_fields(self) -> int:
        """Number of field tokens N: the dense token, if any, one per other field, those of the target in histories."""
        return len(self.field_names)

    @property
    def field_names(self) -> list[str]:
        """Names of the field tokens in their order."""
        names = (["dense"] if self.dense is not None else []) + self.fields
        if self.matches is not None:
            names = names + [f"{behavior} matches" for behavior in self.targets]
        if self.attentions is not None:
            names = names + [f"{column} attended to" for own in self.targets.values() for column in own]
        if self.towers is not None:
            names = [*names, "histories and target"]
        return names

    @property
    def target_fields(self) -> list[str]:
        """Names of the fields that are the target: those whose tables a behaviour shares."""
        return list(dict.fromkeys(field for own in self.targets.values() for field in own.values()))

    def _targets(self, feature_map: FeatureMap) -> dict[str, dict[str, str]]:
        """Finds, for each behaviour, the columns that share a categorical field's table, and the first such field."""
        fields: dict[str, str] = {}
        for name in self.fields:
            if feature_map.features[name]["type"] == "categorical":
                fields.setdefault(_table_owner(feature_map, name), name)
        targets: dict[str, dict[str, str]] = {}
        for behavior, columns in self.behaviors.items():
            owners = {column: _table_owner(feature_map, column) for column in columns}
            if own := {column: fields[owner] for column, owner in owners.items() if owner in fields}:
                targets[behavior] = own
        return targets

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Embeds the inputs.

        Args:
            inputs: Column -> ids or values, ``(B,)``, ``(B, T)`` or ``(B, values)``.

        Returns:
            Field tokens ``(B, N, D)``; events of each behaviour ``(B, T, columns * D)``, right-aligned, zeros where
            padded; their masks ``(B, T)``.
        """
        aligned, masks = self._align(inputs)
        embedded = self.embedding({name: aligned.get(name, inputs[name]) for name in self.embedding.embedding_layers})
        embedded.update((name, resize(embedded[name])) for name, resize in self.resize.items())
        events = {
            behavior: torch.cat([embedded[column] for column in columns], dim=-1) * masks[behavior].unsqueeze(-1)
            for behavior, columns in self.behaviors.items()
        }
        tokens = [embedded[name] for name in self.fields]
        if self.dense is not None:
            values = torch.stack([inputs[name].flatten() for name in self.numeric], dim=1)  # (B, numeric fields)
            tokens.insert(0, self.dense(values.to(self.dense.weight.dtype)))
        for behavior, match in zip(self.targets, self.matches or ()):
            tokens.append(match(self._matches(behavior, aligned, inputs), masks[behavior]))
        histories = {
            behavior: torch.cat([embedded[column] for column in own], dim=-1) * masks[behavior].unsqueeze(-1)
            for behavior, own in self.targets.items()
            if self.attentions is not None or self.towers is not None
        }  # (B, T, columns of the target * D)
        for behavior, attention in zip(histories, self.attentions or ()):
            own = self.targets[behavior]
            target = torch.cat([embedded[field] for field in own.values()], dim=-1)  # (B, columns * D)
            tokens += attention(target, histories[behavior], masks[behavior]).chunk(len(own), dim=-1)
        if self.towers is not None:
            tokens.append(self._compare(histories, masks, embedded, inputs))
        return torch.stack(tokens, dim=1), events, masks

    def _matches(self, behavior: str, aligned: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """Compares a behaviour's events with the target, ``(B, T, columns that share a field's table)``."""
        matches = []
        for column, field in self.targets[behavior].items():
            target = inputs[field].long().view(-1, 1)  # (B, 1)
            known = (target != 0) & (target != self.rare_ids[field])  # which stands for all that are rare
            matches.append((aligned[column] == target) & known)
        return torch.stack(matches, dim=-1)

    def _compare(
        self,
        histories: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        embedded: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
    ) -> Tensor:
        """Makes the towers' token, ``(B, D)``, of each history's mean and latest event and of the target."""
        parts = [part for b, x in histories.items() for part in (masked_mean(x, masks[b]), x[:, -1])]
        target = torch.cat([embedded[field] for field in self.target_fields], dim=-1)
        token, u, v = self.towers(torch.cat(parts, dim=-1), target)
        if self.training:  # what evaluates needs no loss
            self._compared = u, v, torch.stack([inputs[field].flatten() for field in self.target_fields], dim=1)
        return token

    def take_compared(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Hands over what `target_loss` needs of the last forward, for the model to put among its own outputs.

        Returns:
            ``{"compared": ...}``; empty without towers, and while evaluating.
        """
        compared, self._compared = self._compared, None
        return {} if compared is None else {"compared": compared}

    def target_loss(self, outputs: Mapping[str, Any], labels: Sequence[Tensor]) -> Tensor | float:
        """Computes the towers' loss, weighted by ``target_softmax``: the mean over the labels, whatever their weights.

        That of a label is the mean over the rows where it is positive, above one half, and 0 if there are none. A part
        of a batch (``gradient_accumulation``, several processes) is a batch of its own.

        Args:
            outputs: The model's outputs, with what `take_compared` gave.
            labels: Labels of the batch, ``(B, 1)`` each.

        Returns:
            The loss; 0 if there is nothing to compute it of.
        """
        if "compared" not in outputs:
            return 0.0
        losses = self.towers.losses(*outputs["compared"])  # (B,)
        positives = [label.flatten() > 0.5 for label in labels]
        # Whole rows are left out by zeros: how many are positive, only the device knows.
        means = [torch.where(p, losses, 0).sum() / p.sum().clamp(min=1) for p in positives]
        return self.target_softmax * sum(means) / len(means)

    def append_pooled(self, fields: Tensor, events: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Tensor:
        """Appends the mean of every sequence column's real events to the field tokens, ``(B, N + columns, D)``."""
        means = [masked_mean(events[behavior], masks[behavior]) for behavior in self.behaviors]
        pooled = [mean.unflatten(-1, (-1, self.output_dim)) for mean in means]
        return torch.cat([fields, *pooled], dim=1)

    def _align(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        aligned, masks = {}, {}
        for behavior, columns in self.behaviors.items():
            ids = [inputs[column].long() for column in columns]
            real = torch.stack([column != 0 for column in ids]).any(dim=0)  # (B, T)
            aligned.update((column, right_align(values, real)) for column, values in zip(columns, ids))
            masks[behavior] = right_align(real.long(), real).bool()
        return aligned, masks


def _check_units(target_attention: Sequence[int]) -> None:
    units = target_attention if isinstance(target_attention, (list, tuple)) else []
    if not units or not all(isinstance(size, int) and size > 0 for size in units):
        raise ValueError(
            f"target_attention={target_attention!r} must list the hidden units of its network, such as [32]; null "
            "turns it off"
        )


def _check_weight(target_softmax: float) -> None:
    is_number = isinstance(target_softmax, int | float) and not isinstance(target_softmax, bool)
    if not (is_number and 0 < target_softmax < math.inf):
        raise ValueError(f"target_softmax={target_softmax!r} must be a weight above 0, such as 0.1; null turns it off")


def _check_behaviors(feature_map: FeatureMap, behaviors: Mapping[str, Sequence[str]] | None) -> dict[str, list[str]]:
    sequences = {name: spec for name, spec in feature_map.features.items() if spec["type"] == "sequence"}
    if behaviors is None:
        return {name: [name] for name in sequences}
    seen: dict[str, str] = {}
    for behavior, columns in behaviors.items():
        if not columns:
            raise ValueError(f"behavior {behavior!r} names no columns")
        for column in columns:
            if column not in sequences:
                raise ValueError(
                    f"behavior {behavior!r} names {column!r}, which is not a sequence of data set "
                    f"{feature_map.dataset_id!r}; its sequences are: {', '.join(sequences) or 'none'}"
                )
            if column in seen:
                raise ValueError(f"column {column!r} is named by behaviors {seen[column]!r} and {behavior!r}")
            seen[column] = behavior
        lengths = {column: sequences[column]["max_len"] for column in columns}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"behavior {behavior!r} aligns columns of different max_len: {lengths}; give them one max_len"
            )
    return {behavior: list(columns) for behavior, columns in behaviors.items()}


def _embedding_view(feature_map: FeatureMap, event_columns: Sequence[str]) -> FeatureMap:
    """Copies the feature map for the embedding tables: event columns stay unpooled, other sequences are pooled.

    Columns that share a table name the one that owns it and come last: FuxiCTR only shares with a table that exists
    already, and leaves one that it could not share at torch's N(0, 1).
    """
    features = {}
    for name, spec in feature_map.features.items():
        spec = dict(spec)
        if name in event_columns:
            if "Pooling" in str(spec.get("feature_encoder")):  # any other encoder, a linear map say, keeps the steps
                del spec["feature_encoder"]
                spec.pop("emb_output_dim", None)  # the width behind the pooling
        elif spec["type"] == "sequence":
            spec.setdefault("feature_encoder", MEAN_POOLING)
        if spec.get("share_embedding"):
            owner = _table_owner(feature_map, name)
            spec["share_embedding"] = owner
            spec["embedding_dim"] = feature_map.features[owner].get("embedding_dim")
        features[name] = {key: value for key, value in spec.items() if value is not None}
    view = copy.copy(feature_map)
    view.features = OrderedDict(sorted(features.items(), key=lambda item: "share_embedding" in item[1]))
    return view


def _table_owner(feature_map: FeatureMap, name: str) -> str:
    owner = name
    while shared := feature_map.features[owner].get("share_embedding"):
        if shared not in feature_map.features:
            raise ValueError(
                f"{name!r} shares the embedding of {shared!r}, which is not a feature of {feature_map.dataset_id!r}"
            )
        owner = shared
    return owner


def _embedded_width(spec: Mapping, dim: int) -> int:
    return spec.get("emb_output_dim") or spec.get("embedding_dim") or dim

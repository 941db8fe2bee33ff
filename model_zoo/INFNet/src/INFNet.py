"""INFNet: a task-aware information flow network for large-scale recommendation, versions 1 and 2 (2025, 2026).

https://arxiv.org/abs/2508.11565v1 (proxies and gated units) and https://arxiv.org/abs/2508.11565v2 (hub tokens,
aggregate and broadcast). ``version`` picks the preset; every option below can also be set by itself. Tokens and first
hubs are in hubs.py, CA, aggregation, PGU and BGU in blocks.py; README.md lists the papers' equations with their code.

Differs from the papers:
  * Both stages of v1 have a residual and a LayerNorm, as in v2; ``residual: false`` is v1's literal equations.
  * v1's gates are driven by the proxies of the same block, as its text says; ``gate_hubs: previous`` is its formula.
  * Padded events are masked in every attention and pooling; a behaviour without events has a zero hub.
  * Columns of one behaviour become one token per event; its bucketised time gap is one of these columns, which adds
    the relative time embedding of v2 through the event's linear map.
  * The last block builds only what the head reads; attention over a single token is that token's value.
  * Options beyond the papers, off by default: ``head_input: all`` lets the heads read the field and sequence hubs
    beside their token; ``target_matches`` gives the fields a token of how each behaviour's events match the target,
    ``target_attention`` tokens of the events that DIN's attention picks for it, ``target_softmax`` a token and a loss
    of how histories fit the target and the other targets of the batch; ``cross_rank`` lets the heads read a cross of
    DCNv2 over all field tokens and a summary of each behaviour as well.
"""

import warnings
from types import SimpleNamespace

import torch
from flowctr.layers import (
    FeatureTokens,
    LearnedTokens,
    TaskHeads,
    check_options,
    check_positive,
    record_attention,
)
from fuxictr.pytorch.models import MultiTaskModel
from torch import nn

from .blocks import Block, Broadcast, build_aggregation, plan_blocks
from .crosses import CrossTokens
from .hubs import EventTokens, FieldHubs, SequenceHubs, TaskHubs

PRESETS = {
    "v1": {
        "aggregation": "cross",
        "broadcast": "pgu",
        "num_field_hubs": 4,
        "num_task_hubs": 2,
        "sequence_pooling": "shared_sum",
        "positions": False,
        "token_std": None,
    },
    "v2": {
        "aggregation": "views",
        "broadcast": "bgu",
        "num_field_hubs": 16,
        "num_task_hubs": 4,
        "sequence_pooling": "typed_mean",
        "positions": True,
        "token_std": 1e-4,
    },
}
AGGREGATIONS = ("cross", "views", "views_sum", "union", "all_to_all", "none")
BROADCASTS = ("pgu", "bgu", "none")
HUB_INITS = ("mlp", "mean", "random")
SEQUENCE_POOLINGS = ("shared_sum", "typed_mean")
GATE_HUBS = ("refined", "previous")
HEAD_INPUTS = ("token", "hub", "both", "all")


class INFNet(MultiTaskModel):
    """Tokens of fields C, behaviour events S and tasks T exchange information through a few hub tokens per group.

    Args:
        feature_map: FuxiCTR's feature map.
        model_id: Name of the checkpoint and log.
        gpu: GPU index, -1 for the CPU.
        task: FuxiCTR's task type, one for all labels or a list with one for each.
        behaviors: Behaviour name -> aligned sequence columns; none: every sequence column by itself.
        embedding_dim: Token width D.
        embedding_initializer: FuxiCTR's initialiser of the embedding tables.
        target_matches: Whether the fields get a token of how each behaviour's events match the target.
        target_attention: Hidden units of DIN's attention, whose sums of events for the target join the fields; none: no
            such tokens.
        target_softmax: Weight of a loss that, where a binary label is positive, tells the target from the others of the
            batch by the histories, with a token of its own (see ``flowctr.layers.TargetTowers``); none: neither.
        version: Preset ``v1`` or ``v2``: the default of each option below that is None.
        num_blocks: Blocks N.
        num_heads: Attention heads; must divide ``embedding_dim``.
        aggregation: How hubs read tokens: ``cross`` (v1: the other two groups, summed), ``views`` (v2: all three
            groups, concatenated and mapped), ``views_sum``, ``union`` (one softmax over all tokens), ``all_to_all``
            (no hubs: every token reads every token), ``none`` (late fusion of the first hubs in the head).
        broadcast: How tokens read hubs: ``pgu`` (v1), ``bgu`` (v2) or ``none``.
        hub_init: First field and sequence hubs: ``mlp``, ``mean`` or ``random`` (learned, the same for every row).
        num_field_hubs: Field hubs m (v1), n_c (v2).
        num_task_hubs: Shared task hubs N_s (v1), n_s (v2).
        hubs_per_behavior: Sequence hubs of each behaviour.
        hub_hidden_units: Hidden width of the field hubs' MLP.
        sequence_pooling: Sequence hubs: ``shared_sum`` (v1) or ``typed_mean`` (v2: an MLP for each behaviour).
        positions: Whether events carry a learned position, counted from the most recent one.
        token_std: Standard deviation of what task tokens, shared hubs and positions start with; v1's are xavier normal,
            v2's as small as FuxiCTR's embeddings, which larger positions and tokens drown.
        gate_hubs: Hubs that drive a block's broadcast: ``refined`` in this block, or the ``previous`` ones.
        bgu_expansion: Hidden width of the BGU's MLP in units of D; 0: one linear map.
        residual: Residual and LayerNorm around both stages; False: v1's equations as printed.
        head_input: What a head reads: its task ``token``, its task ``hub``, ``both``; or ``all``: its token and all
            field and sequence hubs.
        cross_rank: Rank of a DCNv2 cross of the field tokens and a summary of each behaviour, which the heads read too,
            compressed to as many tokens as there are field hubs; None: no cross.
        task_blind: Ablation: no task tokens; all heads read the field and sequence hubs.
        attention_dropout: Dropout on attention weights.
        head_hidden_units: Hidden widths of each head.
        head_activation: Activation of the heads.
        net_dropout: Dropout of the heads.
        batch_norm: Batch normalisation in the heads.
        optimizer: FuxiCTR's optimiser name.
        loss: FuxiCTR's loss name.
        learning_rate: Initial learning rate.
        **kwargs: Arguments of ``MultiTaskModel`` and ``BaseModel``.

    Raises:
        ValueError: If an option is unknown, a count is below one, or options leave the heads without information.
    """

    def __init__(
        self,
        feature_map,
        model_id="INFNet",
        gpu=-1,
        task="binary_classification",
        behaviors=None,
        embedding_dim=32,
        embedding_initializer="partial(nn.init.normal_, std=1e-4)",
        target_matches=False,
        target_attention=None,
        target_softmax=None,
        version="v2",
        num_blocks=3,
        num_heads=1,
        aggregation=None,
        broadcast=None,
        hub_init="mlp",
        num_field_hubs=None,
        num_task_hubs=None,
        hubs_per_behavior=1,
        hub_hidden_units=256,
        sequence_pooling=None,
        positions=None,
        token_std=None,
        gate_hubs="refined",
        bgu_expansion=4,
        residual=True,
        head_input="token",
        cross_rank=None,
        task_blind=False,
        attention_dropout=0.0,
        head_hidden_units=(128, 64),
        head_activation="ReLU",
        net_dropout=0.0,
        batch_norm=False,
        optimizer="adam",
        loss="binary_crossentropy",
        learning_rate=1e-3,
        **kwargs,
    ):
        kwargs["num_tasks"] = len(feature_map.labels)
        super().__init__(feature_map, model_id=model_id, gpu=gpu, task=task, **kwargs)
        check_options(version=(version, PRESETS))
        given = {
            "aggregation": aggregation,
            "broadcast": broadcast,
            "num_field_hubs": num_field_hubs,
            "num_task_hubs": num_task_hubs,
            "sequence_pooling": sequence_pooling,
            "positions": positions,
            "token_std": token_std,
        }
        use = SimpleNamespace(**{k: PRESETS[version][k] if value is None else value for k, value in given.items()})
        check_options(
            aggregation=(use.aggregation, AGGREGATIONS),
            broadcast=(use.broadcast, BROADCASTS),
            hub_init=(hub_init, HUB_INITS),
            sequence_pooling=(use.sequence_pooling, SEQUENCE_POOLINGS),
            gate_hubs=(gate_hubs, GATE_HUBS),
            head_input=(head_input, HEAD_INPUTS),
        )
        check_positive(
            num_blocks=num_blocks,
            num_field_hubs=use.num_field_hubs,
            num_task_hubs=use.num_task_hubs,
            hubs_per_behavior=hubs_per_behavior,
            hub_hidden_units=hub_hidden_units,
        )
        if bgu_expansion != 0:  # 0: one linear map
            check_positive(bgu_expansion=bgu_expansion)
        if cross_rank is not None:
            check_positive(cross_rank=cross_rank)
        if token_std is not None and not (isinstance(token_std, int | float) and token_std > 0):
            raise ValueError(f"token_std must be a number above 0; got {token_std!r}")
        _check_heads_are_fed(use.aggregation, use.broadcast, gate_hubs, head_input, task_blind)
        self.tokens = FeatureTokens(
            feature_map,
            embedding_dim,
            behaviors,
            embedding_initializer,
            target_matches,
            target_attention,
            target_softmax,
        )
        self.task_blind, self.head_input = task_blind, head_input
        self.reads_hubs = task_blind or head_input == "all" or use.aggregation == "none"  # those of fields and events
        dim, labels, num_fields = embedding_dim, feature_map.labels, self.tokens.num_fields
        sizes = {"tasks": 0 if task_blind else len(labels), "fields": num_fields, "sequence": self.tokens.max_len}
        sizes = {group: size for group, size in sizes.items() if size}
        if (len(sizes) == 1 and use.aggregation == "cross") or (set(sizes.values()) == {1} and "sequence" not in sizes):
            raise ValueError(
                f"data set {feature_map.dataset_id!r} leaves INFNet nothing to exchange: its token groups are {sizes}; "
                "it needs a sequence, or more fields or labels"
            )
        hybrid = use.aggregation != "cross"  # v2's task hubs start with the task tokens, v1's are shared ones only
        num_shared = use.num_task_hubs if use.broadcast != "none" else 0  # only a broadcast reads the shared ones
        num_hubs = {
            "tasks": num_shared + len(labels) * hybrid,
            "fields": use.num_field_hubs,
            "sequence": hubs_per_behavior * len(self.tokens.behaviors),
        }
        _warn_of_more_hubs_than_tokens("num_field_hubs", use.num_field_hubs, num_fields, "field tokens")
        if "sequence" in sizes:
            _warn_of_more_hubs_than_tokens("hubs_per_behavior", hubs_per_behavior, self.tokens.max_len, "events")

        if "sequence" in sizes:
            self.event_tokens = EventTokens(
                self.tokens.behaviors, self.tokens.max_len, dim, use.positions, use.token_std
            )
        if "tasks" in sizes:
            self.task_tokens = LearnedTokens(len(labels), dim, use.token_std)
        pooled_groups = [group for group in ("fields", "sequence") if group in sizes]
        hubs_read = pooled_groups if self.reads_hubs else ["tasks"] if head_input != "token" else []
        plan, initial_hubs = plan_blocks(
            list(sizes),
            0 if use.aggregation == "none" else num_blocks,
            broadcasts=use.broadcast != "none" and use.aggregation != "all_to_all",
            gates_follow=gate_hubs == "refined",
            head_reads_tokens=not task_blind and head_input != "hub",
            hubs_read=hubs_read,
        )
        attend = {"dim": dim, "num_heads": num_heads, "dropout": attention_dropout}
        self.blocks = nn.ModuleList(
            Block(
                build_aggregation(use.aggregation, refined, sizes, residual, attend),
                Broadcast(gated, num_hubs, dim, use.broadcast, bgu_expansion, residual),
                gate_hubs == "refined",
            )
            for refined, gated in plan
        )
        build_hubs = {
            "tasks": lambda: TaskHubs(num_shared, dim, hybrid, use.token_std),
            "fields": lambda: FieldHubs(hub_init, num_fields, use.num_field_hubs, dim, hub_hidden_units),
            "sequence": lambda: SequenceHubs(
                hub_init, use.sequence_pooling, len(self.tokens.behaviors), hubs_per_behavior, dim
            ),
        }
        self.initial_hubs = nn.ModuleDict({group: build_hubs[group]() for group in initial_hubs})
        pooled_width = sum(num_hubs[group] for group in pooled_groups) * dim
        token_width = dim * (1 + (head_input == "both"))
        head_width = pooled_width if task_blind else token_width + pooled_width * self.reads_hubs
        self.crosses = None
        if cross_rank is not None:
            self.crosses = CrossTokens(num_fields, len(self.tokens.behaviors), use.num_field_hubs, dim, cross_rank)
            head_width += self.crosses.output_dim
        self.heads = TaskHeads(
            head_width,
            labels,
            head_hidden_units,
            self.output_activation,
            head_activation,
            net_dropout,
            batch_norm,
        )
        self.compile(optimizer, loss, learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs):
        """Predicts every label, ``{"<label>_pred": (B, 1)}`` (and ``"y_pred"`` when there is one label)."""
        tokens, masks, events = self.tokenize(self.get_inputs(inputs))  # T (B, K, D), C (B, M, D), S (B, L, D)
        hubs = {group: initial(tokens, events) for group, initial in self.initial_hubs.items()}
        fields = tokens["fields"]
        for block in self.blocks:
            tokens, hubs = block(tokens, hubs, masks)
        x = self.head_inputs(tokens, hubs)
        if self.crosses is not None:
            crossed = self.crosses(fields, events)  # of what the blocks start with
            x = torch.cat([x, crossed.unsqueeze(1).expand(-1, x.shape[1], -1) if x.dim() == 3 else crossed], dim=-1)
        return self.heads(x) | self.tokens.take_compared()

    def tokenize(self, inputs):
        """Builds the token groups.

        Returns:
            Tokens of each group, ``(B, N, D)``; masks of each group ``(B, N)``, None where all tokens are real; events
            and mask of each behaviour, ``(B, T, D)`` and ``(B, T)``.
        """
        fields, columns, column_masks = self.tokens(inputs)
        tokens, masks, events = {}, {"tasks": None, "fields": None}, {}
        if not self.task_blind:
            tokens["tasks"] = self.task_tokens(len(fields))
        tokens["fields"] = fields
        if columns:
            events = {name: (s, column_masks[name]) for name, s in self.event_tokens(columns).items()}
            tokens["sequence"] = torch.cat([event for event, _ in events.values()], dim=1)  # (B, L, D)
            masks["sequence"] = torch.cat(list(column_masks.values()), dim=1)  # (B, L)
        return tokens, masks, events

    def head_inputs(self, tokens, hubs):
        """Gives each head its input, ``(B, K, width)``, or ``(B, width)`` where all heads read the same."""
        if self.reads_hubs:
            pooled = torch.cat([hubs[group] for group in ("fields", "sequence") if group in hubs], dim=1).flatten(1)
            if self.task_blind:
                return pooled
            return torch.cat([tokens["tasks"], pooled.unsqueeze(1).expand(-1, self.num_tasks, -1)], dim=-1)
        streams = {"token": tokens["tasks"]}
        if self.head_input != "token":
            streams["hub"] = hubs["tasks"][:, : self.num_tasks]  # v2's task hubs start with one per task
        if self.head_input == "hub":
            del streams["token"]
        return torch.cat(list(streams.values()), dim=-1)

    def add_loss(self, return_dict, y_true):
        """Adds the losses of the labels and, with ``target_softmax``, of the target among those of the batch."""
        return super().add_loss(return_dict, y_true) + self.tokens.target_loss(return_dict, y_true)

    @torch.no_grad()
    def attention_maps(self, inputs):
        """Reads out what the tasks attend to, averaged over heads and rows of a batch.

        Returns:
            Name -> (weights ``(tasks, fields + behaviours)``, row names, column names); the events of a behaviour are
            summed up. The weights over one group sum to one in a row that has events, unless the aggregation takes one
            softmax over all groups.
        """
        self.eval()
        with record_attention(self) as recorded:
            self.forward(inputs)
        steps = [inputs[columns[0]].shape[1] for columns in self.tokens.behaviors.values()]
        num_fields = self.tokens.num_fields
        names = self.tokens.field_names + list(self.tokens.behaviors)
        maps = {}
        for number, block in enumerate(self.blocks):
            if self.task_blind or "tasks" not in getattr(block.aggregation, "queries", ["tasks"]):
                continue  # no task reads in this block: broadcast 'none' refines the hubs that the heads read
            weights = _task_weights(recorded, f"blocks.{number}.aggregation", self.num_tasks, num_fields, sum(steps))
            parts = weights.split([1] * num_fields + steps, dim=-1)
            summed = torch.stack([part.sum(dim=-1) for part in parts], dim=-1)
            maps[f"tasks over inputs, block {number + 1}"] = (
                summed.cpu().numpy(),
                list(self.feature_map.labels),
                names,
            )
        return maps


def _check_heads_are_fed(aggregation, broadcast, gate_hubs, head_input, task_blind):
    has_task_hubs = aggregation in ("views", "views_sum", "union")
    if head_input == "all" and (task_blind or aggregation in ("all_to_all", "none")):
        raise ValueError(
            "head_input='all' adds hubs to the task tokens: aggregation='all_to_all' has none, with 'none' heads read "
            f"them anyway, task_blind has no tokens; got aggregation={aggregation!r}, task_blind={task_blind}"
        )
    if head_input in ("hub", "both") and (task_blind or not has_task_hubs):
        raise ValueError(
            f"head_input={head_input!r} needs v2's task hubs; got aggregation={aggregation!r}, task_blind={task_blind}"
        )
    if has_task_hubs and broadcast == "none" and head_input == "token" and not task_blind:
        raise ValueError("broadcast='none' leaves the task tokens constant; set head_input='hub' to read their hubs")
    if has_task_hubs and gate_hubs == "previous":
        raise ValueError(f"gate_hubs='previous' is v1's formula, for aggregation='cross'; got {aggregation!r}")
    if task_blind and aggregation == "all_to_all":
        raise ValueError("task_blind reads the hubs, and aggregation='all_to_all' has none; use another aggregation")


def _warn_of_more_hubs_than_tokens(name, hubs, tokens, kind):
    """Warns of a group whose hubs cost more than its tokens; task hubs may: the papers have more than tasks."""
    if hubs > tokens:
        warnings.warn(f"{name}={hubs} exceeds the {tokens} {kind}; set it to at most {tokens}", stacklevel=3)


def _task_weights(recorded, prefix, num_tasks, num_fields, num_steps):
    """Collects the attention of the task rows over fields and events, ``(K, fields + L)``, of one block.

    Averages over the rows of the batch; a row without events has no attention to them.
    """
    if f"{prefix}.views.all" in recorded:  # queries and keys both start with the tasks
        return recorded[f"{prefix}.views.all"][:, :num_tasks, num_tasks:].mean(dim=0)
    parts = []
    for source, size in (("fields", num_fields), ("sequence", num_steps)):
        names = [name for name in (f"{prefix}.views.{source}", f"{prefix}.flows.tasks.{source}") if name in recorded]
        if names:
            parts.append(recorded[names[0]][:, :num_tasks].mean(dim=0).cpu())
        elif size:  # attention over a single field
            parts.append(torch.ones(num_tasks, size))
    return torch.cat(parts, dim=-1)

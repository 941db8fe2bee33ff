"""INFNet: a task-aware information flow network for large-scale recommendation, versions 1 and 2 (2025, 2026).

https://arxiv.org/abs/2508.11565v1 (proxies and gated units) and https://arxiv.org/abs/2508.11565v2 (hub tokens,
aggregate and broadcast). ``version`` picks the preset; every option below can also be set by itself.

Differs from the papers:
  * Both stages of v1 have a residual and a LayerNorm, as in v2; ``residual: false`` is v1's literal equations.
  * v1's gates are driven by the proxies of the same block, as its text says; ``gate_hubs: previous`` is its formula.
  * Padded events are masked in every attention and pooling; a behaviour without events has a zero hub.
  * Columns of one behaviour become one token per event; its bucketised time gap is one of these columns, which adds
    the relative time embedding of v2 through the event's linear map.
  * The last block builds only what the head reads; attention over a single token is that token's value.
"""

import warnings
from types import SimpleNamespace

import torch
from flowctr.layers import (
    FeatureTokens,
    LearnedTokens,
    MultiHeadAttention,
    TaskHeads,
    check_options,
    check_positive,
    masked_mean,
    record_attention,
)
from fuxictr.pytorch.models import MultiTaskModel
from torch import nn

PRESETS = {
    "v1": {
        "aggregation": "cross",
        "broadcast": "pgu",
        "num_field_hubs": 4,
        "num_task_hubs": 2,
        "sequence_pooling": "shared_sum",
        "positions": False,
    },
    "v2": {
        "aggregation": "views",
        "broadcast": "bgu",
        "num_field_hubs": 16,
        "num_task_hubs": 4,
        "sequence_pooling": "typed_mean",
        "positions": True,
    },
}
AGGREGATIONS = ("cross", "views", "views_sum", "union", "all_to_all", "none")
BROADCASTS = ("pgu", "bgu", "none")
HUB_INITS = ("mlp", "mean", "random")
SEQUENCE_POOLINGS = ("shared_sum", "typed_mean")
GATE_HUBS = ("refined", "previous")
HEAD_INPUTS = ("token", "hub", "both")


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
        gate_hubs: Hubs that drive a block's broadcast: ``refined`` in this block, or the ``previous`` ones.
        bgu_expansion: Hidden width of the BGU's MLP in units of D; 0: one linear map.
        residual: Residual and LayerNorm around both stages; False: v1's equations as printed.
        head_input: What a head reads: its task ``token``, its task ``hub`` or ``both``.
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
        gate_hubs="refined",
        bgu_expansion=4,
        residual=True,
        head_input="token",
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
        )
        _check_heads_are_fed(use.aggregation, use.broadcast, gate_hubs, head_input, task_blind)
        self.tokens = FeatureTokens(feature_map, embedding_dim, behaviors, embedding_initializer)
        self.task_blind, self.head_input, self.late_fusion = task_blind, head_input, use.aggregation == "none"
        dim, labels, num_fields = embedding_dim, feature_map.labels, self.tokens.num_fields
        sizes = {"tasks": 0 if task_blind else len(labels), "fields": num_fields, "sequence": self.tokens.max_len}
        sizes = {group: size for group, size in sizes.items() if size}
        hybrid = use.aggregation != "cross"  # v2's task hubs start with the task tokens, v1's are shared ones only
        num_shared = use.num_task_hubs if use.broadcast != "none" else 0  # only a broadcast reads the shared ones
        num_hubs = {
            "tasks": num_shared + len(labels) * hybrid,
            "fields": use.num_field_hubs,
            "sequence": hubs_per_behavior * len(self.tokens.behaviors),
        }
        if use.num_field_hubs > num_fields:
            warnings.warn(f"num_field_hubs={use.num_field_hubs} exceeds the {num_fields} field tokens", stacklevel=2)

        if "sequence" in sizes:
            self.event_tokens = EventTokens(self.tokens.behaviors, self.tokens.max_len, dim, use.positions)
        if "tasks" in sizes:
            self.task_tokens = LearnedTokens(len(labels), dim)
        pooled_groups = [group for group in ("fields", "sequence") if group in sizes]
        hubs_read = pooled_groups if task_blind or self.late_fusion else ["tasks"] if head_input != "token" else []
        plan, initial_hubs = _plan_blocks(
            list(sizes),
            0 if self.late_fusion else num_blocks,
            broadcasts=use.broadcast != "none" and use.aggregation != "all_to_all",
            gates_follow=gate_hubs == "refined",
            head_reads_tokens=not task_blind and head_input != "hub",
            hubs_read=hubs_read,
        )
        attend = {"dim": dim, "num_heads": num_heads, "dropout": attention_dropout}
        self.blocks = nn.ModuleList(
            Block(
                _aggregation(use.aggregation, refined, sizes, residual, attend),
                Broadcast(gated, num_hubs, dim, use.broadcast, bgu_expansion, residual),
                gate_hubs == "refined",
            )
            for refined, gated in plan
        )
        build_hubs = {
            "tasks": lambda: TaskHubs(num_shared, dim, hybrid),
            "fields": lambda: FieldHubs(hub_init, num_fields, use.num_field_hubs, dim, hub_hidden_units),
            "sequence": lambda: SequenceHubs(
                hub_init, use.sequence_pooling, list(self.tokens.behaviors), hubs_per_behavior, dim
            ),
        }
        self.initial_hubs = nn.ModuleDict({group: build_hubs[group]() for group in initial_hubs})
        pooled_width = sum(num_hubs[group] for group in pooled_groups) * dim
        token_width = dim * (1 + (head_input == "both"))
        self.heads = TaskHeads(
            pooled_width if task_blind else token_width + pooled_width * self.late_fusion,
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
        for block in self.blocks:
            tokens, hubs = block(tokens, hubs, masks)
        return self.heads(self.head_inputs(tokens, hubs))

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
            events = {name: (self.event_tokens(name, columns[name]), column_masks[name]) for name in columns}
            tokens["sequence"] = torch.cat([event for event, _ in events.values()], dim=1)  # (B, L, D)
            masks["sequence"] = torch.cat(list(column_masks.values()), dim=1)  # (B, L)
        return tokens, masks, events

    def head_inputs(self, tokens, hubs):
        """Gives each head its input, ``(B, K, width)``, or ``(B, width)`` where all heads read the same."""
        if self.task_blind or self.late_fusion:
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

    @torch.no_grad()
    def attention_maps(self, inputs):
        """Reads out what the tasks attend to, averaged over heads and rows of a batch.

        Returns:
            Name -> (weights ``(tasks, fields + behaviours)``, row names, column names); the events of a behaviour are
            summed up. Weights over one group sum to one, unless the aggregation takes one softmax over all groups.
        """
        self.eval()
        with record_attention(self) as recorded:
            self.forward(inputs)
        steps = [inputs[columns[0]].shape[1] for columns in self.tokens.behaviors.values()]
        lengths = [1] * self.tokens.num_fields + steps
        names = self.tokens.field_names + list(self.tokens.behaviors)
        maps = {}
        for number in range(0 if self.task_blind else len(self.blocks)):
            weights = _task_weights(recorded, f"blocks.{number}.aggregation", self.num_tasks, lengths)
            summed = torch.stack([part.sum(dim=-1) for part in weights.split(lengths, dim=-1)], dim=-1)
            maps[f"tasks over inputs, block {number + 1}"] = (
                summed.cpu().numpy(),
                list(self.feature_map.labels),
                names,
            )
        return maps


class Block(nn.Module):
    """One exchange: hubs aggregate the tokens, then broadcast to the tokens of their own group."""

    def __init__(self, aggregation, broadcast, gates_follow):
        super().__init__()
        self.aggregation, self.broadcast, self.gates_follow = aggregation, broadcast, gates_follow

    def forward(self, tokens, hubs, masks):
        """Maps tokens and hubs of each group, ``(B, N, D)``, to those of the next block."""
        tokens, refined = self.aggregation(tokens, hubs, masks)
        return self.broadcast(tokens, refined if self.gates_follow else hubs), refined


class CrossAggregation(nn.Module):
    """v1, heterogeneous stage: ``C~ <- CA(C~, S, S) + CA(C~, T, T)``, likewise ``S~``, ``T~`` and the task tokens T.

    Proxies read the original tokens of the other two groups; of the tokens, only the tasks read (T hat).
    """

    def __init__(self, refined, sizes, residual, attend):
        super().__init__()
        readers = {**{f"{group}_hubs": group for group in refined}, **({"tasks": "tasks"} if "tasks" in sizes else {})}
        self.flows = nn.ModuleDict(
            {
                reader: nn.ModuleDict({source: _view(size, attend) for source, size in sizes.items() if source != own})
                for reader, own in readers.items()
            }
        )
        self.norms = nn.ModuleDict({reader: ResidualNorm(attend["dim"], residual) for reader in readers})

    def forward(self, tokens, hubs, masks):
        """Returns the tokens with the tasks replaced by T hat, and the refined proxies."""
        streams = {**{f"{group}_hubs": x for group, x in hubs.items()}, **tokens}
        read = {
            reader: self.norms[reader](
                streams[reader], sum(view(streams[reader], tokens[s], masks[s]) for s, view in sources.items())
            )
            for reader, sources in self.flows.items()
        }
        refined = {name.removesuffix("_hubs"): x for name, x in read.items() if name != "tasks"}
        return {**tokens, **({"tasks": read["tasks"]} if "tasks" in read else {})}, refined


class ViewAggregation(nn.Module):
    """v2, phase 1: ``H_g <- LN(H_g + [CA(H_g, C, C); CA(H_g, S, S); CA(H_g, T, T)] W_g)`` for every hub group g.

    Keys and values of a source are shared by the hub groups, queries belong to their group. ``views_sum`` adds the
    views instead of concatenating them; ``union`` is one attention over all tokens.
    """

    def __init__(self, kind, refined, sizes, residual, attend):
        super().__init__()
        dim = attend["dim"]
        sources = {"all": sum(sizes.values())} if kind == "union" else sizes
        self.concatenates = kind == "views"
        self.queries = nn.ModuleDict({group: nn.Linear(dim, dim) for group in refined})
        self.views = nn.ModuleDict({s: _view(size, attend, project=False) for s, size in sources.items()})
        width = dim * len(sources) if self.concatenates else dim
        self.fuse = nn.ModuleDict({group: nn.Linear(width, dim) for group in refined})
        self.norms = nn.ModuleDict({group: ResidualNorm(dim, residual) for group in refined})

    def forward(self, tokens, hubs, masks):
        """Returns the tokens as they are, and the refined hubs."""
        queries = torch.cat([query(hubs[group]) for group, query in self.queries.items()], dim=1)
        if "all" in self.views:
            tokens_of, mask_of = {"all": torch.cat(list(tokens.values()), dim=1)}, {"all": _joint_mask(tokens, masks)}
        else:
            tokens_of, mask_of = tokens, masks
        views = [view(queries, tokens_of[source], mask_of[source]) for source, view in self.views.items()]
        fused = torch.cat(views, dim=-1) if self.concatenates else sum(views)  # (B, all hubs, 3 D) or (B, all hubs, D)
        parts = fused.split([hubs[group].shape[1] for group in self.queries], dim=1)
        return tokens, {
            group: self.norms[group](hubs[group], self.fuse[group](z)) for group, z in zip(self.queries, parts)
        }


class AllToAll(nn.Module):
    """Ablation without hubs: a transformer layer over all tokens, ``X <- LN(X + MHA(X))``, ``X <- LN(X + FFN(X))``."""

    def __init__(self, attend):
        super().__init__()
        dim = attend["dim"]
        self.views = nn.ModuleDict({"all": MultiHeadAttention(**attend)})
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))
        self.norm_attention, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, tokens, hubs, masks):
        """Returns the updated tokens, and no hubs."""
        x = torch.cat(list(tokens.values()), dim=1)  # (B, N, D)
        x = self.norm_attention(x + self.views["all"](x, x, _joint_mask(tokens, masks)))
        x = self.norm_ffn(x + self.ffn(x))
        return dict(zip(tokens, x.split([group.shape[1] for group in tokens.values()], dim=1))), hubs


class Broadcast(nn.Module):
    """Phase 2: ``X_g <- LN(X_g + unit(X_g, H_g))`` with v1's PGU or v2's BGU, for every group that is read later."""

    def __init__(self, gated, num_hubs, dim, unit, bgu_expansion, residual):
        super().__init__()
        build = {
            "pgu": lambda hubs: ProxyGatedUnit(hubs, dim),
            "bgu": lambda hubs: BroadcastGatedUnit(hubs, dim, bgu_expansion),
        }
        self.units = nn.ModuleDict({group: build[unit](num_hubs[group]) for group in gated})
        self.norms = nn.ModuleDict({group: ResidualNorm(dim, residual) for group in gated})

    def forward(self, tokens, hubs):
        """Returns the tokens with the gated groups modulated by their hubs."""
        gated = {
            group: self.norms[group](tokens[group], unit(tokens[group], hubs[group]))
            for group, unit in self.units.items()
        }
        return {**tokens, **gated}


class ProxyGatedUnit(nn.Module):
    """v1: ``PGU(X, X~) = X * sigmoid(MLP(flatten(X~)))``, one gate for all tokens of the group."""

    def __init__(self, num_hubs, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(num_hubs * dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, x, hubs):
        """Gates the tokens ``(B, N, D)`` by the hubs ``(B, num_hubs, D)``."""
        return x * self.mlp(hubs.flatten(1)).sigmoid().unsqueeze(1)


class BroadcastGatedUnit(nn.Module):
    """v2: ``BGU(x) = x * sigmoid(alpha) + beta`` with ``[alpha, beta] = MLP(flatten(H))``, starting near zero."""

    def __init__(self, num_hubs, dim, expansion):
        super().__init__()
        hidden = expansion * dim
        layers = [nn.Linear(num_hubs * dim, hidden), nn.ReLU()] if hidden else []
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden or num_hubs * dim, 2 * dim))
        self.init_weights()

    def init_weights(self):
        """Draws the output layer a tenth of the usual size."""
        nn.init.xavier_normal_(self.mlp[-1].weight, gain=0.1)

    def forward(self, x, hubs):
        """Modulates the tokens ``(B, N, D)`` by the hubs ``(B, num_hubs, D)``."""
        alpha, beta = self.mlp(hubs.flatten(1)).unsqueeze(1).chunk(2, dim=-1)  # (B, 1, D) each
        return x * alpha.sigmoid() + beta


class FieldHubs(nn.Module):
    """First field hubs: ``C~(0) = reshape(MLP(flatten(C)))``; or the mean plus a learned offset; or learned ones."""

    def __init__(self, kind, num_fields, num_hubs, dim, hidden_units):
        super().__init__()
        self.num_hubs = num_hubs
        if kind == "mlp":
            self.mlp = nn.Sequential(
                nn.Linear(num_fields * dim, hidden_units), nn.ReLU(), nn.Linear(hidden_units, num_hubs * dim)
            )
        else:
            self.learned = LearnedTokens(num_hubs, dim)
        self.kind = kind

    def forward(self, tokens, events):
        """Returns ``(B, num_hubs, D)``."""
        fields = tokens["fields"]
        if self.kind == "mlp":
            return self.mlp(fields.flatten(1)).unflatten(-1, (self.num_hubs, -1))
        learned = self.learned(len(fields))
        return learned if self.kind == "random" else learned + fields.mean(dim=1, keepdim=True)


class SequenceHubs(nn.Module):
    """First sequence hubs, per behaviour a: ``sum_t phi(s_t)`` (v1, one phi) or ``mean_t MLP_a(s_t)`` (v2)."""

    def __init__(self, kind, pooling, behaviors, hubs_per_behavior, dim):
        super().__init__()
        self.kind, self.sums, self.hubs_per_behavior = kind, pooling == "shared_sum", hubs_per_behavior
        width = hubs_per_behavior * dim
        if kind != "mlp":
            self.learned = LearnedTokens(hubs_per_behavior * len(behaviors), dim)
        elif self.sums:
            self.shared = nn.Linear(dim, width)
        else:
            self.typed = nn.ModuleDict(
                {name: nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, width)) for name in behaviors}
            )

    def forward(self, tokens, events):
        """Returns ``(B, behaviours * hubs_per_behavior, D)``; without events, an ``mlp`` hub is zero."""
        if self.kind == "random":
            return self.learned(len(tokens["fields"]))
        if self.kind == "mean":
            means = [masked_mean(s, mask).repeat(1, self.hubs_per_behavior) for s, mask in events.values()]
            return self._split(means) + self.learned(len(tokens["fields"]))
        hubs = []
        for name, (s, mask) in events.items():
            mapped = self.shared(s) if self.sums else self.typed[name](s)  # (B, T, hubs_per_behavior D)
            mean = masked_mean(mapped, mask)
            hubs.append(mean * mask.sum(dim=1, keepdim=True) if self.sums else mean)
        return self._split(hubs)

    def _split(self, hubs):
        return torch.stack(hubs, dim=1).unflatten(-1, (self.hubs_per_behavior, -1)).flatten(1, 2)


class TaskHubs(nn.Module):
    """First task hubs: learned ones that all tasks share (v1), behind the task tokens in v2, ``[T; T_shared]``."""

    def __init__(self, num_shared, dim, hybrid):
        super().__init__()
        self.shared = LearnedTokens(num_shared, dim) if num_shared else None
        self.hybrid = hybrid

    def forward(self, tokens, events):
        """Returns ``(B, n_s, D)`` or ``(B, K + n_s, D)``."""
        hubs = [tokens["tasks"]] if self.hybrid else []
        if self.shared is not None:
            hubs.append(self.shared(len(tokens["fields"])))
        return torch.cat(hubs, dim=1)


class EventTokens(nn.Module):
    """Event tokens of a behaviour: its columns mapped to the token width, plus a learned position p_t.

    Positions count back from the most recent event, so that neither padding nor older events shift them.
    """

    def __init__(self, behaviors, max_len, dim, positions):
        super().__init__()
        self.max_len = max_len
        self.project = nn.ModuleDict(
            {name: nn.Linear(len(columns) * dim, dim) for name, columns in behaviors.items() if len(columns) > 1}
        )
        self.positions = LearnedTokens(max_len, dim) if positions else None  # the last one is the most recent event's

    def forward(self, behavior, columns):
        """Maps right-aligned columns ``(B, T, columns * D)`` to event tokens ``(B, T, D)``."""
        s = self.project[behavior](columns) if behavior in self.project else columns
        if self.positions is None:
            return s
        missing = s.shape[1] - self.max_len
        return s + nn.functional.pad(self.positions(len(s)), (0, 0, missing, 0))


class ResidualNorm(nn.Module):
    """``LN(x + update)``; without ``residual``, the update alone (v1's equations as printed)."""

    def __init__(self, dim, residual):
        super().__init__()
        self.norm = nn.LayerNorm(dim) if residual else None

    def forward(self, x, update):
        """Combines two ``(B, N, D)``."""
        return update if self.norm is None else self.norm(x + update)


class OneTokenView(nn.Module):
    """Attention over a group of one token: the softmax is 1, only the value projection is left."""

    def __init__(self, dim):
        super().__init__()
        self.value = nn.Linear(dim, dim)

    def forward(self, queries, tokens, mask):
        """Gives every query ``(B, N, D)`` the value of the token ``(B, 1, D)``."""
        return self.value(tokens).expand_as(queries)


def _view(size, attend, project=True):
    if size == 1:
        return OneTokenView(attend["dim"])
    return MultiHeadAttention(**attend, project_queries=project, project_output=False)


def _aggregation(kind, refined, sizes, residual, attend):
    if kind == "all_to_all":
        return AllToAll(attend)
    if kind == "cross":
        return CrossAggregation(refined, sizes, residual, attend)
    return ViewAggregation(kind, refined, sizes, residual, attend)


def _joint_mask(tokens, masks):
    """Joins the masks of all groups, ``(B, N)``; None if all tokens are real."""
    if all(masks[group] is None for group in tokens):
        return None
    real = [x.new_ones(x.shape[:2], dtype=torch.bool) if masks[g] is None else masks[g] for g, x in tokens.items()]
    return torch.cat(real, dim=1)


def _plan_blocks(groups, num_blocks, *, broadcasts, gates_follow, head_reads_tokens, hubs_read):
    """Finds, from the last block backwards, what each block must build so that no parameter is out of the loss' reach.

    Returns:
        For each block its refined hub groups and its gated token groups; and the hub groups that block 1 starts from.
    """
    plan, hubs_read = [], set(hubs_read)
    for block in reversed(range(num_blocks)):
        tokens_read = groups if block < num_blocks - 1 else ["tasks"] * head_reads_tokens
        gated = set(tokens_read) if broadcasts else set()
        refined = hubs_read | gated if gates_follow else hubs_read
        plan.insert(0, ([g for g in groups if g in refined], [g for g in groups if g in gated]))
        hubs_read = refined | gated
    return plan, [group for group in groups if group in hubs_read]


def _check_heads_are_fed(aggregation, broadcast, gate_hubs, head_input, task_blind):
    has_task_hubs = aggregation in ("views", "views_sum", "union")
    if head_input != "token" and (task_blind or not has_task_hubs):
        raise ValueError(
            f"head_input={head_input!r} needs v2's task hubs; got aggregation={aggregation!r}, task_blind={task_blind}"
        )
    if has_task_hubs and broadcast == "none" and head_input == "token" and not task_blind:
        raise ValueError("broadcast='none' leaves the task tokens constant; set head_input='hub' to read their hubs")
    if has_task_hubs and gate_hubs == "previous":
        raise ValueError(f"gate_hubs='previous' is v1's formula, for aggregation='cross'; got {aggregation!r}")
    if task_blind and aggregation == "all_to_all":
        raise ValueError("task_blind reads the hubs, and aggregation='all_to_all' has none; use another aggregation")


def _task_weights(recorded, prefix, num_tasks, lengths):
    """Collects the attention of the task rows over fields and events, ``(K, fields + L)``, of one block."""
    if f"{prefix}.views.all" in recorded:  # queries and keys both start with the tasks
        return recorded[f"{prefix}.views.all"][:, :num_tasks, num_tasks:].mean(dim=0)
    parts = []
    for source, size in (("fields", lengths.count(1)), ("sequence", sum(lengths) - lengths.count(1))):
        names = [name for name in (f"{prefix}.views.{source}", f"{prefix}.flows.tasks.{source}") if name in recorded]
        if names:
            parts.append(recorded[names[0]][:, :num_tasks].mean(dim=0))
        elif size:
            parts.append(torch.ones(num_tasks, size))
    return torch.cat(parts, dim=-1)

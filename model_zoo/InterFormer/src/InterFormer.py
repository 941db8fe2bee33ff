"""InterFormer: Effective Heterogeneous Interaction Learning for Click-Through Rate Prediction (CIKM 2025).

Zeng et al., https://arxiv.org/abs/2411.09852. Equation numbers are those of the CIKM version.

Differs from the paper:
  * The head reads summaries recomputed after the last layer; Algorithm 1 takes those computed before it, which would
    leave the last Interaction Arch and Sequence Arch without effect.
  * Gating is ``Y * sigmoid(MLP(Y))`` by default; the literal ``sigma(Y * MLP(Y))`` is
    ``gating: identity | tanh | sigmoid``.
  * PFFN and MHA sit in pre-LayerNorm residual branches; the formulas show neither, the text calls it a Transformer.
    ``sequence_residual: false`` is the formula.
  * MaskNet's mask starts at one (its output bias), so that the sequence has a signal at FuxiCTR's embedding scale.
  * Several labels get one head each on the same summaries; the paper predicts one.
  * ``target_matches`` gives the fields a token of how each behaviour's events match the target, ``target_attention``
    tokens of the events that DIN's attention picks for it, ``target_softmax`` a token and a loss of how histories fit
    the target and the other targets of the batch; off by default.
  * Histories of several behaviours are aligned at their most recent event before they are concatenated per step.
"""

import torch
from flowctr.layers import (
    AttentionPooling,
    CrossInteraction,
    DHENLayer,
    DotInteraction,
    FeatureTokens,
    Gating,
    LearnedTokens,
    LinearCompressedEmbedding,
    MaskNet,
    MultiHeadAttention,
    PersonalizedFFN,
    TaskHeads,
    check_options,
    check_positive,
    masked_mean,
    record_attention,
)
from flowctr.layers.gating import GATING_KINDS
from flowctr.layers.pffn import PFFN_KINDS
from fuxictr.pytorch.models import MultiTaskModel
from torch import nn

FLOWS = ("sole", "sep", "n2s", "s2n", "int")
INTERACTIONS = ("dot", "dcnv2", "dhen")
AGGREGATIONS = ("selective", "avg", "mlp", "mha")
FIELD_MAPS = ("flatten", "lce")


class InterFormer(MultiTaskModel):
    """Interleaves feature interaction and sequence modelling: in every layer each arch reads the other's summary.

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
        num_layers: Layers L.
        num_cls: CLS tokens; they are the summary X_sum, so this is n_sum as well.
        num_pma: Tokens pooled by multi-head attention.
        num_recent: Most recent events read as they are.
        num_heads: Attention heads; must divide ``embedding_dim``.
        interaction: Interaction module: ``dot``, ``dcnv2`` or ``dhen``.
        cross_rank: Rank of the cross layer in ``dcnv2`` and ``dhen``.
        flow: Which arch reads the other's summary: ``sole``, ``sep``, ``n2s``, ``s2n`` or ``int`` (both).
        aggregation: Sequence summary: ``selective`` (CLS, PMA, recent), ``avg``, ``mlp`` or ``mha``.
        gating: Form of the gating (see ``flowctr.layers.Gating``).
        pffn: Form of the personalised FFN (see ``flowctr.layers.PersonalizedFFN``).
        pma_reads_cls: Whether PMA pools the CLS tokens together with the events.
        sequence_residual: Whether PFFN and MHA are residual branches behind a LayerNorm; False: the printed formula.
        field_map: How the Interaction Arch restores the shape of X: ``flatten`` (one linear map of all tokens) or
            ``lce`` (along the token axis only, far fewer parameters).
        use_pma: Ablation: without the PMA tokens if False.
        use_recent: Ablation: without the recent tokens if False.
        use_gating: Ablation: summaries pass ungated if False.
        use_pffn: Ablation: a plain FFN instead of the personalised one if False.
        use_mha: Ablation: no self-attention in the Sequence Arch if False.
        attention_dropout: Dropout on attention weights.
        head_hidden_units: Hidden widths of the head.
        head_activation: Activation of the head.
        net_dropout: Dropout of the head.
        batch_norm: Batch normalisation in the head.
        optimizer: FuxiCTR's optimiser name.
        loss: FuxiCTR's loss name.
        learning_rate: Initial learning rate.
        **kwargs: Arguments of ``MultiTaskModel`` and ``BaseModel``.

    Raises:
        ValueError: If an option is unknown, ``num_heads`` does not divide ``embedding_dim``, or there is no sequence.
    """

    def __init__(
        self,
        feature_map,
        model_id="InterFormer",
        gpu=-1,
        task="binary_classification",
        behaviors=None,
        embedding_dim=64,
        embedding_initializer="partial(nn.init.normal_, std=1e-4)",
        target_matches=False,
        target_attention=None,
        target_softmax=None,
        num_layers=3,
        num_cls=4,
        num_pma=2,
        num_recent=2,
        num_heads=4,
        interaction="dhen",
        cross_rank=32,
        flow="int",
        aggregation="selective",
        gating="self",
        pffn="literal",
        pma_reads_cls=True,
        sequence_residual=True,
        field_map="flatten",
        use_pma=True,
        use_recent=True,
        use_gating=True,
        use_pffn=True,
        use_mha=True,
        attention_dropout=0.0,
        head_hidden_units=(1024, 512, 256, 128),
        head_activation="SiLU",
        net_dropout=0.0,
        batch_norm=False,
        optimizer="adam",
        loss="binary_crossentropy",
        learning_rate=1e-3,
        **kwargs,
    ):
        kwargs["num_tasks"] = len(feature_map.labels)
        super().__init__(feature_map, model_id=model_id, gpu=gpu, task=task, **kwargs)
        check_options(
            flow=(flow, FLOWS),
            interaction=(interaction, INTERACTIONS),
            aggregation=(aggregation, AGGREGATIONS),
            field_map=(field_map, FIELD_MAPS),
            gating=(gating, GATING_KINDS),
            pffn=(pffn, PFFN_KINDS),
        )
        check_positive(
            num_layers=num_layers, num_cls=num_cls, num_pma=num_pma, num_recent=num_recent, cross_rank=cross_rank
        )
        if aggregation != "selective" and not (use_pma and use_recent and use_mha):
            raise ValueError(
                "use_pma, use_recent and use_mha are switches of aggregation='selective'; "
                f"got aggregation={aggregation!r}"
            )
        if num_heads and (embedding_dim // num_heads) % 2 and embedding_dim % num_heads == 0:
            raise ValueError(
                "rotary positions need an even width per head; "
                f"got embedding_dim={embedding_dim}, num_heads={num_heads}"
            )
        self.tokens = FeatureTokens(
            feature_map,
            embedding_dim,
            behaviors,
            embedding_initializer,
            target_matches,
            target_attention,
            target_softmax,
        )
        if not self.tokens.behaviors:
            raise ValueError(f"InterFormer needs a sequence feature; data set {feature_map.dataset_id!r} has none")
        self.flow = flow
        self.num_layers = num_layers
        self.num_cls = num_cls
        self.num_recent = num_recent if use_recent and aggregation == "selective" else 0
        dim, num_fields = embedding_dim, self.tokens.num_fields

        def gate():
            return Gating(dim, gating) if use_gating else nn.Identity()

        def sequence_summary():
            if aggregation != "selective":
                return PooledSummary(
                    aggregation, num_cls, self.tokens.max_len, dim, num_heads, attention_dropout, gate()
                )
            pma = AttentionPooling(num_pma, dim, num_heads, attention_dropout) if use_pma else None
            return SelectiveSummary(num_cls, pma, pma_reads_cls, self.num_recent, gate())

        def ffn():
            return PersonalizedFFN(num_cls, dim, pffn) if sequence_reads_fields and use_pffn else PlainFFN(dim)

        def built_where_read(build, read_by_layer):
            return nn.ModuleList(build() if read else Unread() for read in [*read_by_layer, True])  # last: by the head

        sequence_reads_fields, fields_read_sequence = flow in ("n2s", "int"), flow in ("s2n", "int")
        if flow == "sole":
            num_fields, num_summaries = num_fields + self.tokens.num_columns, self.tokens.num_columns
            x_sum_read = [False] * num_layers
        else:
            self.masknet = MaskNet(self.tokens.num_columns * dim, dim)
            self.cls = None if sequence_reads_fields else LearnedTokens(num_cls, dim)
            self.sequence_archs = nn.ModuleList(
                SequenceArch(
                    dim,
                    ffn(),
                    MultiHeadAttention(dim, num_heads, attention_dropout) if use_mha else None,
                    sequence_residual,
                )
                for _ in range(num_layers)
            )
            self.sequence_summaries = built_where_read(sequence_summary, [fields_read_sequence] * num_layers)
            num_summaries = self.sequence_summaries[-1].num_tokens
            x_sum_read = [sequence_reads_fields and (use_pffn or layer == 0) for layer in range(num_layers)]
        self.field_summaries = built_where_read(lambda: FieldSummary(num_fields, num_cls, gate()), x_sum_read)
        self.interaction_archs = nn.ModuleList(
            InteractionArch(
                num_fields, num_summaries if fields_read_sequence else 0, dim, interaction, cross_rank, field_map
            )
            for _ in range(num_layers)
        )
        self.heads = TaskHeads(
            (num_cls + num_summaries) * dim,
            feature_map.labels,
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
        if self.flow == "sole":
            return self.forward_sole(inputs)
        x, s, mask = self.preprocess(self.get_inputs(inputs))  # (B, N, D), (B, T, D), (B, T)
        x_sum = self.field_summaries[0](x)  # (B, C, D)
        s, mask, positions = self.prepend_cls(x_sum, s, mask)  # (B, C + T, D)
        s_sum = self.sequence_summaries[0](s, mask)  # (B, M, D)
        for layer in range(self.num_layers):
            x, s = self.interaction_archs[layer](x, s_sum), self.sequence_archs[layer](s, x_sum, mask, positions)
            x_sum = self.field_summaries[layer + 1](x)
            s_sum = self.sequence_summaries[layer + 1](s, mask)
        return self.heads(torch.cat([x_sum, s_sum], dim=1).flatten(1)) | self.tokens.take_compared()

    def forward_sole(self, inputs):
        """Flow ``sole``: the Interaction Arch alone, on the fields and the mean of every sequence column."""
        x = self.tokens.append_pooled(*self.tokens(self.get_inputs(inputs)))  # (B, N + columns, D)
        pooled = x[:, self.tokens.num_fields :]
        for interaction_arch in self.interaction_archs:
            x = interaction_arch(x, None)
        read = torch.cat([self.field_summaries[-1](x), pooled], dim=1)
        return self.heads(read.flatten(1)) | self.tokens.take_compared()

    def preprocess(self, inputs):
        """Embeds the fields, X(1), and merges all behaviours per step with MaskNet, S(1) before the CLS tokens.

        Returns:
            Field tokens ``(B, N, D)``, events ``(B, T, D)`` and the events' mask ``(B, T)``.
        """
        x, events, masks = self.tokens(inputs)
        steps = max(self.num_recent, *(mask.shape[1] for mask in masks.values()))
        s = torch.cat([nn.functional.pad(e, (0, 0, steps - e.shape[1], 0)) for e in events.values()], dim=-1)
        mask = torch.stack([nn.functional.pad(m, (steps - m.shape[1], 0)) for m in masks.values()]).any(dim=0)
        return x, self.masknet(s) * mask.unsqueeze(-1), mask

    def prepend_cls(self, x_sum, s, mask):
        """Puts the CLS tokens, X_sum(1) or learned ones, before the events and counts positions over real tokens."""
        cls = x_sum if self.cls is None else self.cls(len(s))
        s = torch.cat([cls, s], dim=1)
        mask = nn.functional.pad(mask, (self.num_cls, 0), value=True)
        return s, mask, mask.long().cumsum(dim=1) - 1

    def add_loss(self, return_dict, y_true):
        """Adds the losses of the labels and, with ``target_softmax``, of the target among those of the batch."""
        return super().add_loss(return_dict, y_true) + self.tokens.target_loss(return_dict, y_true)

    @torch.no_grad()
    def attention_maps(self, inputs):
        """Reads out where attention looks, averaged over heads and over the real queries of a batch.

        Returns:
            Name -> (weights ``(queries, keys)``, query names, key names); keys are the CLS tokens and the events from
            the oldest to the most recent (-1). Empty for flow ``sole``, which has no attention.
        """
        if self.flow == "sole":
            return {}
        self.eval()
        with record_attention(self) as recorded:
            self.forward(inputs)
        _, _, mask = self.preprocess(self.get_inputs(inputs))
        steps = mask.shape[1]
        mask = nn.functional.pad(mask, (self.num_cls, 0), value=True).float()
        keys = [f"CLS {i + 1}" for i in range(self.num_cls)] + [str(step - steps) for step in range(steps)]
        maps = {}
        for name, weights in recorded.items():
            kind, layer, module = name.split(".")[:3]
            if kind == "sequence_archs":
                total = torch.einsum("bnt,bn->nt", weights, mask)
                average = total / mask.sum(dim=0).clamp(min=1)[:, None]
                maps[f"self-attention, layer {int(layer) + 1}"] = (average.cpu().numpy(), keys, keys)
            elif module == "pma":
                queries = [f"PMA {i + 1}" for i in range(weights.shape[1])]
                read = keys[-weights.shape[2] :]  # without the CLS tokens if PMA does not read them
                maps[f"PMA before layer {int(layer) + 1}"] = (weights.mean(dim=0).cpu().numpy(), queries, read)
        return maps


class FieldSummary(nn.Module):
    """``X_sum = Gating(LCE(X))``: N field tokens become C summary tokens (eq. 7 of CIKM)."""

    def __init__(self, num_fields, num_summaries, gate):
        super().__init__()
        self.lce = LinearCompressedEmbedding(num_fields, num_summaries)
        self.gate = gate

    def forward(self, x):
        """Summarises ``(B, N, D)`` as ``(B, C, D)``."""
        return self.gate(self.lce(x))


class SelectiveSummary(nn.Module):
    """``S_sum = Gating([S_CLS; S_PMA; S_recent])``: context, learned queries and the latest events (eq. 8 of CIKM)."""

    def __init__(self, num_cls, pma, pma_reads_cls, num_recent, gate):
        super().__init__()
        self.num_cls, self.pma, self.num_recent, self.gate = num_cls, pma, num_recent, gate
        self.pma_start = 0 if pma_reads_cls else num_cls
        self.num_tokens = num_cls + (pma.num_tokens if pma else 0) + num_recent

    def forward(self, s, mask):
        """Summarises ``(B, C + T, D)`` under its mask as ``(B, M, D)``; the last steps are the most recent events."""
        parts = [s[:, : self.num_cls]]
        if self.pma is not None:
            parts.append(self.pma(s[:, self.pma_start :], mask[:, self.pma_start :]))
        if self.num_recent:
            parts.append(s[:, -self.num_recent :])
        return self.gate(torch.cat(parts, dim=1))


class PooledSummary(nn.Module):
    """The aggregations that the paper compares with: ``avg``, ``mlp`` and ``mha`` over the events, then the gate.

    ``avg`` is the mean of the events, ``mha`` the mean after one more self-attention, ``mlp`` a linear map along the
    step axis, counted from the most recent event, to as many tokens as there are CLS tokens.
    """

    def __init__(self, kind, num_cls, max_len, dim, num_heads, dropout, gate):
        super().__init__()
        self.kind, self.num_cls, self.max_len, self.gate = kind, num_cls, max_len, gate
        self.num_tokens = num_cls if kind == "mlp" else 1
        if kind == "mlp":
            self.lce = LinearCompressedEmbedding(max_len, num_cls)
        elif kind == "mha":
            self.attention = MultiHeadAttention(dim, num_heads, dropout)

    def forward(self, s, mask):
        """Summarises ``(B, C + T, D)`` under its mask as ``(B, M, D)``."""
        events, mask = s[:, self.num_cls :], mask[:, self.num_cls :]
        if self.kind == "mlp":
            recent = nn.functional.pad(events, (0, 0, self.max_len - events.shape[1], 0))  # (B, max_len, D)
            return self.gate(self.lce(recent))
        if self.kind == "mha":
            events = self.attention(events, events, mask)
        return self.gate(masked_mean(events, mask).unsqueeze(1))


class Unread(nn.Module):
    """Stands for a summary that nothing reads in the chosen flow: has no parameters and computes nothing."""

    def forward(self, *_):
        """Returns None."""
        return None


class InteractionArch(nn.Module):
    """``X(l+1) = MLP(Interaction([X(l); S_sum(l)]))``, back to the shape of X (eq. 4 of CIKM).

    The DHEN layer carries its own shortcut and norm; around ``dot`` and ``dcnv2`` a residual keeps X.
    """

    def __init__(self, num_fields, num_summaries, dim, interaction, cross_rank, field_map):
        super().__init__()
        self.kind = interaction
        num_tokens = num_fields + num_summaries
        if interaction == "dot":
            self.interaction = DotInteraction(num_tokens, num_fields, dim)
            return
        interaction_class = DHENLayer if interaction == "dhen" else CrossInteraction
        self.interaction = interaction_class(num_tokens, dim, cross_rank)
        if field_map == "flatten":
            flat = nn.Linear(num_tokens * dim, num_fields * dim)
            self.to_fields = nn.Sequential(nn.Flatten(), flat, nn.Unflatten(-1, (num_fields, dim)))
        else:
            self.to_fields = LinearCompressedEmbedding(num_tokens, num_fields)

    def forward(self, x, s_sum):
        """Maps ``(B, N, D)`` and, where the flow has it, ``(B, M, D)`` to ``(B, N, D)``."""
        z = x if s_sum is None else torch.cat([x, s_sum], dim=1)
        if self.kind == "dot":
            return x + self.interaction(z)
        if self.kind == "dcnv2":
            return x + self.to_fields(z + self.interaction(z))
        return self.to_fields(self.interaction(z))


class SequenceArch(nn.Module):
    """``S(l+1) = MHA(PFFN(X_sum(l), S(l)))`` in pre-LayerNorm residual branches, with rotary positions (eqs. 5-6)."""

    def __init__(self, dim, ffn, attention, residual):
        super().__init__()
        self.residual = residual
        self.norm_ffn = nn.LayerNorm(dim) if residual else nn.Identity()
        self.ffn = ffn
        self.norm_attention = nn.LayerNorm(dim) if residual and attention else nn.Identity()
        self.attention = attention

    def forward(self, s, x_sum, mask, positions):
        """Transforms ``(B, C + T, D)``; padded steps stay zero."""
        s = self._branch(s, self.ffn(x_sum, self.norm_ffn(s)))
        if self.attention is not None:
            normed = self.norm_attention(s)
            s = self._branch(s, self.attention(normed, normed, mask, positions, positions))
        return s * mask.unsqueeze(-1)

    def _branch(self, s, update):
        return s + update if self.residual else update


class PlainFFN(nn.Module):
    """A feed-forward network that ignores the fields: what remains of PFFN without its personalisation."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, _, s):
        """Maps ``(B, T, D)``; same shape out."""
        return self.mlp(s)

"""OneTrans: Unified Feature Interaction and Sequence Modeling with One Transformer (WWW 2026).

Zhang et al., https://arxiv.org/abs/2510.26104. ``head: ple`` is OneTrans+PLE.

Differs from the paper:
  * Sequences are concatenated with [SEP] between, the paper's rule without timestamps, in the order of ``behaviors``:
    its order is by intent, the strongest first.
  * The top block has no S-queries: the heads read the NS-tokens, which are what is left of the pyramid in Figure 2. The
    lower blocks' counts fall linearly from all S-tokens, not rounded to multiples of 32.
  * Key-value caches across candidates and requests, which are about serving, are left out.
  * Where the paper is silent: GELU in the FFNs, their hidden width of 4 D, one output map of the attention for all
    tokens, no positions, a last RMSNorm, and heads that read all NS-tokens side by side.
"""

import torch
from flowctr.layers import (
    PLE,
    FeatureTokens,
    LearnedTokens,
    PerTokenLinear,
    TaskHeads,
    check_options,
    check_positive,
    right_align,
)
from fuxictr.pytorch.models import MultiTaskModel
from torch import nn

HEADS = ("mlp", "ple")


class OneTrans(MultiTaskModel):
    """One causal transformer over S-tokens (events) and NS-tokens (everything else), fewer S-queries in each block.

    Args:
        feature_map: FuxiCTR's feature map.
        model_id: Name of the checkpoint and log.
        gpu: GPU index, -1 for the CPU.
        task: FuxiCTR's task type, one for all labels or a list with one for each.
        behaviors: Behaviour name -> aligned sequence columns; none: every sequence column by itself.
        embedding_dim: Embedding width of a field.
        embedding_initializer: FuxiCTR's initialiser of the embedding tables.
        num_layers: Blocks L.
        num_ns_tokens: NS-tokens that all fields are mapped to.
        token_dim: Token width D.
        num_heads: Attention heads; must divide ``token_dim``.
        ffn_expansion: Hidden width of the FFNs in units of D.
        pyramid: Whether the S-queries get fewer from block to block; False: all S-tokens stay until the top block.
        head: ``mlp``, or ``ple``: experts of progressive layered extraction before the tasks' MLPs.
        ple_num_levels: Levels of ``head: ple``.
        ple_num_experts: Experts of each task, and as many shared ones, of ``head: ple``.
        ple_hidden_units: Widths of an expert of ``head: ple``.
        head_hidden_units: Hidden widths of each task's MLP.
        head_activation: Activation of the head.
        net_dropout: Dropout of the head.
        batch_norm: Batch normalisation in the head.
        optimizer: FuxiCTR's optimiser name.
        loss: FuxiCTR's loss name.
        learning_rate: Initial learning rate.
        **kwargs: Arguments of ``MultiTaskModel`` and ``BaseModel``.

    Raises:
        ValueError: If an option is unknown, a count is below one, or ``num_heads`` does not divide ``token_dim``.
    """

    def __init__(
        self,
        feature_map,
        model_id="OneTrans",
        gpu=-1,
        task="binary_classification",
        behaviors=None,
        embedding_dim=32,
        embedding_initializer="partial(nn.init.normal_, std=1e-4)",
        num_layers=4,
        num_ns_tokens=12,
        token_dim=128,
        num_heads=4,
        ffn_expansion=4,
        pyramid=True,
        head="mlp",
        ple_num_levels=2,
        ple_num_experts=2,
        ple_hidden_units=(256, 128),
        head_hidden_units=(256, 128),
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
        check_options(head=(head, HEADS))
        check_positive(num_layers=num_layers, num_ns_tokens=num_ns_tokens, token_dim=token_dim)
        check_positive(num_heads=num_heads, ffn_expansion=ffn_expansion)
        check_positive(ple_num_levels=ple_num_levels, ple_num_experts=ple_num_experts)
        if token_dim % num_heads:
            raise ValueError(f"num_heads must divide token_dim; got num_heads={num_heads}, token_dim={token_dim}")
        self.tokens = FeatureTokens(feature_map, embedding_dim, behaviors, embedding_initializer)
        behaviors = self.tokens.behaviors
        self.num_ns_tokens = num_ns_tokens
        self.auto_split = nn.Linear(self.tokens.num_fields * embedding_dim, num_ns_tokens * token_dim)
        self.events = nn.ModuleList(nn.Linear(len(names) * embedding_dim, token_dim) for names in behaviors.values())
        self.separators = LearnedTokens(len(behaviors) - 1, token_dim) if len(behaviors) > 1 else None
        num_s_tokens = sum(feature_map.features[names[0]]["max_len"] + 1 for names in behaviors.values()) - 1
        queries = s_queries(max(num_s_tokens, 0), num_layers, pyramid)
        self.blocks = nn.ModuleList(
            OneTransBlock(token_dim, num_heads, num_ns_tokens, ffn_expansion, keys > 0, count)
            for keys, count in zip([num_s_tokens, *queries], queries)
        )
        self.norm = nn.RMSNorm(token_dim, eps=1e-6)
        width, labels = num_ns_tokens * token_dim, feature_map.labels
        self.extraction = nn.Identity()
        if head == "ple":
            self.extraction = PLE(
                width,
                len(labels),
                ple_num_levels,
                ple_num_experts,
                ple_hidden_units,
                head_activation,
                net_dropout,
                batch_norm,
            )
            width = self.extraction.output_dim
        self.heads = TaskHeads(
            width, labels, head_hidden_units, self.output_activation, head_activation, net_dropout, batch_norm
        )
        self.compile(optimizer, loss, learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs):
        """Predicts every label, ``{"<label>_pred": (B, 1)}`` (and ``"y_pred"`` when there is one label)."""
        x, real = self.tokenize(self.get_inputs(inputs))  # (B, S + N, D), (B, S + N)
        allowed = causal_mask(real)
        for block in self.blocks:
            x = block(x, allowed)
        return self.heads(self.extraction(self.norm(x).flatten(1)))  # the NS-tokens are left

    def tokenize(self, inputs):
        """Builds the tokens: right-aligned S-tokens, then NS-tokens; and the mask of the real ones."""
        fields, columns, masks = self.tokens(inputs)
        ns = self.auto_split(fields.flatten(1)).unflatten(-1, (self.num_ns_tokens, -1))  # (B, N, D)
        real = ns.new_ones(ns.shape[:2], dtype=torch.bool)
        if not columns:
            return ns, real
        s = [embed(columns[behavior]) for behavior, embed in zip(columns, self.events)]
        s_real = list(masks.values())
        if self.separators is not None:
            s = _interleave(s, self.separators(len(ns)).split(1, dim=1))
            s_real = _interleave(s_real, [real[:, :1]] * (len(columns) - 1))
        s, s_real = _right_align_tokens(torch.cat(s, dim=1), torch.cat(s_real, dim=1))
        return torch.cat([s, ns], dim=1), torch.cat([s_real, real], dim=1)


class OneTransBlock(nn.Module):
    """``Z = MixedMHA(RMS(X)) + X``, ``X = MixedFFN(RMS(Z)) + Z`` for the last tokens; all tokens are keys and values.

    Args:
        dim: Token width D.
        num_heads: Attention heads H.
        num_ns: NS-tokens N.
        ffn_expansion: Hidden width of the FFNs in units of D.
        has_s: Whether S-tokens come in.
        num_s_queries: Most recent S-tokens that go on, beside all NS-tokens.
    """

    def __init__(self, dim, num_heads, num_ns, ffn_expansion, has_s, num_s_queries):
        super().__init__()
        self.num_heads, self.num_queries = num_heads, num_s_queries + num_ns
        keeps_s, hidden = num_s_queries > 0, ffn_expansion * dim
        self.norm_attention, self.norm_ffn = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        self.query = MixedLinear(num_ns, dim, dim, keeps_s)
        self.key_value = MixedLinear(num_ns, dim, 2 * dim, has_s)
        self.out = nn.Linear(dim, dim, bias=False)
        self.ffn = nn.Sequential(
            MixedLinear(num_ns, dim, hidden, keeps_s), nn.GELU(), MixedLinear(num_ns, hidden, dim, keeps_s)
        )

    def forward(self, x, allowed):
        """Maps ``(B, L, D)`` to the last L' tokens, ``(B, L', D)``; ``allowed`` is the causal mask of all blocks."""
        length = x.shape[1]
        kept = min(length, self.num_queries)
        normed = self.norm_attention(x)
        q = self._split(self.query(normed[:, -kept:]))  # (B, H, L', D/H)
        k, v = map(self._split, self.key_value(normed).chunk(2, dim=-1))  # (B, H, L, D/H)
        mask = allowed[:, None, -kept:, -length:]
        heads = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        z = self.out(heads.transpose(1, 2).flatten(2)) + x[:, -kept:]
        return self.ffn(self.norm_ffn(z)) + z

    def _split(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class MixedLinear(nn.Module):
    """``W_i x_i``: one W for all S-tokens, which come first, one for each of the last N tokens (mixed parameters)."""

    def __init__(self, num_ns, input_dim, output_dim, has_s):
        super().__init__()
        self.num_ns = num_ns
        self.shared = nn.Linear(input_dim, output_dim, bias=False) if has_s else None
        self.specific = PerTokenLinear(num_ns, input_dim, output_dim, bias=False)

    def forward(self, x):
        """Maps ``(B, S + N, input_dim)`` to ``(B, S + N, output_dim)``."""
        specific = self.specific(x[:, -self.num_ns :])
        return specific if self.shared is None else torch.cat([self.shared(x[:, : -self.num_ns]), specific], dim=1)


def s_queries(num_s_tokens, num_layers, pyramid):
    """Counts the S-queries of each block: all in the first, none at the top, linear between (or all, if no pyramid)."""
    shares = [(num_layers - layer) / (num_layers - 1) for layer in range(1, num_layers)]  # 1 ... 1 / (L - 1)
    return [round(num_s_tokens * (share if pyramid else 1)) for share in shares] + [0]


def causal_mask(real):
    """Lets each token read itself and the real ones before it, ``(B, L)`` to ``(B, L, L)``."""
    length = real.shape[1]
    itself = torch.eye(length, dtype=torch.bool, device=real.device)  # softmax needs one key, in padding too
    return (real.unsqueeze(1) | itself).tril()


def _interleave(parts, between):
    """Puts one of ``between`` after each part but the last."""
    return [x for pair in zip(parts, between) for x in pair] + [parts[-1]]


def _right_align_tokens(tokens, mask):
    """Moves the real tokens ``(B, T, D)`` to the end in their order; returns them with their mask."""
    steps = torch.arange(1, tokens.shape[1] + 1, device=tokens.device).expand(mask.shape)
    source = right_align(steps, mask)  # 0: padding, the zeros in front
    padded = nn.functional.pad(tokens, (0, 0, 1, 0))
    return padded.gather(1, source.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])), source > 0

"""RankMixer: Scaling Up Ranking Models in Industrial Recommenders (CIKM 2025).

Zhu et al., https://arxiv.org/abs/2507.15551, the dense model. ``head: ple`` is RankMixer+PLE.

Differs from the paper:
  * Tokens are equal slices of the fields in the data set's order, which lists related fields together; the paper groups
    them by hand.
  * The paper leaves the sequence module open: here attention over each behaviour's events, queried by all fields.
  * The sparse mixture of experts, which the paper adds for more than 1B parameters, is left out.
"""

import torch
from flowctr.layers import (
    PLE,
    FeatureTokens,
    MultiHeadAttention,
    PerTokenLinear,
    TaskHeads,
    check_options,
    check_positive,
)
from fuxictr.pytorch.models import MultiTaskModel
from torch import nn

HEADS = ("mlp", "ple")


class RankMixer(MultiTaskModel):
    """Mixes feature tokens by exchanging their heads, without parameters, and gives every token an FFN of its own.

    Args:
        feature_map: FuxiCTR's feature map.
        model_id: Name of the checkpoint and log.
        gpu: GPU index, -1 for the CPU.
        task: FuxiCTR's task type, one for all labels or a list with one for each.
        behaviors: Behaviour name -> aligned sequence columns; none: every sequence column by itself.
        embedding_dim: Embedding width of a field.
        embedding_initializer: FuxiCTR's initialiser of the embedding tables.
        num_layers: RankMixer blocks L.
        num_tokens: Tokens T, and as many heads; must divide ``token_dim``.
        token_dim: Token width D.
        ffn_expansion: Hidden width of the per-token FFN in units of D.
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
        ValueError: If an option is unknown, a count is below one, ``num_tokens`` does not divide ``token_dim``, or
            there are more tokens than embeddings to cut.
    """

    def __init__(
        self,
        feature_map,
        model_id="RankMixer",
        gpu=-1,
        task="binary_classification",
        behaviors=None,
        embedding_dim=32,
        embedding_initializer="partial(nn.init.normal_, std=1e-4)",
        num_layers=2,
        num_tokens=16,
        token_dim=128,
        ffn_expansion=4,
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
        check_positive(num_layers=num_layers, num_tokens=num_tokens, token_dim=token_dim, ffn_expansion=ffn_expansion)
        check_positive(ple_num_levels=ple_num_levels, ple_num_experts=ple_num_experts)
        if token_dim % num_tokens:
            raise ValueError(f"num_tokens must divide token_dim; got num_tokens={num_tokens}, token_dim={token_dim}")
        self.tokens = FeatureTokens(feature_map, embedding_dim, behaviors, embedding_initializer)
        num_fields = self.tokens.num_fields
        self.interests = nn.ModuleList(
            SequenceInterest(num_fields, len(columns), embedding_dim) for columns in self.tokens.behaviors.values()
        )
        self.tokenizer = SlicedTokens((num_fields + len(self.interests)) * embedding_dim, num_tokens, token_dim)
        self.layers = nn.ModuleList(
            RankMixerBlock(num_tokens, token_dim, ffn_expansion * token_dim) for _ in range(num_layers)
        )
        width, labels = token_dim, feature_map.labels
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
        fields, events, masks = self.tokens(self.get_inputs(inputs))
        interests = [interest(fields, events[b], masks[b]) for b, interest in zip(events, self.interests)]
        x = self.tokenizer(torch.cat([fields, *interests], dim=1).flatten(1))  # (B, T, D)
        for layer in self.layers:
            x = layer(x)
        return self.heads(self.extraction(x.mean(dim=1)))


class SequenceInterest(nn.Module):
    """What a behaviour says about this row: its events, read by attention with all fields as the query."""

    def __init__(self, num_fields, num_columns, dim):
        super().__init__()
        self.query = nn.Linear(num_fields * dim, dim)
        self.event = nn.Linear(num_columns * dim, dim)
        self.attention = MultiHeadAttention(dim, project_queries=False)

    def forward(self, fields, events, mask):
        """Reads ``(B, T, columns * D)`` under its mask for the fields ``(B, N, D)``; zeros ``(B, 1, D)`` if empty."""
        return self.attention(self.query(fields.flatten(1)).unsqueeze(1), self.event(events), mask)


class SlicedTokens(nn.Module):
    """``x_t = Proj_t(e[d (t-1) : d t])``: all embeddings in T slices of equal width, filled up with zeros."""

    def __init__(self, width, num_tokens, token_dim):
        super().__init__()
        slice_width = -(-width // num_tokens)
        filled = -(-width // slice_width)
        if filled < num_tokens:
            raise ValueError(
                f"num_tokens={num_tokens} slices of all {width} embedding values leave some empty; "
                f"set num_tokens to {filled} or raise embedding_dim"
            )
        self.num_tokens = num_tokens
        self.missing = slice_width * num_tokens - width
        self.project = PerTokenLinear(num_tokens, slice_width, token_dim)

    def forward(self, e):
        """Cuts ``(B, width)`` into tokens ``(B, T, D)``."""
        return self.project(nn.functional.pad(e, (0, self.missing)).unflatten(-1, (self.num_tokens, -1)))


class RankMixerBlock(nn.Module):
    """``S = LN(TokenMixing(X) + X)``, ``X = LN(PFFN(S) + S)`` with ``PFFN_t(s) = W2_t GELU(W1_t s)`` of token t."""

    def __init__(self, num_tokens, dim, hidden):
        super().__init__()
        self.norm_mixing, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ffn = nn.Sequential(
            PerTokenLinear(num_tokens, dim, hidden), nn.GELU(), PerTokenLinear(num_tokens, hidden, dim)
        )

    def forward(self, x):
        """Transforms ``(B, T, D)``; same shape out."""
        s = self.norm_mixing(mix_tokens(x) + x)
        return self.norm_ffn(self.ffn(s) + s)


def mix_tokens(x):
    """Multi-head token mixing with H = T: token h of the result is head h of every token, ``(B, T, D)``."""
    num_tokens = x.shape[1]
    return x.unflatten(-1, (num_tokens, -1)).transpose(1, 2).flatten(2)  # (B, H, T D/H)

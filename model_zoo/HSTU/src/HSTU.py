"""HSTU: Actions Speak Louder than Words, hierarchical sequential transduction units (ICML 2024).

Zhai et al., https://arxiv.org/abs/2402.17152, as a ranking model: the behaviours' events, then the target, whose last
state every head reads.

Differs from the paper and its code:
  * The paper feeds one sequence of items and actions and predicts every action in it. Here a row is one exposure: an
    event is one token that holds its item, and its action by the linear map of its behaviour; the target is one token
    made of all fields; only its actions, the labels, are predicted.
  * Behaviours have no common clock. An event's age is its rank in its behaviour, 1 for the most recent; causality and
    the position bias go by ages.
  * The time bias of a key goes by its gap to the exposure, the only time that the data know. For the target that is the
    paper's bias; events use it too.
  * Weights are divided by the data set's length; the code divides by that of the batch, which padding changes.
  * Stochastic length and the fused kernels, which are about cost, are left out.
  * ``target_softmax`` adds a loss over the targets of the batch, and a field token of it; off by default.
"""

import torch
from flowctr.layers import FeatureTokens, TaskHeads, check_positive
from fuxictr.pytorch.models import MultiTaskModel
from torch import nn


class HSTU(MultiTaskModel):
    """Stacks gated layers of attention without softmax over events and target; heads read the target.

    Args:
        feature_map: FuxiCTR's feature map.
        model_id: Name of the checkpoint and log.
        gpu: GPU index, -1 for the CPU.
        task: FuxiCTR's task type, one for all labels or a list with one for each.
        behaviors: Behaviour name -> aligned sequence columns; none: every sequence column by itself.
        embedding_dim: Token width D.
        embedding_initializer: FuxiCTR's initialiser of the embedding tables.
        target_softmax: Weight of a loss that, where a binary label is positive, tells the target from the others of the
            batch by the histories, with a field token of its own (see ``flowctr.layers.TargetTowers``); none: neither.
        num_layers: Layers L.
        num_heads: Attention heads; must divide ``embedding_dim``.
        time_columns: Columns that hold the bucketised time from an event to the exposure, one of each behaviour; none:
            no time bias.
        layer_dropout: Dropout before the output map of each layer.
        head_hidden_units: Hidden widths of the head.
        head_activation: Activation of the head.
        net_dropout: Dropout of the head.
        batch_norm: Batch normalisation in the head.
        optimizer: FuxiCTR's optimiser name.
        loss: FuxiCTR's loss name.
        learning_rate: Initial learning rate.
        **kwargs: Arguments of ``MultiTaskModel`` and ``BaseModel``.

    Raises:
        ValueError: If a count is below one, ``num_heads`` does not divide ``embedding_dim``, or ``time_columns`` are
            not one column of each behaviour.
    """

    def __init__(
        self,
        feature_map,
        model_id="HSTU",
        gpu=-1,
        task="binary_classification",
        behaviors=None,
        embedding_dim=64,
        embedding_initializer="partial(nn.init.normal_, std=1e-4)",
        target_softmax=None,
        num_layers=2,
        num_heads=2,
        time_columns=(),
        layer_dropout=0.0,
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
        check_positive(num_layers=num_layers, num_heads=num_heads)
        if embedding_dim % num_heads:
            raise ValueError(
                f"num_heads must divide embedding_dim; got num_heads={num_heads}, embedding_dim={embedding_dim}"
            )
        self.tokens = FeatureTokens(
            feature_map, embedding_dim, behaviors, embedding_initializer, target_softmax=target_softmax
        )
        self.time_places = _time_places(self.tokens.behaviors, time_columns)
        self.events = nn.ModuleList(
            nn.Linear(len(columns) * embedding_dim, embedding_dim) for columns in self.tokens.behaviors.values()
        )
        self.target = nn.Linear(self.tokens.num_fields * embedding_dim, embedding_dim)
        lengths = [feature_map.features[columns[0]]["max_len"] for columns in self.tokens.behaviors.values()]
        self.layers = nn.ModuleList(
            HSTULayer(
                embedding_dim, num_heads, max([0, *lengths]) + 1, sum(lengths) + 1, bool(time_columns), layer_dropout
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(embedding_dim, eps=1e-6)
        self.heads = TaskHeads(
            embedding_dim,
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
        x, real, gaps, ages = self.tokenize(self.get_inputs(inputs))  # (B, N, D), (B, N), (B, N, D), (N,)
        distances = ages - ages.unsqueeze(-1)  # (N, N): how much older the key is than the query
        for layer in self.layers[:-1]:
            x = layer(x, distances, real, gaps)
        target = self.layers[-1](x, distances[-1:], real, gaps)  # (B, 1, D)
        return self.heads(self.norm(target).squeeze(1)) | self.tokens.take_compared()

    def add_loss(self, return_dict, y_true):
        """Adds the losses of the labels and, with ``target_softmax``, of the target among those of the batch."""
        return super().add_loss(return_dict, y_true) + self.tokens.target_loss(return_dict, y_true)

    def tokenize(self, inputs):
        """Builds the sequence: every behaviour's events one after another, the target last.

        Returns:
            Tokens ``(B, N, D)``; real ones ``(B, N)``; embedded time gaps ``(B, N, D)``, the target's zero, or None
            without ``time_columns``; ages ``(N,)``, the target's 0.
        """
        fields, columns, masks = self.tokens(inputs)
        target = self.target(fields.flatten(1)).unsqueeze(1)  # (B, 1, D)
        events = [embed(columns[behavior]) for behavior, embed in zip(columns, self.events)]
        ages = [torch.arange(s.shape[1], 0, -1, device=s.device) for s in events]
        real = torch.cat([*masks.values(), target.new_ones(len(target), 1, dtype=torch.bool)], dim=1)
        dim = target.shape[-1]
        gaps = [x.unflatten(-1, (-1, dim))[:, :, i] for x, i in zip(columns.values(), self.time_places)]
        gaps = torch.cat([*gaps, torch.zeros_like(target)], dim=1) if gaps else None
        return torch.cat([*events, target], dim=1), real, gaps, torch.cat([*ages, real.new_zeros(1, dtype=torch.long)])


class HSTULayer(nn.Module):
    """One layer of HSTU, with its residual and the published code's norm of the input.

    U, V, Q, K = Split(SiLU(f1(LN(X))))
    A V = SiLU(Q K^T + rab) V / N,      rab = position bias + time bias
    Y = f2(LN(A V) * U) + X
    """

    def __init__(self, dim, num_heads, num_positions, num_tokens, knows_time, dropout):
        super().__init__()
        self.num_heads, self.num_tokens = num_heads, num_tokens
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.f1 = nn.Linear(dim, 4 * dim, bias=False)
        self.position_bias = nn.Parameter(torch.zeros(num_positions))
        self.time_bias = nn.Linear(dim, 1, bias=False) if knows_time else None
        self.norm_attention = nn.LayerNorm(dim, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.f2 = nn.Linear(dim, dim)

    def forward(self, x, distances, real, gaps):
        """Lets the last Q tokens read the real ones that are as old as they or older.

        Args:
            x: ``(B, N, D)``.
            distances: How much older each token is than a query, ``(Q, N)``.
            real: ``(B, N)``.
            gaps: Embedded time gaps, ``(B, N, D)``, or None.

        Returns:
            ``(B, Q, D)``.
        """
        queries = slice(x.shape[1] - distances.shape[0], None)
        u, v, q, k = nn.functional.silu(self.f1(self.norm(x))).chunk(4, dim=-1)
        q, k, v = self._split(q[:, queries]), self._split(k), self._split(v)  # (B, H, N, D/H)
        # Batches longer than the data set's histories: all that is older shares the last bias.
        bias = self.position_bias[distances.clamp(0, len(self.position_bias) - 1)]  # (Q, N)
        if gaps is not None:
            bias = bias + self.time_bias(gaps).transpose(1, 2).unsqueeze(1)  # (B, 1, Q, N)
        allowed = (distances >= 0) & real[:, None, None, :]  # (B, 1, Q, N)
        weights = nn.functional.silu(q @ k.transpose(-1, -2) + bias).masked_fill(~allowed, 0) / self.num_tokens
        aggregated = (weights @ v).transpose(1, 2).flatten(2)  # (B, Q, D)
        return x[:, queries] + self.f2(self.dropout(self.norm_attention(aggregated) * u[:, queries]))

    def _split(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _time_places(behaviors, time_columns):
    """Finds the place of each behaviour's time column among its columns; none if no time column is named."""
    if not time_columns:
        return []
    places = [[i for i, column in enumerate(columns) if column in time_columns] for columns in behaviors.values()]
    if len(time_columns) != len(behaviors) or any(len(found) != 1 for found in places):
        raise ValueError(
            f"time_columns must name one column of each behavior; got {list(time_columns)} for behaviors {behaviors}"
        )
    return [place for (place,) in places]

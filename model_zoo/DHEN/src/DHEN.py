"""DHEN: A Deep and Hierarchical Ensemble Network for Large-Scale Click-Through Rate Prediction (2022).

Zhang et al., https://arxiv.org/abs/2203.11014, in the form that InterFormer's benchmark (arXiv 2411.09852, Table 2)
names: every layer is an ensemble of the DOT product and one DCN cross.

Differs from the paper:
  * Sequences enter as the mean of each column's events; the paper has no sequences.
  * The ensemble is the sum, which keeps the token count, so that the shortcut is the identity.
"""

from flowctr.layers import DHENLayer, FeatureTokens, TaskHeads, check_positive
from fuxictr.pytorch.models import MultiTaskModel
from torch import nn


class DHEN(MultiTaskModel):
    """Stacks ``LN(DOT(Z) + DCN(Z) + Z)`` on the field tokens and pooled sequences, then one MLP per label.

    Args:
        feature_map: FuxiCTR's feature map.
        model_id: Name of the checkpoint and log.
        gpu: GPU index, -1 for the CPU.
        task: FuxiCTR's task type, one for all labels or a list with one for each.
        behaviors: Behaviour name -> aligned sequence columns; none: every sequence column by itself.
        embedding_dim: Token width D.
        embedding_initializer: FuxiCTR's initialiser of the embedding tables.
        num_layers: DHEN layers.
        cross_rank: Rank of the cross layers.
        head_hidden_units: Hidden widths of the head.
        head_activation: Activation of the head.
        net_dropout: Dropout of the head.
        batch_norm: Batch normalisation in the head.
        optimizer: FuxiCTR's optimiser name.
        loss: FuxiCTR's loss name.
        learning_rate: Initial learning rate.
        **kwargs: Arguments of ``MultiTaskModel`` and ``BaseModel``.
    """

    def __init__(
        self,
        feature_map,
        model_id="DHEN",
        gpu=-1,
        task="binary_classification",
        behaviors=None,
        embedding_dim=64,
        embedding_initializer="partial(nn.init.normal_, std=1e-4)",
        num_layers=2,
        cross_rank=32,
        head_hidden_units=(1024, 512, 256),
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
        check_positive(num_layers=num_layers, cross_rank=cross_rank)
        self.tokens = FeatureTokens(feature_map, embedding_dim, behaviors, embedding_initializer)
        num_tokens = self.tokens.num_fields + self.tokens.num_columns
        self.layers = nn.ModuleList(DHENLayer(num_tokens, embedding_dim, cross_rank) for _ in range(num_layers))
        self.heads = TaskHeads(
            num_tokens * embedding_dim,
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
        fields, events, masks = self.tokens(self.get_inputs(inputs))
        z = self.tokens.append_pooled(fields, events, masks)  # (B, N, D)
        for layer in self.layers:
            z = layer(z)
        return self.heads(z.flatten(1))

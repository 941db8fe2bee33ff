"""DOT: the dot-product baseline of InterFormer's benchmark (arXiv 2411.09852, Table 2), as in DLRM.

Naumov et al., Deep Learning Recommendation Model for Personalization and Recommendation Systems, 2019,
https://arxiv.org/abs/1906.00091.

Differs from the paper:
  * All numeric fields share one linear map instead of a bottom MLP.
  * Sequences enter as the mean of each column's events.
"""

import torch
from flowctr.layers import FeatureTokens, TaskHeads, pairwise_dots
from fuxictr.pytorch.models import MultiTaskModel


class DOT(MultiTaskModel):
    """An MLP per label on the field tokens, the pooled sequences and all their pairwise inner products.

    Args:
        feature_map: FuxiCTR's feature map.
        model_id: Name of the checkpoint and log.
        gpu: GPU index, -1 for the CPU.
        task: FuxiCTR's task type, one for all labels or a list with one for each.
        behaviors: Behaviour name -> aligned sequence columns; none: every sequence column by itself.
        embedding_dim: Token width D.
        embedding_initializer: FuxiCTR's initialiser of the embedding tables.
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
        model_id="DOT",
        gpu=-1,
        task="binary_classification",
        behaviors=None,
        embedding_dim=64,
        embedding_initializer="partial(nn.init.normal_, std=1e-4)",
        head_hidden_units=(512,),
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
        self.tokens = FeatureTokens(feature_map, embedding_dim, behaviors, embedding_initializer)
        num_tokens = self.tokens.num_fields + self.tokens.num_columns
        self.heads = TaskHeads(
            num_tokens * embedding_dim + num_tokens * (num_tokens - 1) // 2,
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
        return self.heads(torch.cat([z.flatten(1), pairwise_dots(z)], dim=1))

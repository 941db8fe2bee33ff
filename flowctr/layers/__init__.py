"""Building blocks shared by the models: plain torch modules, one idea per file.

Shape letters, the same in every file and model:

    B  rows of a batch          N  tokens of a group           T  steps (events) of a behaviour
    D  token width              H  attention heads             K  tasks (labels)

Masks are ``torch.bool``; True marks a real token. Behaviour events are right-aligned (``masks.right_align``): the most
recent event is the last step whatever side the data set pads on. ``tokens`` and ``scenarios`` alone know FuxiCTR's
FeatureMap.
"""

from flowctr.layers.attention import AttentionPooling, MultiHeadAttention, record_attention
from flowctr.layers.dhen import DHENLayer
from flowctr.layers.experts import ExpertGate, Experts
from flowctr.layers.gating import Gating
from flowctr.layers.heads import TaskHeads, named_predictions
from flowctr.layers.interaction import CrossInteraction, DotInteraction, pairwise_dots
from flowctr.layers.lce import LinearCompressedEmbedding
from flowctr.layers.learned import LearnedTokens
from flowctr.layers.lora import LoRAUnits
from flowctr.layers.masknet import MaskNet
from flowctr.layers.masks import masked_mean, right_align
from flowctr.layers.matches import MatchToken
from flowctr.layers.options import check_options, check_positive
from flowctr.layers.per_token import PerTokenLinear
from flowctr.layers.pffn import PersonalizedFFN
from flowctr.layers.ple import PLE
from flowctr.layers.rope import rotate
from flowctr.layers.scenarios import count_scenarios, own_scenario
from flowctr.layers.tokens import FeatureTokens
from flowctr.layers.towers import TargetTowers

__all__ = [
    "PLE",
    "AttentionPooling",
    "CrossInteraction",
    "DHENLayer",
    "DotInteraction",
    "ExpertGate",
    "Experts",
    "FeatureTokens",
    "Gating",
    "LearnedTokens",
    "LinearCompressedEmbedding",
    "LoRAUnits",
    "MaskNet",
    "MatchToken",
    "MultiHeadAttention",
    "PerTokenLinear",
    "PersonalizedFFN",
    "TargetTowers",
    "TaskHeads",
    "check_options",
    "check_positive",
    "count_scenarios",
    "masked_mean",
    "named_predictions",
    "own_scenario",
    "pairwise_dots",
    "record_attention",
    "right_align",
    "rotate",
]

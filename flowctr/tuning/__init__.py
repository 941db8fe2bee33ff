"""Searching hyper-parameters: `tune` runs the trials of a tuner YAML, and may be killed and started again."""

from flowctr.tuning.ids import canonical, canonical_id
from flowctr.tuning.ledger import Ledger
from flowctr.tuning.search import TuningError, tune
from flowctr.tuning.space import Space, Trial, read_space

__all__ = ["Ledger", "Space", "Trial", "TuningError", "canonical", "canonical_id", "read_space", "tune"]

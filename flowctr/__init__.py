"""flowctr: information-flow CTR models, an h5 data pipeline and a benchmark runner for FuxiCTR."""

from flowctr._fuxictr import import_fuxictr_without_ray

__version__ = "0.1.0"

# Before any `fuxictr.pytorch` import: FuxiCTR's layers reach `fuxictr.preprocess`, whose __init__ imports ray.
import_fuxictr_without_ray()

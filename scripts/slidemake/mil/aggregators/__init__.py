"""Aggregators: from the tiles of a bag to logits, with an attention weight per tile. One file per method.

`base` has the interface, `registration` the names, `registry` builds, `inference` has prediction and leave-one-out.
Methods: mean_pool, max_pool, mean_mlp, instance_linear; attention and what builds on it (abmil, additive, clam, dtfd,
chief); dsmil, transmil, ilra.
"""

from slidemake.mil.aggregators.base import Aggregator, BagLoss, Batch, SeededDropout, Step
from slidemake.mil.aggregators.inference import CHUNK, encode_bag, leave_one_out, predict_bag, slide_numbers
from slidemake.mil.aggregators.registration import AGGREGATORS, aggregator
from slidemake.mil.aggregators.registry import build_aggregator, model_parameters
from slidemake.tasks.classes import log_odds

__all__ = [
    "AGGREGATORS",
    "CHUNK",
    "Aggregator",
    "BagLoss",
    "Batch",
    "SeededDropout",
    "Step",
    "aggregator",
    "build_aggregator",
    "encode_bag",
    "leave_one_out",
    "log_odds",
    "model_parameters",
    "predict_bag",
    "slide_numbers",
]

"""Optimisers, learning-rate schedules, batch scaling and the weight average: what changes weights."""

from restrike.optim.batch_scaling import SCALING_RULES, scale_factor, scale_weight_decay
from restrike.optim.gradients import clip_gradients
from restrike.optim.module_clipping import clip_by_module, total_norm
from restrike.optim.optimizers import create_optimizer
from restrike.optim.param_groups import param_groups
from restrike.optim.schedules import (
    SCHEDULES,
    constant,
    cosine,
    lr_scheduler,
    make_schedule,
    one_cycle,
    warmup_cosine,
    weight_decay_at,
)
from restrike.optim.weight_average import WeightAverage, averaged_names

__all__ = [
    "SCALING_RULES",
    "SCHEDULES",
    "WeightAverage",
    "averaged_names",
    "clip_by_module",
    "clip_gradients",
    "constant",
    "cosine",
    "create_optimizer",
    "lr_scheduler",
    "make_schedule",
    "one_cycle",
    "param_groups",
    "scale_factor",
    "scale_weight_decay",
    "total_norm",
    "warmup_cosine",
    "weight_decay_at",
]

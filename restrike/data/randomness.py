"""Where randomness in data comes from: counters, never worker seeds or a global generator.

Each stream is numpy's SeedSequence over (seed, purpose, position), so a result depends neither on the number of
workers nor on what was drawn before, and a resumed run draws what the unbroken one drew.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """Keeps streams of the same position apart; values are part of the data order: never renumber them."""

    SHARD_ORDER = 1
    WINDOW_SHUFFLE = 2
    SAMPLE = 3
    MIXING = 4
    DEVICE = 5
    PACKING = 6
    SCENES = 7
    SHAPE = 8
    VIEWS = 9


def stream(seed: int, purpose: Purpose, *position: int) -> np.random.Generator:
    """A generator that is a pure function of its arguments (all non-negative)."""
    return np.random.default_rng(np.random.SeedSequence((seed, int(purpose), *position)))


def device_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """A seed in [0, 2**63) for `torch.Generator.manual_seed` on the device of one rank at one step."""
    state = np.random.SeedSequence((seed, int(Purpose.DEVICE), epoch, step, rank)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))

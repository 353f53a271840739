"""Randomness as a function of (seed, purpose, round, client): no generator outlives its use.

A client's draws therefore never depend on who else took part, on the pool it ran in, or on what was
resumed or repeated.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What a stream of random numbers is for. Values are part of every run's bits: never renumber."""

    INIT = 0
    PARTITION = 1
    LEVELS = 2
    SELECT = 3
    TRAIN = 4
    EVALUATE = 5
    STATISTICS = 6
    DEVICES = 7
    ALLOCATE = 8
    CHANNELS = 9
    DISTIL = 10
    STRAGGLE = 11
    LOAD = 12
    AVAILABILITY = 13
    LOSS = 14
    TIER = 15


def sequence(seed: int, purpose: Purpose, round: int = 0, client: int = 0) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, int(purpose), round, client])


def generator(seed: int, purpose: Purpose, round: int = 0, client: int = 0) -> np.random.Generator:
    return np.random.default_rng(sequence(seed, purpose, round, client))


def torch_generator(
    seed: int, purpose: Purpose, round: int = 0, client: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    state = int(sequence(seed, purpose, round, client).generate_state(1, np.uint64)[0])
    return torch.Generator(device=device).manual_seed(state & (2**63 - 1))

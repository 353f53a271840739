"""Who takes part: each client's samples and device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster_fl.config import Config
from cluster_fl.data.partition import Shares
from cluster_fl.seeding import Purpose, generator
from cluster_fl.timing.clock import Devices


@dataclass(frozen=True)
class Population:
    shares: Shares
    tier_of: np.ndarray  # (clients,), from 1: the class of each client's device
    devices: Devices

    def select(self, config: Config, round: int) -> np.ndarray:
        """The participants of a round, rising; uniform without replacement."""
        rng = generator(config.seed, Purpose.SELECT, round)
        return np.sort(rng.choice(config.clients.count, config.clients.per_round, replace=False))

    def judges(self, config: Config, round: int) -> np.ndarray:
        """The clients whose held-out parts a round's evaluation reads, rising."""
        count = config.evaluate.clients
        if count is None:
            return np.arange(config.clients.count)
        rng = generator(config.seed, Purpose.EVALUATE, round)
        return np.sort(rng.choice(config.clients.count, count, replace=False))

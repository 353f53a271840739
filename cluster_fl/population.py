"""Who takes part: each client's samples and device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster_fl.config import Config
from cluster_fl.data.partition import Shares
from cluster_fl.seeding import Purpose, generator
from cluster_fl.timing.availability import Availability
from cluster_fl.timing.devices import Devices


@dataclass(frozen=True)
class Population:
    """Arrays of shape (clients,).

    Attributes:
        shares: whose samples are whose.
        samples: how many each trains on.
        tier_of: the class of each client's device, from 1.
        largest: the largest level that its memory holds.
        devices: what they can do.
        availability: when they can take part.
    """

    shares: Shares
    samples: np.ndarray
    tier_of: np.ndarray
    largest: np.ndarray
    devices: Devices
    availability: Availability

    def judges(self, config: Config, round: int) -> np.ndarray:
        """The clients whose held-out parts a round's evaluation reads, rising."""
        count = config.evaluate.clients
        if count is None:
            return np.arange(config.clients.count)
        rng = generator(config.seed, Purpose.EVALUATE, round)
        return np.sort(rng.choice(config.clients.count, count, replace=False))

    def label_counts(self, labels: np.ndarray, classes: int, clients: int) -> np.ndarray:
        """Training samples of each class (columns) that each of the first ``clients`` clients (rows) has."""
        rows = self.shares.train[:clients]
        return np.array([np.bincount(labels[own], minlength=classes) for own in rows])

"""What else a device is busy with: a Markov chain over shares of its speed, a step a round."""

from __future__ import annotations

import numpy as np

from cluster_fl.seeding import Purpose, generator
from cluster_fl.timing.schema import LoadConfig


def loads(config: LoadConfig, seed: int, clients: int, round: int) -> np.ndarray:
    """Share of each client's device that other work takes in a round, (clients,).

    A device begins at any of ``time.load.shares``; each round it stays with chance ``time.load.stay``, and otherwise
    goes to any of them.
    """
    shares = np.asarray(config.shares)
    if len(shares) == 1:
        return np.full(clients, shares[0])
    at = generator(seed, Purpose.DEVICES).integers(len(shares), size=clients)
    for number in range(1, round + 1):
        rng = generator(seed, Purpose.DEVICES, number)
        moves, targets = rng.random(clients) >= config.stay, rng.integers(len(shares), size=clients)
        at = np.where(moves, targets, at)
    result: np.ndarray = shares[at]
    return result

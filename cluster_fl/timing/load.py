"""What else a device is busy with: a Markov chain over shares of its speed, a step a round."""

from __future__ import annotations

import numpy as np

from cluster_fl.seeding import Purpose
from cluster_fl.timing import draws
from cluster_fl.timing.schema import LoadConfig


def load(config: LoadConfig, seed: int, clients: np.ndarray, round: int, half: int = 0) -> np.ndarray:
    """Share of each client's device that other work takes in a round, (clients,).

    A device begins at any of ``time.load.shares``; each round it stays with chance ``time.load.stay``, and otherwise
    goes to any of them. So its load is what it drew when it last moved, for which the rounds are gone through
    backwards: some ``1 / (1 - stay)`` of them a client, whatever the round and however many clients there are.

    Args:
        half: 0 and 1, the halves of a client's training: with ``time.load.mid_round`` the chain takes a step between
            them too, so that two steps lie between one round's first half and the next round's.
    """
    shares = np.asarray(config.shares)
    if len(shares) == 1:
        return np.full(len(clients), shares[0])
    now = 2 * round + half if config.mid_round else round
    at = np.zeros(len(clients), dtype=np.int64)
    waiting = np.arange(len(clients))
    for step in range(now, -1, -1) if config.stay < 1 else (0,):
        stay = config.stay if step else 0.0
        chance = draws.uniforms(seed, Purpose.LOAD, step, clients[waiting])
        moved = chance >= stay
        # A number that is known to be above stay is uniform between stay and 1.
        target = (chance[moved] - stay) / (1 - stay) * len(shares)
        at[waiting[moved]] = np.minimum(target.astype(np.int64), len(shares) - 1)
        waiting = waiting[~moved]
        if not len(waiting):
            break
    result: np.ndarray = shares[at]
    return result

"""What a round costs its participants' devices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster_fl.nesting.plan import Plan
from cluster_fl.population import Population
from cluster_fl.timing.clock import client_seconds, synchronous


@dataclass(frozen=True)
class RoundCost:
    """Arrays of shape (participants,): simulated seconds, and bytes each way."""

    seconds: np.ndarray
    payload: np.ndarray

    @property
    def length(self) -> float:
        """Simulated seconds of the round."""
        return synchronous(self.seconds)

    @property
    def bytes(self) -> int:
        """Sent each way by all participants together."""
        return int(self.payload.sum())


def round_cost(plan: Plan, population: Population, participants: np.ndarray, epochs: int) -> RoundCost:
    """Each participant downloads its submodel, trains ``epochs`` on its samples and uploads the update."""
    costs = [plan.level(int(level)).cost for level in population.level_of[participants]]
    macs = np.array([cost.macs for cost in costs])
    payload = np.array([cost.bytes for cost in costs])
    samples = epochs * np.array([len(population.shares.train[client]) for client in participants])
    return RoundCost(client_seconds(population.devices, participants, macs, payload, samples), payload)

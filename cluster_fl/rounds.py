"""One round as its parts see it: what it starts from and who takes part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from cluster_fl.config import Config
from cluster_fl.nesting.plan import Plan, State
from cluster_fl.population import Population


@dataclass(frozen=True)
class Round:
    """A round before its first step.

    Attributes:
        number: from 0.
        participants: client numbers, rising; empty where the view only serves to look at the models.
        state: the weights that it starts from.
        memory: what the server keeps between rounds besides the weights (moments, control variates, angles).
        personal: what a client kept from its last participation, by its number; empty if nothing.
    """

    number: int
    config: Config
    plan: Plan
    population: Population
    state: State
    memory: State
    personal: Callable[[int], State]
    participants: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def select(self) -> Round:
        """The same round with its participants drawn."""
        return replace(self, participants=self.population.select(self.config, self.number))

"""One round as its parts see it: what it starts from and who takes part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from cluster_fl.config import Config
from cluster_fl.nesting.plan import Plan, State
from cluster_fl.population import Population


@dataclass(frozen=True)
class Start:
    """What an earlier round started from: its weights, and the server's memory of then."""

    state: State
    memory: State


@dataclass(frozen=True)
class Round:
    """A round before its first step.

    Attributes:
        number: from 0.
        participants: client numbers, rising; empty where the view only serves to look at the models.
        starts: earlier rounds by number, from whose weights some of the clients started that it merges.
        pull: how far the weights go towards those that a client trained (FedAsync); 0: they move by its update.
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
    starts: Mapping[int, Start] = field(default_factory=dict)
    pull: float = 0.0

    def start(self, version: int) -> Start:
        """What clients started from in an earlier round, or in this one."""
        return Start(self.state, self.memory) if version == self.number else self.starts[version]

    def seen_at(self, version: int) -> Round:
        """The round that clients saw which started in it."""
        start = self.start(version)
        return replace(self, number=version, state=start.state, memory=start.memory)

"""What a round costs its participants' devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster_fl.nesting.cost import cost
from cluster_fl.nesting.plan import Assignment, Plan
from cluster_fl.nesting.submodel import Submodel
from cluster_fl.rounds import Round
from cluster_fl.timing.clock import client_seconds, synchronous
from cluster_fl.timing.load import loads
from cluster_fl.training.program import LocalProgram


@dataclass(frozen=True)
class RoundCost:
    """Arrays of shape (participants,): simulated seconds, and bytes down and up."""

    seconds: np.ndarray
    down: np.ndarray
    up: np.ndarray

    @property
    def length(self) -> float:
        """Simulated seconds of the round."""
        return synchronous(self.seconds)


def round_cost(round: Round, assignments: Sequence[Assignment], program: LocalProgram) -> RoundCost:
    """Each participant downloads its submodel, trains on its samples and uploads the update."""
    config, population, plan = round.config, round.population, round.plan
    efforts = [program.effort(plan.level(a.level)) for a in assignments]
    known: dict[Submodel, tuple[int, int]] = {}
    sizes = np.array([_size(plan, a, known) for a in assignments], dtype=np.float64).reshape(-1, 2)
    down = sizes[:, 1] * [e.down for e in efforts]
    up = sizes[:, 1] * [e.up for e in efforts]
    macs = sizes[:, 0] * [e.compute for e in efforts]
    samples = np.array([len(population.shares.train[a.client]) for a in assignments]) * config.train.epochs
    clients = np.array([a.client for a in assignments])
    busy = loads(config.time.load, config.seed, config.clients.count, round.number)[clients]
    seconds = client_seconds(population.devices, clients, macs, down, up, samples, busy)
    return RoundCost(seconds, down.astype(np.int64), up.astype(np.int64))


def _size(plan: Plan, assignment: Assignment, known: dict[Submodel, tuple[int, int]]) -> tuple[int, int]:
    """MACs of a forward, and bytes of the submodel."""
    level, shape = plan.level(assignment.level), assignment.submodel.shape
    if shape not in known:
        own = level.cost if shape == level.submodel.shape else cost(plan.anatomy, assignment.submodel)
        known[shape] = own.macs, own.bytes
    return known[shape]

"""A cohort: the clients of a round that share a submodel, in client order, in chunks of a fixed size.

Its composition depends on the configuration, the round and the seed alone. It is what one call trains, what
is placed and repeated, and what returns one partial sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cluster_fl.aggregation.exact import weight_unit
from cluster_fl.aggregation.nested import PartialSum
from cluster_fl.config import Config
from cluster_fl.nesting.extraction import load, read
from cluster_fl.nesting.plan import Plan
from cluster_fl.population import Population
from cluster_fl.seeding import Purpose, torch_generator
from cluster_fl.training.worker import Worker


@dataclass(frozen=True)
class CohortReport:
    """What the clients of a cohort reported, in their order.

    ``refused`` are clients whose update was not finite or out of range; they are not in the sum.
    """

    clients: tuple[int, ...]
    losses: tuple[float, ...]
    steps: tuple[int, ...]
    refused: tuple[int, ...]


@dataclass(frozen=True)
class CohortResult:
    partial: PartialSum
    report: CohortReport


@dataclass(frozen=True)
class Cohort:
    """Trains ``clients`` on the level's submodel, each from the same state, weighted by ``weights``."""

    round: int
    level: int
    clients: tuple[int, ...]
    weights: tuple[float, ...]
    work: float

    def run(self, worker: Worker, state: Mapping[str, np.ndarray]) -> CohortResult:
        received = worker.plan.received(state, self.level)
        module = worker.module(self.level).train()
        partial = PartialSum.empty(self.level, {name: array.shape for name, array in received.items()})
        reports, refused = [], []
        for client, weight in zip(self.clients, self.weights, strict=True):
            load(module, received)
            generator = torch_generator(worker.config.seed, Purpose.TRAIN, self.round, client)
            rows = worker.shares.train[client]
            reports.append(worker.program(module, worker.data, rows, self.round, generator))
            # A client that took no step has nothing to say, so it does not dilute the mean either.
            if reports[-1].steps and not partial.add(received, read(module), weight):
                refused.append(client)
        losses, steps = tuple(r.loss for r in reports), tuple(r.steps for r in reports)
        return CohortResult(partial, CohortReport(self.clients, losses, steps, tuple(refused)))


def form(
    config: Config, plan: Plan, population: Population, round: int, participants: np.ndarray
) -> list[Cohort]:
    """The cohorts of a round, by level and then in client order."""
    samples = np.array([len(population.shares.train[c]) for c in participants])
    shares = samples if config.aggregation.weights == "samples" else np.ones_like(samples)
    unit = weight_unit(max(1, int(shares.sum())))
    levels = population.level_of[participants]
    cohorts = []
    for level in plan.levels:
        at = np.flatnonzero(levels == level.number)
        for start in range(0, len(at), config.train.cohort_size):
            chunk = at[start : start + config.train.cohort_size]
            clients = tuple(int(c) for c in participants[chunk])
            weights = tuple(float(shares[i]) * unit for i in chunk)
            work = float(samples[chunk].sum() * level.cost.macs * config.train.epochs)
            cohorts.append(Cohort(round, level.number, clients, weights, work))
    return cohorts

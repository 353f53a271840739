"""Which levels a client finishes in time: an allocation by the devices' load at runtime."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster_fl.rounds import Round
from cluster_fl.timing.load import load
from cluster_fl.timing.work import Charge, Work, roofline_batch
from cluster_fl.training.program import LocalProgram


@dataclass(frozen=True)
class Affordable:
    """Each participant trains the largest level that it finishes before the deadline, or else the smallest.

    What it would take is what the simulated clock will charge, its load in this round included.

    Attributes:
        program: what a client does, for what it costs.
        deadline: seconds; None: what the median client takes, without load, for the level of about ``width``.
    """

    program: LocalProgram
    deadline: float | None = None
    width: float = 0.6

    def __call__(self, round: Round) -> np.ndarray:
        config, clients = round.config, round.participants
        busy = load(config.time.load, config.seed, clients, round.number)
        limit = self.limit(round) if self.deadline is None else self.deadline
        fits = level_seconds(round, self.program, clients, busy) <= limit
        largest = fits.shape[1] - np.argmax(fits[:, ::-1], axis=1)
        return np.where(fits.any(axis=1), largest, 1)

    def limit(self, round: Round) -> float:
        """The deadline where none is given, seconds."""
        everyone = np.arange(round.config.clients.count)
        distance = [abs(level.width - self.width) for level in round.plan.levels]
        seconds = level_seconds(round, self.program, everyone, np.zeros(len(everyone)))
        return float(np.median(seconds[:, int(np.argmin(distance))]))


def level_seconds(round: Round, program: LocalProgram, clients: np.ndarray, busy: np.ndarray) -> np.ndarray:
    """What each client would take for each level, seconds, (clients, levels).

    Args:
        busy: share of each client's device that other work takes, (clients,).
    """
    config, population = round.config, round.population
    samples = population.samples[clients] * config.train.epochs
    batch, columns = roofline_batch(config, population.devices), []
    for level in round.plan.levels:
        charge = [Charge.of(round.plan, program, level, batch=batch)]
        work = Work.of(charge, np.zeros(len(clients), dtype=np.int64), population.devices, clients, samples)
        columns.append(work.seconds + work.compute * busy / (1 - busy))
    return np.stack(columns, axis=1)

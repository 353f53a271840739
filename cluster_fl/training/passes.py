"""Further passes over a round's updates, for merges that see all of them before they weigh them.

Each task runs where a cohort's updates are kept, or trains the cohort once more. Elements fall into numbered
*parts*, published beside the weights; what a task says of an update, it says part by part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster_fl.aggregation.nested import PartialSum
from cluster_fl.nesting.plan import Holding
from cluster_fl.training.cohort import Cohort, Update
from cluster_fl.training.worker import Worker

# In the published state, before a tensor's key: the part of each element, int8.
PART = "part/"


@dataclass(frozen=True)
class OfCohort:
    """A task for a cohort's updates, at home where they are kept."""

    cohort: Cohort

    @property
    def home(self) -> tuple[int, int]:
        return self.cohort.home

    @property
    def clients(self) -> tuple[int, ...]:
        return self.cohort.clients

    @property
    def level(self) -> int:
        return self.cohort.level


@dataclass(frozen=True)
class Pass(OfCohort):
    """One that lasts about as long as the training would."""

    @property
    def work(self) -> float:
        return self.cohort.work


@dataclass(frozen=True)
class Send(Pass):
    """The updates themselves."""

    def run(self, worker: Worker, state: Mapping[str, np.ndarray]) -> list[Update]:
        return self.cohort.updates(worker, state)


@dataclass(frozen=True)
class Compared:
    """One client's update a against references b, part by part, on the elements that the client speaks for.

    Attributes:
        products: <a, b>, (references, parts), float64.
        square: |a|^2, (parts,).
        others: |b|^2, (references, parts).
    """

    client: int
    level: int
    products: np.ndarray
    square: np.ndarray
    others: np.ndarray


@dataclass(frozen=True)
class Compare(Pass):
    """Every client's update against vectors that are published beside the weights.

    Attributes:
        references: what stands before a tensor's key in the published state, one a vector.
        parts: how many parts there are.
    """

    references: tuple[str, ...]
    parts: int

    def run(self, worker: Worker, state: Mapping[str, np.ndarray]) -> list[Compared]:
        return [self._compare(update, state) for update in self.cohort.updates(worker, state)]

    def _compare(self, update: Update, state: Mapping[str, np.ndarray]) -> Compared:
        products = np.zeros((len(self.references), self.parts))
        square, others = np.zeros(self.parts), np.zeros_like(products)
        for name, delta in update.deltas.items():
            key, where = update.holding.keys[name], update.holding.where[name]
            share = update.coverage.get(name, 1.0)
            own, part = (delta * share).ravel(), state[PART + key][where].ravel().astype(np.intp)
            square += np.bincount(part, own * own, self.parts)
            for row, reference in enumerate(self.references):
                other = (state[reference + key][where] * share).ravel()
                products[row] += np.bincount(part, own * other, self.parts)
                others[row] += np.bincount(part, other * other, self.parts)
        return Compared(update.client, self.level, products, square, others)


@dataclass(frozen=True)
class Reweigh(Pass):
    """The sum of a cohort's updates, in which a client's weight is multiplied by a factor of its own in each part.

    Attributes:
        factors: by client, (parts,), such that its products with the client's weight are multiples of 2^-40.
    """

    factors: Mapping[int, np.ndarray]

    def run(self, worker: Worker, state: Mapping[str, np.ndarray]) -> PartialSum:
        partial = self.cohort.empty(worker, state)
        for update in self.cohort.updates(worker, state):
            factors, holding = self.factors[update.client], update.holding
            coverage = {
                name: factors[state[PART + key][holding.where[name]]] * update.coverage.get(name, 1.0)
                for name, key in holding.keys.items()
            }
            partial.add(holding, update.deltas, update.weight, coverage)
        return partial


def innermost(holdings: Sequence[Holding], state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Which of ``holdings`` is the first to hold each element, int8 by the state's key; -1: none of them.

    With holdings of which each contains the one before, these are the parts between one and the next.
    """
    parts: dict[str, np.ndarray] = {}
    for number, holding in reversed(list(enumerate(holdings))):
        for name, key in holding.keys.items():
            part = parts.setdefault(key, np.full(state[key].shape, -1, dtype=np.int8))
            part[holding.where[name]] = number
    return parts


def spread(update: Update, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An update in the state's coordinates, float64 by key; 0 where the client does not speak."""
    full = {}
    for name, delta in update.deltas.items():
        key = update.holding.keys[name]
        full[key] = np.zeros(state[key].shape)
        full[key][update.holding.where[name]] = delta * update.coverage.get(name, 1.0)
    return full

"""The coverage mean: each element moves by the mean update of the clients that speak for it.

ScaleFL Eq. 2, HeteroFL's count average and NeFL's block average are this same operator. An element for which
nobody speaks keeps its bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from cluster_fl.aggregation.exact import fits, on_grid
from cluster_fl.nesting.plan import WHOLE, Holding, State
from cluster_fl.nesting.submodel import Index

ONE = np.ones(())


@dataclass
class PartialSum:
    """Exact sum of clients' weighted updates, and of the weights with which they count.

    Sums of any clients add in any order to the same bits.

    Attributes:
        where: by the state's key, which elements of the tensor the arrays describe.
        updates: float64, multiples of 2^-40.
        weights: float64; broadcasts to the update of the same key (one number where all elements count alike).
        local: its clients all hold ``where``, and the arrays are in the submodel's coordinates.
        total: sum of the weights of all clients in the sum, whatever they spoke for.
        count: how many clients those are.
    """

    where: dict[str, Index]
    updates: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    local: bool
    total: float = 0.0
    count: int = 0

    @staticmethod
    def of(holding: Holding, state: Mapping[str, np.ndarray]) -> PartialSum:
        """An empty sum of clients that hold the same elements, in the submodel's coordinates."""
        parts = {holding.keys[name]: part for name, part in holding.gather(state).items()}
        where = {key: holding.where[name] for name, key in holding.keys.items()}
        return _empty(where, {key: part.shape for key, part in parts.items()}, local=True)

    @staticmethod
    def over(state: Mapping[str, np.ndarray], keys: Iterable[str]) -> PartialSum:
        """An empty sum of clients that may hold different elements, in the state's coordinates."""
        shapes = {key: state[key].shape for key in keys}
        return _empty(dict.fromkeys(shapes, WHOLE), shapes, local=False)

    def add(
        self,
        holding: Holding,
        deltas: Mapping[str, np.ndarray],
        weight: float,
        coverage: Mapping[str, np.ndarray] = {},
    ) -> bool:
        """Adds one client's update.

        Args:
            holding: what the client holds: what the sum does, or anything in a sum over the state.
            deltas: trained minus received, float64, by tensor name.
            weight: a multiple of 2^-40, as are its products with the coverage.
            coverage: by tensor name, how much the client speaks for each element (broadcasts to it; usually
                1 or 0); 1 where not named.

        Returns:
            False, with the sum as it was, if an element of the update is not finite or 2^11 or more.
        """
        if not all(fits(delta) for delta in deltas.values()):
            return False
        for name, delta in deltas.items():
            key, share = holding.keys[name], coverage.get(name, ONE)
            counts = np.asarray(weight * share, dtype=np.float64)
            update = on_grid(delta * counts)
            if self.local:
                self.updates[key] += update
                self.weights[key] = self.weights[key] + counts
            else:
                at = holding.where[name]
                self.updates[key][at] += update
                self.weights[key] = _grown(self.weights[key], self.updates[key].shape)
                self.weights[key][at] += counts
        self.total += weight
        self.count += 1
        return True


@dataclass(frozen=True)
class Mean:
    """The mean update of a round.

    Attributes:
        updates: float64 by the state's key, of the tensors that somebody held; 0 where nobody spoke.
        weights: float64 by the same key: with what weight the clients spoke for each element.
        total: sum of the weights of all clients of the round.
        count: how many clients those are.
    """

    updates: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    total: float
    count: int


class CoverageMean:
    """Takes partial sums as they come, in any order. Holds two float64 arrays a tensor, however many clients."""

    def __init__(self, state: Mapping[str, np.ndarray]) -> None:
        self._shapes = {key: array.shape for key, array in state.items()}
        self._updates: dict[str, np.ndarray] = {}
        self._weights: dict[str, np.ndarray] = {}
        self._total, self._count = 0.0, 0

    def add(self, part: PartialSum) -> None:
        for key, where in part.where.items():
            if key not in self._updates:
                self._updates[key] = np.zeros(self._shapes[key])
                self._weights[key] = np.zeros(self._shapes[key])
            self._updates[key][where] += part.updates[key]
            self._weights[key][where] += part.weights[key]
        self._total += part.total
        self._count += part.count

    def sums(self) -> dict[str, np.ndarray]:
        """The sums of the weighted updates, by key; of the tensors that somebody held."""
        return self._updates

    def result(self) -> Mean:
        means = {
            key: np.divide(total, self._weights[key], out=np.zeros_like(total), where=self._weights[key] > 0)
            for key, total in self._updates.items()
        }
        return Mean(means, self._weights, self._total, self._count)


def aggregate(state: State, sums: Iterable[PartialSum]) -> State:
    """``state`` moved by the coverage mean of the updates."""
    mean = CoverageMean(state)
    for part in sums:
        mean.add(part)
    return moved(state, mean.result().updates)


def moved(state: State, updates: Mapping[str, np.ndarray]) -> State:
    """The next state; the one before is not changed, and tensors that nothing moved are shared with it."""
    return {key: _moved(array, updates[key]) if key in updates else array for key, array in state.items()}


def _moved(array: np.ndarray, update: np.ndarray) -> np.ndarray:
    if not update.any():
        return array
    # A sum of exactly zero must not turn -0.0 into 0.0: what nothing moved keeps its bits.
    return np.where(update != 0, array + update, array).astype(np.float32)


def _empty(where: dict[str, Index], shapes: Mapping[str, tuple[int, ...]], local: bool) -> PartialSum:
    updates = {key: np.zeros(shape) for key, shape in shapes.items()}
    return PartialSum(where, updates, {key: np.zeros(()) for key in shapes}, local)


def _grown(weights: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Weights with one number an element, so that parts of them can be added to."""
    return weights if weights.shape == shape else np.broadcast_to(weights, shape).copy()

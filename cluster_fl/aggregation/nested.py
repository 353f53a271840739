"""The coverage mean: each element moves by the mean update of the clients whose submodel holds it.

ScaleFL Eq. 2, HeteroFL's count average and NeFL's block average are this same operator. An element that
nobody held keeps its bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from cluster_fl.aggregation.exact import fits, on_grid
from cluster_fl.nesting.plan import Plan, State


@dataclass
class PartialSum:
    """Exact sum of weighted updates of clients that share a submodel, in the submodel's coordinates.

    ``weight`` is the sum of the clients' weights. Sums of the same level add in any order to the same bits.
    """

    level: int
    weight: float
    updates: dict[str, np.ndarray]  # float64, multiples of 2^-40

    @staticmethod
    def empty(level: int, shapes: Mapping[str, tuple[int, ...]]) -> PartialSum:
        return PartialSum(level, 0.0, {name: np.zeros(shape) for name, shape in shapes.items()})

    def add(
        self, received: Mapping[str, np.ndarray], trained: Mapping[str, np.ndarray], weight: float
    ) -> bool:
        """Adds one client's update, trained minus received (float32 both).

        Returns:
            False, with the sum as it was, if an element of the update is not finite or 2^11 or more.
        """
        deltas = {name: trained[name].astype(np.float64) - received[name] for name in self.updates}
        if not all(fits(delta) for delta in deltas.values()):
            return False
        for name, delta in deltas.items():
            delta *= weight
            self.updates[name] += on_grid(delta)
        self.weight += weight
        return True


class CoverageMean:
    """Takes partial sums as they come, in any order, and moves a state by their mean.

    Holds two float64 arrays a tensor, however many clients there are.
    """

    def __init__(self, plan: Plan, state: State) -> None:
        self._plan, self._state = plan, state
        self._total = {name: np.zeros(array.shape) for name, array in state.items()}
        self._weight = {name: np.zeros(array.shape) for name, array in state.items()}

    def add(self, part: PartialSum) -> None:
        for name, where in self._plan.indices[part.level - 1].items():
            key = self._plan.key(part.level, name)
            at = (...,) if name in self._plan.owned else where
            self._total[key][at] += part.updates[name]
            self._weight[key][at] += part.weight

    def result(self) -> State:
        """The next state; the one before is not changed."""
        return {
            name: _moved(array, self._total[name], self._weight[name]) for name, array in self._state.items()
        }


def aggregate(plan: Plan, state: State, sums: Iterable[PartialSum]) -> State:
    """``state`` moved by the coverage mean of the updates."""
    mean = CoverageMean(plan, state)
    for part in sums:
        mean.add(part)
    return mean.result()


def _moved(array: np.ndarray, total: np.ndarray, weight: np.ndarray) -> np.ndarray:
    if not weight.any():
        return array
    mean = np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)
    # A sum of exactly zero must not turn -0.0 into 0.0: what nothing moved keeps its bits.
    return np.where(mean != 0, array + mean, array).astype(np.float32)

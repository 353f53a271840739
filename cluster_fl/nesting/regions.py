"""The regions of a model: which levels hold which of its parameters."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from cluster_fl.nesting.plan import Plan
from cluster_fl.nesting.submodel import Index, lengths


@dataclass(frozen=True)
class Regions:
    """All parameters of a plan, those together that the same levels hold.

    Attributes:
        held: which levels hold each group, bool (groups, levels).
        params: how many parameters each has, int64 (groups,).
    """

    held: np.ndarray
    params: np.ndarray

    @staticmethod
    def of(plan: Plan) -> Regions:
        """By the plan's own submodels. Parameters that no level holds are left out."""
        counts: Counter[int] = Counter()
        for key, parts in _holders(plan).items():
            bits = np.zeros(_shape(plan, key), dtype=np.uint64)
            for level, where in parts:
                bits[where] |= np.uint64(1 << level)
            for held, count in zip(*np.unique(bits, return_counts=True), strict=True):
                counts[int(held)] += int(count)
        del counts[0]
        sets = sorted(counts)
        held = [[bool(bits >> level.number & 1) for level in plan.levels] for bits in sets]
        return Regions(np.array(held), np.array([counts[bits] for bits in sets], dtype=np.int64))

    def beyond(self, level: int) -> np.ndarray:
        """Parameters of each group that this level holds and the next smaller one does not, (groups,)."""
        mine = self.held[:, level - 1]
        smaller = self.held[:, level - 2] if level > 1 else np.zeros_like(mine)
        result: np.ndarray = np.where(mine & ~smaller, self.params, 0)
        return result


def _holders(plan: Plan) -> dict[str, list[tuple[int, Index]]]:
    """Which levels hold a part of each trained tensor of the state, and which part."""
    found: dict[str, list[tuple[int, Index]]] = {}
    for level in plan.levels:
        holding = plan.holding(level.number)
        for name, key in holding.keys.items():
            if key not in plan.measured:
                found.setdefault(key, []).append((level.number, holding.where[name]))
    return found


def _shape(plan: Plan, key: str) -> tuple[int, ...]:
    """Of a tensor of the state; a level's own is as large as the level's part of it."""
    owner, _, name = key.rpartition("/")
    if not owner:
        return plan.anatomy.shapes[name]
    level = plan.level(int(owner.removeprefix("level.")))
    return lengths(plan.anatomy, level.submodel)[name]

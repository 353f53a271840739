"""The split configuration of a run: its levels, their submodels, and who is at which level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cluster_fl.models.spec import ModelSpec
from cluster_fl.nesting.anatomy import Anatomy
from cluster_fl.nesting.cost import Cost
from cluster_fl.nesting.search import Candidate
from cluster_fl.nesting.submodel import Index, Submodel, index_map

State = dict[str, np.ndarray]


@dataclass(frozen=True)
class Level:
    """One size of submodel.

    Attributes:
        number: from 1, the smallest.
        width, depth: share of the channels and number of units kept.
        budgeted: what Eq. 1 counts for this level, in the unit of ``levels.metric``.
        ratio: ``budgeted`` over the plain full model.
        cost: of the module that is trained, all its exits included.
    """

    number: int
    width: float
    depth: int
    budgeted: int
    ratio: float
    cost: Cost
    submodel: Submodel


@dataclass(frozen=True)
class Plan:
    """What a run trains.

    Attributes:
        owned: the tensors that exist once a level instead of being shared.
        batch_norms: the model normalises training batches, so that none may hold a single sample.
    """

    model: ModelSpec
    anatomy: Anatomy
    levels: tuple[Level, ...]
    level_of: np.ndarray  # (clients,), from 1
    owned: frozenset[str]
    batch_norms: bool
    candidates: tuple[tuple[Candidate, ...], ...] = ()

    @cached_property
    def indices(self) -> list[dict[str, Index]]:
        """Per level, where its tensors lie in the full ones."""
        return [index_map(self.anatomy, level.submodel) for level in self.levels]

    @property
    def evaluates_batches(self) -> bool:
        """Answers depend on what else is in the batch, in evaluation too."""
        return self.batch_norms and self.model.norm == "batch"

    def level(self, number: int) -> Level:
        return self.levels[number - 1]

    def key(self, level: int, name: str) -> str:
        """Where a level's tensor is found in the state."""
        return f"level.{level}/{name}" if name in self.owned else name

    def initial_state(self, weights: Mapping[str, np.ndarray]) -> State:
        """Shared tensors as they are, owned ones once a level in that level's shape."""
        state = {name: array for name, array in weights.items() if name not in self.owned}
        for level, index in zip(self.levels, self.indices, strict=True):
            for name in index.keys() & self.owned:
                state[self.key(level.number, name)] = weights[name][index[name]].copy()
        return state

    def received(self, state: Mapping[str, np.ndarray], level: int) -> State:
        """What a client of a level downloads; views of ``state`` where the submodel is a prefix."""
        index = self.indices[level - 1]
        return {
            name: state[self.key(level, name)] if name in self.owned else state[name][where]
            for name, where in index.items()
        }

    def as_json(self) -> dict[str, Any]:
        counts = np.bincount(self.level_of, minlength=len(self.levels) + 1)
        return {"levels": [_level_json(level, int(counts[level.number])) for level in self.levels]}


def _level_json(level: Level, clients: int) -> dict[str, Any]:
    return {
        "level": level.number,
        "width": level.width,
        "depth": level.depth,
        "exits": list(level.submodel.exits),
        "params": level.cost.params,
        "macs": level.cost.macs,
        "activations": level.cost.activations,
        "bytes": level.cost.bytes,
        "cost": level.budgeted,
        "ratio": level.ratio,
        "clients": clients,
    }

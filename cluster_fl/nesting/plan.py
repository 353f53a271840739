"""The split configuration of a run: its levels, their submodels, and who is at which level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from cluster_fl.models.spec import ModelSpec
from cluster_fl.nesting.anatomy import Anatomy
from cluster_fl.nesting.cost import Cost
from cluster_fl.nesting.search import Candidate
from cluster_fl.nesting.submodel import Index, Submodel, index_map

State = dict[str, np.ndarray]
WHOLE: Index = (...,)


@dataclass(frozen=True)
class Level:
    """One size of submodel.

    Attributes:
        number: from 1, the smallest.
        width, depth: share of the channels and number of units kept.
        budgeted: what Eq. 1 counts for this level, in the unit of ``levels.metric``.
        ratio: ``budgeted`` over the plain full model.
        cost: of the module that is trained, all its exits included.
        owned: the tensors of which this level has a copy of its own instead of sharing them.
        also: levels whose own tensors this level's clients train besides their own (FjORD's widths).
    """

    number: int
    width: float
    depth: int
    budgeted: int
    ratio: float
    cost: Cost
    submodel: Submodel
    owned: frozenset[str] = frozenset()
    also: tuple[int, ...] = ()


@dataclass(frozen=True)
class Assignment:
    """What one participant trains in one round. The submodel has the shape of its level, or a smaller one."""

    client: int
    level: int
    submodel: Submodel


@dataclass(frozen=True)
class Holding:
    """Which elements of the state a submodel holds.

    Attributes:
        keys: the state's key of each tensor, by the tensor's name in the module.
        where: the elements of it that are held, by the same name.
    """

    keys: dict[str, str]
    where: dict[str, Index]

    def gather(self, state: Mapping[str, np.ndarray]) -> State:
        """What a client downloads, by tensor name; views of ``state`` where the submodel is a prefix."""
        return {name: state[key][self.where[name]] for name, key in self.keys.items()}


@dataclass(frozen=True)
class Plan:
    """What a run trains.

    Attributes:
        level_of: each client's level, (clients,), from 1: the one that its budget affords. A method may let it
            train another one in some rounds.
        batch_norms: the model normalises training batches, so that none may hold a single sample.
        global_level: the level whose model is the method's global one; None if it has none.
        serves: levels have models of their own; otherwise only clients do.
        starts: tensors that start otherwise than the model's, by the state's key.
    """

    model: ModelSpec
    anatomy: Anatomy
    levels: tuple[Level, ...]
    level_of: np.ndarray
    batch_norms: bool
    global_level: int | None
    candidates: tuple[tuple[Candidate, ...], ...] = ()
    serves: bool = True
    starts: State = field(default_factory=dict)

    @property
    def evaluates_batches(self) -> bool:
        """Answers depend on what else is in the batch, in evaluation too."""
        return self.batch_norms and self.model.norm == "batch"

    @property
    def smallest_batch(self) -> int:
        """The fewest samples that a training batch may have."""
        return 2 if self.batch_norms else 1

    @cached_property
    def measured(self) -> frozenset[str]:
        """Keys of what the state holds without being trained: running statistics."""
        return frozenset(
            self.key(level.number, name)
            for level, index in zip(self.levels, self._indices, strict=True)
            for name in index
            if name not in self.anatomy.parameters
        )

    def level(self, number: int) -> Level:
        return self.levels[number - 1]

    def key(self, level: int, name: str) -> str:
        """Where a level's tensor is found in the state."""
        return f"level.{level}/{name}" if name in self.level(level).owned else name

    def holding(self, level: int, submodel: Submodel | None = None) -> Holding:
        """What a client of a level holds of the state, with another submodel than the plan's if one is given."""
        own = self.level(level)
        if submodel is None or submodel == own.submodel:
            return self._holdings[level - 1]
        return self._hold(own, submodel)

    def initial_state(self, weights: Mapping[str, np.ndarray]) -> State:
        """Shared tensors as they are, owned ones once a level in that level's shape."""
        shared = {
            name
            for level, own in zip(self.levels, self._indices, strict=True)
            for name in own.keys() - level.owned
        }
        state = {name: array for name, array in weights.items() if name in shared}
        for level, index in zip(self.levels, self._indices, strict=True):
            for name in index.keys() & level.owned:
                state[self.key(level.number, name)] = weights[name][index[name]].copy()
        return state | self.starts

    @cached_property
    def _indices(self) -> list[dict[str, Index]]:
        return [index_map(self.anatomy, level.submodel) for level in self.levels]

    @cached_property
    def _holdings(self) -> list[Holding]:
        return [self._hold(level, level.submodel) for level in self.levels]

    def _hold(self, level: Level, submodel: Submodel) -> Holding:
        same = submodel == level.submodel
        index = self._indices[level.number - 1] if same else index_map(self.anatomy, submodel)
        keys = {name: self.key(level.number, name) for name in index}
        where = {name: WHOLE if name in level.owned else at for name, at in index.items()}
        for lower in level.also:
            for name in self._indices[lower - 1].keys() & self.level(lower).owned:
                key = self.key(lower, name)
                keys[key], where[key] = key, WHOLE
        return Holding(keys, where)

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

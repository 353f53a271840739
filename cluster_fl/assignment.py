"""Who trains which submodel: first each participant's level, then the submodel of that level.

Both are decided once a round for all participants together, since some rules are joint (NestFL prunes one
chain of models).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cluster_fl.config import Config
from cluster_fl.nesting.plan import Assignment, Plan
from cluster_fl.nesting.submodel import Submodel
from cluster_fl.rounds import Round
from cluster_fl.seeding import Purpose, generator

# The level of each participant, (participants,), from 1.
Allocation = Callable[[Round], np.ndarray]


class SubmodelRule(ABC):
    """Chooses the channels and units of each participant's level.

    Attributes:
        resizes: submodels may be smaller than their level's.
        nests: of one round, each level's submodel contains those of the smaller ones.
    """

    resizes = False
    nests = False

    @abstractmethod
    def submodels(self, round: Round, levels: np.ndarray) -> list[Submodel]:
        """One submodel a participant, of the shape of its level."""

    @abstractmethod
    def serve(self, round: Round) -> list[Submodel]:
        """One submodel a level: the one that answers for the level when it is evaluated."""


def assign(round: Round, levels: np.ndarray, rule: SubmodelRule) -> list[Assignment]:
    """What every participant trains at its level, in client order."""
    chosen = rule.submodels(round, levels)
    return [
        Assignment(int(client), int(level), submodel)
        for client, level, submodel in zip(round.participants, levels, chosen, strict=True)
    ]


def allocation(config: Config, plan: Plan) -> Allocation:
    """The allocation that ``levels.draw`` names."""
    return {"fixed": fixed, "dynamic": dynamic, "window": window}[config.levels.draw]


def fixed(round: Round) -> np.ndarray:
    """Every client at its own level, always."""
    levels: np.ndarray = round.plan.level_of[round.participants]
    return levels


def dynamic(round: Round) -> np.ndarray:
    """Each participant draws its level anew, by ``levels.shares`` (HeteroFL's dynamic mode)."""
    count = len(round.plan.levels)
    shares = np.asarray(
        round.config.levels.shares if count > 1 and round.config.levels.shares else [1.0] * count
    )
    # numpy wants a sum nearer to 1 than what a user writes.
    draws = [_rng(round, client).choice(count, p=shares / shares.sum()) for client in round.participants]
    return np.array(draws, dtype=np.int64) + 1


def window(round: Round) -> np.ndarray:
    """Uniform among the levels at most ``levels.window`` from the client's own (NeFL)."""
    reach, count = round.config.levels.window, len(round.plan.levels)
    own = round.plan.level_of[round.participants]
    low, high = np.maximum(own - reach, 1), np.minimum(own + reach, count)
    draws = [
        _rng(round, client).integers(a, b + 1)
        for client, a, b in zip(round.participants, low, high, strict=True)
    ]
    return np.array(draws, dtype=np.int64)


def _rng(round: Round, client: int) -> np.random.Generator:
    return generator(round.config.seed, Purpose.ALLOCATE, round.number, int(client))


@dataclass(frozen=True)
class Planned(SubmodelRule):
    """The plan's own submodels, in every round."""

    def submodels(self, round: Round, levels: np.ndarray) -> list[Submodel]:
        return [round.plan.level(int(level)).submodel for level in levels]

    def serve(self, round: Round) -> list[Submodel]:
        return [level.submodel for level in round.plan.levels]


def planned(config: Config, plan: Plan) -> SubmodelRule:
    return Planned()

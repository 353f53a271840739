"""A merge that sees all updates before it weighs them: FedAdp's, part by part of a nest of submodels.

Of the levels in use, each submodel contains the next smaller one. A level's *part* is what it holds beyond that.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster_fl.aggregation.angles import angles, factors, on_weight_grid, smoothed
from cluster_fl.aggregation.nested import CoverageMean
from cluster_fl.aggregation.server import ServerStep
from cluster_fl.merging import Merge, Merged, Phase, Phases, collect
from cluster_fl.nesting.plan import State
from cluster_fl.rounds import Round
from cluster_fl.training.cohort import Cohort, Update
from cluster_fl.training.passes import PART, Compare, Compared, Reweigh, Send, innermost, spread

# In the published state, before a tensor's key.
MEAN, UPDATE = "mean/", "update/"
# In the memory, float64 (clients, levels): each client's mean angle in each level's part, and of how many angles.
ANGLE, COUNT = "angles/mean", "angles/count"

Rows = Generator[Phase, list[Any], list[Compared]]


@dataclass(frozen=True)
class ByAngle(Merge):
    """In each part, clients count by their weight times exp(f) of their angle (Wu & Wang, IEEE TCCN 2021).

    Where one client alone holds a part, or some update has no direction there, the weight alone counts, and no
    angle is remembered. With ``alpha`` 0 the bits are those of :class:`~cluster_fl.merging.Streaming`.

    Attributes:
        against: ``partition``: the angle to the mean update, in each part; ``common``: the angle in the part that
            all hold; ``pairwise``: the mean angle to the others' updates, in each part.
        alpha: of the Gompertz function f.
        clients, levels: how many there are.
    """

    step: ServerStep
    against: str
    alpha: float
    clients: int
    levels: int
    keeps_updates = True

    def initial(self, state: State) -> State:
        shape = self.clients, self.levels
        return self.step.initial(state) | {ANGLE: np.zeros(shape), COUNT: np.zeros(shape)}

    def phases(self, round: Round, cohorts: Sequence[Cohort]) -> Phases:
        start = self.step.sent(round.state, round.memory)
        collected = yield from collect(round, cohorts, start)
        levels, parts = _parts(round, cohorts)
        # Every phase has the weights that updates start from: a new pool trains its cohort once more.
        seen = start | {PART + key: part for key, part in parts.items()}
        if self.against == "pairwise":
            rows, seen = yield from self._each_other(cohorts, seen, len(levels))
        else:
            seen = seen | {MEAN + key: update for key, update in collected.mean.updates.items()}
            rows = yield from _compare(cohorts, seen, (MEAN,), len(levels))
        weights = {member.client: member.weight for cohort in cohorts for member in cohort.members}
        counts, memory = self._weigh(rows, levels, weights, round.memory)
        mean = CoverageMean(round.state)
        yield Phase("weigh", [Reweigh(cohort, counts) for cohort in cohorts], seen, mean.add)
        state, memory = self.step.apply(round.state, mean.result(), collected.extra, memory)
        return Merged(state, memory, collected.reports, collected.personal)

    def _each_other(
        self, cohorts: Sequence[Cohort], seen: State, parts: int
    ) -> Generator[Phase, list[Any], tuple[list[Compared], State]]:
        sent: list[list[Update]] = yield Phase("send", [Send(cohort) for cohort in cohorts], seen)
        updates = [update for part in sent for update in part]
        names = tuple(f"{UPDATE}{update.client}/" for update in updates)
        keys = [key.removeprefix(PART) for key in seen if key.startswith(PART)]
        full = dict(seen)
        for name, update in zip(names, updates, strict=True):
            own = spread(update, seen)
            full |= {name + key: own[key] if key in own else np.zeros(seen[key].shape) for key in keys}
        rows = yield from _compare(cohorts, full, names, parts)
        return rows, full

    def _weigh(
        self, rows: Sequence[Compared], levels: Sequence[int], weights: Mapping[int, float], memory: State
    ) -> tuple[dict[int, np.ndarray], State]:
        """Each client's factors, (parts,), and the next memory."""
        holds = np.array([[level <= row.level for level in levels] for row in rows]).reshape(
            len(rows), len(levels)
        )
        now = self._angles(rows, holds)
        clients = np.array([row.client for row in rows], dtype=np.int64)
        means, counts = memory[ANGLE].copy(), memory[COUNT].copy()
        result = np.ones(holds.shape)
        for part, level in enumerate(levels):
            who = np.flatnonzero(holds[:, part])
            if len(who) < 2 or np.isnan(now[who, part]).any():
                continue
            at = clients[who], level - 1
            means[at] = smoothed(means[at], counts[at], now[who, part])
            counts[at] += 1
            result[who, part] = factors(means[at], self.alpha)
        own = {
            row.client: on_weight_grid(factor, weights[row.client])
            for row, factor in zip(rows, result, strict=True)
        }
        return own, memory | {ANGLE: means, COUNT: counts}

    def _angles(self, rows: Sequence[Compared], holds: np.ndarray) -> np.ndarray:
        """This round's angle of each client in each part, (rows, parts); NaN where it has none.

        Args:
            holds: which client holds which part, (rows, parts).
        """
        if not rows:
            return np.zeros(holds.shape)
        each = np.stack([angles(row.products, row.square, row.others) for row in rows])
        if self.against == "partition":
            return each[:, 0]
        if self.against == "common":
            return np.repeat(each[:, 0, :1], holds.shape[1], axis=1)
        peers = holds[None] & ~np.eye(len(rows), dtype=bool)[:, :, None]
        sums, count = np.where(peers, each, 0.0).sum(axis=1), peers.sum(axis=1)
        result: np.ndarray = np.divide(sums, count, out=np.full(holds.shape, np.nan), where=count > 0)
        return result


def _compare(cohorts: Sequence[Cohort], state: State, references: tuple[str, ...], parts: int) -> Rows:
    compared: list[list[Compared]] = yield Phase(
        "compare", [Compare(cohort, references, parts) for cohort in cohorts], state
    )
    return [row for part in compared for row in part]


def _parts(round: Round, cohorts: Sequence[Cohort]) -> tuple[list[int], dict[str, np.ndarray]]:
    """The levels in use, rising, and the part of every element, by the state's key."""
    submodels = {cohort.level: cohort.members[0].submodel for cohort in cohorts}
    levels = sorted(submodels)
    holdings = [round.plan.holding(level, submodels[level]) for level in levels]
    return levels, innermost(holdings, round.state)

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
from cluster_fl.merging import Merge, Merged, Phase, Phases, collect, pulled, sent
from cluster_fl.nesting.plan import State
from cluster_fl.nesting.submodel import Submodel
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
        started = sent(round, cohorts, self.step)
        collected = yield from collect(round, cohorts, started)
        nests = {
            version: self.nest(round.seen_at(version), [one for one in cohorts if one.round == version])
            for version in {cohort.round for cohort in cohorts}
        }
        levels = sorted({level for nest in nests.values() for level in nest})
        # Every phase has the weights that updates start from: a new pool trains its cohort once more.
        starts = {cohort.round: start for cohort, start in zip(cohorts, started, strict=True)}
        seen = {version: start | _parts(round, nests[version], levels) for version, start in starts.items()}
        if self.against == "pairwise":
            rows, seen = yield from self._each_other(cohorts, seen, len(levels))
        else:
            mean_update = {MEAN + key: update for key, update in collected.mean.updates.items()}
            seen = {version: start | mean_update for version, start in seen.items()}
            rows = yield from _compare(cohorts, seen, (MEAN,), len(levels))
        weights = {member.client: member.weight for cohort in cohorts for member in cohort.members}
        counts, memory = self._weigh(rows, levels, weights, round.memory)
        mean = CoverageMean(round.state)
        tasks = [Reweigh(cohort, counts) for cohort in cohorts]
        yield Phase("weigh", tasks, [seen[cohort.round] for cohort in cohorts], mean.add)
        weighed = pulled(round, cohorts, mean.result())
        state, memory = self.step.apply(round.state, weighed, collected.extra, memory)
        return Merged(state, memory, collected.reports, collected.personal)

    def nest(self, round: Round, cohorts: Sequence[Cohort]) -> dict[int, Submodel]:
        """The submodels of the levels in use among clients that started in ``round``."""
        return {cohort.level: cohort.members[0].submodel for cohort in cohorts}

    def _each_other(
        self, cohorts: Sequence[Cohort], seen: Mapping[int, State], parts: int
    ) -> Generator[Phase, list[Any], tuple[list[Compared], dict[int, State]]]:
        tasks = [Send(cohort) for cohort in cohorts]
        replies: list[list[Update]] = yield Phase("send", tasks, [seen[cohort.round] for cohort in cohorts])
        updates = [(update, seen[c.round]) for c, own in zip(cohorts, replies, strict=True) for update in own]
        names = tuple(f"{UPDATE}{update.client}/" for update, _ in updates)
        shapes = {
            key.removeprefix(PART): array.shape
            for state in seen.values()
            for key, array in state.items()
            if key.startswith(PART)
        }
        full: State = {}
        for name, (update, state) in zip(names, updates, strict=True):
            own = spread(update, state)
            full |= {name + key: own[key] if key in own else np.zeros(shape) for key, shape in shapes.items()}
        all_seen = {version: state | full for version, state in seen.items()}
        rows = yield from _compare(cohorts, all_seen, names, parts)
        return rows, all_seen

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


def _compare(
    cohorts: Sequence[Cohort], seen: Mapping[int, State], references: tuple[str, ...], parts: int
) -> Rows:
    tasks = [Compare(cohort, references, parts) for cohort in cohorts]
    compared: list[list[Compared]] = yield Phase("compare", tasks, [seen[cohort.round] for cohort in cohorts])
    return [row for part in compared for row in part]


def _parts(round: Round, nest: Mapping[int, Submodel], levels: Sequence[int]) -> State:
    """The part of every element, a position in ``levels``, as it is published."""
    holdings = [round.plan.holding(level, nest[level]) for level in levels if level in nest]
    numbers = np.array([at for at, level in enumerate(levels) if level in nest] + [-1], dtype=np.int8)
    return {PART + key: numbers[part] for key, part in innermost(holdings, round.state).items()}

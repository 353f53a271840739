"""Submodel rules that pick the channels of a level anew: rolling windows and random channels.

A rule only picks *which* channels; how many, and the units, are the plan's. All layers of a channel group keep
the same ones, so what meets in a residual sum stays aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from cluster_fl.assignment import Planned, SubmodelRule
from cluster_fl.errors import UserError
from cluster_fl.nesting.plan import Plan
from cluster_fl.nesting.submodel import Submodel
from cluster_fl.nesting.windows import leading, rolled
from cluster_fl.rounds import Round
from cluster_fl.seeding import Purpose, generator


def leading_channels(submodel: Submodel, orders: Iterable[np.ndarray]) -> Submodel:
    """As many channels of every group as ``submodel`` has, the first ones of the group's order."""
    counts = [kept if isinstance(kept, int) else len(kept) for kept in submodel.channels]
    return replace(submodel, channels=tuple(map(leading, orders, counts)))


def reordered(plan: Plan, order: Callable[[int], np.ndarray]) -> Plan:
    """The plan whose levels keep the first channels of an order instead of the group's first, nested as before.

    Args:
        order: from a group's size to its order; called once a group, in the order of the groups.
    """
    orders = [order(group.size) for group in plan.anatomy.groups]
    levels = tuple(replace(level, submodel=leading_channels(level.submodel, orders)) for level in plan.levels)
    return replace(plan, levels=levels)


def check_shared_norms(plan: Plan) -> None:
    """Raises UserError if a level's own norms would get other channels in each round."""
    if plan.model.norm == "per_level":
        right = (
            "must be another policy: a level's channels change, and a norm of its own would not follow them."
        )
        raise UserError("model.norm", plan.model.norm, right)


@dataclass(frozen=True)
class Rolling(SubmodelRule):
    """In round j, of K channels a level keeps those from j (or -j) on, around the end (FedRolex).

    One shift for all groups and clients. After K rounds each channel was kept as often as any other. A level
    is served with the window that the last finished round has trained.

    Attributes:
        forward: the window moves up by a channel a round, otherwise down.
    """

    forward: bool = False

    def submodels(self, round: Round, levels: np.ndarray) -> list[Submodel]:
        windows = self._windows(round.plan, round.number)
        return [windows[int(level) - 1] for level in levels]

    def serve(self, round: Round) -> list[Submodel]:
        # The final test comes as a round after the last one, which never trained.
        return self._windows(round.plan, min(round.number, round.config.rounds - 1))

    def _windows(self, plan: Plan, number: int) -> list[Submodel]:
        shift = number if self.forward else -number
        orders = [rolled(group.size, shift) for group in plan.anatomy.groups]
        return [leading_channels(level.submodel, orders) for level in plan.levels]


@dataclass(frozen=True)
class Drawn(Planned):
    """Every participant draws its channels uniformly, group by group and anew each time (Federated Dropout).

    A level is served with the plan's own submodel.
    """

    def submodels(self, round: Round, levels: np.ndarray) -> list[Submodel]:
        return [
            self._draw(round, int(client), round.plan.level(int(level)).submodel)
            for client, level in zip(round.participants, levels, strict=True)
        ]

    def _draw(self, round: Round, client: int, submodel: Submodel) -> Submodel:
        rng = generator(round.config.seed, Purpose.CHANNELS, round.number, client)
        return leading_channels(submodel, [rng.permutation(g.size) for g in round.plan.anatomy.groups])

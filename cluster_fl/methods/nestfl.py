"""NestFL: progressive model pruning in heterogeneous edge computing (Zhou, Jia & Xie, Purple Mountain Laboratories).

In each round the server picks a size for each device by what it can do just then, prunes the global model down
to one size after the other, and merges what lies between two sizes by the angles of the updates. The paper has no
formula and no number, and there is no code. What we decided:

- A size is a share of the channels of every group (``levels.pairs``; 0.2, 0.4, ..., 1 by default), rounded up.
- A device takes the largest size that it trains and sends within ``options.deadline`` under its present load, and the
  smallest if it has time for none. It keeps it for the whole round. Devices have no memory limit yet.
- A channel is worth the L1 norm of what writes to it, from channels that are still there; all groups of one
  step are judged on the model of the step before. Network inputs and logits are never pruned.
- The chain has the sizes in use in the round, largest first (asynchronous: all sizes, since who will be merged with
  whom is not known yet); a size is served from the chain of all sizes. With
  ``options.mask_refresh_every`` above 1 the chain of all sizes is kept for so many rounds (0: for good).
- What nobody holds in a round keeps its value and may come back.
- "Angle" and "non-linear mapping" are FedAdp's (Wu & Wang 2021): the angle to the data-weighted mean update, averaged
  over the client's own participations, and a Gompertz function with alpha 5; for each level's part by itself.
  ``options.angle=common`` takes the part that all hold; ``pairwise`` (the paper's wording) the mean angle to each
  other. A part that one client holds moves by its update; one with an update of zero counts by samples alone.
- A client's personal model is what it has trained, before the merge; in its next round it begins from the global
  one again. A client that never took part answers with its level's model.
- Norms use the batch's statistics. A level's own norms would not follow its changing channels and are refused, as are
  static ones, which nobody collects for clients' own models.
- A bit a channel tells a client which ones it gets, whenever the chain is new; the full model needs none. With chains
  that last for k rounds each participation is charged a k-th of it, and one that lasts for good none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster_fl.aggregation.server import server_step
from cluster_fl.assignment import Allocation, SubmodelRule
from cluster_fl.config import Config, PairConfig
from cluster_fl.merging import Phases
from cluster_fl.methods.base import Method, Setting, always, check_correction, sgd
from cluster_fl.nesting.importance import chain, numbers
from cluster_fl.nesting.plan import Level, Plan, State
from cluster_fl.nesting.splitting import WIDTH, split
from cluster_fl.nesting.submodel import Submodel
from cluster_fl.nesting.windows import leading
from cluster_fl.option import option
from cluster_fl.rounds import Round
from cluster_fl.selection import check_shared_norms
from cluster_fl.timing.deadline import Affordable
from cluster_fl.training.cohort import Cohort
from cluster_fl.training.objectives import CrossEntropy
from cluster_fl.training.own import KeepsOwn, check_own_norms
from cluster_fl.training.program import Effort, LocalProgram
from cluster_fl.weighing import ByAngle

# In the memory, before level/group: numbers of the channels kept, int64. Only where a chain lasts for several rounds.
CHAIN = "chain/"

Chain = dict[int, Submodel]


CORRECTIONS = ("none", "proximal", "scaffold")


@dataclass
class Options:
    deadline: float | None = option(
        None,
        "seconds that a device has; what the median one takes for 0.6 of the channels when not given",
        above=0,
    )
    mask_refresh_every: int = option(1, "rounds between two prunings; 0: only before the first", low=0)
    angle: str = option(
        "partition",
        "of an update, to the mean: part by part, or where all hold (common); or to each other (pairwise)",
        choices=("partition", "common", "pairwise"),
    )
    alpha: float = option(5.0, "how much the angle counts; 0: not at all", low=0)


def plan(setting: Setting) -> Plan:
    """Prefixes of the channels: only their shapes matter."""
    check_correction(setting.config, CORRECTIONS, "FedDyn's server expects the plain sum of all updates.")
    levels = setting.config.levels
    if levels.pairs is None and levels.ratios is None and levels.budgets is None:
        pairs = [PairConfig(width=number / levels.count) for number in range(1, levels.count + 1)]
        levels = replace(levels, pairs=pairs)
    made = split(setting.model, levels, setting.level_of, WIDTH)
    check_shared_norms(made)
    check_own_norms(made.model.norm)
    return made


@dataclass(frozen=True)
class Client(KeepsOwn):
    """``index_bytes``: what tells a client its channels, a round."""

    index_bytes: float

    def effort(self, level: Level) -> Effort:
        plain = super().effort(level)
        index = self.index_bytes / level.cost.bytes if level.ratio < 1 else 0.0
        return replace(plain, down=plain.down + index)


def program(config: Config, plan: Plan) -> LocalProgram:
    every = config.options.mask_refresh_every
    index = sum(group.size for group in plan.anatomy.groups) / 8 / every if every else 0.0
    return Client(sgd(config, plan, CrossEntropy()), index)


def allocation(config: Config, plan: Plan) -> Allocation:
    return Affordable(program(config, plan), config.options.deadline)


@dataclass(frozen=True)
class Progressive(SubmodelRule):
    """Each level is pruned from the next larger one.

    Attributes:
        every: ``options.mask_refresh_every``.
        grid: the chain has all sizes, not those in use alone.
    """

    every: int
    grid: bool = False
    nests = True

    def submodels(self, round: Round, levels: np.ndarray) -> list[Submodel]:
        own = range(1, len(round.plan.levels) + 1) if self.grid else levels
        made = _pruned(round, own) if self.every == 1 else self._lasting(round)
        return [made[int(level)] for level in levels]

    def serve(self, round: Round) -> list[Submodel]:
        made = _kept(round) or _pruned(round, range(1, len(round.plan.levels) + 1))
        return [made[level.number] for level in round.plan.levels]

    def remembered(self, round: Round) -> State:
        """What the memory must hold of the chain that the round was trained with."""
        if self.every == 1:
            return {}
        return {
            f"{CHAIN}{level}/{group}": numbers(own)
            for level, submodel in self._lasting(round).items()
            for group, own in enumerate(submodel.channels)
        }

    def _lasting(self, round: Round) -> Chain:
        due = self.every and round.number % self.every == 0
        return (not due and _kept(round)) or _pruned(round, range(1, len(round.plan.levels) + 1))


def _pruned(round: Round, levels: Iterable[int]) -> Chain:
    """The chain of some levels, from the round's weights."""
    falling = sorted({int(level) for level in levels}, reverse=True)
    shapes = [round.plan.level(level).submodel for level in falling]
    return dict(zip(falling, chain(round.plan.anatomy, round.state, shapes), strict=True))


def _kept(round: Round) -> Chain:
    """The chain in the memory; empty if there is none."""
    made = {}
    for level in round.plan.levels:
        orders = [round.memory.get(f"{CHAIN}{level.number}/{g}") for g in range(len(level.submodel.channels))]
        known = [order for order in orders if order is not None]
        if len(known) == len(orders):
            channels = tuple(leading(order, len(order)) for order in known)
            made[level.number] = replace(level.submodel, channels=channels)
    return made


@dataclass(frozen=True)
class Merging(ByAngle):
    """The merge by angles, after which the memory holds the chain too."""

    rule: Progressive

    def nest(self, round: Round, cohorts: Sequence[Cohort]) -> dict[int, Submodel]:
        if not self.rule.grid:
            return super().nest(round, cohorts)
        levels = [level.number for level in round.plan.levels]
        return dict(zip(levels, self.rule.submodels(round, np.array(levels)), strict=True))

    def phases(self, round: Round, cohorts: Sequence[Cohort]) -> Phases:
        merged = yield from super().phases(round, cohorts)
        return replace(merged, memory=merged.memory | self.rule.remembered(round))


def rule(config: Config, plan: Plan) -> Progressive:
    return Progressive(config.options.mask_refresh_every, config.time.policy.asynchronous)


def merge(config: Config, plan: Plan) -> Merging:
    options: Options = config.options
    return Merging(
        step=server_step(config, plan),
        against=options.angle,
        alpha=options.alpha,
        clients=config.clients.count,
        levels=len(plan.levels),
        rule=rule(config, plan),
    )


METHOD = Method(
    title="NestFL (Zhou et al., progressive model pruning)",
    options=Options,
    plan=plan,
    program=program,
    allocation=allocation,
    rule=rule,
    merge=merge,
    variants=always(levels={"count": 5, "rounding": "ceil"}, aggregation={"weights": "samples"}),
)

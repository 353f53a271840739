"""InclusiveFL (Liu et al., KDD 2022): depth prefixes that answer at their last exit alone, and momentum distillation.

A level's last unit and its head are its own; the units before are shared with all deeper levels. The server
lets a level's own last unit move by (1 - beta) its own mean update + beta the mean of the updates of the units
that the next larger level has more.

- Those units are the larger level's from the smaller one's depth to its own last. ``released``: also the one in
  the place of the smaller level's last (``options.overlap``).
- Updates of a shared unit are the mean over everyone who has it; the code takes those of the larger level
  alone, and of the round before.
- Updates mix tensor by tensor, of trained parameters, where shapes agree: all do in a transformer; in a residual
  network units of other stages stay out.
- A level that nobody trained in a round stays as it is, and so do the larger units that nobody trained out of
  the mean.
- Clients take local steps; the code's send one gradient, and the server steps with AdamW.
- Clients count by their samples; the code counts them alike inside a level.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster_fl.aggregation.nested import Mean
from cluster_fl.aggregation.server import ServerStep, server_step
from cluster_fl.config import Config, LevelsConfig
from cluster_fl.errors import UserError
from cluster_fl.merging import Merge, Streaming
from cluster_fl.methods import fedavg
from cluster_fl.methods.base import Method, Setting, check_correction
from cluster_fl.nesting.anatomy import Anatomy, place
from cluster_fl.nesting.plan import Level, Plan, State
from cluster_fl.nesting.splitting import DEPTH, split
from cluster_fl.nesting.submodel import Submodel, lengths, present
from cluster_fl.option import option


@dataclass
class Options:
    beta: float = option(0.2, "share of the larger level's update in that of a last unit", low=0, high=1)
    own_unit: bool = option(
        True, "a level's last unit is its own; false: all but the head is shared, and beta 0"
    )
    overlap: bool = option(False, "the larger level's unit in the place of the smaller one's last counts too")


def plan(setting: Setting) -> Plan:
    """Raises UserError for levels of one depth, which would be one model with two last units."""
    options: Options = setting.config.options
    if options.beta and not options.own_unit:
        right = "must be 0 with options.own_unit=false: there is no last unit of its own to move."
        raise UserError("options.beta", options.beta, right)
    made = split(
        setting.model,
        setting.config.levels,
        setting.level_of,
        DEPTH,
        nested_exits=False,
        own=own_tensors if options.own_unit else None,
    )
    _check_depths(made, setting.config.levels)
    return made


def _check_depths(made: Plan, levels: LevelsConfig) -> None:
    for lower, upper in zip(made.levels, made.levels[1:], strict=False):
        if lower.depth == upper.depth:
            right = (
                f"gives levels {lower.number} and {upper.number} the same {lower.depth} units, "
                "but each owns its last one: depths must rise."
            )
            if levels.pairs is None:
                raise UserError("levels.tolerance", levels.tolerance, right)
            raise UserError("levels.pairs", f"depth {lower.depth}", right)


def own_tensors(anatomy: Anatomy, submodel: Submodel) -> Iterable[str]:
    """The head and the last unit of a depth prefix."""
    last = max(submodel.exits)
    spots = ((name, place(name)) for name in present(anatomy, submodel))
    return (
        name
        for name, spot in spots
        if spot.part in ("exits", "head") or (spot.part == "units" and spot.number == last - 1)
    )


@dataclass(frozen=True)
class MomentumDistillation(ServerStep):
    """Any step, after updates ``key`` became (1 - beta) update[key] + beta mean(update[s] for s of sources[key])."""

    inner: ServerStep
    beta: float
    sources: Mapping[str, Sequence[str]]

    def initial(self, state: State) -> State:
        return self.inner.initial(state)

    def published(self, memory: State) -> State:
        return self.inner.published(memory)

    def apply(
        self, state: State, mean: Mean, extra: Mapping[str, np.ndarray], memory: State
    ) -> tuple[State, State]:
        mixed = {key: self._mixed(key, mean) for key in self.sources if key in mean.updates}
        return self.inner.apply(state, replace(mean, updates=mean.updates | mixed), extra, memory)

    def _mixed(self, key: str, mean: Mean) -> np.ndarray:
        own, spoken = mean.updates[key], mean.weights[key] > 0
        total, count = np.zeros_like(own), np.zeros_like(own)
        for source in self.sources[key]:
            if source in mean.updates:
                total += mean.updates[source]  # 0 where nobody spoke
                count += mean.weights[source] > 0
        taught = spoken & (count > 0)
        return np.where(taught, (1 - self.beta) * own + self.beta * total / np.maximum(count, 1), own)


def sources(plan: Plan, overlap: bool) -> dict[str, list[str]]:
    """For every trained tensor of a level's own last unit, its counterparts of equal shape in the next level."""
    found: dict[str, list[str]] = {}
    for lower, upper in zip(plan.levels, plan.levels[1:], strict=False):
        shapes, last = lengths(plan.anatomy, upper.submodel), lower.depth - 1
        for name in _of_unit(plan, lower, last):
            counterparts = (
                name.replace(f"units.{last}.", f"units.{unit}.", 1)
                for unit in range(last if overlap else lower.depth, upper.depth)
            )
            same = [c for c in counterparts if shapes.get(c) == plan.anatomy.shapes[name]]
            if same:
                found[plan.key(lower.number, name)] = [plan.key(upper.number, c) for c in same]
    return found


def _of_unit(plan: Plan, level: Level, unit: int) -> Iterable[str]:
    names = present(plan.anatomy, level.submodel)
    return (
        name
        for name in names
        if name in plan.anatomy.parameters and place(name).number == unit and place(name).part == "units"
    )


def merge(config: Config, plan: Plan) -> Merge:
    options: Options = config.options
    step = server_step(config, plan)
    if options.beta:
        allowed = ("none", "proximal", "scaffold")
        check_correction(
            config, allowed, "FedDyn's server expects updates that are not mixed (options.beta=0)."
        )
        step = MomentumDistillation(step, options.beta, sources(plan, options.overlap))
    return Streaming(step)


PRESET = {"aggregation": {"weights": "samples"}}

METHOD = Method(
    title="InclusiveFL (Liu et al., KDD 2022)",
    options=Options,
    plan=plan,
    program=fedavg.program,
    merge=merge,
    variants={
        "default": PRESET,
        "paper": PRESET,
        "released": {**PRESET, "options": {"overlap": True}},
    },
)

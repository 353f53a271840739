"""NeFL: nested federated learning (Kang et al., IEEE TMC 2025): width, any subset of blocks, or both.

Every residual block has a step size s, y = ReLU(s F(x) + shortcut(x)). Norms and step sizes are inconsistent:
each submodel has its own, averaged over its own trainers. All else moves by the mean of those who hold it.

- Submodels are the published tables' where ``levels.ratios`` and ``levels.pairs`` are not given (``nefl_tables``
  says where code and tables differ; ``variant: paper`` takes the printed vectors); otherwise budgets are searched.
- A client draws uniformly among the submodels at most two from its own, each time (``levels.draw: window``).
- Dropped blocks are really absent (the code runs them with s = 0). Of a dropped block that changes the shape, the
  projection stays; its convolution is trained but does not count, as in the code: block b belongs to those
  who hold block b. Its norm is the submodel's own anyway.
- A block that nobody trained keeps its value; the code sets it to zero.
- ``options.ode_init`` (NeFL-D_O): a block's first step size absorbs the dropped ones behind it in its stage.
- With ``model.options.pretrained`` the pre-trained norms are kept; the code discards them.
- The global model is the largest submodel, with its own norms and step sizes (the code's never leave 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster_fl.config import Config, LevelsConfig, PairConfig, level_count
from cluster_fl.errors import UserError
from cluster_fl.methods.base import Method, Setting, sgd
from cluster_fl.methods.nefl_tables import SPLITS
from cluster_fl.models.layered import Layered
from cluster_fl.nesting.anatomy import Anatomy, place
from cluster_fl.nesting.levels import ratios
from cluster_fl.nesting.plan import Level, Plan, State
from cluster_fl.nesting.splitting import keep_units, plan_of, width_grid
from cluster_fl.nesting.submodel import Submodel
from cluster_fl.nesting.thinning import Units, stages, thin, thinnings
from cluster_fl.nesting.tracing import anatomy
from cluster_fl.option import option
from cluster_fl.training.objectives import CrossEntropy
from cluster_fl.training.program import Context, LocalProgram

STEP = "step"
NOTHING = np.zeros(())


@dataclass
class Options:
    split: str = option(
        "WD", "W: width, D: depth, WD: both; or another column of the published tables, e.g. W3, WD04"
    )
    tables: str = option(
        "code",
        "whose keep-vectors, where they differ: the code's or the printed ones",
        choices=("code", "printed"),
    )
    steps: str = option("learnt", "step sizes", choices=("learnt", "fixed"))
    ode_init: bool = option(False, "first step sizes absorb the dropped blocks (NeFL-D_O)")


def plan(setting: Setting) -> Plan:
    config, options = setting.config, setting.config.options
    with_steps = options.steps == "learnt" or options.ode_init
    model = replace(setting.model.with_exits(()), steps=with_steps)
    skeleton = model.skeleton()
    traced = anatomy(skeleton, model.input_shape)
    parts = stages(skeleton)
    levels = keep_units(traced, _splits(setting, traced, parts), config.levels)
    made = plan_of(model, traced, levels, setting.level_of, own=_steps)
    return replace(made, starts=_absorbed(levels, parts)) if options.ode_init else made


def _splits(setting: Setting, traced: Anatomy, parts: Sequence[range]) -> Sequence[tuple[float, Units]]:
    """Width and units of every level."""
    config, options, name = setting.config.levels, setting.config.options, setting.model.name
    if config.pairs is not None:
        return _given(config.pairs, traced.depth)
    if config.ratios is not None or config.budgets is not None:
        if options.split not in ("W", "D", "WD"):
            right = "must be W, D or WD with levels.ratios or levels.budgets."
            raise UserError("options.split", options.split, right)
        depths = thinnings(parts) if "D" in options.split else [tuple(range(traced.depth))]
        widths = width_grid(config.grid.width_step) if "W" in options.split else np.ones(1)
        return thin(traced, depths, widths, config, ratios(config))
    return _published(name, options, config)


def _published(name: str, options: Options, levels: LevelsConfig) -> list[tuple[float, Units]]:
    printed = SPLITS.get((name, f"{options.split}_printed")) if options.tables == "printed" else None
    table = printed or SPLITS.get((name, options.split))
    if table is None:
        known = ", ".join(f"{m} {s}" for m, s in SPLITS if not s.endswith("_printed"))
        right = (
            f"the tables have no {options.split} of {name}, only {known}; give levels.ratios or levels.pairs."
        )
        raise UserError("options.split", options.split, right)
    if level_count(levels) != len(table):
        raise UserError("levels.count", levels.count, f"must be {len(table)}, as the table of {name} has.")
    return [(split.width, split.keep) for split in table]


def _given(pairs: Sequence[PairConfig], units: int) -> list[tuple[float, Units]]:
    every = tuple(range(units))
    splits = [(pair.width, _units(pair, every)) for pair in pairs]
    width, last = splits[-1]
    if width < 1 or last != every:
        right = f"the last level must be the full model: width 1, all {units} units."
        raise UserError("levels.pairs", f"width {width:g}, {len(last)} units", right)
    return splits


def _units(pair: PairConfig, every: Units) -> Units:
    if pair.keep is not None and pair.depth is not None:
        raise UserError("levels.pairs", f"depth {pair.depth}", f"excludes keep ({pair.keep}).")
    if pair.depth is not None and pair.depth > len(every):
        raise UserError("levels.pairs", f"depth {pair.depth}", f"there are only {len(every)} units.")
    if pair.keep is None:
        return every[: pair.depth]
    if not pair.keep or max(pair.keep) >= len(every):
        raise UserError("levels.pairs", pair.keep, f"keep must name units from 0 to {len(every) - 1}.")
    return tuple(sorted(set(pair.keep)))


def _steps(traced: Anatomy, submodel: Submodel) -> Iterable[str]:
    return (name for name in traced.shapes if name.endswith(f".{STEP}"))


def _absorbed(levels: Sequence[Level], parts: Sequence[range]) -> State:
    """First step sizes: 1, and 1 more for every dropped block behind; those before the first kept go to it."""
    starts = {}
    for level in levels:
        for stage in parts:
            kept = [unit for unit in stage if unit in level.submodel.units]
            for at, unit in enumerate(kept):
                begin = unit if at else stage.start
                end = kept[at + 1] if at + 1 < len(kept) else stage.stop
                starts[f"level.{level.number}/units.{unit}.{STEP}"] = np.array([end - begin], np.float32)
    return starts


def kept_blocks(context: Context, model: Layered) -> Mapping[str, np.ndarray]:
    """A client does not speak for what the levels share of a block that it dropped."""
    units = frozenset(context.submodel.units)
    return {
        name: NOTHING
        for name in context.holding.keys.keys() - context.level.owned
        if place(name).part == "units" and place(name).number not in units
    }


def program(config: Config, plan: Plan) -> LocalProgram:
    fixed = config.options.steps == "fixed"
    return replace(sgd(config, plan, CrossEntropy(), kept_blocks), frozen=(STEP,) if fixed else ())


PRESET = {
    "model": {"norm": "per_level"},
    "levels": {"rounding": "ceil", "order": "rising", "draw": "window", "window": 2},
}

METHOD = Method(
    title="NeFL (Kang et al., IEEE TMC 2025)",
    options=Options,
    plan=plan,
    program=program,
    variants={
        "default": PRESET,
        "paper": {**PRESET, "options": {"tables": "printed"}},
        "released": PRESET,
    },
)

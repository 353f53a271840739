"""Depth by thinning out every stage, alone or together with width: for models whose units may be left out.

A stage is a run of units of one shape; it begins with a unit that changes the shape. Of every stage the first
ones are kept, the same share of each, and at least one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cluster_fl.config import LevelsConfig
from cluster_fl.errors import UserError
from cluster_fl.models.layered import Layered
from cluster_fl.nesting.anatomy import Anatomy
from cluster_fl.nesting.cost import cost
from cluster_fl.nesting.search import SLACK
from cluster_fl.nesting.submodel import Submodel, kept

Units = tuple[int, ...]


def stages(model: Layered) -> list[range]:
    """The units of every stage."""
    starts = [0] + [n for n in range(1, model.depth) if not getattr(model.units[str(n)], "skippable", False)]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], model.depth], strict=True)]


def thinnings(stages: Sequence[range]) -> list[Units]:
    """Every choice of units that keeps the same share of each stage, rounded up; the full depth last."""
    shares = sorted({n / len(stage) for stage in stages for n in range(1, len(stage) + 1)})
    return [
        tuple(unit for stage in stages for unit in stage[: math.ceil(share * len(stage) - 1e-9)])
        for share in shares
    ]


def thin(
    traced: Anatomy,
    depths: Sequence[Units],
    widths: np.ndarray,
    levels: LevelsConfig,
    ratios: Sequence[float],
) -> list[tuple[float, Units]]:
    """The width and units of every level, the last one being the full model.

    With several widths, Eq. 1 of ScaleFL: the least |share of units - width| within the tolerance of the budget.
    With one, the largest submodel that the budget and its tolerance allow.

    Raises:
        UserError: a level has no submodel within the tolerance.
    """
    points = [(float(width), units) for units in depths for width in widths]
    costs = np.array([_cost(traced, width, units, levels) for width, units in points])
    chosen = []
    for level, ratio in enumerate(ratios[:-1], start=1):
        relative = costs / (ratio * _cost(traced, 1.0, depths[-1], levels))
        far = relative - 1 if len(widths) == 1 else np.abs(relative - 1)
        allowed = np.flatnonzero(far <= levels.tolerance + SLACK)
        if not len(allowed):
            nearest = int(np.abs(relative - 1).argmin())
            width, units = points[nearest]
            right = (
                f"level {level} has no submodel that close to its budget. Nearest: width {width:g}, {len(units)} "
                f"units ({relative[nearest]:.3f} of the budget)."
            )
            raise UserError("levels.tolerance", levels.tolerance, right)
        if len(widths) == 1:
            best = max(allowed, key=lambda i: costs[i])
        else:
            imbalance = [abs(len(units) / traced.depth - width) for width, units in points]
            best = min(allowed, key=lambda i: (round(imbalance[i], 12), abs(relative[i] - 1)))
        chosen.append(points[int(best)])
    return [*chosen, (1.0, depths[-1])]


def _cost(traced: Anatomy, width: float, units: Units, levels: LevelsConfig) -> int:
    channels = tuple(kept(group.size, width, levels.rounding) for group in traced.groups)
    own = cost(traced, Submodel(channels, units, (traced.depth,)))
    return own.macs if levels.metric == "macs" else own.params

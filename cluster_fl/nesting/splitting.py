"""From a model and its budgets to the levels: the search, or given pairs, and the submodels they mean."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from cluster_fl.config import LevelsConfig, PairConfig
from cluster_fl.errors import UserError
from cluster_fl.models.spec import ModelSpec
from cluster_fl.nesting.anatomy import Anatomy
from cluster_fl.nesting.cost import cost, tables
from cluster_fl.nesting.plan import Level
from cluster_fl.nesting.search import Candidate, Problem, candidate_at, search
from cluster_fl.nesting.submodel import prefix
from cluster_fl.nesting.tracing import anatomy


def choose_pairs(
    spec: ModelSpec, config: LevelsConfig, ratios: Sequence[float]
) -> tuple[list[Candidate], list[list[Candidate]]]:
    """The width and depth of every level, given or searched, and the feasible candidates of each.

    Raises:
        UserError: a given depth does not exist, or a level has no pair within the tolerance.
    """
    depth = spec.skeleton().depth
    if config.pairs is None:
        problem = _problem(spec, config, _depth_grid(spec, config, depth), width_grid(config.grid.width_step))
        return search(problem, ratios)
    _check_pairs(config.pairs, spec.name, depth)
    depths = sorted({pair.depth for pair in config.pairs if pair.depth < depth})
    widths = np.array(sorted({pair.width for pair in config.pairs} | {1.0}))
    problem = _problem(spec, config, depths, widths)
    chosen: list[Candidate] = []
    for pair, ratio in zip(config.pairs, ratios, strict=True):
        lower = sorted({c.depth for c in chosen})
        chosen.append(candidate_at(problem, pair.width, pair.depth, lower, ratio))
    return chosen, [[candidate] for candidate in chosen]


def make_levels(chosen: Sequence[Candidate], traced: Anatomy, config: LevelsConfig) -> tuple[Level, ...]:
    """The levels of the final model, each answering at every exit up to its own depth (ScaleFL, 3.2).

    ``chosen`` ends in the full model, whose cost is the plain one that ratios are taken against.
    """
    plain = chosen[-1].cost
    levels = []
    for number, candidate in enumerate(chosen, start=1):
        exits = sorted({p for p in traced.exits if p <= candidate.depth} | {candidate.depth})
        submodel = prefix(traced, candidate.width, candidate.depth, exits, config.rounding)
        ratio = candidate.cost / plain
        own = cost(traced, submodel)
        levels.append(Level(number, candidate.width, candidate.depth, candidate.cost, ratio, own, submodel))
    return tuple(levels)


def width_grid(step: float) -> np.ndarray:
    """step, 2 step, ... and always 1."""
    grid = np.round(np.arange(1, round(1 / step) + 1) * step, 12)
    return np.append(grid[grid < 1], 1.0)


def _check_pairs(pairs: Sequence[PairConfig], name: str, depth: int) -> None:
    for lower, upper in itertools.pairwise(pairs):
        if upper.depth < lower.depth:
            raise UserError(
                "levels.pairs", f"depth {upper.depth}", "must not fall from one level to the next."
            )
    top = pairs[-1]
    if top.depth > depth:
        raise UserError("levels.pairs", f"depth {top.depth}", f"{name} has only {depth} units.")
    if (top.width, top.depth) != (1, depth):
        given = f"width {top.width:g}, depth {top.depth}"
        raise UserError(
            "levels.pairs", given, f"the last level must be the full model: width 1, depth {depth}."
        )


def _depth_grid(spec: ModelSpec, config: LevelsConfig, depth: int) -> list[int]:
    step = config.grid.depth_step
    if step > depth:
        raise UserError("levels.grid.depth_step", step, f"{spec.name} has only {depth} units.")
    return list(range(step, depth, step))


def _problem(spec: ModelSpec, config: LevelsConfig, exits: Sequence[int], widths: np.ndarray) -> Problem:
    traced = anatomy(spec.with_exits(tuple(exits)).skeleton(), spec.input_shape)
    costs = tables(traced, widths, config.rounding)
    return Problem(traced, costs, config.metric, config.tolerance, config.tie_break)

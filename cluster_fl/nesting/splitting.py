"""From a model and its budgets to the plan: the search, or given pairs, and the submodels they mean."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from cluster_fl.config import LevelsConfig, PairConfig
from cluster_fl.errors import UserError
from cluster_fl.models.spec import ModelSpec
from cluster_fl.nesting.anatomy import Anatomy
from cluster_fl.nesting.cost import cost, tables
from cluster_fl.nesting.levels import ratios
from cluster_fl.nesting.ownership import has_batch_norms, owned_tensors
from cluster_fl.nesting.plan import Level, Plan
from cluster_fl.nesting.search import Candidate, Problem, candidate_at, search
from cluster_fl.nesting.submodel import Submodel, kept, prefix
from cluster_fl.nesting.tracing import anatomy

BOTH, WIDTH, DEPTH = "both", "width", "depth"
# Names of the tensors of which a level has a copy of its own.
Own = Callable[[Anatomy, Submodel], Iterable[str]]


def split(
    model: ModelSpec,
    levels: LevelsConfig,
    level_of: np.ndarray,
    axes: str = BOTH,
    *,
    nested_exits: bool = True,
    own: Own | None = None,
) -> Plan:
    """The plan whose levels keep the first channels, the first units, or the first of both.

    Args:
        model: without exits; early exits are hung wherever a level ends.
        axes: ``both``, ``width`` (every level has full depth) or ``depth`` (full width).
        nested_exits: a level answers at every exit up to its own (ScaleFL, 3.2); otherwise at its own alone.
        own: tensors that a level owns besides what the norm policy says.

    Raises:
        UserError: a given pair does not exist, or a level has no submodel within the tolerance.
    """
    chosen, candidates = choose_pairs(model, levels, ratios(levels), axes, nested_exits)
    model = model.with_exits(tuple(sorted({candidate.depth for candidate in chosen})))
    traced = anatomy(model.skeleton(), model.input_shape)
    submodels = [_submodel(traced, candidate, levels.rounding, nested_exits) for candidate in chosen]
    made = tuple(
        _level(number, traced, candidate.width, submodel, candidate.cost, chosen[-1].cost)
        for number, (candidate, submodel) in enumerate(zip(chosen, submodels, strict=True), start=1)
    )
    return plan_of(model, traced, made, level_of, own=own, candidates=candidates)


def keep_units(
    traced: Anatomy, kept_units: Sequence[tuple[float, Sequence[int]]], levels: LevelsConfig
) -> tuple[Level, ...]:
    """Levels of a width and any set of units each, answering at the final head; the last one is the largest."""
    submodels = [
        Submodel(
            tuple(kept(group.size, width, levels.rounding) for group in traced.groups),
            tuple(units),
            (traced.depth,),
        )
        for width, units in kept_units
    ]
    metric = "macs" if levels.metric == "macs" else "params"
    costs = [int(getattr(cost(traced, submodel), metric)) for submodel in submodels]
    return tuple(
        _level(number, traced, width, submodel, own, costs[-1])
        for number, (submodel, own, (width, _)) in enumerate(
            zip(submodels, costs, kept_units, strict=True), start=1
        )
    )


def plan_of(
    model: ModelSpec,
    traced: Anatomy,
    levels: Sequence[Level],
    level_of: np.ndarray,
    *,
    own: Own | None = None,
    candidates: Sequence[Sequence[Candidate]] = (),
) -> Plan:
    """A plan of given levels, each owning what the norm policy and ``own`` say; the last one is the global model."""
    skeleton = model.skeleton()
    by_norm = owned_tensors(skeleton, model.norm)
    owning = tuple(
        replace(level, owned=by_norm | frozenset(own(traced, level.submodel) if own else ()))
        for level in levels
    )
    return Plan(
        model=model,
        anatomy=traced,
        levels=owning,
        level_of=level_of,
        batch_norms=has_batch_norms(skeleton),
        global_level=len(owning),
        candidates=tuple(tuple(level) for level in candidates),
    )


def choose_pairs(
    spec: ModelSpec,
    config: LevelsConfig,
    ratios: Sequence[float],
    axes: str = BOTH,
    nested_exits: bool = True,
) -> tuple[list[Candidate], list[list[Candidate]]]:
    """The width and depth of every level, given or searched, and the feasible candidates of each.

    Raises:
        UserError: a given depth does not exist, or a level has no pair within the tolerance.
    """
    depth = spec.skeleton().depth
    if config.pairs is None:
        depths = [] if axes == WIDTH else _depth_grid(spec, config, depth)
        widths = np.ones(1) if axes == DEPTH else width_grid(config.grid.width_step)
        problem = _problem(spec, config, depths, widths, axes == BOTH, nested_exits)
        return search(problem, ratios)
    pairs = _checked(config.pairs, spec.name, depth, axes)
    depths = sorted({own for _, own in pairs if own < depth})
    widths = np.array(sorted({width for width, _ in pairs} | {1.0}))
    problem = _problem(spec, config, depths, widths, axes == BOTH, nested_exits)
    chosen: list[Candidate] = []
    for (width, own), ratio in zip(pairs, ratios, strict=True):
        lower = sorted({c.depth for c in chosen})
        chosen.append(candidate_at(problem, width, own, lower, ratio))
    return chosen, [[candidate] for candidate in chosen]


def width_grid(step: float) -> np.ndarray:
    """step, 2 step, ... and always 1."""
    grid = np.round(np.arange(1, round(1 / step) + 1) * step, 12)
    return np.append(grid[grid < 1], 1.0)


def _submodel(traced: Anatomy, candidate: Candidate, rounding: str, nested_exits: bool) -> Submodel:
    lower = {p for p in traced.exits if p <= candidate.depth} if nested_exits else set()
    return prefix(traced, candidate.width, candidate.depth, sorted(lower | {candidate.depth}), rounding)


def _level(
    number: int, traced: Anatomy, width: float, submodel: Submodel, budgeted: int, plain: int
) -> Level:
    """``budgeted`` is the level's cost as Eq. 1 counts it, ``plain`` the full model's."""
    ratio, own = budgeted / plain, cost(traced, submodel)
    return Level(number, width, len(submodel.units), budgeted, ratio, own, submodel)


def _checked(pairs: Sequence[PairConfig], name: str, depth: int, axes: str) -> list[tuple[float, int]]:
    """(width, depth) of every pair."""
    given = [(pair.width, depth if pair.depth is None else pair.depth) for pair in pairs]
    for number, pair in enumerate(pairs):
        if pair.keep is not None:
            right = "this method keeps units from the front: give a depth."
            raise UserError(f"levels.pairs[{number}].keep", pair.keep, right)
        if axes == WIDTH and given[number][1] != depth:
            raise UserError("levels.pairs", f"depth {pair.depth}", "this method only varies the width.")
        if axes == DEPTH and pair.width != 1:
            raise UserError("levels.pairs", f"width {pair.width:g}", "this method only varies the depth.")
    for (_, lower), (_, upper) in itertools.pairwise(given):
        if upper < lower:
            raise UserError("levels.pairs", f"depth {upper}", "must not fall from one level to the next.")
    if given[-1][1] > depth:
        raise UserError("levels.pairs", f"depth {given[-1][1]}", f"{name} has only {depth} units.")
    width, last = given[-1]
    if width < 1 or last < depth:
        right = f"the last level must be the full model: width 1, depth {depth}."
        raise UserError("levels.pairs", f"width {width:g}, depth {last}", right)
    return given


def _depth_grid(spec: ModelSpec, config: LevelsConfig, depth: int) -> list[int]:
    step = config.grid.depth_step
    if step > depth:
        raise UserError("levels.grid.depth_step", step, f"{spec.name} has only {depth} units.")
    return list(range(step, depth, step))


def _problem(
    spec: ModelSpec,
    config: LevelsConfig,
    exits: Sequence[int],
    widths: np.ndarray,
    both: bool,
    nested_exits: bool,
) -> Problem:
    traced = anatomy(spec.with_exits(tuple(exits)).skeleton(), spec.input_shape)
    costs = tables(traced, widths, config.rounding)
    return Problem(traced, costs, config.metric, config.tolerance, config.tie_break, both, nested_exits)

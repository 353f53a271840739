"""Task 2 of ScaleFL (section 3.1, Eq. 1): the width and depth of each level.

    argmin |s_d - s_w|   subject to   |cost(s_d, s_w) / (r_l cost(M)) - 1| <= tolerance

on a grid of depths and widths, where each level is deeper than the one below or has full depth. ``cost``
counts the exit heads up to and including the level's own, and ``cost(M)`` the plain full model; with both,
depths every sixth block and widths every 0.05, the published pairs of Table 1 come out (and with no other
reading that was tried).

Along one axis alone there is no imbalance to minimise: a level is then the largest submodel whose cost is within
the budget and its tolerance, and no shallower than the one below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster_fl.errors import UserError
from cluster_fl.nesting.anatomy import Anatomy
from cluster_fl.nesting.cost import CostTable

SLACK = 1e-12
SHOWN = 3


@dataclass(frozen=True)
class Candidate:
    """One point of the grid for one level. ``ratio`` is its cost over the level's budget."""

    width: float
    depth: int
    imbalance: float
    cost: int
    ratio: float


@dataclass(frozen=True)
class Problem:
    """What is searched: a traced model with an exit at every candidate depth below its full depth.

    ``both``: width and depth; otherwise along one of them. ``nested_exits``: a level has the lower levels' exits.
    """

    anatomy: Anatomy
    tables: Mapping[str, CostTable]
    metric: str
    tolerance: float
    tie_break: Sequence[str]
    both: bool = True
    nested_exits: bool = True

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("params", "macs") if self.metric == "both" else (self.metric,)


def search(problem: Problem, ratios: Sequence[float]) -> tuple[list[Candidate], list[list[Candidate]]]:
    """Solves Eq. 1 level by level, from the smallest.

    Args:
        ratios: budget of each level as a share of the plain full model, the last one 1.

    Returns:
        The chosen candidate of every level, and per level all feasible ones, best first. The last level is
        the full model.

    Raises:
        UserError: a level has no candidate within the tolerance; names the nearest ones.
    """
    chosen: list[Candidate] = []
    feasible: list[list[Candidate]] = []
    for level, ratio in enumerate(ratios, start=1):
        if level == len(ratios):
            feasible.append([_full(problem)])
        else:
            lower = sorted({candidate.depth for candidate in chosen})
            deeper = [p for p in _candidates(problem, ratio, lower) if _is_deeper(p[0], lower, problem)]
            feasible.append(
                _ranked(problem, deeper, level) if problem.both else _largest(problem, deeper, level)
            )
        chosen.append(feasible[-1][0])
    return chosen, feasible


def plain_cost(anatomy: Anatomy, table: CostTable) -> int:
    """Cost of the full model without exits, the denominator of Eq. 1."""
    widest = int(np.argmax(table.widths))
    return int(table.backbone()[anatomy.depth, widest] + table.head[widest])


def candidate_at(problem: Problem, width: float, depth: int, lower: Sequence[int], ratio: float) -> Candidate:
    """A given pair as a candidate, whether or not it is within the tolerance.

    The full width and depth count as the plain full model, as Table 1 counts its last level.
    """
    if width == 1 and depth == problem.anatomy.depth:
        return _full(problem)
    points = (c for c, _ in _candidates(problem, ratio, lower))
    return next(c for c in points if c.depth == depth and c.width == width)


def _is_deeper(candidate: Candidate, lower: Sequence[int], problem: Problem) -> bool:
    least = max(lower, default=0) + problem.both
    return candidate.depth >= least or candidate.depth == problem.anatomy.depth


def _full(problem: Problem) -> Candidate:
    plain = plain_cost(problem.anatomy, problem.tables[problem.metrics[0]])
    return Candidate(1.0, problem.anatomy.depth, 0.0, plain, 1.0)


def _candidates(problem: Problem, ratio: float, lower: Sequence[int]) -> list[tuple[Candidate, float]]:
    """Every grid point with how far it is from the budget (the worst metric's relative deviation)."""
    anatomy, depths = problem.anatomy, (*problem.anatomy.exits, problem.anatomy.depth)
    heads = lower if problem.nested_exits else ()
    costs = {m: _costs(anatomy, problem.tables[m], depths, heads) for m in problem.metrics}
    plain = {m: plain_cost(anatomy, problem.tables[m]) for m in problem.metrics}
    relative = np.stack([costs[m] / (ratio * plain[m]) for m in problem.metrics])
    worst = np.argmax(np.abs(relative - 1) if problem.both else relative, axis=0)
    first = problem.metrics[0]
    points = []
    for (i, j), metric in np.ndenumerate(worst):
        width, value = float(problem.tables[first].widths[j]), float(relative[metric, i, j])
        imbalance = abs(depths[i] / anatomy.depth - width)
        points.append(
            (Candidate(width, depths[i], imbalance, int(costs[first][i, j]), value), abs(value - 1))
        )
    return points


def _costs(anatomy: Anatomy, table: CostTable, depths: Sequence[int], lower: Sequence[int]) -> np.ndarray:
    """(depths, widths): backbone, the heads of lower levels at or above, and the own head."""
    backbone, rows = table.backbone(), []
    for depth in depths:
        heads = sorted({p for p in (*lower, depth) if p <= depth and p < anatomy.depth})
        exits = sum((table.exits[anatomy.exits.index(p)] for p in heads), start=np.zeros_like(table.head))
        rows.append(backbone[depth] + exits + (table.head if depth == anatomy.depth else 0))
    return np.stack(rows)


def _ranked(problem: Problem, points: list[tuple[Candidate, float]], level: int) -> list[Candidate]:
    keys = {
        "ratio": lambda c: round(abs(c.ratio - 1), 12),
        "wider": lambda c: -c.width,
        "deeper": lambda c: -c.depth,
    }
    within = [c for c, off in points if off <= problem.tolerance + SLACK]
    if not within:
        raise _impossible(problem, points, level, "that close to its budget")
    order = [keys[name] for name in problem.tie_break]
    return sorted(within, key=lambda c: (round(c.imbalance, 12), *(key(c) for key in order)))


def _largest(problem: Problem, points: list[tuple[Candidate, float]], level: int) -> list[Candidate]:
    within = [c for c, _ in points if c.ratio <= 1 + problem.tolerance + SLACK]
    if not within:
        raise _impossible(problem, points, level, "down to its budget")
    return sorted(within, key=lambda c: (-c.cost, -c.width, -c.depth))


def _impossible(
    problem: Problem, points: list[tuple[Candidate, float]], level: int, wanted: str
) -> UserError:
    nearest = sorted(points, key=lambda point: point[1])[:SHOWN]
    near = "; ".join(f"width {c.width:g} depth {c.depth}: {c.cost:,} ({c.ratio:.3f})" for c, _ in nearest)
    right = f"level {level} has no width and depth whose {problem.metric} come {wanted}. "
    return UserError("levels.tolerance", problem.tolerance, f"{right}Nearest (cost, cost/budget): {near}.")

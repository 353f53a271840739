"""Task 1 of ScaleFL (section 3.1): which levels exist, and which client is at which."""

from __future__ import annotations

import numpy as np
from sklearn.cluster import KMeans

from cluster_fl.config import LevelsConfig, level_count
from cluster_fl.errors import UserError


def ratios(levels: LevelsConfig) -> list[float]:
    """Budget of each level as a share of the full model: given, clustered from budgets, or halved from 1."""
    if levels.ratios is not None:
        return list(levels.ratios)
    count = level_count(levels)
    if levels.budgets is not None:
        budgets, groups = np.asarray(levels.budgets), cluster(levels.budgets, count)
        lowest = [float(budgets[groups == level].min()) for level in range(1, count + 1)]
        return [*lowest[:-1], 1.0]
    return [2.0 ** (level - count) for level in range(1, count + 1)]


def assign(
    levels: LevelsConfig,
    clients: int,
    rng: np.random.Generator | np.random.RandomState,
    speed: np.ndarray | None = None,
) -> np.ndarray:
    """Level (from 1) of each client, shape (clients,).

    By budget where budgets are given; otherwise the clients in ``levels.order`` cut into contiguous chunks, one a
    level, sizes rounded to the nearest; in falling order they are rounded down and the smallest level takes the
    rest (HeteroFL's fixed mode). A share of 0 makes a level that only the server has.

    Args:
        speed: of each client's device, (clients,), for ``levels.order=speed``.

    Raises:
        UserError: a level would have no client.
    """
    count = level_count(levels)
    if levels.budgets is not None:
        return cluster(levels.budgets, count)
    shares = levels.shares if levels.shares is not None else [1 / count] * count
    bounds = _bounds(np.asarray(shares), clients, levels.order == "falling")
    order, result = _order(levels.order, clients, rng, speed), np.zeros(clients, dtype=np.int64)
    for level in range(1, count + 1):
        chunk = order[bounds[level - 1] : bounds[level]]
        if len(chunk) == 0 and shares[level - 1] > 0:
            key, value = ("levels.shares", levels.shares) if levels.shares else ("clients.count", clients)
            raise UserError(key, value, f"level {level} of {count} gets no client, and the method trains it.")
        result[chunk] = level
    return result


def cluster(budgets: list[float], count: int) -> np.ndarray:
    """Level (from 1) of each client by k-means on the logarithm of its budget, lowest budgets first.

    A client that can afford the full model belongs to the top level whatever its cluster, so that the top
    level's budget is 1.
    """
    if count == 1 and min(budgets) < 1:
        right = "one level is the full model, which not every client of levels.budgets can afford."
        raise UserError("levels.count", count, right)
    values = np.log(np.asarray(budgets, dtype=float))[:, None]
    if len(np.unique(values)) < count:
        raise UserError(
            "levels.count", count, f"levels.budgets has only {len(np.unique(values))} different values."
        )
    means = KMeans(count, n_init=10, random_state=0).fit(values)
    rank = np.empty(count, dtype=np.int64)
    rank[np.argsort(means.cluster_centers_[:, 0])] = np.arange(1, count + 1)
    result: np.ndarray = rank[means.labels_]
    affords = np.asarray(budgets) >= 1
    result[affords] = count
    result[(result == count) & ~affords] = count - 1
    for level in range(1, count + 1):
        if not (result == level).any():
            raise UserError(
                "levels.count", count, f"clustering levels.budgets leaves level {level} without a client."
            )
    return result


def _order(
    name: str, clients: int, rng: np.random.Generator | np.random.RandomState, speed: np.ndarray | None
) -> np.ndarray:
    """Client numbers, those of the smallest level first."""
    if name == "speed":
        assert speed is not None
        return np.argsort(speed, kind="stable")
    if name == "shuffled":
        return rng.permutation(clients)
    return np.arange(clients) if name == "rising" else np.arange(clients)[::-1]


def _bounds(shares: np.ndarray, clients: int, round_down: bool) -> np.ndarray:
    if round_down:
        sizes = np.floor(shares[1:] * clients + 1e-9).astype(int)
        return np.cumsum([0, clients - sizes.sum(), *sizes])
    bounds: np.ndarray = np.floor(np.cumsum([0.0, *shares]) * clients + 0.5).astype(int)
    return bounds

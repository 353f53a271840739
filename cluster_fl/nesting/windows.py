"""Which channels of a group a submodel keeps, when they are not simply the first ones.

An *order* ranks a group's channels, (size,), a permutation. A submodel that keeps ``count`` of them keeps the
first ``count`` of the order; so of one order, the smaller choice always lies within the larger.
"""

from __future__ import annotations

import numpy as np

from cluster_fl.nesting.submodel import Channels


def rolled(size: int, shift: int) -> np.ndarray:
    """From channel ``shift`` on, around the end; ``shift`` may be negative or beyond the size."""
    return (np.arange(size) + shift) % size


def reverse(size: int) -> np.ndarray:
    """The last channel first."""
    return np.arange(size)[::-1]


def outward(size: int) -> np.ndarray:
    """From the middle to both ends; the lower one first of two that are equally far."""
    return np.argsort(np.abs(2 * np.arange(size) - (size - 1)), kind="stable")


def leading(order: np.ndarray, count: int) -> Channels:
    """The first ``count`` channels of an order, rising; a plain number where they are a prefix of the group."""
    chosen = np.sort(order[:count])
    return count if chosen[-1] == count - 1 else tuple(chosen.tolist())

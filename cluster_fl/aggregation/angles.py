"""FedAdp: clients count by the angle of their update to the mean one (Wu & Wang, IEEE TCCN 2021).

An angle is a number of radians; NaN stands for that of a vector without a direction.
"""

from __future__ import annotations

import numpy as np


def angles(products: np.ndarray, squares: np.ndarray, others: np.ndarray) -> np.ndarray:
    """arccos(<a, b> / (|a| |b|)) of <a, b>, |a|^2 and |b|^2, which broadcast; NaN where a norm is zero."""
    norms = np.sqrt(squares) * np.sqrt(others)
    cosines = np.divide(products, norms, out=np.full(np.shape(norms), np.nan), where=norms > 0)
    result: np.ndarray = np.arccos(np.clip(cosines, -1.0, 1.0))
    return result


def smoothed(before: np.ndarray, count: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """The mean of ``count`` angles whose mean was ``before``, and one more."""
    total = count + 1
    result: np.ndarray = count / total * before + angle / total
    return result


def gompertz(angle: np.ndarray, alpha: float) -> np.ndarray:
    """f = alpha (1 - exp(-exp(-alpha (angle - 1)))): nearly alpha below half a radian, nearly 0 beyond two."""
    result: np.ndarray = alpha * -np.expm1(-np.exp(-alpha * (angle - 1)))
    return result


def factors(angle: np.ndarray, alpha: float) -> np.ndarray:
    """With what factor each client's own weight counts: exp(f) over the largest of them, (clients,) in (0, 1].

    All are exactly 1 with ``alpha`` 0.
    """
    mapped = gompertz(angle, alpha)
    result: np.ndarray = np.exp(mapped - mapped.max())
    return result


def on_weight_grid(factor: np.ndarray, weight: float) -> np.ndarray:
    """``factor`` rounded so that its products with ``weight``, a multiple of 2^-40, are multiples of 2^-40 too."""
    multiple = int(weight * 2.0**40)
    # The lowest set bit of the weight is what the factor's own resolution may not undercut.
    step = float(multiple & -multiple)
    result: np.ndarray = np.round(factor * step) / step
    return result

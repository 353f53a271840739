"""Random numbers for many clients at once, each a function of (seed, purpose, round, client) alone.

A generator a client would take microseconds each; here a hash of the client's number stands for it, so that a draw
costs nanoseconds and still does not depend on who else is drawn for.
"""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri

from cluster_fl.seeding import Purpose, sequence

# SplitMix64 (Steele, Lea & Flood, OOPSLA 2014): the step of the sequence and the multipliers of its finaliser.
STEP = np.uint64(0x9E3779B97F4A7C15)
FIRST, SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def uniforms(seed: int, purpose: Purpose, round: int, clients: np.ndarray, draw: int = 0) -> np.ndarray:
    """One number above 0 and below 1 for each client, float64, of shape (clients,).

    Args:
        clients: their numbers, not negative.
        draw: which of a client's numbers for this purpose and round.
    """
    start = sequence(seed, purpose, round, draw).generate_state(1, np.uint64)[0]
    # Twice over, since neighbouring clients' states differ by a constant.
    bits = _mixed(_mixed(clients.astype(np.uint64) * STEP + start) + start)
    result: np.ndarray = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return result


def normals(seed: int, purpose: Purpose, round: int, clients: np.ndarray, draw: int = 0) -> np.ndarray:
    """Standard normal, as :func:`uniforms`."""
    result: np.ndarray = ndtri(uniforms(seed, purpose, round, clients, draw))
    return result


def exponentials(seed: int, purpose: Purpose, round: int, clients: np.ndarray, draw: int = 0) -> np.ndarray:
    """Exponential of rate 1, as :func:`uniforms`."""
    result: np.ndarray = -np.log1p(-uniforms(seed, purpose, round, clients, draw))
    return result


def _mixed(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * FIRST
    state = (state ^ (state >> np.uint64(27))) * SECOND
    result: np.ndarray = state ^ (state >> np.uint64(31))
    return result

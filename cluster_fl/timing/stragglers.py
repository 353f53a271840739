"""How much longer than its speed says a client computes: a factor drawn anew in each round."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cluster_fl.seeding import Purpose
from cluster_fl.timing import draws
from cluster_fl.timing.schema import StragglersConfig

Draw = Callable[[StragglersConfig, int, int, np.ndarray], np.ndarray]


def slowdown(config: StragglersConfig, seed: int, round: int, clients: np.ndarray) -> np.ndarray:
    """The factor on each client's computing seconds, above 0, float64, (clients,).

    It depends on the seed, the round and the client, and on nobody else who takes part.
    """
    return DISTRIBUTIONS[config.name](config, seed, round, clients)


def least(config: StragglersConfig) -> float:
    """A factor below which hardly any is: less than one in 30,000."""
    return float(np.exp(-4 * config.sigma)) if config.name == "lognormal" else 1.0


def _none(config: StragglersConfig, seed: int, round: int, clients: np.ndarray) -> np.ndarray:
    return np.ones(len(clients))


def _shifted_exponential(config: StragglersConfig, seed: int, round: int, clients: np.ndarray) -> np.ndarray:
    """The run time of coded computation (Lee et al., IEEE Trans. Inf. Theory 2018): work that takes at least ``s``
    seconds takes ``s + s Exp(rate)`` (Reisizadeh et al., IEEE Trans. Inf. Theory 2019), a mean of ``s (1 + 1/rate)``.
    """
    return 1 + draws.exponentials(seed, Purpose.STRAGGLE, round, clients) / config.rate


def _lognormal(config: StragglersConfig, seed: int, round: int, clients: np.ndarray) -> np.ndarray:
    """FedScale's alternative to its traces (Lai et al., ICML 2022), which cites PAPAYA (Huba et al., MLSys 2022)."""
    result: np.ndarray = np.exp(config.sigma * draws.normals(seed, Purpose.STRAGGLE, round, clients))
    return result


def _pareto(config: StragglersConfig, seed: int, round: int, clients: np.ndarray) -> np.ndarray:
    """A power law: a chance of ``x^-shape`` to need more than ``x`` times as long (Peng, Soljanin & Whiting, IEEE
    Trans. Inf. Theory 2021); its logarithm is exponential."""
    result: np.ndarray = np.exp(draws.exponentials(seed, Purpose.STRAGGLE, round, clients) / config.shape)
    return result


def _bimodal(config: StragglersConfig, seed: int, round: int, clients: np.ndarray) -> np.ndarray:
    """A few slow nodes among equal ones (Peng, Soljanin & Whiting, IEEE Trans. Inf. Theory 2021)."""
    slow = draws.uniforms(seed, Purpose.STRAGGLE, round, clients) < config.slow_share
    return np.where(slow, config.slow_factor, 1.0)


DISTRIBUTIONS: dict[str, Draw] = {
    "none": _none,
    "shifted_exponential": _shifted_exponential,
    "lognormal": _lognormal,
    "pareto": _pareto,
    "bimodal": _bimodal,
}

"""The simulated clock: what the clients' devices would have spent, apart from what the cluster spends."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster_fl.config import TimeConfig
from cluster_fl.errors import UserError

# A backward pass costs two forwards, and a multiply-accumulate is two operations.
FORWARD_AND_BACKWARD = 3
FLOPS_PER_MAC = 2

# Effective GFLOP/s of the low and the high-end phone of FLASH (WWW 2021), from its training times of a
# 17.2 MMAC network; the levels in between are spaced geometrically.
SLOWEST_GFLOPS, FASTEST_GFLOPS = 0.63, 5.77
# Mbit/s: the median 4G test of "Mobile Access Bandwidth in Practice" (SIGCOMM 2022), and FedScale's median.
DOWN_MBPS, UP_MBPS = 26.1, 6.1


@dataclass(frozen=True)
class Devices:
    """One device profile a client: arrays of shape (clients,)."""

    flops: np.ndarray  # effective FLOP/s
    down: np.ndarray  # bit/s
    up: np.ndarray  # bit/s
    latency: float  # seconds, round trip

    @staticmethod
    def by_level(config: TimeConfig, level_of: np.ndarray) -> Devices:
        """The profile of each client's level.

        Raises:
            UserError: a list has not one positive value a level.
        """
        levels = int(level_of.max())
        gflops = _profile("time.gflops", config.gflops, _geometric(levels), levels)
        down = _profile("time.down_mbps", config.down_mbps, [DOWN_MBPS] * levels, levels)
        up = _profile("time.up_mbps", config.up_mbps, [UP_MBPS] * levels, levels)
        at = level_of - 1
        return Devices(gflops[at] * 1e9, down[at] * 1e6, up[at] * 1e6, config.latency_s)


def client_seconds(
    devices: Devices, clients: np.ndarray, macs: np.ndarray, payload: np.ndarray, samples: np.ndarray
) -> np.ndarray:
    """Download + compute + upload of each client, seconds, shape (clients,).

    Args:
        clients: who.
        macs: of one sample's forward pass through the client's submodel.
        payload: bytes of the submodel, sent both ways.
        samples: trained on, epochs counted.
    """
    bits = payload * 8.0
    compute = samples * macs * float(FORWARD_AND_BACKWARD * FLOPS_PER_MAC) / devices.flops[clients]
    total: np.ndarray = devices.latency + bits / devices.down[clients] + compute + bits / devices.up[clients]
    return total


def synchronous(seconds: np.ndarray) -> float:
    """Length of a round that waits for everybody: the slowest participant ends it."""
    return float(seconds.max(initial=0.0))


def _geometric(levels: int) -> list[float]:
    return (
        [float(v) for v in np.geomspace(SLOWEST_GFLOPS, FASTEST_GFLOPS, levels)]
        if levels > 1
        else [FASTEST_GFLOPS]
    )


def _profile(key: str, given: list[float] | None, default: list[float], levels: int) -> np.ndarray:
    values = default if given is None else given
    if len(values) != levels or not all(value > 0 for value in values):
        raise UserError(key, values, f"must be {levels} positive numbers, one a level, smallest level first.")
    return np.asarray(values, dtype=np.float64)

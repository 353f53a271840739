"""The simulated clock: what the clients' devices would have spent, apart from what the cluster spends."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster_fl.errors import UserError
from cluster_fl.timing.schema import DevicesConfig

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
    def by_level(config: DevicesConfig, level_of: np.ndarray, levels: int) -> Devices:
        """The profile of each client's level, of so many levels.

        Raises:
            UserError: a list has not one positive value a level.
        """
        gflops = _profile("time.devices.gflops", config.gflops, _geometric(levels), levels)
        down = _profile("time.devices.down_mbps", config.down_mbps, [DOWN_MBPS] * levels, levels)
        up = _profile("time.devices.up_mbps", config.up_mbps, [UP_MBPS] * levels, levels)
        at = level_of - 1
        return Devices(gflops[at] * 1e9, down[at] * 1e6, up[at] * 1e6, config.latency_s)


def client_seconds(
    devices: Devices,
    clients: np.ndarray,
    macs: np.ndarray,
    down: np.ndarray,
    up: np.ndarray,
    samples: np.ndarray,
    busy: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Download + compute + upload of each client, seconds, shape (clients,).

    Args:
        clients: who.
        macs: of one sample's forward pass, as often as the local program passes.
        down, up: bytes received and sent.
        samples: trained on, epochs counted.
        busy: share of the device's speed that other work takes.
    """
    speed = devices.flops[clients] * (1 - busy)
    compute = samples * macs * float(FORWARD_AND_BACKWARD * FLOPS_PER_MAC) / speed
    total: np.ndarray = (
        devices.latency + down * 8.0 / devices.down[clients] + compute + up * 8.0 / devices.up[clients]
    )
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

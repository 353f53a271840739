"""The clients' devices: how fast each one computes and communicates, and what fits into its memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster_fl.timing.schema import DevicesConfig
from cluster_fl.timing.sources import DEFAULTS, SOURCES, Clients, value


@dataclass(frozen=True)
class Devices:
    """One device a client: read-only float64 arrays of shape (clients,). What all share is stored once.

    Attributes:
        flops: effective FLOP/s: of its peak, the share that training reaches.
        down, up: bit/s.
        latency: seconds, round trip.
        memory: bytes that training may take; inf: no limit.
        memory_bandwidth: bytes/s between memory and processor; inf: nothing waits for it.
    """

    flops: np.ndarray
    down: np.ndarray
    up: np.ndarray
    latency: np.ndarray
    memory: np.ndarray
    memory_bandwidth: np.ndarray


def make(config: DevicesConfig, seed: int, clients: int, level_of: np.ndarray | None, levels: int) -> Devices:
    """The device of each client, by ``config.source``:

    - ``levels``: its level's; lists of one value a level, smallest first. GFLOP/s that are not given are geometric
      from FLASH's low-end phone to its high-end phone.
    - ``values``: lists of one value for all clients, or of one a client.
    - ``lognormal``: lists of a median and the logarithm's standard deviation; ``uniform``: of the lowest and the
      highest value. Columns are independent.
    - ``phones``, ``fedscale``, ``csv``: see :mod:`cluster_fl.timing.sources`.

    What the source leaves open can be given as for ``values``; otherwise it is 1.76 GFLOP/s (FLASH's middle phone),
    26.1 Mbit/s down and 6.1 up, memory without limit that nothing waits for. ``config.utilisation`` scales every
    source's GFLOP/s: where they are measured, as those of FLASH, phones and FedScale are, it is 1.

    A client's draws depend on ``seed`` and its number alone, not on how many clients there are.

    Args:
        level_of: each client's level, (clients,), from 1; only ``levels`` needs it.
        levels: how many there are; also those that no client has.

    Raises:
        UserError: lists or a file that are not as above, or a list for what the source decides.
    """
    columns = SOURCES[config.source](config, Clients(seed, clients, level_of, levels))
    columns.setdefault("latency_s", config.latency_s)
    for key in DEFAULTS:
        if key not in columns:
            columns[key] = value(config, key, clients)

    def scaled(key: str, unit: float) -> np.ndarray:
        return np.broadcast_to(np.asarray(columns[key], dtype=np.float64) * unit, (clients,))

    columns["gflops"] = columns["gflops"] * config.utilisation
    return Devices(
        flops=scaled("gflops", 1e9),
        down=scaled("down_mbps", 1e6),
        up=scaled("up_mbps", 1e6),
        latency=scaled("latency_s", 1.0),
        memory=scaled("memory_mb", 1e6),
        memory_bandwidth=scaled("memory_gbps", 1e9),
    )

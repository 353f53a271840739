"""What is shipped of real devices' measurements; the README beside this file names sources and licences.

``ops/make_tables.py`` made the files.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import NamedTuple

import numpy as np


class Availability(NamedTuple):
    """When phones were ready to train: idle, charging and on Wi-Fi. Seconds, one clock for all users.

    Intervals of a user rise and do not overlap; some have length 0 (the source's whole seconds).

    Attributes:
        offsets: (users + 1,), int64: a user's intervals are ``starts[offsets[user]:offsets[user + 1]]``, which is
            empty for one that was never ready.
        starts, ends: (intervals,), float64.
        trace_start, trace_end: (users,), float64: from when to when a user was watched at all.
    """

    offsets: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    trace_start: np.ndarray
    trace_end: np.ndarray


class Phones(NamedTuple):
    """Marginals of real phones, and how two of them go together. All float64 but ``joint``.

    Attributes:
        latency: (250,), rising: equally likely times of one inference with a ResNet, ms.
        down: (5, 250), rising along each row: equally likely download rates on 4G, 5G, Wi-Fi 4, 5 and 6, Mbit/s.
        up_share: (19,), rising: equally likely ratios of the upload to the download rate.
        joint: (1148,), int64: the rank of the download rate, from 0, that goes with each rank of the speed.
    """

    latency: np.ndarray
    down: np.ndarray
    up_share: np.ndarray
    joint: np.ndarray


def availability() -> Availability:
    """The traces of 710 phones of FLASH, 1 to 7 days each."""
    table = _load("availability.npz")
    times = np.cumsum(table["steps"], dtype=np.int64).astype(np.float64)
    offsets = np.concatenate([[0], np.cumsum(table["intervals"], dtype=np.int64)])
    start, end = table["trace_start"].astype(np.float64), table["trace_end"].astype(np.float64)
    return Availability(offsets, times[0::2], times[1::2], start, end)


def phones() -> Phones:
    table = _load("phones.npz")
    joint = table["joint"].astype(np.int64)
    return Phones(table["latency"] / 10, table["down"] / 10, table["up_share"] / 100, joint)


def quantile(values: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """The quantile function of equally likely ``values``, rising, at ``ranks`` in (0, 1), interpolated.

    It ends at the first and the last value: more extreme ones than were measured are not made up.
    """
    result: np.ndarray = np.interp(ranks * len(values) - 0.5, np.arange(len(values)), values)
    return result


def _load(name: str) -> dict[str, np.ndarray]:
    with as_file(files(__name__) / name) as path, np.load(path, allow_pickle=False) as content:
        return dict(content)

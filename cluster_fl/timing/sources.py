"""Where the clients' devices come from: one function a value of ``time.devices.source``.

Each returns the columns that the source decides, by the names of the configuration and in their units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from cluster_fl.errors import UserError
from cluster_fl.seeding import Purpose
from cluster_fl.timing import device_file, draws, fedscale, tables
from cluster_fl.timing.schema import DevicesConfig

# Effective GFLOP/s of the low, the middle and the high-end phone of FLASH (WWW 2021), from its training times of a
# 17.2 MMAC network.
SLOWEST_GFLOPS, MIDDLE_GFLOPS, FASTEST_GFLOPS = 0.63, 1.76, 5.77
# What a device has where neither its source nor the configuration says it. Mbit/s: the median 4G test of "Mobile
# Access Bandwidth in Practice" (SIGCOMM 2022), and FedScale's median.
DEFAULTS = {
    "gflops": MIDDLE_GFLOPS,
    "down_mbps": 26.1,
    "up_mbps": 6.1,
    "memory_mb": math.inf,
    "memory_gbps": math.inf,
}
# Which of a client's draws of Purpose.DEVICES in round 0 is for what: a column has one of its own, and so has the row
# drawn from a file. None is draw 0, whose seed load.py gives its generator: another kind of stream, and apart anyway.
DRAWS = {"gflops": 1, "down_mbps": 2, "up_mbps": 3, "memory_mb": 4, "memory_gbps": 5, "row": 6}
# Of 2^52 draws none is beyond e^(8.3 sigma), which is to be a number.
MOST_SIGMA = 10.0

# One value for all clients, or one a client, (clients,).
Column = float | np.ndarray


@dataclass(frozen=True)
class Clients:
    """For whom devices are made: ``level_of`` (clients,), from 1, is there for those who ask for it."""

    seed: int
    count: int
    level_of: np.ndarray | None
    levels: int

    def uniforms(self, draw: str) -> np.ndarray:
        return draws.uniforms(self.seed, Purpose.DEVICES, 0, np.arange(self.count), DRAWS[draw])

    def normals(self, draw: str) -> np.ndarray:
        return draws.normals(self.seed, Purpose.DEVICES, 0, np.arange(self.count), DRAWS[draw])


def from_levels(config: DevicesConfig, clients: Clients) -> dict[str, Column]:
    if clients.level_of is None:
        raise ValueError("devices by level need each client's level")
    default = {key: [value] * clients.levels for key, value in DEFAULTS.items()}
    default["gflops"] = _geometric(clients.levels)
    profiles = {key: _profile(config, key, default[key]) for key in DEFAULTS}
    at = clients.level_of - 1
    return {
        key: profile[at] if (profile != profile[0]).any() else float(profile[0])
        for key, profile in profiles.items()
    }


def _geometric(levels: int) -> list[float]:
    if levels == 1:
        return [FASTEST_GFLOPS]
    return [float(value) for value in np.geomspace(SLOWEST_GFLOPS, FASTEST_GFLOPS, levels)]


def _profile(config: DevicesConfig, key: str, default: list[float]) -> np.ndarray:
    given = getattr(config, key)
    values = default if given is None else given
    if len(values) != len(default) or not all(value > 0 for value in values):
        right = f"must be {len(default)} positive numbers, one a level, smallest level first."
        raise UserError(f"time.devices.{key}", values, right)
    return np.asarray(values, dtype=np.float64)


def from_values(config: DevicesConfig, clients: Clients) -> dict[str, Column]:
    return {}  # of its own: all that a source leaves open is read so


def value(config: DevicesConfig, key: str, clients: int) -> Column:
    """A column that no source decides: given once for all, or once a client, or else the default."""
    given = getattr(config, key)
    if given is None:
        return DEFAULTS[key]
    if len(given) not in (1, clients) or not all(value > 0 for value in given):
        shown = given if len(given) <= 10 else f"{len(given)} values, the least {min(given):g}"
        right = f"must be one positive number for all clients, or {clients}, one a client."
        raise UserError(f"time.devices.{key}", shown, right)
    return float(given[0]) if len(given) == 1 else np.asarray(given, dtype=np.float64)


def from_lognormal(config: DevicesConfig, clients: Clients) -> dict[str, Column]:
    right = f"must be [median, sigma]: a positive median, and a sigma from 0 to {MOST_SIGMA:g}."
    pairs = _pairs(config, right, lambda median, sigma: 0 < median < math.inf and 0 <= sigma <= MOST_SIGMA)
    return {key: median * np.exp(sigma * clients.normals(key)) for key, median, sigma in pairs}


def from_uniform(config: DevicesConfig, clients: Clients) -> dict[str, Column]:
    right = "must be [low, high]: two positive numbers, the second not below the first."
    pairs = _pairs(config, right, lambda low, high: 0 < low <= high < math.inf)
    return {key: low + (high - low) * clients.uniforms(key) for key, low, high in pairs}


def _pairs(
    config: DevicesConfig, right: str, valid: Callable[[float, float], bool]
) -> Iterator[tuple[str, float, float]]:
    """The columns that are given, with their two parameters."""
    given = {key: getattr(config, key) for key in DEFAULTS if getattr(config, key) is not None}
    if not given:
        wanted = "draws what is given as a list, and nothing is: give time.devices.gflops, for example."
        raise UserError("time.devices.source", config.source, wanted)
    for key, pair in given.items():
        if len(pair) != 2 or not valid(*pair):
            raise UserError(f"time.devices.{key}", pair, right)
        yield key, *pair


def from_phones(config: DevicesConfig, clients: Clients) -> dict[str, Column]:
    """Real phones, resampled from :func:`tables.phones`: models on the market, not weighted by how many are in use.

    A phone's speed is 1.76 GFLOP/s x the median phone's inference time / its own. The tables' inference times are of
    a ResNet whose size, input and processor are not published, and phones infer much faster than they train; so only
    the ratios are taken from there, and the median phone is FLASH's middle one, whose training was measured.

    The download rate is that of a phone of about the same rank of speed, among the tests of phones whose speed is
    known (rank correlation 0.27; :mod:`tables`' README says what it rests on), from 4G, 5G, Wi-Fi 4, 5 and 6 in equal
    parts: the publisher's choice, not usage. The upload rate is a share of it, independently drawn from 19 users'.
    """
    _refuse(config, ("gflops", "down_mbps", "up_mbps"), "the phones decide")
    phones = tables.phones()
    speed, matched = clients.uniforms("gflops"), len(phones.joint)
    # Both ranks are uniform between neighbours, so that each marginal is the table's, and only their order is joint.
    network = (phones.joint[(speed * matched).astype(np.int64)] + clients.uniforms("down_mbps")) / matched
    down = tables.quantile(np.sort(phones.down, axis=None), network)
    return {
        "gflops": _calibrated(tables.quantile(phones.latency, 1 - speed), float(np.median(phones.latency))),
        "down_mbps": down,
        "up_mbps": down * tables.quantile(phones.up_share, clients.uniforms("up_mbps")),
    }


def from_fedscale(config: DevicesConfig, clients: Clients) -> dict[str, Column]:
    """FedScale's devices: each client draws an entry of its file, with replacement.

    FedScale charges an entry's inference time per sample whatever the model is, thrice for training. Here it says how
    fast the device is in relation to the others: the file's median device is FLASH's middle phone, as for phones.
    FedScale's one bandwidth is that of both directions.
    """
    _refuse(config, ("gflops", "down_mbps", "up_mbps"), "the file decides")
    capacities = fedscale.read(_file(config))
    rows = _rows(clients, len(capacities.computation))
    rate = capacities.communication[rows] / 1e3
    median = float(np.median(capacities.computation))
    return {
        "gflops": _calibrated(capacities.computation[rows], median),
        "down_mbps": rate,
        "up_mbps": rate,
    }


def from_csv(config: DevicesConfig, clients: Clients) -> dict[str, Column]:
    """The user's own devices: row i is client i's if there are as many rows as clients; otherwise each client draws a
    row, with replacement. :mod:`device_file` names the columns.
    """
    table = device_file.read(_file(config))
    _refuse(config, table, "the file decides")
    if "latency_s" in table and config.latency_s != DevicesConfig().latency_s:
        raise UserError("time.devices.latency_s", config.latency_s, "must be left out: the file decides it.")
    if len(table["gflops"]) == clients.count:
        return dict(table)
    rows = _rows(clients, len(table["gflops"]))
    return {key: column[rows] for key, column in table.items()}


def _calibrated(milliseconds: np.ndarray, median: float) -> np.ndarray:
    """GFLOP/s by inference time: the median device's are those of FLASH's middle phone."""
    result: np.ndarray = MIDDLE_GFLOPS * median / milliseconds
    return result


def _rows(clients: Clients, count: int) -> np.ndarray:
    """The row of a table that each client draws."""
    rows: np.ndarray = (clients.uniforms("row") * count).astype(np.int64)
    return rows


def _refuse(config: DevicesConfig, keys: Iterable[str], who: str) -> None:
    for key in keys:
        if key in DEFAULTS and getattr(config, key) is not None:
            raise UserError(f"time.devices.{key}", getattr(config, key), f"must be left out: {who} it.")


def _file(config: DevicesConfig) -> str:
    if config.file is None:
        right = f"must name the file, since time.devices.source is {config.source}."
        raise UserError("time.devices.file", None, right)
    return config.file


SOURCES: dict[str, Callable[[DevicesConfig, Clients], dict[str, Column]]] = {
    "levels": from_levels,
    "values": from_values,
    "lognormal": from_lognormal,
    "uniform": from_uniform,
    "phones": from_phones,
    "fedscale": from_fedscale,
    "csv": from_csv,
}

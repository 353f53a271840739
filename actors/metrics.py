"""A run's pulse on Ray's Prometheus endpoints: how fast it goes, and what it loses to failures.

Each name appears there with ``ray_`` in front, a counter's with ``_total`` behind, and with the tag ``run``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ray.util.metrics import Counter, Gauge

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Meter:
    """One metric.

    Attributes:
        read: its value in a round, or what the round adds to it, from the round's record.
        adds: a counter, which only grows.
    """

    name: str
    about: str
    read: Callable[[Record], float]
    adds: bool = False


def round_seconds(record: Record) -> float:
    return float(sum(record["wall"]["phases"].values()))


def utilisation(record: Record) -> float:
    """Share of the pools' time that they were in tasks; 0 in a round that had none."""
    had = record["wall"]["pools"] * round_seconds(record)
    return float(record["wall"]["busy_s"] / had) if had else 0.0


def trained(record: Record) -> float:
    """Clients whose updates came in."""
    merged = sum(participant["fate"] == "merged" for participant in record["participants"])
    return float(merged - len(record["refused"]))


def clients_per_second(record: Record) -> float:
    seconds = record["wall"]["phases"].get("train", 0.0)
    return trained(record) / seconds if seconds else 0.0


METERS = (
    Meter("cluster_fl_rounds", "Rounds that are complete.", lambda record: record["round"] + 1),
    Meter("cluster_fl_round_seconds", "Wall-clock seconds of the last round.", round_seconds),
    Meter("cluster_fl_simulated_seconds", "Simulated seconds so far.", lambda record: record["sim_time_s"]),
    Meter("cluster_fl_pools", "Pools at the end of the last round.", lambda record: record["wall"]["pools"]),
    Meter("cluster_fl_pool_utilisation", "Share of the pools' time spent in tasks, last round.", utilisation),
    Meter("cluster_fl_clients_per_second", "Clients trained a second of training.", clients_per_second),
    Meter("cluster_fl_clients_trained", "Clients trained so far.", trained, adds=True),
    Meter(
        "cluster_fl_retries",
        "Tasks sent again, as their pool died.",
        lambda record: record["retries"],
        adds=True,
    ),
    Meter(
        "cluster_fl_refused",
        "Updates refused, as they were not finite.",
        lambda record: len(record["refused"]),
        adds=True,
    ),
    Meter(
        "cluster_fl_store_bytes",
        "Bytes that the driver has put into the object store.",
        lambda record: record["wall"]["store_bytes"],
        adds=True,
    ),
)


class Pulse:
    """The metrics of one run; to be made in the process that is to export them."""

    def __init__(self, run: str) -> None:
        self._counters = [(meter, _made(Counter, meter, run)) for meter in METERS if meter.adds]
        self._gauges = [(meter, _made(Gauge, meter, run)) for meter in METERS if not meter.adds]

    def beat(self, record: Record) -> None:
        """A round is complete. ``record`` is its line of rounds.jsonl."""
        for gauge_of, gauge in self._gauges:
            gauge.set(gauge_of.read(record))
        for counter_of, counter in self._counters:
            if added := counter_of.read(record):  # Ray's counters do not take zero
                counter.inc(added)


def _made(kind: type[Any], meter: Meter, run: str) -> Any:
    metric = kind(meter.name, description=meter.about, tag_keys=("run",))
    metric.set_default_tags({"run": run})
    return metric

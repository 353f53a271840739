"""The section ``time``: the simulated devices, what makes them slow or unreachable, and when a round ends."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster_fl.errors import UserError
from cluster_fl.option import option

ASYNCHRONOUS = ("semi_sync", "fedbuff", "fedasync")


@dataclass
class DevicesConfig:
    """What the clients' devices can do; what is not given follows from the source (docs/clock.md)."""

    source: str = option(
        "levels",
        "where devices come from: one profile a level; values, one a client or one for all; lognormal, from "
        "[median, sigma]; uniform, from [low, high]; phones, real ones; fedscale or csv, from a file",
        choices=("levels", "values", "lognormal", "uniform", "phones", "fedscale", "csv"),
    )
    file: str | None = option(None, "fedscale, csv: the file")
    gflops: list[float] | None = option(None, "GFLOP/s of a device, as its source reads it")
    down_mbps: list[float] | None = option(None, "download rate, Mbit/s")
    up_mbps: list[float] | None = option(None, "upload rate, Mbit/s")
    memory_mb: list[float] | None = option(None, "memory that training may take, MB; no limit when not given")
    memory_gbps: list[float] | None = option(
        None, "memory bandwidth, GB/s: layers that move much and compute little wait for it (roofline)"
    )
    utilisation: float = option(1.0, "share of its GFLOP/s that training reaches", above=0, high=1)
    latency_s: float = option(0.05, "round trip time, seconds", low=0)


@dataclass
class LoadConfig:
    """Other work on a device: a Markov chain over shares of its speed, a step a round."""

    shares: list[float] = option([0.0], "shares of a device that other work may take", low=0)
    stay: float = option(0.7, "chance that a device's load stays for another round", low=0, high=1)
    mid_round: bool = option(False, "a device's load takes its step in the middle of its training too")


@dataclass
class StragglersConfig:
    """A factor on a client's computing time, drawn anew in each round."""

    # By default shifted_exponential and pareto have the same mean, 2, and the former is what coded computation
    # usually assumes (shift and scale equal). sigma is FedScale's. Shape 2 is the smallest whole number with a
    # finite mean. Stragglers that were on average 8 times slower than the median task were found at Facebook and
    # Bing (Ananthanarayanan et al., NSDI 2013); that a tenth of the clients are is our choice.
    name: str = option(
        "none",
        "its distribution",
        choices=("none", "shifted_exponential", "lognormal", "pareto", "bimodal"),
    )
    rate: float = option(1.0, "shifted_exponential: 1 + an exponential of this rate", above=0)
    sigma: float = option(0.6, "lognormal: of the factor's logarithm; the median is 1", low=0)
    shape: float = option(2.0, "pareto: exponent of the tail; the least factor is 1", above=0)
    slow_share: float = option(0.1, "bimodal: chance of being slow", low=0, high=1)
    slow_factor: float = option(8.0, "bimodal: how much slower", low=1)


@dataclass
class AvailabilityConfig:
    """When a device can take part."""

    source: str = option(
        "always",
        "phones: traces of real ones; csv: traces of your own; markov: on and off, memoryless",
        choices=("always", "phones", "csv", "markov"),
    )
    file: str | None = option(
        None,
        "csv, also .gz: columns user, start_s, end_s, and optionally trace_start_s, trace_end_s, between which a "
        "user was watched; a user without a time is never there",
    )
    on_s: float = option(3600.0, "markov: mean time on, seconds", low=1)
    off_s: float = option(3600.0, "markov: mean time off, seconds", low=0)
    away: str = option(
        "pause",
        "what a client does that is no longer available: it goes on when it is back (pause), or is lost",
        choices=("pause", "lose"),
    )


@dataclass
class PolicyConfig:
    """When a round ends, and whose update counts."""

    name: str = option(
        "wait",
        "wait for all; deadline; over_select and take the first; tiers of equally fast clients (TiFL); semi_sync, "
        "whatever arrived in a period; fedbuff, every so many arrivals; fedasync, every arrival",
        choices=("wait", "deadline", "over_select", "tiers", "semi_sync", "fedbuff", "fedasync"),
    )
    timeout_s: float | None = option(
        None, "after which the server gives up lost clients; at once when not given", above=0
    )
    deadline_s: float | None = option(None, "deadline: seconds that a round has", above=0, infinite=True)
    late: str = option(
        "drop",
        "deadline: who would be late does not take part (drop), trains as many epochs as it can (partial), or "
        "the largest smaller level that it can (smaller)",
        choices=("drop", "partial", "smaller"),
    )
    min_share: float = option(
        0.0, "deadline: share of the participants without which a round changes nothing", low=0, high=1
    )
    factor: float = option(1.3, "over_select: clients asked for each one wanted", low=1)
    tiers: int = option(5, "tiers: how many, of equal size", low=1)
    tier_shares: list[float] | None = option(
        None, "tiers: chance of each, fastest first; equal when not given"
    )
    period_s: float | None = option(None, "semi_sync: seconds between two merges", above=0)
    buffer: int = option(10, "fedbuff: arrivals that make a merge", low=1)
    concurrency: int | None = option(
        None,
        "semi_sync, fedbuff, fedasync: clients at work at any time; clients.per_round when not given",
        low=1,
    )
    max_staleness: int | None = option(
        None, "semi_sync, fedbuff, fedasync: merges after which an update is not used any more", low=0
    )
    staleness: str = option(
        "polynomial",
        "how an update counts that is t merges old: 1; (1+t)^-exponent; 1 up to hinge and then "
        "1/(exponent(t-hinge)+1)",
        choices=("constant", "polynomial", "hinge"),
    )
    exponent: float = option(0.5, "polynomial, hinge: how fast it falls", above=0)
    hinge: int = option(4, "hinge: merges without a penalty", low=0)
    mixing: float = option(0.6, "fedasync: share of a fresh client's model in the next one", above=0, high=1)
    switch: bool = option(
        False, "a client whose load rises in the middle of its training goes on with the next smaller level"
    )

    @property
    def asynchronous(self) -> bool:
        """Clients may start from older weights than those that they are merged into."""
        return self.name in ASYNCHRONOUS

    def asked(self, per_round: int) -> int:
        """over_select: how many clients a round asks to have so many."""
        # 1.3 x 10 is 13, whatever floating point says.
        return math.ceil(round(self.factor * per_round, 9))


@dataclass
class TimeConfig:
    """The simulated clock."""

    devices: DevicesConfig = option(DevicesConfig, "")
    load: LoadConfig = option(LoadConfig, "")
    stragglers: StragglersConfig = option(StragglersConfig, "")
    availability: AvailabilityConfig = option(AvailabilityConfig, "")
    dropout: float = option(
        0.0, "chance that a participant is lost, at any moment of its round", low=0, high=1
    )
    policy: PolicyConfig = option(PolicyConfig, "")


def check_time(time: TimeConfig, clients: int, per_round: int) -> None:
    """What several values say together.

    Raises:
        UserError: naming the first key that is wrong.
    """
    devices, policy = time.devices, time.policy
    if max(time.load.shares, default=1.0) >= 1:
        raise UserError("time.load.shares", time.load.shares, "must be shares below 1, e.g. [0,0.25,0.5].")
    for key, source, file in (
        ("time.devices", devices.source, devices.file),
        ("time.availability", time.availability.source, time.availability.file),
    ):
        if source in ("fedscale", "csv") and file is None:
            raise UserError(f"{key}.file", None, f"must name the file, since {key}.source is {source}.")
    if policy.name == "semi_sync" and policy.period_s is None:
        raise UserError("time.policy.period_s", None, "must be given for semi_sync, e.g. 600.")
    if policy.name == "deadline" and policy.deadline_s is None:
        raise UserError("time.policy.deadline_s", None, "must be given for deadline, e.g. 600; inf has none.")
    shares = policy.tier_shares
    if shares is not None and (len(shares) != policy.tiers or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6):
        right = f"must be {policy.tiers} shares that sum to 1, one a tier, fastest first."
        raise UserError("time.policy.tier_shares", shares, right)
    if policy.name == "tiers" and per_round > clients // policy.tiers:
        right = f"a tier has only {clients // policy.tiers} clients (clients.count over time.policy.tiers)."
        raise UserError("clients.per_round", per_round, right)
    at_work = per_round if policy.concurrency is None else policy.concurrency
    if policy.asynchronous and at_work > clients:
        right = f"there are only {clients} clients (clients.count)."
        raise UserError("time.policy.concurrency", at_work, right)
    if policy.name == "fedbuff" and policy.buffer > clients:
        raise UserError(
            "time.policy.buffer", policy.buffer, f"there are only {clients} clients (clients.count)."
        )
    # First as floats, since there may be no such whole number.
    if policy.name == "over_select" and (
        policy.factor * per_round >= clients + 1 or policy.asked(per_round) > clients
    ):
        right = f"asks for {policy.factor * per_round:g} clients a round of {clients} (clients.count)."
        raise UserError("time.policy.factor", policy.factor, right)

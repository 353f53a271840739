"""Round policies: when a round ends, and whose updates count. Clock alone, before anything is trained.

A policy takes a run from one :class:`Standing` to the next. It asks a :class:`Dispatch` for clients and for what
they will take, and says how every attempt ends; what is not merged is never trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from cluster_fl.timing.attempts import Attempts, Ended, Fate
from cluster_fl.timing.schema import PolicyConfig

NOBODY = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Standing:
    """Where the clock stands between two rounds; in the checkpoint.

    Attributes:
        round: the next one.
        time: simulated seconds.
        flight: attempts under way, and those done that wait to be merged (asynchronous policies).
    """

    round: int = 0
    time: float = 0.0
    flight: Attempts = field(default_factory=Attempts.none)


@dataclass(frozen=True)
class Step:
    """One round.

    Attributes:
        begin: simulated seconds.
        ended: the attempts that are over, by client.
        scale: with what factor each of the merged counts, in the order of ``ended.merged``.
        pull: fedasync: how far the weights go towards those that the client trained; 0: they move by updates.
        after: where the clock stands then.
    """

    begin: float
    ended: Ended
    scale: np.ndarray
    after: Standing
    pull: float = 0.0

    @property
    def round(self) -> int:
        return self.after.round - 1

    @property
    def end(self) -> float:
        return self.after.time


class Dispatch(Protocol):
    """Who can start, and what it takes them."""

    def draw(
        self,
        round: int,
        turn: int,
        count: int,
        time: float,
        busy: np.ndarray,
        among: np.ndarray | None = None,
    ) -> np.ndarray:
        """So many clients that are available and not busy, rising; fewer where there are not so many.

        ``turn`` counts the draws of a round. ``among``: only of these; None: of all.
        """

    def next_available(self, time: float, busy: np.ndarray, among: np.ndarray | None = None) -> float:
        """When at the earliest somebody can start who is not busy; infinite: never."""

    def attempts(self, round: int, clients: np.ndarray, start: float, deadline: float) -> Attempts:
        """What the clients will do if they start from the round's weights.

        ``deadline``: seconds that they have, for those that can do less (``late``); infinite: no matter.
        """

    def tier(self, round: int, shares: Sequence[float]) -> np.ndarray:
        """One of so many tiers of equally fast clients, drawn by its share, fastest first; rising."""


class Policy(ABC):
    """How a run goes from one round to the next. ``asynchronous``: clients may start from older weights."""

    asynchronous = False

    @abstractmethod
    def step(self, now: Standing, dispatch: Dispatch) -> Step: ...


@dataclass(frozen=True)
class Synchronous(Policy):
    """All participants of a round start together from its weights.

    Attributes:
        count: clients asked.
        wanted: arrivals that end the round; the rest is late.
        deadline: seconds after which it ends in any case.
        min_share: of the asked; with fewer arrivals nothing changes (Bonawitz et al., MLSys 2019).
        timeout: seconds after which lost clients are given up; None: at once.
        tiers: shares of the tiers of equally fast clients, of which each round asks one (TiFL, Chai et al., HPDC 2020,
            with fixed chances); None: everybody.
    """

    count: int
    wanted: int
    deadline: float = np.inf
    min_share: float = 0.0
    timeout: float | None = None
    tiers: tuple[float, ...] | None = None

    def step(self, now: Standing, dispatch: Dispatch) -> Step:
        begin, among = now.time, None if self.tiers is None else dispatch.tier(now.round, self.tiers)
        while not len(clients := dispatch.draw(now.round, 0, self.count, begin, NOBODY, among)):
            begin = dispatch.next_available(begin, NOBODY, among)
            if begin == np.inf:  # a tier of clients who never come: the round is over at once
                nothing = Ended.of(Attempts.none(), Fate.LOST, 0.0)
                return Step(now.time, nothing, np.ones(0), Standing(now.round + 1, now.time))
        asked = dispatch.attempts(now.round, clients, begin, self.deadline)
        end = self._end(asked, begin)
        fate = self._fates(asked, end)
        ended = Ended.of(asked, fate, np.minimum(asked.end, end)).sorted()
        return Step(now.time, ended, np.ones(len(ended.merged)), Standing(now.round + 1, end))

    def _end(self, asked: Attempts, begin: float) -> float:
        gone = asked.lost <= asked.finish
        arrivals = asked.finish[~gone]
        if len(arrivals) >= self.wanted:
            end = float(np.partition(arrivals, self.wanted - 1)[self.wanted - 1])
        else:
            # Nobody knows before its time who will be lost.
            given_up = np.maximum(asked.lost, begin if self.timeout is None else begin + self.timeout)
            end = float(np.where(gone, given_up, asked.finish).max())
        return min(end, begin + self.deadline)

    def _fates(self, asked: Attempts, end: float) -> np.ndarray:
        fate = np.where(asked.finish <= end, Fate.MERGED, Fate.LATE)
        fate = np.where(asked.lost <= np.minimum(asked.finish, end), Fate.LOST, fate)
        merged = np.flatnonzero(fate == Fate.MERGED)
        if len(merged) > self.wanted:
            # Of several that arrive at the same moment the lower numbers come first.
            order = merged[np.argsort(asked.finish[merged], kind="stable")]
            fate[order[self.wanted :]] = Fate.LATE
        # 0.55 x 20 is 11, whatever floating point says.
        if len(merged) < round(self.min_share * len(asked), 9):
            fate[fate == Fate.MERGED] = Fate.ABANDONED
        return fate


@dataclass(frozen=True)
class Asynchronous(Policy):
    """So many clients are at work at any time; a merge starts the next round, and whoever is at work goes on.

    A client that is done makes room for another, which starts from the weights of the moment. Nobody starts twice
    from the same weights.

    Attributes:
        concurrency: clients at work.
        buffer: arrivals that make a merge (FedBuff, Nguyen et al., AISTATS 2022); 1: FedAsync (Xie et al., 2019).
        period: seconds between merges of whatever has arrived, between which nobody starts; None: by ``buffer``.
        staleness: the factor of an update that is so many rounds old, (n,) -> (n,).
        max_staleness: in rounds; older ones are stale.
        mixing: FedAsync: share of the client's model in the next one; 0: the weights move by the update instead.
    """

    concurrency: int
    buffer: int
    staleness: Callable[[np.ndarray], np.ndarray]
    period: float | None = None
    max_staleness: int | None = None
    mixing: float = 0.0
    asynchronous = True

    def step(self, now: Standing, dispatch: Dispatch) -> Step:
        time, until = now.time, np.inf if self.period is None else now.time + self.period
        over, turn = Ended.of(Attempts.none(), Fate.LOST, 0.0), 0
        flight, ended = self._sorted_out(now.flight, time, now.round)
        over += ended
        while not self._is_due(flight, time, until):
            room = self.concurrency - int(np.count_nonzero(flight.end > time))
            # Who is through, or waits to be merged, does not start from the same weights again; nobody is in both.
            through = over.attempts.client[over.attempts.version == now.round]
            busy = np.sort(np.concatenate([flight.client, through]))
            later, started = until, Attempts.none()
            if room and (self.period is None or not turn):
                clients = dispatch.draw(now.round, turn, room, time, busy)
                started, turn = dispatch.attempts(now.round, clients, time, np.inf), turn + 1
                if self.period is None and len(clients) < room:  # a place stays free until somebody comes
                    later = dispatch.next_available(time, np.union1d(busy, clients))
            # Who has just started may be through at once.
            ahead = np.concatenate([flight.end[flight.end > time], started.end])
            flight, later = flight + started, float(ahead.min(initial=later))
            if later == np.inf:  # nobody is left who could start: the round ends with what there is
                break
            time = later
            flight, ended = self._sorted_out(flight, time, now.round)
            over += ended
        merged = self._first(flight, time)
        rest = np.setdiff1d(np.arange(len(flight)), merged)
        arrived = flight.at(merged)
        over = (over + Ended.of(arrived, Fate.MERGED, arrived.finish)).sorted()
        scale = self.staleness(now.round - over.attempts.version[over.merged])
        pull = self.mixing * float(scale[0]) if self.mixing and len(scale) else 0.0
        scale = scale * self.mixing if self.mixing else scale
        return Step(now.time, over, scale, Standing(now.round + 1, time, flight.at(rest)), pull)

    def _sorted_out(self, flight: Attempts, time: float, round: int) -> tuple[Attempts, Ended]:
        """Who is still of use, and those lost or too old by now."""
        lost = (flight.lost <= flight.finish) & (flight.lost <= time)
        old = np.zeros(len(flight), dtype=bool)
        if self.max_staleness is not None:
            old = ~lost & (flight.finish <= time) & (round - flight.version > self.max_staleness)
        if not (lost | old).any():  # as after most arrivals
            return flight, Ended.of(Attempts.none(), Fate.LOST, 0.0)
        gone, stale = flight.at(lost), flight.at(old)
        ended = Ended.of(gone, Fate.LOST, gone.lost) + Ended.of(stale, Fate.STALE, stale.finish)
        return flight.at(~(lost | old)), ended

    def _is_due(self, flight: Attempts, time: float, until: float) -> bool:
        if self.period is not None:
            return time >= until
        return int(np.count_nonzero(flight.finish <= time)) >= self.buffer

    def _first(self, flight: Attempts, time: float) -> np.ndarray:
        """Which arrivals are merged: the first ones, of those at the same moment the lower numbers."""
        done = np.flatnonzero(flight.finish <= time)
        order = done[np.lexsort((flight.client[done], flight.finish[done]))]
        return order if self.period is not None else order[: self.buffer]


def make(config: PolicyConfig, per_round: int) -> Policy:
    """The configured policy, for rounds of so many clients."""
    name, timeout = config.name, config.timeout_s
    if config.asynchronous:
        return Asynchronous(
            concurrency=config.concurrency or per_round,
            buffer=config.buffer if name == "fedbuff" else 1,
            staleness=staleness(config),
            period=config.period_s if name == "semi_sync" else None,
            max_staleness=config.max_staleness,
            mixing=config.mixing if name == "fedasync" else 0.0,
        )
    if name == "deadline":
        assert config.deadline_s is not None
        return Synchronous(per_round, per_round, config.deadline_s, config.min_share, timeout)
    if name == "over_select":
        return Synchronous(config.asked(per_round), per_round, timeout=timeout)
    if name == "tiers":
        shares = config.tier_shares or [1 / config.tiers] * config.tiers
        return Synchronous(per_round, per_round, timeout=timeout, tiers=tuple(shares))
    return Synchronous(per_round, per_round, timeout=timeout)


def staleness(config: PolicyConfig) -> Callable[[np.ndarray], np.ndarray]:
    """How an update counts that is so many rounds old (Xie et al., 2019, section 5.2); 1 for a fresh one."""

    def polynomial(age: np.ndarray) -> np.ndarray:
        result: np.ndarray = (1.0 + age) ** -config.exponent
        return result

    def hinge(age: np.ndarray) -> np.ndarray:
        over = np.maximum(age - config.hinge, 0)
        return np.where(over > 0, 1.0 / (config.exponent * over + 1.0), 1.0)

    def constant(age: np.ndarray) -> np.ndarray:
        return np.ones(len(age))

    return {"constant": constant, "polynomial": polynomial, "hinge": hinge}[config.staleness]

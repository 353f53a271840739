"""When clients can take part: always, by recorded traces, or on and off at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cluster_fl.errors import UserError
from cluster_fl.seeding import Purpose, generator
from cluster_fl.timing import draws, tables
from cluster_fl.timing.schema import AvailabilityConfig
from cluster_fl.timing.trace_files import read
from cluster_fl.timing.traces import RESOLUTION, Traces, choice

# markov: that many clients have a trace each, of that many mean times on and off; more of them share these.
MARKOV_TRACES, MARKOV_CYCLES = 5_000, 100


class Availability(Protocol):
    """Who is there when. Times are simulated seconds, from 0; arrays of clients, starts, work: (n,)."""

    def available(self, time: float, clients: np.ndarray) -> np.ndarray:
        """Which of the clients are available at a time, bool (n,)."""

    def draw(
        self, seed: int, round: int, draw_number: int, count: int, time: float, busy: np.ndarray
    ) -> np.ndarray:
        """So many different clients that are available and not ``busy``, rising; all, where there are fewer.

        Each set of them is equally likely, and a function of the arguments alone.

        Args:
            draw_number: which of a round's draws.
            busy: clients, rising.
        """

    def finish(self, start: np.ndarray, work: np.ndarray, clients: np.ndarray) -> np.ndarray:
        """When each client is done that starts at ``start`` and works ``work`` seconds, but only while available.

        Infinite for one that never is. ``work`` may be of shape (m, n), several amounts for each client, and then the
        result is.
        """

    def until_away(self, start: np.ndarray, clients: np.ndarray) -> np.ndarray:
        """Until when each client stays available from ``start`` on: ``start`` if it is not; infinite: for good."""

    def absent(self, times: np.ndarray, clients: np.ndarray) -> np.ndarray:
        """Seconds before each time in which a client was not available, but for a constant of its own.

        ``times`` may be of shape (m, n), several for each client. Differences are exactly 0 where it stayed.
        """

    def next_start(self, time: float, clients: np.ndarray) -> np.ndarray:
        """The first time, not before ``time``, at which each client is available; infinite: never."""

    def next_available(self, time: float, busy: np.ndarray | None = None) -> float:
        """The first time, not before ``time``, at which any client, but the ``busy``, is; infinite: never."""


@dataclass(frozen=True)
class Always:
    """All of so many clients, at any time."""

    clients: int

    def available(self, time: float, clients: np.ndarray) -> np.ndarray:
        return np.ones(len(clients), dtype=bool)

    def draw(
        self, seed: int, round: int, draw_number: int, count: int, time: float, busy: np.ndarray
    ) -> np.ndarray:
        return choice(generator(seed, Purpose.SELECT, round, draw_number), self.clients, count, busy)

    def finish(self, start: np.ndarray, work: np.ndarray, clients: np.ndarray) -> np.ndarray:
        result: np.ndarray = start + work
        return result

    def until_away(self, start: np.ndarray, clients: np.ndarray) -> np.ndarray:
        return np.full(len(clients), np.inf)

    def absent(self, times: np.ndarray, clients: np.ndarray) -> np.ndarray:
        return np.zeros(times.shape)

    def next_start(self, time: float, clients: np.ndarray) -> np.ndarray:
        return np.full(len(clients), time)

    def next_available(self, time: float, busy: np.ndarray | None = None) -> float:
        return time if busy is None or len(busy) < self.clients else float("inf")


def make(config: AvailabilityConfig, seed: int, clients: int) -> Availability:
    """The configured availability of so many clients.

    Where there are as many traces as clients, each client follows its own; else each follows one drawn from all.

    Raises:
        UserError: the file cannot be used, or nobody could ever take part.
    """
    if config.source == "always":
        return Always(clients)
    if config.source == "phones":
        table = tables.availability()
    elif config.source == "csv":
        assert config.file is not None
        table = read(config.file)
    else:
        table = markov(config.on_s, config.off_s, seed, min(clients, MARKOV_TRACES))
    users, everybody = len(table.offsets) - 1, np.arange(clients)
    if users != clients:
        everybody = (draws.uniforms(seed, Purpose.AVAILABILITY, 0, everybody) * users).astype(np.int64)
    made = Traces(table, everybody)
    if not np.isfinite(made.next_available(0.0)):
        right = (
            "the traces that the clients follow hold no time of being available: nobody could ever take part."
        )
        raise UserError("time.availability.source", config.source, right)
    return made


def markov(on: float, off: float, seed: int, users: int) -> tables.Availability:
    """Traces that are on and off for exponential times of these means (seconds), stationary from the start.

    The two-state model of CA-Fed (Rodio et al., INFOCOM 2023) in continuous time. It is exact for each user within
    a period of ``MARKOV_CYCLES`` times ``on + off``, at whose end the state is drawn anew.
    """
    period = np.round(MARKOV_CYCLES * (on + off) / RESOLUTION) * RESOLUTION
    rng = generator(seed, Purpose.AVAILABILITY)
    # Twice as many times as expected; that they do not fill the period has a chance below 10^-12.
    lengths = rng.standard_exponential((users, 2 * MARKOV_CYCLES, 2)) * (off, on)
    # The rest of a memoryless time is distributed as a whole one.
    lengths[rng.random(users) < on / (on + off), 0, 0] = 0.0
    changes = np.minimum(np.cumsum(lengths.reshape(users, -1), axis=1), period)
    changes = np.round(changes / RESOLUTION) * RESOLUTION
    starts, ends = changes[:, 0::2].ravel(), changes[:, 1::2].ravel()
    offsets = np.arange(users + 1) * (2 * MARKOV_CYCLES)
    return tables.Availability(offsets, starts, ends, np.zeros(users), np.full(users, period))

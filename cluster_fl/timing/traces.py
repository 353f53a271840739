"""Clients that come and go by traces: intervals of being available, over and over."""

from __future__ import annotations

import numpy as np

from cluster_fl.seeding import Purpose, generator
from cluster_fl.timing import tables

DAY = 86_400.0
# Multiples of this many seconds add up exactly in float64, up to the longest trace and far beyond.
RESOLUTION, LONGEST = 2.0**-10, 1e10


class Traces:
    """Each client follows the trace of one user, which repeats with a period of its own.

    Simulated time 0 is the midnight before the earliest trace begins, so that a trace of whole days keeps its time of
    day for as long as it repeats. A client is available from an interval's start until just before its end.

    Nothing costs more with more clients than those asked for, except the arrays, 12 bytes a client; a draw looks at
    every user once.

    Args:
        table: the traces of at least one user: multiples of ``RESOLUTION``, each user's intervals inside its trace,
            rising, none overlapping.
        user_of: which user each client follows, (clients,).
    """

    def __init__(self, table: tables.Availability, user_of: np.ndarray) -> None:
        users = len(table.offsets) - 1
        begin, period = table.trace_start, table.trace_end - table.trace_start
        owner = np.repeat(np.arange(users), np.diff(table.offsets))
        owner, starts, ends = _joined(owner, table.starts - begin[owner], table.ends - begin[owner], period)
        # Turned so that every trace begins with its first interval: there is one before any moment.
        offsets = np.searchsorted(owner, np.arange(users + 1))
        self._first, self._last = first, last = offsets[:-1], offsets[1:] - 1
        turn = starts[first]
        self._starts, self._ends = starts - turn[owner], ends - turn[owner]
        self._next = np.append(self._starts[1:], 0.0)  # when the interval after it begins
        self._next[last] = period
        until = np.cumsum(ends - starts)
        before = until - (ends - starts)
        self._before = before - before[first][owner]  # available seconds of the trace before the interval
        self._total = until[last] - before[first]  # of the whole trace
        self._period = period
        midnight = np.floor(begin.min() / DAY) * DAY
        self._lead = np.mod(midnight - begin - turn, period)  # where in its trace a user is at time 0

        # Clients by their user: a client's place among them, and who is at a place.
        self._user_of = user_of.astype(np.int32)
        self._clients_at = np.argsort(self._user_of, kind="stable").astype(np.int32)
        self._place = np.empty_like(self._clients_at)
        self._place[self._clients_at] = np.arange(len(user_of), dtype=np.int32)
        self._followers = np.bincount(user_of, minlength=users)

    def available(self, time: float, clients: np.ndarray) -> np.ndarray:
        result: np.ndarray = self._is_on(time)[self._user_of[clients]]
        return result

    def draw(
        self, seed: int, round: int, draw_number: int, count: int, time: float, busy: np.ndarray
    ) -> np.ndarray:
        on = self._is_on(time)
        followers = np.where(on, self._followers, 0)
        # The available clients, by user, have ranks; what a rank is behind its place differs between users.
        ends = np.cumsum(followers)
        behind = np.cumsum(self._followers) - ends
        asked = busy[on[self._user_of[busy]]]
        taken = np.sort(self._place[asked] - behind[self._user_of[asked]])
        ranks = choice(generator(seed, Purpose.SELECT, round, draw_number), int(ends[-1]), count, taken)
        user = np.searchsorted(ends, ranks, side="right")
        return np.sort(self._clients_at[ranks + behind[user]]).astype(np.int64)

    def finish(self, start: np.ndarray, work: np.ndarray, clients: np.ndarray) -> np.ndarray:
        users = self._user_of[clients]
        zero, position, at = self._locate(start, users)
        served = self._before[at] + np.minimum(position, self._ends[at]) - self._starts[at]
        total = self._total[users]
        periods, rest = np.divmod(served + work, np.where(total > 0, total, 1.0))
        # Done at the end of one period, not at the first moment of being available in the next.
        full = rest == 0
        periods, rest = periods - full, np.where(full, total, rest)
        at = self._latest(self._before, users, rest, np.less)
        done = zero + periods * self._period[users] + self._starts[at] + (rest - self._before[at])
        return np.where(total > 0, np.maximum(done, start), np.inf)

    def until_away(self, start: np.ndarray, clients: np.ndarray) -> np.ndarray:
        users = self._user_of[clients]
        zero, position, at = self._locate(start, users)
        end = self._ends[at]
        away = np.where(position < end, np.maximum(zero + end, start), start)
        return np.where(self._total[users] == self._period[users], np.inf, away)

    def absent(self, times: np.ndarray, clients: np.ndarray) -> np.ndarray:
        users = self._user_of[clients]
        zero, position, at = self._locate(times, users)
        # Whole periods, what lies before the interval in this one, and what has passed since the interval's end.
        whole = np.rint((zero + self._lead[users]) / self._period[users])
        before = self._starts[at] - self._before[at] + np.maximum(position - self._ends[at], 0.0)
        absent: np.ndarray = whole * (self._period - self._total)[users] + before
        return absent

    def next_available(self, time: float, busy: np.ndarray | None = None) -> float:
        followers = self._followers
        if busy is not None:
            followers = followers - np.bincount(self._user_of[busy], minlength=len(followers))
        users = np.flatnonzero(followers)
        return float(self._next_start(time, users).min(initial=np.inf))

    def next_start(self, time: float, clients: np.ndarray) -> np.ndarray:
        return self._next_start(time, self._user_of[clients])

    def _next_start(self, time: float, users: np.ndarray) -> np.ndarray:
        zero, position, at = self._locate(time, users)
        start = np.where(position < self._ends[at], time, np.maximum(zero + self._next[at], time))
        return np.where(self._total[users] > 0, start, np.inf)

    def _is_on(self, time: float) -> np.ndarray:
        """Which users are available, (users,)."""
        _, position, at = self._locate(time, np.arange(len(self._period)))
        result: np.ndarray = position < self._ends[at]
        return result

    def _locate(
        self, time: np.ndarray | float, users: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """When each user's present period began, how many seconds ago, and which interval began last."""
        lead, period = self._lead[users], self._period[users]
        periods, position = np.divmod(time + lead, period)
        return periods * period - lead, position, self._latest(self._starts, users, position, np.less_equal)

    def _latest(
        self, values: np.ndarray, users: np.ndarray, limit: np.ndarray, compare: np.ufunc
    ) -> np.ndarray:
        """Each user's last interval whose value is below its limit (``compare``); its first one's is.

        A bisection in all users' intervals at once, over which the values rise.
        """
        at: np.ndarray = self._first[users]
        last = self._last[users]
        step = 1 << int((last - at).max(initial=0)).bit_length()
        while step := step // 2:
            ahead = np.minimum(at + step, last)
            at = np.where(compare(values[ahead], limit), ahead, at)
        return at


def choice(rng: np.random.Generator, total: int, count: int, taken: np.ndarray) -> np.ndarray:
    """So many different numbers below ``total``, uniformly, none of ``taken`` (rising); rising, or all there are."""
    left = total - len(taken)
    chosen = np.sort(rng.choice(left, min(count, left), replace=False))
    # The chosen count only what is not taken: each grows by the taken numbers that lie before it.
    result: np.ndarray = chosen + np.searchsorted(taken - np.arange(len(taken)), chosen, side="right")
    return result


def _joined(
    owner: np.ndarray, starts: np.ndarray, ends: np.ndarray, period: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The intervals of positive length, those that touch made one, also across the end of the period.

    A user without any has one of length 0, so that everybody has an interval.
    """
    real = ends > starts
    never = np.setdiff1d(np.arange(len(period)), owner[real])
    owner = np.concatenate([owner[real], never])
    order = np.argsort(owner, kind="stable")
    starts, ends = (np.concatenate([times[real], np.zeros(len(never))])[order] for times in (starts, ends))
    owner = owner[order]
    parted = (owner[1:] != owner[:-1]) | (starts[1:] != ends[:-1])
    begins, closes = np.append(True, parted), np.append(parted, True)
    owner, starts, ends = owner[begins], starts[begins], ends[closes]
    offsets = np.searchsorted(owner, np.arange(len(period) + 1))
    first, last = offsets[:-1], offsets[1:] - 1
    around = (first < last) & (starts[first] == 0) & (ends[last] == period)
    ends[last[around]] += ends[first[around]]
    keep = np.ones(len(owner), dtype=bool)
    keep[first[around]] = False
    return owner[keep], starts[keep], ends[keep]

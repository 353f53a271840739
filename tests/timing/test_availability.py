"""Who is there when: traces against a second-by-second replay, draws against their chances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cluster_fl.errors import UserError
from cluster_fl.seeding import Purpose, generator
from cluster_fl.timing import availability, tables
from cluster_fl.timing.availability import Always, Availability, make, markov
from cluster_fl.timing.schema import AvailabilityConfig
from cluster_fl.timing.traces import DAY, Traces

TICK = 0.25  # seconds; the replay goes by these
NOBODY = np.zeros(0, dtype=np.int64)


def table(users: Sequence[tuple[Sequence[tuple[float, float]], float, float]]) -> tables.Availability:
    """Of (intervals, trace start, trace end) a user."""
    offsets = np.cumsum([0] + [len(intervals) for intervals, _, _ in users])
    times = np.array([pair for intervals, _, _ in users for pair in intervals], dtype=float).reshape(-1, 2)
    begin, stop = (np.array([user[k] for user in users], dtype=float) for k in (1, 2))
    return tables.Availability(offsets, times[:, 0], times[:, 1], begin, stop)


def traces(*users: tuple[Sequence[tuple[float, float]], float, float]) -> Traces:
    """One client a user."""
    return Traces(table(users), np.arange(len(users)))


def one(values: np.ndarray) -> float:
    (value,) = values.tolist()
    return float(value)


def finish(made: Availability, start: float, work: float, client: int = 0) -> float:
    return one(made.finish(np.array([start]), np.array([work]), np.array([client])))


def until_away(made: Availability, start: float, client: int = 0) -> float:
    return one(made.until_away(np.array([start]), np.array([client])))


HAND = ([(10.0, 20.0), (50.0, 60.0)], 0.0, 100.0)


@pytest.mark.parametrize(
    ("start", "work", "done"),
    [
        (10, 5, 15),
        (10, 10, 20),  # at the end of the first interval
        (10, 11, 51),
        (12.5, 7.5, 20),
        (10, 20, 60),
        (10, 20.5, 110.5),  # over the end of the period
        (15, 105, 520),  # 5 + 10 today, four whole periods, and 10 of the next
        (15, 105.25, 550.25),
        (0, 5, 15),  # away at first
        (20, 5, 55),
        (70, 5, 115),
        (15, 0, 15),
        (30, 0, 30),  # nothing to do needs no client
        (1_000_015, 5, 1_000_020),
        (1_000_015, 6, 1_000_051),
    ],
)
def test_work_waits_for_its_client(start: float, work: float, done: float) -> None:
    assert finish(traces(HAND), start, work) == done


@pytest.mark.parametrize(
    ("start", "away"),
    [(10, 20), (19.5, 20), (20, 20), (0, 0), (50, 60), (110, 120), (10**6 + 55, 10**6 + 60)],
)
def test_until_a_client_goes_away(start: float, away: float) -> None:
    assert until_away(traces(HAND), start) == away


@pytest.mark.parametrize(
    ("time", "next_one"), [(0, 10), (10, 10), (19.5, 19.5), (20, 50), (60, 110), (99, 110), (100, 110)]
)
def test_next_start(time: float, next_one: float) -> None:
    made = traces(HAND)
    assert one(made.next_start(time, np.array([0]))) == next_one
    assert made.next_available(time) == next_one


def test_intervals_that_touch_are_one() -> None:
    made = traces(([(0.0, 5.0), (5.0, 5.0), (5.0, 9.0), (30.0, 30.0), (40.0, 50.0)], 0.0, 50.0))
    assert until_away(made, 0) == 9
    assert until_away(made, 45) == 59  # over the end of the period
    assert finish(made, 45, 14) == 59
    assert finish(made, 45, 15) == 91
    assert made.next_available(20) == 40  # not at 30, for no time at all


def test_a_client_that_is_always_there() -> None:
    made = traces(([(0.0, 7.0), (7.0, 50.0)], 0.0, 50.0))
    assert until_away(made, 12.25) == np.inf
    assert finish(made, 12.25, 1000) == 1012.25
    assert made.available(1e9, np.array([0])).all()


def test_a_client_that_is_never_there() -> None:
    made = traces(HAND, ([], 0.0, 10.0), ([(3.0, 3.0)], 0.0, 10.0))
    never = np.array([1, 2])
    assert not made.available(3.0, never).any()
    assert made.finish(np.zeros(2), np.array([0.0, 1.0]), never).tolist() == [np.inf] * 2
    assert made.until_away(np.array([3.0, 4.0]), never).tolist() == [3.0, 4.0]
    assert made.next_start(3.0, never).tolist() == [np.inf] * 2
    assert made.next_available(3.0, np.array([0])) == np.inf
    assert made.draw(0, 0, 0, 3, 15.0, NOBODY).tolist() == [0]


def test_time_0_is_the_midnight_before_the_earliest_trace() -> None:
    """Two users watched on different days, available from 6 to 8 and from 20 to 24 of their hours."""
    hour = DAY / 24
    early = ([(5 * DAY + 6 * hour, 5 * DAY + 8 * hour)], 5 * DAY + 2 * hour, 6 * DAY + 2 * hour)
    late = ([(9 * DAY + 20 * hour, 10 * DAY)], 9 * DAY, 11 * DAY)
    made = traces(early, late)
    days = [
        made.available(day * DAY + h * hour, np.arange(2)).tolist() for day in range(4) for h in range(24)
    ]
    by_day = np.array(days).reshape(4, 24, 2)
    assert (by_day[:, :, 0] == np.isin(np.arange(24), [6, 7])).all()
    # The fifth day of the one is the first of simulated time, and the other's trace repeats every two days.
    assert (by_day[[0, 2], :, 1] == (np.arange(24) >= 20)).all()
    assert not by_day[[1, 3], :, 1].any()


@dataclass
class Replay:
    """A table of traces, and the truth tick by tick."""

    table: tables.Availability
    masks: list[np.ndarray]

    def on(self, user: int, tick: int) -> bool:
        midnight = np.floor(self.table.trace_start.min() / DAY) * DAY
        mask = self.masks[user]
        return bool(mask[int(tick + (midnight - self.table.trace_start[user]) / TICK) % len(mask)])

    def finish(self, user: int, start: int, work: int) -> float:
        if not self.masks[user].any():
            return float("inf")
        tick = start
        while work:
            work -= self.on(user, tick)
            tick += 1
        return tick * TICK

    def until_away(self, user: int, start: int) -> float:
        ticks = range(start, start + len(self.masks[user]) + 1)
        return next((tick * TICK for tick in ticks if not self.on(user, tick)), float("inf"))

    def next_start(self, user: int, start: int) -> float:
        ticks = range(start, start + len(self.masks[user]) + 1)
        return next((tick * TICK for tick in ticks if self.on(user, tick)), float("inf"))


@st.composite
def replays(draw: st.DrawFn) -> Replay:
    """Users with periods of their own; some intervals are cut in two, some are empty."""
    users, masks = [], []
    for _ in range(draw(st.integers(1, 4))):
        mask = np.array(draw(st.lists(st.booleans(), min_size=1, max_size=24)))
        begin = draw(st.integers(0, int(3 * DAY / TICK))) * TICK
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
        cuts = draw(st.lists(st.integers(0, len(mask)), max_size=3))
        inner = [cut for cut in cuts if 0 < cut < len(mask) and mask[cut - 1] and mask[cut]]
        empty = [cut for cut in cuts if cut not in inner]
        marks = np.sort(np.concatenate([edges, np.repeat(inner + empty, 2)])).reshape(-1, 2)
        users.append((list(begin + marks * TICK), begin, begin + len(mask) * TICK))
        masks.append(mask)
    return Replay(table(users), masks)


STARTS = st.lists(st.integers(0, 200), min_size=1, max_size=8)


@given(replays(), STARTS, st.integers(0, 10**6), st.data())
def test_traces_are_their_replay(replay: Replay, starts: list[int], shift: int, data: st.DataObject) -> None:
    users = len(replay.masks)
    made = Traces(replay.table, np.arange(users))
    ticks = np.array(starts) + shift
    who = np.array([data.draw(st.integers(0, users - 1)) for _ in starts])
    work = np.array([data.draw(st.integers(0, 60)) for _ in starts])
    cases = list(zip(who.tolist(), ticks.tolist(), work.tolist(), strict=True))
    start = ticks * TICK
    assert made.finish(start, work * TICK, who).tolist() == [replay.finish(*case) for case in cases]
    assert made.until_away(start, who).tolist() == [replay.until_away(u, t) for u, t, _ in cases]
    for time in start:
        tick = int(time / TICK)
        expected = [replay.on(user, tick) for user in range(users)]
        assert made.available(time, np.arange(users)).tolist() == expected
        following = [replay.next_start(user, tick) for user in range(users)]
        assert made.next_start(time, np.arange(users)).tolist() == following
        assert made.next_available(time) == min(following)
        assert made.next_available(time, np.arange(1)) == min(following[1:], default=np.inf)


@given(replays(), STARTS, st.integers(0, 10**6), st.data())
def test_absence_is_the_time_that_was_not_served(
    replay: Replay, starts: list[int], shift: int, data: st.DataObject
) -> None:
    users = len(replay.masks)
    made = Traces(replay.table, np.arange(users))
    who = np.array([data.draw(st.integers(0, users - 1)) for _ in starts])
    begin = np.array(starts) + shift
    end = begin + [data.draw(st.integers(0, 60)) for _ in starts]
    first, last = made.absent(np.stack([begin, end]) * TICK, who)
    away = [
        sum(not replay.on(user, tick) for tick in range(one, other)) * TICK
        for user, one, other in zip(who.tolist(), begin.tolist(), end.tolist(), strict=True)
    ]
    assert (last - first).tolist() == away


@given(replays(), STARTS, st.integers(0, 80), st.integers(0, 80))
def test_work_is_conserved(replay: Replay, starts: list[int], first: int, second: int) -> None:
    """Twice some work after each other is all of it at once; no work is done before it starts."""
    made = Traces(replay.table, np.zeros(len(starts), dtype=np.int64))
    who, start = np.arange(len(starts)), np.array(starts) * TICK
    halfway = made.finish(start, np.full(len(starts), first * TICK), who)
    parts = np.array([[first], [first + second]]) * TICK * np.ones(len(starts))
    together = made.finish(start, parts, who)
    assert (together[0] == halfway).all()
    assert (halfway >= start).all()
    assert (together[1] >= together[0]).all()
    if np.isfinite(halfway).all():
        after = made.finish(halfway, np.full(len(starts), second * TICK), who)
        assert (after == np.where(second > 0, together[1], halfway)).all()


@given(replays(), st.data())
def test_a_draw_is_of_the_available_that_are_not_busy(replay: Replay, data: st.DataObject) -> None:
    user_of = np.array(
        data.draw(st.lists(st.integers(0, len(replay.masks) - 1), min_size=1, max_size=30)), dtype=np.int64
    )
    made, clients = Traces(replay.table, user_of), np.arange(len(user_of))
    busy = np.array(sorted(data.draw(st.sets(st.integers(0, len(clients) - 1)))), dtype=np.int64)
    tick, count = data.draw(st.integers(0, 100)), data.draw(st.integers(0, 40))
    found = made.draw(3, 1, 2, count, tick * TICK, busy)
    free = {c for c in clients if replay.on(user_of[c], tick)} - set(busy.tolist())
    assert found.dtype == np.int64
    assert (np.diff(found) > 0).all()
    assert set(found.tolist()) <= free
    assert len(found) == min(count, len(free))
    assert made.draw(3, 1, 2, count, tick * TICK, busy).tolist() == found.tolist()


@given(st.integers(0, 10**6), st.integers(0, 99), st.integers(0, 9), st.data())
def test_whoever_is_always_there_is_drawn_as_by_the_generator(
    seed: int, round: int, number: int, data: st.DataObject
) -> None:
    clients = data.draw(st.sampled_from([1, 2, 10, 100, 10_000, 10**6]))
    count = data.draw(st.integers(0, min(clients, 500)))
    found = Always(clients).draw(seed, round, number, count, 5.0, NOBODY)
    rng = generator(seed, Purpose.SELECT, round, number)
    assert found.tobytes() == np.sort(rng.choice(clients, count, replace=False)).tobytes()


@given(st.integers(1, 30), st.integers(0, 40), st.data())
def test_always_leaves_out_the_busy(clients: int, count: int, data: st.DataObject) -> None:
    busy = np.array(sorted(data.draw(st.sets(st.integers(0, clients - 1)))), dtype=np.int64)
    found = Always(clients).draw(0, 0, 0, count, 0.0, busy)
    assert (np.diff(found) > 0).all()
    assert set(found.tolist()) <= set(range(clients)) - set(busy.tolist())
    assert len(found) == min(count, clients - len(busy))


def test_always() -> None:
    made, who = Always(3), np.arange(3)
    assert made.available(7.0, who).tolist() == [True] * 3
    assert made.finish(np.array([1.0, 2.0, 3.0]), np.array([4.0, 0.0, 0.5]), who).tolist() == [5.0, 2.0, 3.5]
    assert made.until_away(np.zeros(3), who).tolist() == [np.inf] * 3
    assert made.absent(np.ones((2, 3)), who).tolist() == [[0.0] * 3] * 2
    assert made.next_start(4.0, who).tolist() == [4.0] * 3
    assert made.next_available(4.0) == made.next_available(4.0, np.array([0, 2])) == 4.0
    assert made.next_available(4.0, who) == np.inf


# Nine clients of four users, of whom two are there: clients 0, 2, 3, 5, 7, 8.
MIXED = Traces(
    table([([(0, 5)], 0, 9), ([(6, 7)], 0, 9), ([(2, 4)], 0, 9), ([], 0, 9)]),
    np.array([2, 1, 0, 2, 3, 2, 1, 0, 2]),
)


@pytest.mark.parametrize(
    ("made", "busy", "free"),
    [
        (Always(6), [], range(6)),
        (Always(8), [0, 3, 7], [1, 2, 4, 5, 6]),
        (MIXED, [], [0, 2, 3, 5, 7, 8]),
        (MIXED, [1, 3, 4, 7], [0, 2, 5, 8]),
    ],
)
def test_every_choice_is_equally_likely(made: Availability, busy: list[int], free: Sequence[int]) -> None:
    """All pairs of those that are free, in 6,000 draws of as many rounds."""
    pairs = dict.fromkeys(combinations(free, 2), 0)
    for round in range(6_000):
        first, second = made.draw(0, round, 1, 2, 3.0, np.array(busy, dtype=np.int64)).tolist()
        pairs[first, second] += 1
    assert stats.chisquare(list(pairs.values())).pvalue > 1e-3


def test_draws_of_a_round_and_seeds_differ() -> None:
    made = make(AvailabilityConfig("phones"), 0, 10_000)
    found = [made.draw(*at, 50, 0.0, NOBODY).tolist() for at in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]]
    assert len({tuple(clients) for clients in found}) == 4


def test_phones_are_there_at_night() -> None:
    """The published table's 13.8 % of users at 04:00 and 6.6 % at 13:00, over all days of the repeated traces.

    Within 0.3 %: it is not said whether days or users were averaged, which is what it makes.
    """
    phones = tables.availability()
    users = len(phones.trace_start)
    made = Traces(phones, np.arange(users))
    for hour, share in ((4, 0.138), (13, 0.066)):
        times = [day * DAY + hour * 3600 for day in range(420)]
        found = np.mean([made.available(time, np.arange(users)).mean() for time in times])
        assert abs(found - share) < 0.003


def test_phones_follow_traces_by_chance() -> None:
    """A client's trace stays its own when there are more clients, and all are followed equally often."""
    some, more = (make(AvailabilityConfig("phones"), 4, clients) for clients in (2_000, 71_000))
    assert isinstance(some, Traces)
    assert isinstance(more, Traces)
    assert (some._user_of == more._user_of[:2_000]).all()
    assert stats.chisquare(np.bincount(more._user_of, minlength=710)).pvalue > 1e-3
    other = make(AvailabilityConfig("phones"), 5, 2_000)
    assert isinstance(other, Traces)
    assert (some._user_of != other._user_of).any()


def test_a_file_of_as_many_users_as_clients_gives_each_its_own(tmp_path: Path) -> None:
    file = tmp_path / "own.csv"
    file.write_text("user,start_s,end_s\n" + "".join(f"u{k},{k},{k + 1}\n" for k in range(6)))
    made = make(AvailabilityConfig("csv", file=str(file)), 0, 6)
    there = [made.available(second + 0.5, np.arange(6)).tolist() for second in range(6)]
    assert there == np.eye(6, dtype=bool).tolist()
    drawn = make(AvailabilityConfig("csv", file=str(file)), 0, 6_000)
    counts = [int(drawn.available(second + 0.5, np.arange(6_000)).sum()) for second in range(6)]
    assert sum(counts) == 6_000
    assert stats.chisquare(counts).pvalue > 1e-3


def test_whoever_could_never_take_part_is_refused(tmp_path: Path) -> None:
    """One client, and a file whose other users are there: the trace that it drew is empty."""
    file = tmp_path / "one.csv"
    file.write_text("user,start_s,end_s\nthere,0,10\n" + "".join(f"u{k},,\n" for k in range(999)))
    with pytest.raises(UserError, match=r"^time\.availability\.source=csv: .*nobody could ever take part"):
        make(AvailabilityConfig("csv", file=str(file)), 0, 1)


def test_always_is_the_default() -> None:
    assert make(AvailabilityConfig(), 0, 17) == Always(17)


def present(on: float, off: float, times: Sequence[float], seed: int = 0) -> np.ndarray:
    """(times, clients), a trace each."""
    clients = availability.MARKOV_TRACES
    made = make(AvailabilityConfig("markov", on_s=on, off_s=off), seed, clients)
    return np.stack([made.available(time, np.arange(clients)) for time in times])


@pytest.mark.parametrize(("on", "off"), [(3600.0, 3600.0), (100.0, 900.0), (5000.0, 50.0)])
def test_markov_is_stationary(on: float, off: float) -> None:
    """Of 5,000 independent clients on/(on+off) are there at any time, within five standard errors."""
    share = on / (on + off)
    times = [0.0, 1.0, on, 7.5 * (on + off), 99.9 * (on + off), 100 * (on + off), 1234.5 * (on + off)]
    found = present(on, off, times).mean(axis=1)
    assert np.abs(found - share).max() < 5 * np.sqrt(share * (1 - share) / availability.MARKOV_TRACES)


@pytest.mark.parametrize("lag", [0.1, 0.5, 1.0, 3.0])
def test_markov_forgets_exponentially(lag: float) -> None:
    """P(on after a lag, given on) = p + (1-p) exp(-lag (1/on + 1/off))."""
    on, off = 600.0, 1800.0
    before, after = present(on, off, [5_000.0, 5_000.0 + lag * on], seed=1)
    share = on / (on + off)
    expected = share + (1 - share) * np.exp(-lag * on * (1 / on + 1 / off))
    error = np.sqrt(expected * (1 - expected) / before.sum())
    assert abs(after[before].mean() - expected) < 5 * error


def test_markov_times_are_exponential() -> None:
    """What is left of it at any moment has the distribution of the whole."""
    on, off, clients = 600.0, 200.0, availability.MARKOV_TRACES
    made = make(AvailabilityConfig("markov", on_s=on, off_s=off), 2, clients)
    time, everybody = 12_345.0, np.arange(clients)
    there = made.available(time, everybody)
    left = made.until_away(np.full(clients, time), everybody)[there] - time
    gone = made.next_start(time, everybody)[~there] - time
    assert stats.kstest(left, stats.expon(scale=on).cdf).pvalue > 1e-3
    assert stats.kstest(gone, stats.expon(scale=off).cdf).pvalue > 1e-3


def test_markov_clients_are_independent_and_seeds_differ() -> None:
    one, other = (present(100.0, 100.0, np.arange(0, 20_000, 400).tolist(), seed) for seed in (0, 1))
    assert (one != other).any()
    pairs = np.corrcoef(one[:, :200].T)[np.triu_indices(200, 1)]
    assert abs(pairs.mean()) < 5 / np.sqrt(len(pairs) * len(one))


def test_markov_without_time_off_is_always() -> None:
    made = make(AvailabilityConfig("markov", on_s=50.0, off_s=0.0), 0, 20)
    assert made.available(1e7, np.arange(20)).all()
    assert made.until_away(np.zeros(20), np.arange(20)).tolist() == [np.inf] * 20
    assert made.finish(np.full(20, 7.0), np.full(20, 1e5), np.arange(20)).tolist() == [1e5 + 7] * 20


def test_markov_traces_lie_in_their_period() -> None:
    made = markov(10.0, 30.0, 0, 200)
    owner = np.repeat(np.arange(200), np.diff(made.offsets))
    later = owner[1:] == owner[:-1]
    assert (made.starts >= 0).all()
    assert (made.ends <= made.trace_end[owner]).all()
    assert (made.starts <= made.ends).all()
    assert (made.starts[1:] >= made.ends[:-1])[later].all()
    assert set((made.trace_end - made.trace_start).tolist()) == {4000.0}

"""When rounds end and whose updates count: against schedules worked out by hand, and what holds for any of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster_fl.timing.attempts import Attempts, Ended, Fate, participants
from cluster_fl.timing.policies import NOBODY, Asynchronous, Policy, Standing, Step, Synchronous, make
from cluster_fl.timing.policies import staleness as staleness_of
from cluster_fl.timing.schema import ASYNCHRONOUS, PolicyConfig

DOWN, UP = 1000, 600
MERGED, LATE, LOST, STALE, ABANDONED = Fate


@dataclass
class Fake:
    """A dispatch whose clients take what they are said to: a quarter of it downloading, a quarter uploading.

    Attributes:
        seconds: that each client takes, (clients,), or in each round, (rounds, clients).
        lost: seconds after which a client is lost, by round and client.
        away: from when to when a client is away, over and over: (from, to, period), by client.
        tiers: clients, by tier.
        seed: None: of those who can start, the first ones do; otherwise any, by the seed.
        asked: the deadlines that attempts were made for.
    """

    seconds: Any
    lost: Mapping[tuple[int, int], float] = field(default_factory=dict)
    away: Mapping[int, tuple[float, float, float]] = field(default_factory=dict)
    tiers: Sequence[Sequence[int]] = ()
    seed: int | None = None
    made: list[Attempts] = field(default_factory=list)
    asked: list[float] = field(default_factory=list)

    @property
    def clients(self) -> int:
        return int(np.shape(self.seconds)[-1])

    def draw(
        self,
        round: int,
        turn: int,
        count: int,
        time: float,
        busy: np.ndarray,
        among: np.ndarray | None = None,
    ) -> np.ndarray:
        assert count >= 1
        free = self._free(busy, among)
        free = free[[self._next(client, time) == time for client in free.tolist()]] if len(free) else free
        if self.seed is None:
            return free[:count]
        rng = np.random.default_rng([self.seed, round, turn])
        return np.sort(rng.choice(free, min(count, len(free)), replace=False))

    def next_available(self, time: float, busy: np.ndarray, among: np.ndarray | None = None) -> float:
        return min((self._next(client, time) for client in self._free(busy, among).tolist()), default=np.inf)

    def attempts(self, round: int, clients: np.ndarray, start: float, deadline: float) -> Attempts:
        assert (np.diff(clients) > 0).all()
        each = np.asarray(self.seconds, dtype=float)
        took = each[clients] if each.ndim == 1 else each[round % len(each), clients]
        lost = [start + self.lost.get((round, client), np.inf) for client in clients.tolist()]
        same = np.ones(len(clients), dtype=np.int64)
        made = Attempts(
            client=clients,
            level=same,
            version=same * round,
            epochs=same,
            first=same,
            start=same * start,
            downloaded=start + took / 4,
            computed=start + took * 3 / 4,
            finish=start + took,
            lost=np.array(lost, dtype=float),
            down=same * DOWN,
            up=same * UP,
        )
        self.made.append(made)
        self.asked.append(deadline)
        return made

    def tier(self, round: int, shares: Sequence[float]) -> np.ndarray:
        assert len(shares) == len(self.tiers)
        return np.array(self.tiers[round % len(self.tiers)])

    def _free(self, busy: np.ndarray, among: np.ndarray | None) -> np.ndarray:
        return np.setdiff1d(np.arange(self.clients) if among is None else among, busy)

    def _next(self, client: int, time: float) -> float:
        """When a client is there, not before a time."""
        begin, end, period = self.away.get(client, (0.0, 0.0, 1.0))
        at = time % period
        if not begin <= at < end:
            return time
        return time - at + end if end < period else np.inf


def run(policy: Policy, dispatch: Fake, rounds: int, now: Standing | None = None) -> list[Step]:
    steps, now = [], now or Standing()
    for _ in range(rounds):
        steps.append(policy.step(now, dispatch))
        now = steps[-1].after
    return steps


def fates(step: Step) -> list[tuple[int, str, float]]:
    """(client, fate, stop) of those who are through."""
    ended = step.ended
    return [
        (client, Fate(fate).name, stop)
        for client, fate, stop in zip(
            ended.attempts.client.tolist(), ended.fate.tolist(), ended.stop.tolist(), strict=True
        )
    ]


def merges(step: Step) -> list[tuple[int, int, float]]:
    """(client, version, factor) of those who count."""
    own = step.ended.attempts.at(step.ended.merged)
    return list(zip(own.client.tolist(), own.version.tolist(), step.scale.tolist(), strict=True))


def at_work(step: Step) -> list[tuple[int, int, float]]:
    """(client, version, finish) of those under way or waiting."""
    own = step.after.flight
    return sorted(zip(own.client.tolist(), own.version.tolist(), own.finish.tolist(), strict=True))


def same(one: Step, other: Step) -> bool:
    """Bit for bit."""
    columns = [one.ended.attempts.columns(), one.after.flight.columns()]
    theirs = [other.ended.attempts.columns(), other.after.flight.columns()]
    rest = [
        (s.begin, s.end, s.round, s.pull, s.scale.tolist(), s.ended.fate.tolist(), s.ended.stop.tolist())
        for s in (one, other)
    ]
    return rest[0] == rest[1] and all(
        mine[name].tobytes() == yours[name].tobytes()
        for mine, yours in zip(columns, theirs, strict=True)
        for name in mine
    )


# Synchronous: all, or until a deadline.


def test_waiting_for_all() -> None:
    first, second = run(Synchronous(3, 3), Fake([3.0, 1.0, 2.0]), 2)
    assert fates(first) == [(0, "MERGED", 3.0), (1, "MERGED", 1.0), (2, "MERGED", 2.0)]
    assert (first.begin, first.end, first.round, first.pull) == (0.0, 3.0, 0, 0.0)
    assert first.scale.tolist() == [1.0] * 3
    assert at_work(first) == []
    assert (second.begin, second.end, second.round) == (3.0, 6.0, 1)
    assert second.ended.attempts.version.tolist() == [1] * 3


@pytest.mark.parametrize(
    ("deadline", "end", "expected"),
    [
        (30.0, 20.0, [(0, "MERGED", 5.0), (1, "MERGED", 10.0), (2, "MERGED", 20.0)]),
        (20.0, 20.0, [(0, "MERGED", 5.0), (1, "MERGED", 10.0), (2, "MERGED", 20.0)]),
        (15.0, 15.0, [(0, "MERGED", 5.0), (1, "MERGED", 10.0), (2, "LATE", 15.0)]),
        (10.0, 10.0, [(0, "MERGED", 5.0), (1, "MERGED", 10.0), (2, "LATE", 10.0)]),
        (4.0, 4.0, [(0, "LATE", 4.0), (1, "LATE", 4.0), (2, "LATE", 4.0)]),
    ],
)
def test_a_deadline_ends_a_round_that_would_be_longer(
    deadline: float, end: float, expected: list[tuple[int, str, float]]
) -> None:
    """Who is done at the very moment is in time. A round that nobody meets takes its time, and changes nothing."""
    dispatch = Fake([5.0, 10.0, 20.0])
    first, second = run(Synchronous(3, 3, deadline), dispatch, 2)
    assert (first.end, fates(first)) == (end, expected)
    assert len(first.scale) == len(merges(first)) == sum(fate == "MERGED" for _, fate, _ in expected)
    assert dispatch.asked == [deadline, deadline]
    assert second.end == 2 * end


@pytest.mark.parametrize(
    ("arrive", "asked", "share", "enough"),
    [
        (2, 4, 0.5, True),
        (2, 4, 0.51, False),
        (0, 4, 0.0, True),
        (4, 4, 1.0, True),
        (3, 4, 1.0, False),
        # In floating point these products lie above the whole number.
        (11, 20, 0.55, True),
        (10, 20, 0.55, False),
        (7, 25, 0.28, True),
        (57, 100, 0.57, True),
    ],
)
def test_a_round_with_too_few_is_abandoned(arrive: int, asked: int, share: float, enough: bool) -> None:
    """It takes its time, and changes nothing."""
    dispatch = Fake([5.0] * arrive + [20.0] * (asked - arrive))
    (step,) = run(Synchronous(asked, asked, 10.0, min_share=share), dispatch, 1)
    expected = [MERGED if enough else ABANDONED] * arrive + [LATE] * (asked - arrive)
    assert step.ended.fate.tolist() == expected
    assert len(step.scale) == (arrive if enough else 0)
    assert step.end == (5.0 if arrive == asked else 10.0)


def test_too_few_of_those_who_were_there_not_of_those_wanted() -> None:
    dispatch = Fake([5.0] * 8, away=dict.fromkeys(range(2, 8), (0.0, 99.0, 100.0)))
    (step,) = run(Synchronous(8, 8, 10.0, min_share=0.8), dispatch, 1)
    assert step.ended.fate.tolist() == [MERGED, MERGED]


def test_an_abandoned_round_has_no_arrivals_that_count() -> None:
    """Whatever else is asked of the round."""
    (step,) = run(Synchronous(4, 1, 10.0, min_share=0.9), Fake([1.0, 1.0, 20.0, 20.0]), 1)
    assert step.ended.fate.tolist() == [ABANDONED, LATE, LATE, LATE]


# Lost clients.


@pytest.mark.parametrize(
    ("timeout", "end"),
    [(None, 8.0), (2.0, 8.0), (8.0, 8.0), (30.0, 30.0)],
)
def test_lost_clients_are_given_up(timeout: float | None, end: float) -> None:
    """At once, or when the time is out; others are waited for longer. Here 1 is lost at 7, and 2 is done at 8."""
    dispatch = Fake([3.0, 9.0, 8.0], lost={(0, 1): 7.0})
    (step,) = run(Synchronous(3, 3, timeout=timeout), dispatch, 1)
    assert fates(step) == [(0, "MERGED", 3.0), (1, "LOST", 7.0), (2, "MERGED", 8.0)]
    assert step.end == end


@pytest.mark.parametrize("timeout", [None, 1.0, 5.0, 7.0])
def test_nobody_knows_before_who_will_be_lost(timeout: float | None) -> None:
    """Until it is lost the server waits for it, as for one that will arrive."""
    lost, arrives = (
        run(Synchronous(2, 2, timeout=timeout), Fake([3.0, 9.0], lost=gone), 1)[0]
        for gone in ({(0, 1): 7.0}, {})
    )
    assert (lost.end, fates(lost)[1]) == (7.0, (1, "LOST", 7.0))
    assert (arrives.end, fates(arrives)[1]) == (9.0, (1, "MERGED", 9.0))


def test_who_is_lost_after_it_was_done_is_not_lost() -> None:
    (step,) = run(Synchronous(2, 2, timeout=50.0), Fake([3.0, 9.0], lost={(0, 0): 3.5, (0, 1): 9.5}), 1)
    assert step.ended.fate.tolist() == [MERGED, MERGED]
    assert step.end == 9.0


def test_who_is_lost_after_the_deadline_is_late() -> None:
    (step,) = run(Synchronous(3, 3, 5.0, timeout=50.0), Fake([3.0, 9.0, 9.0], lost={(0, 1): 7, (0, 2): 4}), 1)
    assert fates(step) == [(0, "MERGED", 3.0), (1, "LATE", 5.0), (2, "LOST", 4.0)]
    assert step.end == 5.0


@pytest.mark.parametrize(("timeout", "end"), [(None, 8.0), (20.0, 20.0)])
def test_all_lost(timeout: float | None, end: float) -> None:
    steps = run(Synchronous(2, 2, timeout=timeout), Fake([9.0, 9.0], lost={(0, 0): 8.0, (0, 1): 2.0}), 2)
    assert fates(steps[0]) == [(0, "LOST", 8.0), (1, "LOST", 2.0)]
    assert (steps[0].end, steps[1].begin) == (end, end)
    assert merges(steps[0]) == []
    assert len(merges(steps[1])) == 2


# Over-selection.


def test_the_first_arrivals_end_the_round() -> None:
    """Of those at the same moment the lower numbers; what the rest has sent and received counts."""
    (step,) = run(Synchronous(5, 3), Fake([8.0, 4.0, 8.0, 2.0, 16.0]), 1)
    assert fates(step) == [
        (0, "MERGED", 8.0),
        (1, "MERGED", 4.0),
        (2, "LATE", 8.0),
        (3, "MERGED", 2.0),
        (4, "LATE", 8.0),
    ]
    assert step.end == 8.0
    # Client 2 was done; 4 has all of its submodel and has just computed half.
    assert step.ended.down.tolist() == [DOWN] * 5
    assert step.ended.up.tolist() == [UP, UP, UP, UP, 0]


def test_a_spare_client_takes_the_place_of_a_lost_one() -> None:
    dispatch = Fake([1.0, 2.0, 3.0, 4.0], lost={(0, 0): 0.5})
    (step,) = run(Synchronous(4, 3, timeout=100.0), dispatch, 1)
    assert (step.end, step.ended.fate.tolist()) == (4.0, [LOST, MERGED, MERGED, MERGED])


def test_with_too_few_arrivals_all_are_taken() -> None:
    dispatch = Fake([1.0, 2.0, 3.0, 4.0], lost={(0, 0): 0.5, (0, 3): 3.5})
    (step,) = run(Synchronous(4, 3), dispatch, 1)
    assert (step.end, step.ended.fate.tolist()) == (3.5, [LOST, MERGED, MERGED, LOST])


@pytest.mark.parametrize(("asked", "wanted"), [(10, 10), (13, 10), (20, 10), (5, 1), (1, 1)])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_the_expected_length_of_a_round_of_exponential_clients(asked: int, wanted: int, shift: float) -> None:
    """Of n exponentials the k-th smallest is a sum of independent ones, of means 1/n, 1/(n-1), ..., 1/(n-k+1):
    H_n - H_(n-k), and for all of them H_n, the formula of coded computation."""
    rounds, mu = 3000, 2.0
    times = shift + np.random.default_rng(7).standard_exponential((rounds, asked)) / mu
    found = [step.end - step.begin for step in run(Synchronous(asked, wanted), Fake(times), rounds)]
    ranks = np.arange(asked - wanted + 1, asked + 1)
    mean, variance = shift + np.sum(1 / ranks) / mu, np.sum(1.0 / ranks**2) / mu**2
    assert abs(np.mean(found) - mean) < 6 * np.sqrt(variance / rounds)


# Tiers, and clients that come and go.


def test_a_round_asks_one_tier() -> None:
    dispatch = Fake([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], tiers=[[0, 1], [2, 3], [4, 5]])
    steps = run(Synchronous(2, 2, tiers=(0.5, 0.25, 0.25)), dispatch, 4)
    assert [step.ended.attempts.client.tolist() for step in steps] == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert [step.end for step in steps] == [2.0, 6.0, 12.0, 14.0]


def test_a_round_waits_until_somebody_is_there() -> None:
    """The deadline and the timeout count from then."""
    dispatch = Fake(
        [3.0, 1.0, 1.0], away={0: (0, 5, 100), 1: (0, 5, 100), 2: (0, 9, 100)}, lost={(0, 1): 0.5}
    )
    (step,) = run(Synchronous(3, 3, deadline=4.0, timeout=3.5), dispatch, 1)
    assert fates(step) == [(0, "MERGED", 8.0), (1, "LOST", 5.5)]
    assert step.ended.attempts.start.tolist() == [5.0, 5.0]
    assert (step.begin, step.end) == (0.0, 8.5)


def test_a_round_asks_those_who_are_there() -> None:
    dispatch = Fake([1.0] * 5, away=dict.fromkeys((0, 2, 4), (0.0, 50.0, 100.0)))
    (step,) = run(Synchronous(4, 4), dispatch, 1)
    assert step.ended.attempts.client.tolist() == [1, 3]


def test_a_tier_that_never_comes_has_an_empty_round() -> None:
    never = (0.0, 1.0, 1.0)
    dispatch = Fake([1.0, 2.0, 3.0, 4.0], tiers=[[0, 1], [2, 3]], away={0: never, 1: never})
    first, second = run(Synchronous(2, 2, tiers=(0.5, 0.5)), dispatch, 2)
    assert (len(first.ended.attempts), len(first.scale), first.begin, first.end) == (0, 0, 0.0, 0.0)
    assert (second.ended.attempts.client.tolist(), second.end) == ([2, 3], 4.0)


# Buffered asynchronous.


def constant(age: np.ndarray) -> np.ndarray:
    return np.ones(len(age))


def root(age: np.ndarray) -> np.ndarray:
    result: np.ndarray = (1.0 + age) ** -0.5
    return result


def test_fedbuff_by_hand() -> None:
    """Three places, merges of two. Of those who can start the lowest number does.

    ====  =======================================  ===================================================
    time  what happens                             who starts
    ====  =======================================  ===================================================
    0     round 0                                  0 until 4, 1 until 6, 2 until 10
    4     0 arrives                                3 until 7, from round 0's weights too
    6     1 arrives: merge of 0 and 1, round 1     0 until 10
    7     3 arrives, of round 0                    1 until 13; 0 and 2 are at work and 3 waits
    10    0 and 2 arrive: merge of 3 and 0,        in round 2, with 1 at work and 2 waiting:
          2 has the higher number and waits        0 until 14, 3 until 13
    13    1 and 3 arrive: merge of 2 and 1;        in round 3, with 0 at work and 3 waiting:
          3 waits                                  1 until 19, 2 until 23
    14    0 arrives: merge of 3 and 0              in round 4, with 1 and 2 at work: 0 until 18
    18    0 arrives                                3 until 21
    19    1 arrives: merge of 0 and 1
    ====  =======================================  ===================================================
    """
    steps = run(Asynchronous(3, 2, root), Fake([4.0, 6.0, 10.0, 3.0]), 5)
    assert [step.end for step in steps] == [6.0, 10.0, 13.0, 14.0, 19.0]
    assert [merges(step) for step in steps] == [
        [(0, 0, 1.0), (1, 0, 1.0)],
        [(0, 1, 1.0), (3, 0, 2**-0.5)],
        [(1, 1, 2**-0.5), (2, 0, 3**-0.5)],
        [(0, 2, 2**-0.5), (3, 2, 2**-0.5)],
        [(0, 4, 1.0), (1, 3, 2**-0.5)],
    ]
    assert [at_work(step) for step in steps] == [
        [(2, 0, 10.0), (3, 0, 7.0)],
        [(1, 1, 13.0), (2, 0, 10.0)],
        [(0, 2, 14.0), (3, 2, 13.0)],
        [(1, 3, 19.0), (2, 3, 23.0)],
        [(2, 3, 23.0), (3, 4, 21.0)],
    ]
    assert [step.ended.stop.tolist() for step in steps] == [[4, 6], [10, 7], [13, 10], [14, 13], [18, 19]]
    assert all(step.pull == 0.0 for step in steps)


def test_a_merge_of_what_waits_takes_no_time() -> None:
    """Four arrive at once, and merges are of two: the second one follows at the same moment, and its clients are old.

    Only then do others start.
    """
    first, second, third = run(Asynchronous(4, 2, root), Fake([5.0, 5.0, 5.0, 5.0]), 3)
    assert (merges(first), first.end) == ([(0, 0, 1.0), (1, 0, 1.0)], 5.0)
    assert (merges(second), second.end) == ([(2, 0, 2**-0.5), (3, 0, 2**-0.5)], 5.0)
    assert at_work(second) == []
    assert (merges(third), third.end) == ([(0, 2, 1.0), (1, 2, 1.0)], 10.0)


def test_a_buffer_larger_than_the_places() -> None:
    """One at work, three in a merge: one after the other, all from the same weights."""
    (step, after) = run(Asynchronous(1, 3, root), Fake([1.0, 2.0, 4.0, 8.0]), 2)
    assert (merges(step), step.end) == ([(0, 0, 1.0), (1, 0, 1.0), (2, 0, 1.0)], 7.0)
    assert step.ended.attempts.start.tolist() == [0.0, 1.0, 3.0]
    assert (merges(after), after.end) == ([(0, 1, 1.0), (1, 1, 1.0), (2, 1, 1.0)], 14.0)


@pytest.mark.parametrize("policy", [Asynchronous(1, 1, root), Asynchronous(1, 1, root, period=3.0)])
def test_a_single_client(policy: Asynchronous) -> None:
    steps = run(policy, Fake([3.0]), 3)
    assert [merges(step) for step in steps] == [[(0, version, 1.0)] for version in range(3)]
    assert [step.end for step in steps] == [3.0, 6.0, 9.0]


def test_a_lost_client_makes_room_and_does_not_come_back_in_this_round() -> None:
    """1 is lost at 2: its place goes to 2, since nobody starts twice from the same weights."""
    dispatch = Fake([6.0, 4.0, 5.0], lost={(0, 1): 2.0})
    first, second = run(Asynchronous(2, 2, root), dispatch, 2)
    assert fates(first) == [(0, "MERGED", 6.0), (1, "LOST", 2.0), (2, "MERGED", 7.0)]
    assert first.ended.attempts.start.tolist() == [0.0, 0.0, 2.0]
    assert (first.end, at_work(first)) == (7.0, [])
    assert second.ended.attempts.client.tolist() == [0, 1]


def test_a_client_lost_from_older_weights_may_start_again_at_once() -> None:
    """0 starts at 0 and is lost at 5, in round 1: its second start is from other weights."""
    dispatch = Fake([9.0, 3.0], lost={(0, 0): 5.0})
    steps = run(Asynchronous(2, 1, root), dispatch, 3)
    assert [fates(step) for step in steps] == [
        [(1, "MERGED", 3.0)],
        [(0, "LOST", 5.0), (1, "MERGED", 6.0)],
        [(1, "MERGED", 9.0)],
    ]
    assert at_work(steps[1]) == [(0, 1, 14.0)]
    assert merges(steps[1]) == [(1, 1, 1.0)]


def test_a_lost_client_that_is_nobodys_end_is_not_merged() -> None:
    dispatch = Fake([4.0, 4.0], lost={(0, 0): 4.0})
    (step,) = run(Asynchronous(2, 1, root), dispatch, 1)
    assert fates(step) == [(0, "LOST", 4.0), (1, "MERGED", 4.0)]


def test_when_nobody_is_left_the_round_ends_with_what_there_is() -> None:
    dispatch = Fake([1.0, 2.0, 3.0], lost={(0, 1): 1.5})
    first, second = run(Asynchronous(3, 3, root), dispatch, 2)
    assert fates(first) == [(0, "MERGED", 1.0), (1, "LOST", 1.5), (2, "MERGED", 3.0)]
    assert (first.end, second.end) == (3.0, 6.0)
    assert len(merges(second)) == 3


def test_all_lost_changes_nothing() -> None:
    dispatch = Fake([4.0, 4.0], lost={(0, 0): 1.0, (0, 1): 3.0})
    first, second = run(Asynchronous(1, 1, root, mixing=0.5), dispatch, 2)
    assert fates(first) == [(0, "LOST", 1.0), (1, "LOST", 4.0)]
    assert (len(first.scale), first.pull, first.end) == (0, 0.0, 4.0)
    assert (merges(second), second.end) == ([(0, 1, 0.5)], 8.0)


def test_a_place_waits_until_somebody_is_there() -> None:
    """Nobody is there before 5; the second place is taken at 7, long before the first is free again."""
    dispatch = Fake([90.0, 10.0], away={0: (0.0, 5.0, 1000.0), 1: (0.0, 7.0, 1000.0)})
    (step,) = run(Asynchronous(2, 1, root), dispatch, 1)
    assert fates(step) == [(1, "MERGED", 17.0)]
    assert step.ended.attempts.start.tolist() == [7.0]
    assert at_work(step) == [(0, 0, 95.0)]


def test_a_place_is_not_taken_by_who_never_comes() -> None:
    dispatch = Fake([2.0, 2.0, 2.0], away={1: (0.0, 1.0, 1.0), 2: (0.0, 3.0, 100.0)})
    (step,) = run(Asynchronous(2, 3, root), dispatch, 1)
    assert fates(step) == [(0, "MERGED", 2.0), (2, "MERGED", 5.0)]


def test_who_takes_no_time_is_through_at_once() -> None:
    """Each in its turn, and nobody twice from the same weights."""
    first, second = run(Asynchronous(2, 3, root), Fake([0.0, 0.0, 0.0, 0.0]), 2)
    assert (merges(first), first.end) == ([(0, 0, 1.0), (1, 0, 1.0), (2, 0, 1.0)], 0.0)
    assert (merges(second), second.end) == ([(0, 1, 1.0), (1, 1, 1.0), (3, 0, 2**-0.5)], 0.0)


# Too old.


def test_who_is_too_old_when_it_arrives_does_not_count() -> None:
    """Client 2 takes 10, in which three merges of 0 and 1 have passed; it makes room and starts again."""
    dispatch = Fake([3.0, 3.0, 10.0])
    steps = run(Asynchronous(3, 2, root, max_staleness=2), dispatch, 5)
    assert [fates(step) for step in steps] == [
        [(0, "MERGED", 3.0), (1, "MERGED", 3.0)],
        [(0, "MERGED", 6.0), (1, "MERGED", 6.0)],
        [(0, "MERGED", 9.0), (1, "MERGED", 9.0)],
        [(0, "MERGED", 12.0), (1, "MERGED", 12.0), (2, "STALE", 10.0)],
        [(0, "MERGED", 15.0), (1, "MERGED", 15.0)],
    ]
    assert at_work(steps[3]) == [(2, 3, 20.0)]
    just = run(Asynchronous(3, 2, root, max_staleness=3), dispatch, 4)[3]
    assert merges(just) == [(0, 3, 1.0), (2, 0, 0.5)]


def test_who_grows_too_old_while_it_waits_does_not_count() -> None:
    """Four arrive together, and merges are of two: with no staleness allowed, the others have worked for nothing."""
    first, second = run(Asynchronous(4, 2, root, max_staleness=0), Fake([5.0] * 4), 2)
    assert (fates(first), first.end) == ([(0, "MERGED", 5.0), (1, "MERGED", 5.0)], 5.0)
    stale = [(2, "STALE", 5.0), (3, "STALE", 5.0)]
    assert [one for one in fates(second) if one[1] == "STALE"] == stale
    assert (merges(second), second.end) == ([(0, 1, 1.0), (1, 1, 1.0)], 10.0)


# Merges of one, and of a period.


def test_fedasync_by_hand() -> None:
    """Two places, every arrival a merge: w + mixing x s(t) (w_client - w).

    0 takes 5 and 1 takes 2: at 2 (fresh), at 4 (fresh), at 5 the first of 0, two merges old; and so on.
    """
    steps = run(Asynchronous(2, 1, root, mixing=0.5), Fake([5.0, 2.0]), 5)
    assert [step.end for step in steps] == [2.0, 4.0, 5.0, 6.0, 8.0]
    expected = [(1, 0, 0), (1, 1, 0), (0, 0, 2), (1, 2, 1), (1, 4, 0)]
    assert [merges(step) for step in steps] == [
        [(client, version, 0.5 * (1 + age) ** -0.5)] for client, version, age in expected
    ]
    assert [step.pull for step in steps] == [0.5 * (1 + age) ** -0.5 for _, _, age in expected]


def test_a_period_merges_what_has_arrived() -> None:
    """Places are filled at its beginning alone: 1 is done at 3 and again starts at 10."""
    dispatch = Fake([12.0, 3.0, 25.0, 10.0])
    steps = run(Asynchronous(4, 1, root, period=10.0), dispatch, 4)
    assert [step.end for step in steps] == [10.0, 20.0, 30.0, 40.0]
    assert [fates(step) for step in steps] == [
        [(1, "MERGED", 3.0), (3, "MERGED", 10.0)],
        [(0, "MERGED", 12.0), (1, "MERGED", 13.0), (3, "MERGED", 20.0)],
        [(1, "MERGED", 23.0), (2, "MERGED", 25.0), (3, "MERGED", 30.0)],
        [(0, "MERGED", 32.0), (1, "MERGED", 33.0), (3, "MERGED", 40.0)],
    ]
    assert merges(steps[1]) == [(0, 0, 2**-0.5), (1, 1, 1.0), (3, 1, 1.0)]
    assert merges(steps[2])[1] == (2, 0, 3**-0.5)


def test_a_period_in_which_nobody_arrives_or_is_there() -> None:
    away = dict.fromkeys(range(2), (0.0, 15.0, 1000.0))
    steps = run(Asynchronous(2, 1, root, period=10.0), Fake([12.0, 12.0], away=away), 5)
    assert [step.end for step in steps] == [10.0, 20.0, 30.0, 40.0, 50.0]
    assert [len(merges(step)) for step in steps] == [0, 0, 0, 2, 0]
    assert merges(steps[3]) == [(0, 2, 2**-0.5), (1, 2, 2**-0.5)]


def test_a_place_of_a_lost_client_stays_empty_for_the_rest_of_the_period() -> None:
    dispatch = Fake([2.0, 20.0, 2.0], lost={(0, 1): 1.0})
    first, second = run(Asynchronous(2, 1, root, period=10.0), dispatch, 2)
    assert fates(first) == [(0, "MERGED", 2.0), (1, "LOST", 1.0)]
    assert sorted(client for client, _, _ in at_work(second)) == [1]


# The configured policy.


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("constant", {}, [1, 1, 1, 1]),
        ("polynomial", {}, [1, 2**-0.5, 0.5, 1 / 3]),
        ("polynomial", {"exponent": 2.0}, [1, 1 / 4, 1 / 16, 1 / 81]),
        ("hinge", {}, [1, 1, 1, 1 / 3]),
        ("hinge", {"hinge": 0, "exponent": 10.0}, [1, 1 / 11, 1 / 31, 1 / 81]),
        ("hinge", {"hinge": 3, "exponent": 0.2}, [1, 1, 1, 1 / 2]),
    ],
)
def test_how_an_old_update_counts(name: str, options: dict[str, Any], expected: list[float]) -> None:
    """FedAsync's three functions, at 0, 1, 3 and 8 merges."""
    found = staleness_of(PolicyConfig(staleness=name, **options))(np.array([0, 1, 3, 8]))
    assert found.tolist() == pytest.approx(expected, rel=1e-15)
    assert found[0] == 1.0
    assert len(staleness_of(PolicyConfig(staleness=name))(NOBODY)) == 0


def test_the_configuration_names_the_policy() -> None:
    def made(**options: Any) -> Any:
        return make(PolicyConfig(**options), 10)

    assert made() == Synchronous(10, 10)
    assert made(name="wait", timeout_s=3.0, deadline_s=5.0) == Synchronous(10, 10, timeout=3.0)
    assert made(name="deadline", deadline_s=5.0, min_share=0.5) == Synchronous(10, 10, 5.0, 0.5)
    assert made(name="over_select") == Synchronous(13, 10)
    assert made(name="over_select", factor=1.25) == Synchronous(13, 10)
    assert made(name="tiers", tiers=2) == Synchronous(10, 10, tiers=(0.5, 0.5))
    assert made(name="tiers", tiers=2, tier_shares=[0.75, 0.25]) == Synchronous(10, 10, tiers=(0.75, 0.25))
    buffered, each, period = (made(name=name, period_s=7.0) for name in ("fedbuff", "fedasync", "semi_sync"))
    kept = [(p.concurrency, p.buffer, p.period, p.mixing, p.max_staleness) for p in (buffered, each, period)]
    assert kept == [(10, 10, None, 0.0, None), (10, 1, None, 0.6, None), (10, 1, 7.0, 0.0, None)]
    other = made(name="fedbuff", buffer=3, concurrency=5, max_staleness=0)
    assert (other.concurrency, other.buffer, other.max_staleness) == (5, 3, 0)
    assert [made(name=name, period_s=7.0).asynchronous for name in ASYNCHRONOUS] == [True] * 3


# What holds for any of them.


@st.composite
def dispatches(draw: st.DrawFn) -> Fake:
    """Few clients with many ties, some lost, some away now and then or for good."""
    clients, rounds = draw(st.integers(1, 6)), 4
    length = st.sampled_from([0.0, 0.5, 1.0, 1.0, 2.0, 3.0, 7.0])
    seconds = draw(st.lists(length, min_size=rounds * clients, max_size=rounds * clients))
    at = st.tuples(st.integers(0, 6), st.integers(0, clients - 1))
    lost = draw(st.dictionaries(at, st.sampled_from([0.25, 0.5, 1.0, 2.0]), max_size=8))
    absence = st.sampled_from([(0.0, 3.0, 4.0), (1.0, 2.0, 8.0), (2.0, 4.0, 4.0), (0.0, 1.0, 1.0)])
    away = draw(st.dictionaries(st.integers(0, clients - 1), absence, max_size=3))
    halves = [list(range(clients))[: clients // 2 or 1], list(range(clients))[clients // 2 :]]
    return Fake(np.array(seconds).reshape(rounds, clients), lost, away, halves, draw(st.integers(0, 9)))


@st.composite
def policies(draw: st.DrawFn) -> Synchronous | Asynchronous:
    count = draw(st.integers(1, 6))
    timeout = draw(st.sampled_from([None, 0.5, 4.0]))
    if draw(st.booleans()):
        deadline = draw(st.sampled_from([0.75, 1.0, 2.0, np.inf]))
        tiers = draw(st.sampled_from([None, (0.5, 0.5)]))
        wanted = draw(st.integers(1, count))
        return Synchronous(count, wanted, deadline, draw(st.sampled_from([0.0, 0.5, 1.0])), timeout, tiers)
    return Asynchronous(
        concurrency=count,
        buffer=draw(st.integers(1, 6)),
        staleness=root,
        period=draw(st.sampled_from([None, None, 1.0, 2.5])),
        max_staleness=draw(st.sampled_from([None, 0, 1, 2])),
        mixing=draw(st.sampled_from([0.0, 0.6])),
    )


ROUNDS = 7
Key = tuple[int, int, float]


def keys(attempts: Attempts) -> list[Key]:
    return list(
        zip(attempts.client.tolist(), attempts.version.tolist(), attempts.start.tolist(), strict=True)
    )


@settings(max_examples=100, deadline=None)
@given(policy=policies(), dispatch=dispatches())
def test_every_attempt_ends_in_exactly_one_way(policy: Synchronous | Asynchronous, dispatch: Fake) -> None:
    """Or is under way; and nobody starts twice from the same weights."""
    steps = run(policy, dispatch, ROUNDS)
    started = [key for made in dispatch.made for key in keys(made)]
    ended = [key for step in steps for key in keys(step.ended.attempts)]
    assert sorted(ended + keys(steps[-1].after.flight)) == sorted(started)
    assert len({(client, version) for client, version, _ in started}) == len(started)
    if not policy.asynchronous:
        assert all(not len(step.after.flight) for step in steps)


@settings(max_examples=100, deadline=None)
@given(policy=policies(), dispatch=dispatches())
def test_time_goes_on_and_nobody_is_at_two_places(policy: Synchronous | Asynchronous, dispatch: Fake) -> None:
    steps = run(policy, dispatch, ROUNDS)
    assert [step.round for step in steps] == list(range(ROUNDS))
    assert all(step.begin <= step.end for step in steps)
    assert all(one.end == next.begin for one, next in itertools.pairwise(steps))
    spans: list[tuple[int, float, float, float]] = []  # client, start, stop, until when it cannot start again
    for step in steps:
        own, stops = step.ended.attempts, step.ended.stop
        kept = np.isin(step.ended.fate, [MERGED, LATE, ABANDONED])
        again = np.where(kept, step.end, stops)
        assert (own.start <= stops).all()
        assert (stops <= step.end).all()
        spans += zip(own.client.tolist(), own.start.tolist(), stops.tolist(), again.tolist(), strict=True)
    last = steps[-1].after.flight
    spans += [(client, start, np.inf, np.inf) for client, _, start in keys(last)]
    for one, other in itertools.pairwise(sorted(spans)):
        assert one[0] != other[0] or one[3] <= other[1]
    limit = policy.concurrency if isinstance(policy, Asynchronous) else policy.count
    ends = [(start, min(stop, _end(last, client))) for client, start, stop, _ in spans]
    for moment, _ in ends:
        assert sum(start <= moment < stop for start, stop in ends) <= limit


def _end(flight: Attempts, client: int) -> float:
    """When a client's place is free that waits to be merged."""
    found = flight.end[flight.client == client]
    return float(found[0]) if len(found) else np.inf


@settings(max_examples=100, deadline=None)
@given(policy=policies(), dispatch=dispatches())
def test_fates_are_what_happened(policy: Synchronous | Asynchronous, dispatch: Fake) -> None:
    for step in run(policy, dispatch, ROUNDS):
        ended, own, age = step.ended, step.ended.attempts, step.round - step.ended.attempts.version
        arrived = (own.finish < own.lost) & (own.finish <= step.end)
        assert keys(own) == sorted(keys(own), key=lambda key: (key[0], key[2]))
        for fate, fits in {
            MERGED: arrived & (ended.stop == own.finish),
            LOST: (own.lost <= own.finish) & (ended.stop == own.lost),
            STALE: arrived & (ended.stop == own.finish),
            ABANDONED: arrived & (ended.stop == own.finish),
            LATE: (own.end >= step.end) & (ended.stop == step.end),
        }.items():
            assert fits[ended.fate == fate].all(), fate
        if isinstance(policy, Asynchronous):
            assert not np.isin(ended.fate, [LATE, ABANDONED]).any()
            most = ROUNDS if policy.max_staleness is None else policy.max_staleness
            assert ((age > most) == (ended.fate == STALE))[ended.fate != LOST].all()
            assert policy.period is not None or len(ended.merged) <= policy.buffer
            factors = root(age[ended.merged]) * (policy.mixing or 1.0)
            assert step.scale.tolist() == factors.tolist()
        else:
            assert (age == 0).all()
            assert len(ended.merged) <= policy.wanted
            assert step.scale.tolist() == [1.0] * len(ended.merged)
            enough = len(ended.merged) or (ended.fate == ABANDONED).any() or not arrived.any()
            assert enough


@settings(max_examples=100, deadline=None)
@given(policy=policies(), dispatch=dispatches())
def test_bytes_are_between_nothing_and_all(policy: Synchronous | Asynchronous, dispatch: Fake) -> None:
    for step in run(policy, dispatch, ROUNDS):
        ended = step.ended
        down, up = ended.down, ended.up
        assert ((down >= 0) & (down <= DOWN) & (up >= 0) & (up <= UP)).all()
        done = ended.stop >= ended.attempts.finish
        assert (down[done] == DOWN).all()
        assert (up[done] == UP).all()
        assert (down[up > 0] == DOWN).all()
        assert (up[(ended.stop < ended.attempts.computed)] == 0).all()
        records = participants(ended)
        assert [one["client"] for one in records] == ended.attempts.client.tolist()
        assert [one["seconds"] for one in records] == (ended.stop - ended.attempts.start).tolist()


@settings(max_examples=40, deadline=None)
@given(policy=policies(), dispatch=dispatches(), after=st.integers(1, ROUNDS - 1))
def test_a_run_goes_on_from_where_it_stood(
    policy: Synchronous | Asynchronous, dispatch: Fake, after: int
) -> None:
    whole = run(policy, dispatch, ROUNDS)
    rest = run(policy, dispatch, ROUNDS - after, whole[after - 1].after)
    assert all(same(one, other) for one, other in zip(whole[after:], rest, strict=True))


@settings(max_examples=100, deadline=None)
@given(
    clients=st.integers(1, 8),
    count=st.integers(1, 8),
    length=st.sampled_from([0.0, 0.1, 7.0]),
    seed=st.integers(0, 99),
    mode=st.sampled_from(["wait", "over_select", "deadline"]),
)
def test_equally_fast_clients_make_fedbuff_synchronous(
    clients: int, count: int, length: float, seed: int, mode: str
) -> None:
    """With a buffer of as many as are at work."""
    count = min(count, clients)
    dispatch = Fake(np.full(clients, length), seed=seed)
    buffered = make(PolicyConfig(name="fedbuff", buffer=count), count)
    plain = make(PolicyConfig(name=mode, factor=1.0, deadline_s=np.inf), count)
    pairs = zip(run(buffered, dispatch, ROUNDS), run(plain, dispatch, ROUNDS), strict=True)
    assert all(same(one, other) for one, other in pairs)


@settings(max_examples=100, deadline=None)
@given(dispatch=dispatches(), count=st.integers(1, 6), timeout=st.sampled_from([None, 0.5, 4.0]))
def test_nobody_too_many_and_no_deadline_is_waiting_for_all(
    dispatch: Fake, count: int, timeout: float | None
) -> None:
    names = ("wait", "over_select", "deadline")
    wait, first, endless = (
        run(make(PolicyConfig(name=n, factor=1.0, deadline_s=np.inf, timeout_s=timeout), count), dispatch, 5)
        for n in names
    )
    assert all(same(one, other) for one, other in zip(wait, first, strict=True))
    assert all(same(one, other) for one, other in zip(wait, endless, strict=True))


@settings(max_examples=100, deadline=None)
@given(dispatch=dispatches(), count=st.integers(1, 6), deadline=st.sampled_from([0.5, 1.0, 2.0, 3.0]))
def test_a_deadline_never_makes_a_round_longer(dispatch: Fake, count: int, deadline: float) -> None:
    short = Synchronous(count, count, deadline).step(Standing(), dispatch)
    long = Synchronous(count, count).step(Standing(), dispatch)
    assert short.end <= long.end
    assert set(merges(short)) <= set(merges(long))


# How far transfers came.


def attempt(**moments: float) -> Attempts:
    """One client, with bytes and versions that do not matter."""
    usual = {"downloaded": 10.0, "computed": 30.0, "finish": 40.0, "start": 0.0, "lost": np.inf} | moments
    one = np.ones(1, dtype=np.int64)
    times = {name: np.array([moment]) for name, moment in usual.items()}
    return Attempts(one, one, one, one, one, down=one * DOWN, up=one * UP, **times)


@pytest.mark.parametrize(
    ("stop", "down", "up"),
    [
        (0, 0, 0),
        (2.5, 250, 0),
        (9.99999, 999, 0),
        (10, 1000, 0),
        (30, 1000, 0),
        (35, 1000, 300),
        (40, 1000, 600),
    ],
)
def test_a_transfer_that_is_cut_short_counts_as_far_as_it_came(stop: float, down: int, up: int) -> None:
    ended = Ended.of(attempt(), LATE, stop)
    assert (ended.down.tolist(), ended.up.tolist()) == ([down], [up])


@pytest.mark.parametrize(("stop", "down", "up"), [(20.0, DOWN, 0), (30.0, DOWN, UP), (-1.0, 0, 0)])
def test_a_transfer_that_takes_no_time_is_done_or_has_not_begun(stop: float, down: int, up: int) -> None:
    ended = Ended.of(attempt(downloaded=0.0, finish=30.0), LOST, stop)
    assert (ended.down.tolist(), ended.up.tolist()) == ([down], [up])


def test_the_record_names_what_is_unusual() -> None:
    usual, switched = attempt(), attempt(lost=20.0)
    (plain,) = participants(Ended.of(usual, MERGED, 40.0))
    assert plain == {"client": 1, "level": 1, "seconds": 40.0, "fate": "merged", "version": 1}
    smaller = Attempts(**(switched.columns() | {"first": np.array([2])}))
    (other,) = participants(Ended.of(smaller, LOST, 20.0))
    assert other == {"client": 1, "level": 1, "seconds": 20.0, "fate": "lost", "version": 1, "first": 2}

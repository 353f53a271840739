"""What attempts spend their time on: phases, pauses and waiting, against the availability itself."""

from __future__ import annotations

import numpy as np
import pytest

from cluster_fl.timing import availability
from cluster_fl.timing.attempts import Attempts, Ended, Fate
from cluster_fl.timing.intervals import milestones, pauses, phases, waiting
from cluster_fl.timing.schema import AvailabilityConfig
from cluster_fl.timing.tables import Availability
from cluster_fl.timing.traces import Traces


def attempts(times: list[tuple[float, float, float, float]]) -> Attempts:
    """One a tuple of start, downloaded, computed, finish; client 0, 1, ..."""
    count, columns = len(times), np.array(times, dtype=np.float64).T
    numbers = {name: np.full(count, 1) for name in ("level", "version", "epochs", "first", "down", "up")}
    names = ("start", "downloaded", "computed", "finish")
    moments = dict(zip(names, columns, strict=True))
    return Attempts(client=np.arange(count), lost=np.full(count, np.inf), **moments, **numbers)


def ended(times: list[tuple[float, float, float, float]], fates: list[Fate], stops: list[float]) -> Ended:
    return Ended.of(attempts(times), np.array(fates), np.array(stops))


def test_phases_end_where_the_attempt_stops() -> None:
    whole, cut = (0.0, 1.0, 4.0, 6.0), (0.0, 1.0, 4.0, 6.0)
    one = ended([whole, cut, cut, cut], [Fate.MERGED, Fate.LATE, Fate.LOST, Fate.LATE], [6.0, 2.5, 0.5, 5.0])
    assert milestones(one).T.tolist() == [[0, 1, 4, 6], [0, 1, 2.5, 2.5], [0, 0.5, 0.5, 0.5], [0, 1, 4, 5]]
    assert phases(one).T.tolist() == [[1, 3, 2], [1, 1.5, 0], [0.5, 0, 0], [1, 3, 1]]


def test_only_what_has_arrived_waits() -> None:
    times = [(0.0, 1.0, 2.0, 3.0)] * len(Fate)
    one = ended(times, list(Fate), [3.0] * len(Fate))
    waits = {fate for fate, seconds in zip(Fate, waiting(one, 10.0), strict=True) if seconds}
    assert waits == {Fate.MERGED, Fate.ABANDONED}
    assert set(waiting(one, 10.0)) == {0.0, 7.0}


def traces() -> Traces:
    """Client 0 is there from 10 to 40 of every 100 seconds, client 1 in two times, client 2 always, 3 never."""
    starts, ends = np.array([10.0, 5.0, 50.0, 0.0]), np.array([40.0, 25.0, 90.0, 100.0])
    offsets, zero = np.array([0, 1, 3, 4, 4]), np.zeros(4)
    return Traces(Availability(offsets, starts, ends, zero, np.full(4, 100.0)), np.arange(4))


def there(client: int, time: float) -> bool:
    at = time % 100
    return {0: 10 <= at < 40, 1: 5 <= at < 25 or 50 <= at < 90, 2: True, 3: False}[client]


@pytest.mark.parametrize("client", range(4))
def test_absence_is_what_the_trace_leaves_out(client: int) -> None:
    """Against half seconds counted one by one, over several periods."""
    grid = np.arange(0, 350, 0.5)
    times = np.array([[0.0], [7.5], [12.0], [40.0], [99.5], [100.0], [205.0], [349.5]])
    found = traces().absent(times, np.array([client]))[:, 0]
    away = np.array([not there(client, time) for time in grid])
    expected = [0.5 * away[grid < time].sum() for time in times[:, 0]]
    assert (found - found[0]).tolist() == expected


def test_nobody_is_absent_while_available() -> None:
    """Exactly: no rounding makes a pause."""
    moments = np.array([[10.1, 5.3], [22.2, 11.1], [39.9, 24.7]]) + 1e7 / 3 // 100 * 100
    assert (np.diff(traces().absent(moments, np.array([0, 1])), axis=0) == 0).all()
    always = availability.make(AvailabilityConfig(), 0, 2)
    assert (always.absent(moments, np.array([0, 1])) == 0).all()


def test_work_is_what_the_pauses_leave() -> None:
    """As :meth:`Availability.finish` charges it: phases without pauses are the work again."""
    made, clients = traces(), np.array([0, 1, 2])
    start, work = (
        np.array([20.0, 6.0, 3.0]),
        np.array([[5.0, 30.0, 1.0], [45.0, 50.0, 10.0], [70.0, 61.0, 300.0]]),
    )
    finish = made.finish(start, work, clients)
    one = Ended.of(
        attempts([tuple(moments) for moments in np.vstack([start, finish]).T.tolist()]),
        Fate.MERGED,
        finish[2],
    )
    left = phases(one) - pauses(one, made)
    assert left == pytest.approx(np.diff(work, axis=0, prepend=0.0), abs=1e-9)
    assert pauses(one, made)[:, 2].tolist() == [0, 0, 0]
    assert pauses(one, made)[:, 0].sum() > 0

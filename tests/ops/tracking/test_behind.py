"""A tracker holds nothing up: it works in a thread, and whatever happens there is one line."""

from __future__ import annotations

import threading

import pytest

from actors.events import Event, Finished, RoundDone, Working
from ops.tracking.behind import Behind
from tests.ops.tracking.following import KEY

ROUND = RoundDone({"round": 0})


class Inner:
    """Remembers what it was told; may fail, or wait for ``gate``."""

    def __init__(self, error: Exception | None = None) -> None:
        self.told: list[Event] = []
        self.gate, self.closed, self._error = threading.Event(), False, error
        self.gate.set()

    def show(self, event: Event) -> None:
        self.gate.wait()
        self.told.append(event)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self.closed = True
        if self._error is not None:
            raise self._error


def test_events_arrive_in_order_and_before_the_end() -> None:
    inner = Inner()
    with Behind(inner) as shown:
        shown.show(ROUND)
        shown.show(Working(1, "train", 0, 3))  # nobody tracks these
        shown.show(Finished({}))
    assert inner.told == [ROUND, Finished({})]
    assert inner.closed


def test_show_does_not_wait_for_the_network() -> None:
    inner = Inner()
    inner.gate.clear()
    with Behind(inner) as shown:
        for _ in range(1000):
            shown.show(ROUND)
        assert inner.told == []
        inner.gate.set()
    assert len(inner.told) == 1000


def test_failures_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    inner = Inner(OSError(f"no\nnetwork for {KEY}"))
    with Behind(inner) as shown:
        shown.show(ROUND)
        shown.show(ROUND)
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("cluster-fl: tracking: OSError: no network for ***")
    assert len(inner.told) == 2  # the second may be taken again
    assert inner.closed


def test_a_run_that_never_began_tells_nothing() -> None:
    inner = Inner()
    Behind(inner).close()
    assert not inner.closed

"""Where a round's wall-clock time goes."""

from __future__ import annotations

import time


class Stopwatch:
    """Seconds spent in each phase since the last reading; every second since the start lies in one phase."""

    def __init__(self) -> None:
        self._at = time.perf_counter()
        self._phases: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Ends a phase: the time since the last lap was spent on it."""
        now = time.perf_counter()
        self._phases[phase] = self._phases.get(phase, 0.0) + now - self._at
        self._at = now

    def read(self) -> dict[str, float]:
        """The phases so far, and starts afresh."""
        phases, self._phases = self._phases, {}
        return phases

"""What a run's rounds come to, by level: fates, times, bytes, staleness, and who trains which part of the model.

Everything is added up round by round, so that it costs as much memory after a million rounds as after one, but for
the rounds' own lengths and two bits a client.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cluster_fl.nesting.plan import Plan
from cluster_fl.nesting.regions import Regions
from cluster_fl.timing.attempts import Ended, Fate
from cluster_fl.timing.intervals import PHASES, phases, waiting
from cluster_fl.timing.policies import Step

SPENT = (*PHASES, "paused", "waiting")


class Spread:
    """Mean, largest and quantiles of many positive numbers in some classes.

    Quantiles are those of a histogram whose bins are half a percent wide; mean and largest are exact.
    """

    LEAST, STEP, BINS = np.log(1e-6), np.log(1.005), 8320  # from a microsecond to 3e11 seconds

    def __init__(self, classes: int) -> None:
        self._bins = np.zeros((classes, self.BINS), dtype=np.int64)
        self._sum, self._most = np.zeros(classes), np.zeros(classes)

    def add(self, which: np.ndarray, values: np.ndarray) -> None:
        """``which``: the class of each value."""
        with np.errstate(divide="ignore"):
            at = np.clip((np.log(values) - self.LEAST) / self.STEP, 0, self.BINS - 1).astype(np.int64)
        count = len(self._bins)
        flat = np.bincount(which * self.BINS + at, minlength=count * self.BINS)
        self._bins += flat.reshape(count, self.BINS)
        self._sum += np.bincount(which, weights=values, minlength=count)
        np.maximum.at(self._most, which, values)

    def as_json(self, which: int | None = None) -> dict[str, float | None]:
        """Of one class, or of all; null where there is no number, or it is infinite."""
        rows = slice(None) if which is None else slice(which, which + 1)
        bins, most = self._bins[rows].sum(axis=0), float(self._most[rows].max())
        total = int(bins.sum())
        found = {"mean": float(self._sum[rows].sum()) / total if total else None}
        for name, share in (("p50", 0.5), ("p95", 0.95)):
            at = int(np.searchsorted(np.cumsum(bins), share * total))
            middle = float(np.exp(self.LEAST + (at + 0.5) * self.STEP)) if at < self.BINS - 1 else np.inf
            found[name] = min(middle, most) if total else None
        return {key: finite(value) for key, value in (found | {"max": most if total else None}).items()}


class Totals:
    """Adds up the rounds of a run.

    Args:
        plan: the levels.
        clients: how many there are.
    """

    def __init__(self, plan: Plan, clients: int) -> None:
        self._plan, self._regions, levels = plan, Regions.of(plan), len(plan.levels)
        self._lengths: list[float] = []
        self._end = 0.0
        self._fates = np.zeros((levels, len(Fate)), dtype=np.int64)
        self._spent = np.zeros((len(SPENT), levels))
        self._wasted = np.zeros(levels)
        self._bytes, self._wasted_bytes = np.zeros((2, levels)), np.zeros((2, levels))
        self._needs = Spread(levels)
        self._ages = np.zeros(0, dtype=np.int64)
        self._holders, self._nobody = (np.zeros(len(self._regions.params), dtype=np.int64) for _ in range(2))
        self._asked, self._counted = np.zeros(clients, dtype=bool), np.zeros(clients, dtype=bool)

    def add(self, step: Step, pauses: np.ndarray) -> None:
        """``pauses``: of each phase of each attempt, seconds, (3, attempts) (:func:`intervals.pauses`)."""
        ended, at = step.ended, step.ended.attempts.level - 1
        self._lengths.append(step.end - step.begin)
        self._end = step.end
        levels = len(self._fates)
        counts = np.bincount(at * len(Fate) + ended.fate, minlength=self._fates.size)
        self._fates += counts.reshape(self._fates.shape)
        self._add_time(ended, at, pauses, step.end)
        self._add_bytes(ended, at)
        counted = ended.merged
        self._asked[ended.attempts.client] = True
        self._counted[ended.attempts.client[counted]] = True
        ages = np.bincount(step.round - ended.attempts.version[counted], minlength=len(self._ages))
        ages[: len(self._ages)] += self._ages
        self._ages = ages
        holders = self._regions.held @ np.bincount(at[counted], minlength=levels)
        self._holders += holders
        self._nobody += holders == 0

    def _add_time(self, ended: Ended, at: np.ndarray, pauses: np.ndarray, end: float) -> None:
        levels = len(self._fates)
        work = phases(ended) - pauses
        for number, seconds in enumerate((*work, pauses.sum(axis=0), waiting(ended, end))):
            self._spent[number] += np.bincount(at, weights=seconds, minlength=levels)
        lost = ended.fate != Fate.MERGED
        self._wasted += np.bincount(at[lost], weights=work.sum(axis=0)[lost], minlength=levels)
        self._needs.add(at, ended.attempts.finish - ended.attempts.start)

    def _add_bytes(self, ended: Ended, at: np.ndarray) -> None:
        lost = ended.fate != Fate.MERGED
        for number, sent in enumerate((ended.down, ended.up)):
            # Whole numbers below 2^53: nothing is rounded.
            self._bytes[number] += np.bincount(at, weights=sent, minlength=len(self._fates))
            self._wasted_bytes[number] += np.bincount(at[lost], sent[lost], minlength=len(self._fates))

    def as_json(self, asynchronous: bool) -> dict[str, Any]:
        """Seconds and bytes are sums over all rounds; shares are fractions; null: nothing to tell."""
        lengths, rounds = np.array(self._lengths), len(self._lengths)
        quantiles = np.quantile(lengths, (0.5, 0.95)).tolist()
        shape = dict(
            zip(("mean", "p50", "p95", "max"), (lengths.mean(), *quantiles, lengths.max()), strict=True)
        )
        return {
            "rounds": rounds,
            "sim_time_s": finite(self._end),
            "sim_time_hours": finite(self._end / 3600),
            "round_s": {name: finite(float(value)) for name, value in shape.items()},
            **self._of(None),
            "staleness": self._ages.tolist() if asynchronous else None,
            "clients": {
                "count": len(self._asked),
                "asked": int(np.count_nonzero(self._asked)),
                "counted": int(np.count_nonzero(self._counted)),
            },
            "levels": [self._level(level.number) for level in self._plan.levels],
        }

    def _of(self, level: int | None) -> dict[str, Any]:
        """Of a level, from 1, or of all."""
        rows = slice(None) if level is None else slice(level - 1, level)
        fates = self._fates[rows].sum(axis=0)
        spent = self._spent[:, rows].sum(axis=1)
        down, up = self._bytes[:, rows].sum(axis=1)
        wasted, worked = float(self._wasted[rows].sum()), float(spent[: len(PHASES)].sum())
        wasted_down, wasted_up = self._wasted_bytes[:, rows].sum(axis=1)
        total = float(spent.sum())
        return {
            "attempts": int(fates.sum()),
            "fates": {fate.name.lower(): int(fates[fate]) for fate in Fate},
            "needs_s": self._needs.as_json(None if level is None else level - 1),
            "time_s": dict(zip(SPENT, map(finite, spent.tolist()), strict=True)),
            "utilisation": finite(worked / total) if total else None,
            "waste": {
                "seconds": finite(wasted),
                "share": finite(wasted / worked) if worked else None,
                "bytes_down": int(wasted_down),
                "bytes_up": int(wasted_up),
            },
            "bytes_down": int(down),
            "bytes_up": int(up),
        }

    def _level(self, level: int) -> dict[str, Any]:
        own = self._plan.level_of == level
        clients, rounds = int(np.count_nonzero(own)), len(self._lengths)
        region = self._regions.beyond(level)
        params = int(region.sum())
        return {
            "level": level,
            "clients": clients,
            "clients_asked": int(np.count_nonzero(self._asked & own)),
            "clients_counted": int(np.count_nonzero(self._counted & own)),
            **self._of(level),
            "region": {
                "params": params,
                "holders": float(region @ self._holders) / params / rounds if params else None,
                "rounds_without": float(region @ self._nobody) / params / rounds if params else None,
            },
        }


def finite(value: float | None) -> float | None:
    """The same, or None: JSON knows no infinity."""
    return value if value is not None and np.isfinite(value) else None

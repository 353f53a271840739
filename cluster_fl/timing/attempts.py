"""What clients spend their time on: one *attempt* a client and start, as arrays."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import numpy as np


class Fate(IntEnum):
    """How an attempt ends; every one ends in exactly one way. Values are part of every run's files."""

    MERGED = 0
    LATE = 1  # not done when its round ended
    LOST = 2  # dropped out in the middle
    STALE = 3  # done, but from weights that are too old
    ABANDONED = 4  # done, in a round with too few others


@dataclass(frozen=True)
class Attempts:
    """Clients at work. Arrays of shape (attempts,); times are simulated seconds since the run began.

    Attributes:
        client, level: who trains what size.
        version: the round whose weights it started from.
        epochs: that it trains.
        first: the level with which it began; ``level``, unless its load rose in mid-round.
        start, downloaded, computed, finish: when it starts, has its submodel, has trained, has sent its update.
        lost: when it drops out; infinite: never.
        down, up: bytes.
    """

    client: np.ndarray
    level: np.ndarray
    version: np.ndarray
    epochs: np.ndarray
    first: np.ndarray
    start: np.ndarray
    downloaded: np.ndarray
    computed: np.ndarray
    finish: np.ndarray
    lost: np.ndarray
    down: np.ndarray
    up: np.ndarray

    @staticmethod
    def none() -> Attempts:
        return Attempts(**{name: np.zeros(0, dtype=dtype) for name, dtype in COLUMNS.items()})

    def __len__(self) -> int:
        return len(self.client)

    def at(self, rows: np.ndarray) -> Attempts:
        """Some of them: row numbers, or a mask."""
        return Attempts(**{name: column[rows] for name, column in self.columns().items()})

    def where(self, mask: np.ndarray, other: Attempts) -> Attempts:
        """These where the mask says so, and the others where not."""
        theirs = other.columns()
        return Attempts(**{name: np.where(mask, own, theirs[name]) for name, own in self.columns().items()})

    def columns(self) -> dict[str, np.ndarray]:
        return dict(vars(self))

    def __add__(self, other: Attempts) -> Attempts:
        mine, theirs = self.columns(), other.columns()
        return Attempts(**{name: np.concatenate([mine[name], theirs[name]]) for name in mine})

    @property
    def end(self) -> np.ndarray:
        """When each is through, one way or the other."""
        result: np.ndarray = np.minimum(self.finish, self.lost)
        return result


COLUMNS = {
    spec.name: np.dtype(np.int64)
    if spec.name in ("client", "level", "version", "epochs", "first", "down", "up")
    else np.dtype(np.float64)
    for spec in fields(Attempts)
}


@dataclass(frozen=True)
class Ended:
    """Attempts that are over.

    Attributes:
        fate: a :class:`Fate` each.
        stop: when each stopped working, seconds.
    """

    attempts: Attempts
    fate: np.ndarray
    stop: np.ndarray

    @staticmethod
    def of(attempts: Attempts, fate: np.ndarray | Fate, stop: np.ndarray | float) -> Ended:
        shape = len(attempts)
        return Ended(
            attempts,
            np.broadcast_to(np.asarray(fate, dtype=np.int8), shape),
            np.broadcast_to(np.asarray(stop, dtype=np.float64), shape),
        )

    def __add__(self, other: Ended) -> Ended:
        return Ended(
            self.attempts + other.attempts,
            np.concatenate([self.fate, other.fate]),
            np.concatenate([self.stop, other.stop]),
        )

    def sorted(self) -> Ended:
        """By client, and a client's own by their start."""
        client = self.attempts.client
        if (client[1:] > client[:-1]).all():  # as a synchronous round's are
            return self
        order = np.lexsort((self.attempts.start, client))
        return Ended(self.attempts.at(order), self.fate[order], self.stop[order])

    @property
    def merged(self) -> np.ndarray:
        """Row numbers of those that count."""
        return np.flatnonzero(self.fate == Fate.MERGED)

    @property
    def down(self) -> np.ndarray:
        """Bytes that each has received, whole ones: a transfer that is cut short counts as far as it came."""
        a = self.attempts
        return _so_far(a.down, a.start, a.downloaded, self.stop)

    @property
    def up(self) -> np.ndarray:
        """Bytes that each has sent, as :attr:`down`."""
        a = self.attempts
        return _so_far(a.up, a.computed, a.finish, self.stop)


def _so_far(bytes: np.ndarray, begin: np.ndarray, end: np.ndarray, stop: np.ndarray) -> np.ndarray:
    whole = stop >= end
    share = np.divide(stop - begin, end - begin, out=np.zeros(len(stop)), where=~whole & (end > begin))
    result: np.ndarray = np.where(whole, bytes, np.floor(bytes * np.clip(share, 0, 1))).astype(np.int64)
    return result


def participants(ended: Ended) -> list[dict[str, Any]]:
    """A round's attempts for its record; what is as usual is left out."""
    found = []
    for at, (fate, stop) in enumerate(zip(ended.fate, ended.stop, strict=True)):
        own = {name: column[at].item() for name, column in ended.attempts.columns().items()}
        one = {"client": own["client"], "level": own["level"], "seconds": float(stop) - own["start"]}
        one |= {"fate": Fate(fate).name.lower(), "version": own["version"]}
        found.append(one | ({"first": own["first"]} if own["first"] != own["level"] else {}))
    return found

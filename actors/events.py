"""What a driver tells its caller while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Planned:
    """The run is about to start (or to go on) at round ``start``.

    Attributes:
        plan: the content of plan.json.
        samples: training samples of each class (columns) that each client (rows) has; of the first 200 clients.
    """

    plan: dict[str, Any]
    start: int
    pools: int
    samples: np.ndarray


@dataclass(frozen=True)
class Working:
    """``done`` of ``total`` tasks of a phase of a round have come back."""

    round: int
    phase: str
    done: int
    total: int


@dataclass(frozen=True)
class RoundDone:
    """A round is complete and on disk. ``record`` is its line of rounds.jsonl."""

    record: dict[str, Any]


@dataclass(frozen=True)
class Finished:
    """The run is complete. ``summary`` is the content of summary.json."""

    summary: dict[str, Any]


Event = Planned | Working | RoundDone | Finished

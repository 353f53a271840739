"""Where tasks run: a set of pools behind one interface, in this process or on a Ray cluster."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from cluster_fl.experiment import Experiment
from cluster_fl.nesting.plan import State
from cluster_fl.training.worker import Outcome, Task, Worker

Result = TypeVar("Result")


@dataclass
class Usage:
    """Wall-clock seconds of all pools together: busy with tasks, and idle while others ended a phase."""

    busy_s: float = 0.0
    tail_s: float = 0.0


class Pools(Protocol):
    """A pool set. ``usage`` grows with every phase; ``retries`` counts tasks sent again after a pool died."""

    count: int
    usage: Usage
    retries: int

    def publish(self, state: State) -> Any:
        """Makes a state known to all pools; the handle may serve any number of phases."""

    def execute(self, tasks: Sequence[Task[Result]], state: Any) -> Iterator[tuple[int, Outcome[Result]]]:
        """Runs a phase, longest tasks first; yields (position in ``tasks``, outcome) as they complete."""

    def close(self) -> None: ...


class InlinePools:
    """The twin of the Ray pools in the calling process: for tests, notebooks and ``--debug``."""

    def __init__(self, experiment: Experiment) -> None:
        self.count, self.usage, self.retries = 1, Usage(), 0
        shares = experiment.population.shares
        self._worker = Worker(
            experiment.config, experiment.plan, experiment.dataset, shares, torch.device("cpu")
        )

    def publish(self, state: State) -> State:
        return state

    def execute(self, tasks: Sequence[Task[Result]], state: State) -> Iterator[tuple[int, Outcome[Result]]]:
        for position in longest_first(tasks):
            start = time.perf_counter()
            outcome = self._worker.execute(tasks[position], state)
            self.usage.busy_s += time.perf_counter() - start
            yield position, outcome

    def close(self) -> None:
        """Nothing to give back."""


def longest_first(tasks: Sequence[Task[Any]]) -> list[int]:
    return sorted(range(len(tasks)), key=lambda position: (-tasks[position].work, position))

"""Where tasks run: a set of pools behind one interface, in this process or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from cluster_fl.experiment import Experiment
from cluster_fl.training.worker import Outcome, Task, Worker

Result = TypeVar("Result")


@dataclass
class Usage:
    """What the pools did since somebody last asked.

    ``busy_s`` and ``tail_s`` are wall-clock seconds of all pools together: in tasks, and idle while others
    ended a phase. ``retries`` are tasks sent again after a pool died. ``store_bytes`` were put into the object
    store.
    """

    busy_s: float = 0.0
    tail_s: float = 0.0
    retries: int = 0
    store_bytes: int = 0


class Pools(Protocol):
    """A set of pools, all with the same data and plan."""

    @property
    def count(self) -> int:
        """How many there are at the moment."""

    @property
    def device(self) -> str:
        """cpu or cuda: another kind computes other bits."""

    def publish(self, state: Mapping[str, np.ndarray]) -> Any:
        """Makes a state known to all pools; the handle may serve any number of phases."""

    def execute(
        self, tasks: Sequence[Task[Result]], states: Sequence[Any]
    ) -> Iterator[tuple[int, Outcome[Result]]]:
        """Runs a phase, longest tasks first; yields (position in ``tasks``, outcome) as they complete.

        ``states``: the handle of what each task reads.
        """

    def take_usage(self) -> Usage:
        """What was used since the last call."""

    def close(self) -> None:
        """Gives everything back."""


class InlinePools:
    """The twin of the Ray pools in the calling process: for tests, notebooks and ``--debug``."""

    def __init__(self, experiment: Experiment) -> None:
        self.count, self.device = 1, "cpu"
        self._usage = Usage()
        shares = experiment.population.shares
        config, plan, program = experiment.config, experiment.plan, experiment.program
        self._worker = Worker(config, plan, program, experiment.dataset, shares, torch.device("cpu"))

    def publish(self, state: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return state

    def execute(
        self, tasks: Sequence[Task[Result]], states: Sequence[Mapping[str, np.ndarray]]
    ) -> Iterator[tuple[int, Outcome[Result]]]:
        for position in longest_first(tasks):
            outcome = self._worker.execute(tasks[position], states[position])
            self._usage.busy_s += outcome.seconds
            yield position, outcome

    def take_usage(self) -> Usage:
        usage, self._usage = self._usage, Usage()
        return usage

    def close(self) -> None:
        """Nothing to give back."""


def longest_first(tasks: Sequence[Task[Any]]) -> list[int]:
    return sorted(range(len(tasks)), key=lambda position: (-tasks[position].work, position))

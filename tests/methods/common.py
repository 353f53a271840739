"""One small experiment that every method can run, and pools that misbehave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.pools import Usage
from cluster_fl import methods
from cluster_fl.compose import compose
from cluster_fl.config import Config
from cluster_fl.experiment import Experiment
from cluster_fl.training.worker import Outcome, Task, Worker
from tests.tiny import worker_of

SMALL = """
rounds: 3
clients: {count: 6, per_round: 5}
levels: {ratios: [0.35, 0.65, 1.0], tolerance: 0.25}
model: {name: resnet14, options: {widths: [4, 8, 16]}}
data: {name: digits, held_out: 80}
train: {epochs: 1, batch_size: 16, lr: 0.1, momentum: 0.0, cohort_size: 2}
evaluate: {every: 2}
"""

# What a method cannot do without in this experiment.
NEEDS: dict[str, tuple[str, ...]] = {
    "depthfl": ("model.norm_groups=4",),
    "inclusivefl": ("levels.pairs=[{depth: 2}, {depth: 4}, {}]",),
    "feddf": ("data.public=64", "options.steps=4"),
    "hermes": ("options.threshold=0",),
}
VARIANTS: tuple[tuple[str, ...], ...] = (
    *((name,) for name in methods.NAMES),
    ("fedavg", "options.model=smallest"),
    ("scalefl", "train.correction.name=scaffold"),
    ("heterofl", "server.optimizer=yogi", "server.lr=0.01"),
    ("fedrolex", "train.correction.name=feddyn"),
    ("perfedavg", "options.order=hf"),
)


def small(folder: Path, method: str, *overrides: str) -> Config:
    """The experiment with a method, composed from a file in ``folder``."""
    file = folder / "small.yaml"
    file.write_text(SMALL)
    return compose([file], (f"method={method}", *NEEDS.get(method, ()), *overrides))


class UnrulyPools:
    """Several workers in this process: tasks go to any of them and come back in any order; workers get lost.

    Before each task a worker may be replaced by a new one, which has kept nothing, and every few tasks one is
    run twice, as after the death of a pool that had not answered yet.
    """

    device = "cpu"

    def __init__(self, experiment: Experiment, count: int, seed: int = 0) -> None:
        self._experiment, self.count = experiment, count
        self._rng = np.random.default_rng(seed)
        self._workers = [self._new() for _ in range(count)]

    def publish(self, state: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return state

    def execute(
        self, tasks: Sequence[Task[Any]], states: Sequence[Mapping[str, np.ndarray]]
    ) -> Iterator[tuple[int, Outcome[Any]]]:
        for position in self._rng.permutation(len(tasks)):
            at = int(self._rng.integers(self.count))
            if self._rng.random() < 0.2:
                self._workers[at] = self._new()
            if self._rng.random() < 0.2:
                self._workers[at].execute(tasks[position], states[position])
            yield int(position), self._workers[at].execute(tasks[position], states[position])

    def take_usage(self) -> Usage:
        return Usage()

    def close(self) -> None:
        """Nothing to give back."""

    def _new(self) -> Worker:
        return worker_of(self._experiment)

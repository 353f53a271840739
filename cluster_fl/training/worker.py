"""What a pool hosts: resident data, built modules, and the tasks that run on them. Knows nothing of Ray."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from cluster_fl import methods
from cluster_fl.config import Config
from cluster_fl.data.batching import Resident
from cluster_fl.data.datasets import Dataset
from cluster_fl.data.partition import Shares
from cluster_fl.models.layered import Layered
from cluster_fl.nesting.extraction import extract
from cluster_fl.nesting.plan import Plan

Result = TypeVar("Result")
Out = TypeVar("Out", covariant=True)


class Task(Protocol[Out]):
    """One call to a pool: a pure function of itself and the state, so repeating it elsewhere is harmless.

    ``work`` predicts its duration in arbitrary but common units; the longest go first.
    """

    @property
    def work(self) -> float: ...

    def run(self, worker: Worker, state: Mapping[str, np.ndarray]) -> Out: ...


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """What a task returned, and the wall-clock seconds it kept its pool busy."""

    result: Result
    seconds: float


def _make_deterministic(device: torch.device) -> None:
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


class Worker:
    """One pool's share of the machine. One thread, since two give other bits than one."""

    def __init__(
        self, config: Config, plan: Plan, dataset: Dataset, shares: Shares, device: torch.device
    ) -> None:
        self.config, self.plan, self.shares, self.device = config, plan, shares, device
        _make_deterministic(device)
        self.data = Resident(dataset, device)
        self.program = methods.get(config.method).program(config, plan)
        self._full = plan.model.build()
        self._modules: dict[int, Layered] = {}

    def execute(self, task: Task[Result], state: Mapping[str, np.ndarray]) -> Outcome[Result]:
        # The caller's thread count is put back, for callers that share the process.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        start = time.perf_counter()
        try:
            result = task.run(self, state)
        finally:
            torch.set_num_threads(threads)
        return Outcome(result, time.perf_counter() - start)

    def module(self, level: int) -> Layered:
        """The level's module, built once and kept; its weights are whatever its last user left."""
        if level not in self._modules:
            small = extract(self._full, self.plan.anatomy, self.plan.level(level).submodel)
            self._modules[level] = small.to(self.device).to(memory_format=torch.channels_last)
        return self._modules[level]

    def fresh(self, level: int) -> Layered:
        """A copy of the level's module that its user may change."""
        return copy.deepcopy(self.module(level))

"""What a pool hosts: resident data, built modules, and the tasks that run on them. Knows nothing of Ray."""

from __future__ import annotations

import copy
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from cluster_fl.config import Config
from cluster_fl.data.batching import Resident
from cluster_fl.data.datasets import Dataset
from cluster_fl.data.partition import Shares
from cluster_fl.models.layered import Layered
from cluster_fl.nesting.extraction import extract
from cluster_fl.nesting.plan import Plan
from cluster_fl.nesting.submodel import Submodel
from cluster_fl.training.program import LocalProgram

Result = TypeVar("Result")
Out = TypeVar("Out", covariant=True)


class Task(Protocol[Out]):
    """One call to a pool: a pure function of itself and the state, so repeating it elsewhere is harmless.

    ``work`` predicts its duration in arbitrary but common units; the longest go first. Tasks of the same
    ``home`` are best run by the same pool, which may have kept something for them; None: anywhere.
    """

    @property
    def work(self) -> float: ...

    @property
    def home(self) -> Hashable: ...

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
        self,
        config: Config,
        plan: Plan,
        program: LocalProgram,
        dataset: Dataset,
        shares: Shares,
        device: torch.device,
    ) -> None:
        self.config, self.plan, self.program = config, plan, program
        self.shares, self.device = shares, device
        _make_deterministic(device)
        self.data = Resident(dataset, device)
        self._full = plan.model.untrained().build()
        self._modules: dict[Hashable, Layered] = {}
        self._kept: dict[tuple[int, Hashable], Any] = {}

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

    def module(self, submodel: Submodel) -> Layered:
        """A module of the submodel's shape, built once and kept; its weights are whatever its last user left."""
        shape = submodel.shape
        if shape not in self._modules:
            small = extract(self._full, self.plan.anatomy, submodel)
            self._modules[shape] = small.to(self.device).to(memory_format=torch.channels_last)
        return self._modules[shape]

    def fresh(self, submodel: Submodel) -> Layered:
        """A copy of the submodel's module that its user may change."""
        return copy.deepcopy(self.module(submodel))

    def keep(self, round: int, key: Hashable, value: Any) -> None:
        """Keeps a value until the first one of another round comes."""
        if any(kept_round != round for kept_round, _ in self._kept):
            self._kept.clear()
        self._kept[round, key] = value

    def kept(self, round: int, key: Hashable) -> Any:
        """What was kept in this round, or None: another pool did the work, or this one is new."""
        return self._kept.get((round, key))

"""Client pools as Ray actors.

A pool is a plain object in an actor that is never restarted by Ray: the driver sees every death, starts
another pool and sends the task again, so a retry is counted and bounded. Tasks are pure functions of
themselves and the state, so a repeated one returns the same bits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import ray
import torch
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError, UnserializableException

from actors.placement import pool_count
from actors.pools import Usage, longest_first
from cluster_fl.config import Config
from cluster_fl.data.datasets import Dataset
from cluster_fl.data.partition import Shares
from cluster_fl.errors import ClusterFLError, RunError
from cluster_fl.experiment import Experiment
from cluster_fl.nesting.plan import Plan
from cluster_fl.training.program import LocalProgram
from cluster_fl.training.worker import Outcome, Task, Worker

Result = TypeVar("Result")

# Importing torch and mapping the data takes seconds; longer means that there is no room.
START_TIMEOUT_S = 180


class Pool:
    """One actor: a worker on the device that Ray assigned."""

    def __init__(
        self, config: Config, plan: Plan, program: LocalProgram, dataset: Dataset, shares: Shares
    ) -> None:
        torch.set_num_threads(1)
        self._worker = Worker(config, plan, program, dataset, shares, _device())

    def device(self) -> str:
        """Answers once the worker stands."""
        return self._worker.device.type

    def execute(self, task: Task[Result], state: Mapping[str, np.ndarray]) -> Outcome[Result]:
        return self._worker.execute(task, state)


def _device() -> torch.device:
    # By what Ray assigned: a CPU-only actor on a GPU node sees every GPU.
    assigned = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    return torch.device("cuda", 0) if assigned and torch.cuda.is_available() else torch.device("cpu")


class RayPools:
    """The pools of one run. What they share is put once and owned by the caller (the driver)."""

    def __init__(self, experiment: Experiment) -> None:
        self._cluster = experiment.config.cluster
        self.count, self._usage = pool_count(self._cluster), Usage()
        config, plan, program = experiment.config, experiment.plan, experiment.program
        shared = (config, plan, program, experiment.dataset, experiment.population.shares)
        self._shared = [ray.put(part) for part in shared]
        self._idle: list[Any] = []
        self._alive: list[Any] = []  # idle, busy or starting: what `close` must end
        self._homes: dict[Hashable, Any] = {}  # which pool may have kept something for which tasks
        self._starting = {pool.device.remote(): pool for pool in (self._start() for _ in range(self.count))}
        self.device = self._await_all()

    def publish(self, state: Mapping[str, np.ndarray]) -> Any:
        return ray.put(state)

    def execute(
        self, tasks: Sequence[Task[Result]], states: Sequence[Any]
    ) -> Iterator[tuple[int, Outcome[Result]]]:
        if not any(task.home in self._homes for task in tasks):
            self._homes.clear()  # another round, or tasks that any pool may run
        queue, attempts = deque(longest_first(tasks)), [0] * len(tasks)
        running: dict[Any, tuple[Any, int]] = {}
        last_done: dict[Any, float] = dict.fromkeys(self._idle, time.perf_counter())
        while queue or running:
            for pool, position in self._matched(queue, tasks):
                running[pool.execute.remote(tasks[position], states[position])] = pool, position
            (done, *_), _ = ray.wait([*running, *self._starting], num_returns=1)
            if done in self._starting:
                last_done[self._admit(done)] = time.perf_counter()
                continue
            pool, position = running.pop(done)
            try:
                outcome = ray.get(done)
            except (RayActorError, ObjectLostError) as error:
                attempts[position] += 1
                self._give_up_after(attempts[position], tasks[position], error)
                queue.appendleft(position)
                last_done.pop(pool)
                self._alive.remove(pool)
                pool = self._start()
                self._starting[pool.device.remote()] = pool
                continue
            except RayTaskError as error:
                raise task_error(error, tasks[position]) from error
            except UnserializableException as error:
                raise RunError(f"{describe(tasks[position])}: {_last_line(error)}") from error
            else:
                self._usage.busy_s += outcome.seconds
                yield position, outcome
            last_done[pool] = time.perf_counter()
            self._idle.append(pool)
        end = time.perf_counter()
        self._usage.tail_s += sum(end - at for at in last_done.values())

    def _matched(self, queue: deque[int], tasks: Sequence[Task[Any]]) -> list[tuple[Any, int]]:
        """Idle pools and what they do next; a task whose home is alive waits for it."""
        matched = []
        for position in list(queue):
            home = self._homes.get(tasks[position].home)
            fit = [p for p in self._idle if p == home or home not in self._alive]
            if fit:
                self._idle.remove(fit[-1])
                queue.remove(position)
                matched.append((fit[-1], position))
                if tasks[position].home is not None:
                    self._homes[tasks[position].home] = fit[-1]
        return matched

    def take_usage(self) -> Usage:
        usage, self._usage = self._usage, Usage()
        return usage

    def close(self) -> None:
        for pool in self._alive:
            ray.kill(pool)

    def _await_all(self) -> str:
        """The device of the pools once all of them stand: imports and data are nobody's round."""
        pending = list(self._starting)
        _, late = ray.wait(pending, num_returns=len(pending), timeout=START_TIMEOUT_S)
        if late:
            raise RunError(
                f"{len(late)} of {self.count} pools did not start within {START_TIMEOUT_S} s: the cluster has no free "
                f"{self._cluster.cpus_per_pool:g} CPUs and {self._cluster.gpus_per_pool:g} GPUs for each."
            )
        devices = {self._answer(ref) for ref in pending}
        self._idle = [self._starting.pop(ref) for ref in pending]
        if len(devices) > 1:
            raise RunError("some pools have a GPU that works and others have none: results would differ.")
        return devices.pop()

    def _admit(self, started: Any) -> Any:
        """A pool that stands now joins the idle ones."""
        pool = self._starting.pop(started)
        self._answer(started)
        self._idle.append(pool)
        return pool

    def _answer(self, started: Any) -> str:
        try:
            device: str = ray.get(started)
        except (RayActorError, RayTaskError) as error:
            raise RunError(f"a pool could not start: {_last_line(error)}") from error
        return device

    def _start(self) -> Any:
        options = {
            "num_cpus": self._cluster.cpus_per_pool,
            "num_gpus": self._cluster.gpus_per_pool,
            "max_restarts": 0,
            "max_task_retries": 0,
            # Inside a placement group (a sweep's trial) its bundles decide instead.
            "scheduling_strategy": None if ray.util.get_current_placement_group() else "SPREAD",
        }
        pool = ray.remote(Pool).options(**options).remote(*self._shared)
        self._alive.append(pool)
        return pool

    def _give_up_after(self, attempts: int, task: Task[Any], error: Exception) -> None:
        self._usage.retries += 1
        if attempts > self._cluster.retries:
            raise RunError(
                f"{describe(task)}: its pool died {attempts} times (cluster.retries={self._cluster.retries}): "
                f"{str(error).splitlines()[0]}"
            ) from error


def task_error(error: RayTaskError, task: Task[Any]) -> ClusterFLError:
    """What a task raised in its pool, as the one line that reaches the user."""
    cause = error.cause
    if isinstance(cause, ClusterFLError):
        return cause
    return RunError(f"{describe(task)}: {type(cause).__name__}: {' '.join(str(cause).split())}")


def _last_line(error: Exception) -> str:
    """Ray's messages end with the cause."""
    return str(error).strip().splitlines()[-1].strip()


def describe(task: Task[Any]) -> str:
    clients = getattr(task, "clients", ())
    level = getattr(task, "level", "?")
    return f"{type(task).__name__.lower()} of level {level}, clients {', '.join(map(str, clients)) or '-'}"

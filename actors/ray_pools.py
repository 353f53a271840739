"""Client pools as Ray actors.

A pool is a plain object in an actor that is never restarted by Ray: the driver sees every death, starts
another pool where there is room, and sends the task again, so a retry is counted and bounded. Tasks are pure
functions of themselves and the state, so a repeated one returns the same bits. Nodes that join are used from
the next phase on.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import ray
import torch
from ray.exceptions import (
    ActorUnschedulableError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
    UnserializableException,
)

from actors.placement import Place, places
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
# How a pool's end shows: it died, its node is gone, or what it returned went with its node.
GONE = (RayActorError, ActorUnschedulableError, ObjectLostError)


class Pool:
    """One actor: a worker on the device that Ray assigned."""

    def __init__(
        self, config: Config, plan: Plan, program: LocalProgram, dataset: Dataset, shares: Shares
    ) -> None:
        torch.set_num_threads(1)
        device = _device(config.cluster.gpus_per_pool)
        self._worker = Worker(config, plan, program, dataset, shares, device)

    def computes(self) -> tuple[str, str]:
        """On which kind of device and with which torch: what the bits depend on. Answers once the worker stands."""
        return self._worker.device.type, torch.__version__

    def execute(self, task: Task[Result], state: Mapping[str, np.ndarray]) -> Outcome[Result]:
        return self._worker.execute(task, state)


def _device(share: float) -> torch.device:
    # By what Ray assigned: a CPU-only actor on a GPU node sees every GPU.
    assigned = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    if not assigned or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", 0)
    if share < 1:
        # Ray's fractions are for scheduling alone; nothing else keeps a pool off its neighbours' memory.
        torch.cuda.set_per_process_memory_fraction(share, device)
    return device


@dataclass(eq=False)
class Hosted:
    """A pool, and the place where it lives."""

    actor: Any
    place: Place


class RayPools:
    """The pools of one run. What they share is put once and owned by the caller (the driver)."""

    def __init__(self, experiment: Experiment) -> None:
        self._cluster, self._usage = experiment.config.cluster, Usage()
        self._places = places(self._cluster)
        config, plan, program = experiment.config, experiment.plan, experiment.program
        shared = (config, plan, program, experiment.dataset, experiment.population.shares)
        self._shared = [ray.put(part) for part in shared]
        self._idle: list[Hosted] = []
        self._alive: list[Hosted] = []  # idle, busy or starting: what `close` must end
        self._starting: dict[Any, Hosted] = {}  # by what will tell that it stands
        self._failures: Counter[Place] = Counter()  # starts in a row that failed
        self._homes: dict[Hashable, Hosted] = {}  # which pool may have kept something for which tasks
        self._computes: tuple[str, str] | None = None
        self._ready = False
        self._fill()
        self._await_all()

    @property
    def count(self) -> int:
        return len(self._alive) - len(self._starting)

    @property
    def device(self) -> str:
        assert self._computes is not None
        return self._computes[0]

    def publish(self, state: Mapping[str, np.ndarray]) -> Any:
        self._usage.store_bytes += sum(array.nbytes for array in state.values())
        try:
            return ray.put(state)
        except RayError as error:
            raise RunError(f"the weights cannot be shared: {_last_line(error)}") from error

    def execute(
        self, tasks: Sequence[Task[Result]], states: Sequence[Any]
    ) -> Iterator[tuple[int, Outcome[Result]]]:
        if not any(task.home in self._homes for task in tasks):
            self._homes.clear()  # another round, or tasks that any pool may run
        self._fill()
        queue, attempts = deque(longest_first(tasks)), [0] * len(tasks)
        running: dict[Any, tuple[Hosted, int]] = {}
        last_done: dict[Hosted, float] = dict.fromkeys(self._idle, time.perf_counter())
        while queue or running:
            for pool, position in self._matched(queue, tasks):
                running[pool.actor.execute.remote(tasks[position], states[position])] = pool, position
            done = self._first(list(running))
            if done in self._starting:
                self._admit(done)
                last_done |= {pool: time.perf_counter() for pool in self._idle if pool not in last_done}
                continue
            pool, position = running.pop(done)
            try:
                outcome = ray.get(done)
            except GONE as error:
                attempts[position] += 1
                self._give_up_after(attempts[position], tasks[position], error)
                queue.appendleft(position)
                last_done.pop(pool)
                self._end(pool)
                self._fill()
                continue
            except RayTaskError as error:
                raise task_error(error, tasks[position]) from error
            except (UnserializableException, RayError) as error:
                raise RunError(f"{describe(tasks[position])}: {_last_line(error)}") from error
            else:
                self._usage.busy_s += outcome.seconds
                yield position, outcome
            last_done[pool] = time.perf_counter()
            self._idle.append(pool)
        end = time.perf_counter()
        self._usage.tail_s += sum(end - at for at in last_done.values())

    def _matched(self, queue: deque[int], tasks: Sequence[Task[Any]]) -> list[tuple[Hosted, int]]:
        """Idle pools and what they do next; a task whose home is alive waits for it."""
        matched = []
        for position in list(queue):
            home = self._homes.get(tasks[position].home)
            fit = [pool for pool in self._idle if pool is home or home not in self._alive]
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
            ray.kill(pool.actor)

    # How pools come and go.

    def _fill(self) -> None:
        """Starts the pools that are missing, where there is room for them."""
        for place in self._places.missing(Counter(pool.place for pool in self._alive)):
            options = {
                "num_cpus": self._cluster.cpus_per_pool,
                "num_gpus": self._cluster.gpus_per_pool,
                "max_restarts": 0,
                "max_task_retries": 0,
                "scheduling_strategy": self._places.strategy(place),
            }
            pool = Hosted(ray.remote(Pool).options(**options).remote(*self._shared), place)
            self._alive.append(pool)
            self._starting[pool.actor.computes.remote()] = pool

    def _await_all(self) -> None:
        """Until all pools stand: imports and data are nobody's round. With ``auto``, late ones join later."""
        end = time.monotonic() + START_TIMEOUT_S
        while self._starting and (left := end - time.monotonic()) > 0:
            done, _ = ray.wait(list(self._starting), num_returns=1, timeout=left)
            for started in done:
                self._admit(started)
                self._fill()
        if self._starting and (self._places.wanted is not None or not self._idle):
            raise self._no_room(f"{len(self._starting)} of {len(self._alive)} pools did not start")
        self._ready = True

    def _first(self, running: Sequence[Any]) -> Any:
        """The first task or start that ends. With nothing to do it on, waits for a node with room.

        Raises:
            RunError: nothing runs, and no pool has started for three minutes.
        """
        end = time.monotonic() + START_TIMEOUT_S
        while True:
            pending = [*running, *self._starting]
            done, _ = (
                ray.wait(pending, num_returns=1, timeout=None if running else 1) if pending else ([], [])
            )
            if done:
                return done[0]
            if time.monotonic() > end:
                raise self._no_room("no pool is left and none could be started")
            if not pending:
                time.sleep(1)
            self._fill()

    def _admit(self, started: Any) -> None:
        """A pool that stands joins the idle ones, unless it would compute other bits than they do."""
        pool = self._starting.pop(started)
        try:
            computes: tuple[str, str] = ray.get(started)
        except GONE as error:
            self._end(pool)
            self._failures[pool.place] += pool.place in self._places.present()  # else its node is to blame
            failed = isinstance(error, RayActorError) and error.actor_init_failed
            if failed or self._failures[pool.place] > self._cluster.retries:
                raise RunError(f"a pool could not start: {_last_line(error)}") from error
            return
        except RayTaskError as error:
            raise RunError(f"a pool could not start: {_last_line(error)}") from error
        self._failures.pop(pool.place, None)
        self._computes = self._computes or computes
        if computes == self._computes:
            self._idle.append(pool)
            return
        if not self._ready:
            both = f"{_name(self._computes)} and others on {_name(computes)}"
            raise RunError(f"some pools compute on {both}: results would differ.")
        self._places.avoid(pool.place)
        self._end(pool)

    def _end(self, pool: Hosted) -> None:
        self._alive.remove(pool)
        ray.kill(pool.actor)  # where only what it returned was lost, it still lives

    def _no_room(self, what: str) -> RunError:
        each = f"{self._cluster.cpus_per_pool:g} CPUs and {self._cluster.gpus_per_pool:g} GPUs"
        return RunError(
            f"{what} within {START_TIMEOUT_S} s: the cluster has no free {each} for each "
            f"(nodes: {self._places.describe()}; others may be using them)."
        )

    def _give_up_after(self, attempts: int, task: Task[Any], error: Exception) -> None:
        self._usage.retries += 1
        if attempts > self._cluster.retries:
            raise RunError(
                f"{describe(task)}: its pool died {attempts} times (cluster.retries={self._cluster.retries}): "
                f"{str(error).splitlines()[0]}"
            ) from error


def _name(computes: tuple[str, str]) -> str:
    device, version = computes
    return f"{device} with torch {version}"


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

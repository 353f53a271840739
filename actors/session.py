"""Connects to a Ray cluster, or starts one of its own, and runs a driver actor on it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import ray
from ray._private import ray_constants
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.driver import Driver
from actors.events import Event, RoundDone
from actors.metrics import Pulse
from actors.ray_pools import RayPools
from cluster_fl.config import ClusterConfig, Config
from cluster_fl.errors import ClusterFLError, RunError
from cluster_fl.records import RunFolder


class DriverActor(Driver):
    """A driver whose pulse Ray exports."""

    def run(self) -> Generator[Event, None, None]:
        pulse = Pulse(self._folder.path.name)
        for event in super().run():
            if isinstance(event, RoundDone):
                pulse.beat(event.record)
            yield event


class Session:
    """A driver actor as seen by its caller."""

    def __init__(self, config: Config, folder: RunFolder, resume: bool) -> None:
        # On this node, whose disk has the run folder. Two threads, so that `stop` is answered while `run` runs; no
        # CPU of its own, since it mostly waits.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(DriverActor).options(num_cpus=0, max_concurrency=2, scheduling_strategy=here)
        self._driver = actor.remote(config, folder, RayPools, resume)

    def run(self) -> Iterator[Event]:
        """The driver's events; raises what it raises."""
        try:
            for event in self._driver.run.options(num_returns="streaming").remote():
                yield ray.get(event)
        except RayTaskError as error:
            if isinstance(error.cause, ClusterFLError):
                raise error.cause from error
            raise RunError(f"the driver failed: {type(error.cause).__name__}: {error.cause}") from error
        except RayActorError as error:
            raise RunError(f"the driver died: {str(error).strip().splitlines()[-1].strip()}") from error

    def stop(self) -> int:
        try:
            rounds: int = ray.get(self._driver.stop.remote(), timeout=60)
        except (RayActorError, RayTaskError, GetTimeoutError):
            return 0
        return rounds


@contextmanager
def connected(cluster: ClusterConfig) -> Iterator[None]:
    """A Ray cluster for the length of a ``with``: an existing one, or one of our own that ends with it."""
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    common: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    with nullcontext() if address else _on_loopback():
        try:
            if address:
                ray.init(address=address, **common)
            else:
                ray.init(address="local", include_dashboard=False, **own_resources(cluster), **common)
        except Exception as error:  # Ray raises whatever it likes, plain Exception included
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise RunError(f"cannot connect to Ray at {address or 'local'}: {why}") from error
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A cluster that is started meanwhile can be reached from this machine alone; Ray's own listens to all the world.

    The switch is that of the systems on which Ray makes no clusters. It is read here when Ray is imported, which is
    over, and by the processes that Ray starts.
    """
    known, variable = ray_constants.ENABLE_RAY_CLUSTER, ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before = os.environ.get(variable)
    ray_constants.ENABLE_RAY_CLUSTER, os.environ[variable] = False, "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = known
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def own_resources(cluster: ClusterConfig) -> dict[str, float]:
    """What a cluster of our own declares: this machine, or more where the pools ask for it."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if isinstance(cluster.pools, str):
        return {"num_cpus": max(cores, math.ceil(cluster.cpus_per_pool))}
    resources = {"num_cpus": max(cores, math.ceil(cluster.pools * cluster.cpus_per_pool))}
    if cluster.gpus_per_pool:
        each = cluster.gpus_per_pool
        resources["num_gpus"] = (
            math.ceil(cluster.pools / int(1 / each + 1e-9)) if each <= 1 else cluster.pools * each
        )
    return resources

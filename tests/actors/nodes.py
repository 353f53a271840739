"""A Ray cluster of several nodes on this machine, whose pools and nodes can be killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.processes import children, wait

# A node counts as dead after some three seconds of silence; Ray's own default is about seventeen.
SYSTEM = {"health_check_period_ms": 500, "health_check_failure_threshold": 6, "health_check_timeout_ms": 500}
STORE = 100 * 2**20


class Nodes:
    """A head without room for pools, where the driver lives, and nodes with some."""

    def __init__(self) -> None:
        head = {
            "num_cpus": 0,
            "include_dashboard": False,
            "object_store_memory": STORE,
            "_system_config": SYSTEM,
        }
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes: list[Any] = []

    def connect(self) -> None:
        ray.init(address=self._cluster.address, log_to_driver=False, configure_logging=False)

    def add(self, cpus: float = 1, gpus: float = 0) -> None:
        """A node joins; returns once the cluster knows of it."""
        node = self._cluster.add_node(num_cpus=cpus, num_gpus=gpus, object_store_memory=STORE)
        self._nodes.append(node)
        if ray.is_initialized():
            wait(lambda: any(one["NodeID"] == node.node_id and one["Alive"] for one in ray.nodes()))

    def kill_node(self, number: int = 0) -> None:
        """SIGKILL of its raylet; its pools die with it."""
        self._cluster.remove_node(self._nodes.pop(number), allow_graceful=False)

    def kill_pool(self, number: int = 0) -> None:
        """SIGKILL of the process of one of the pools."""
        os.kill(self.pools()[number], signal.SIGKILL)

    def pools(self) -> list[int]:
        """Process numbers of all pools, node by node in the order in which the nodes joined."""
        return [pid for node in self._nodes for pid in _pools_under(_raylet(node))]

    @property
    def count(self) -> int:
        return len(self._nodes)

    def close(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()


@contextmanager
def cluster(*cpus: float) -> Iterator[Nodes]:
    """A connected cluster with nodes of so many CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        nodes = Nodes()
        try:
            for each in cpus:
                nodes.add(each)
            nodes.connect()
            yield nodes
        finally:
            nodes.close()


def _raylet(node: Any) -> int:
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid


def _pools_under(raylet: int) -> list[int]:
    return sorted(pid for pid in children(raylet) if _name(pid).startswith(b"ray::Pool"))


def _name(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # gone meanwhile
        return b""

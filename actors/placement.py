"""How many pools fit, node by node: fractions of a GPU never straddle two nodes."""

from __future__ import annotations

from typing import Any

import ray

from cluster_fl.config import ClusterConfig
from cluster_fl.errors import UserError


def pool_count(cluster: ClusterConfig) -> int:
    """Pools to start on the connected cluster.

    Raises:
        UserError: not even one fits, or fewer than ``cluster.pools``; says what each node has.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    room = sum(pools_on(node["Resources"], cluster) for node in nodes)
    wanted = 1 if cluster.pools == "auto" else int(cluster.pools)
    if room < wanted:
        have = "; ".join(_describe(node, cluster) for node in nodes)
        raise UserError(
            "cluster.pools",
            cluster.pools,
            f"only {room} fit with {cluster.cpus_per_pool:g} CPUs and {cluster.gpus_per_pool:g} GPUs each ({have}).",
        )
    return room if cluster.pools == "auto" else wanted


def pools_on(resources: dict[str, float], cluster: ClusterConfig) -> int:
    """Pools that one node has room for."""
    limits = []
    if cluster.cpus_per_pool:
        limits.append(int(resources.get("CPU", 0) / cluster.cpus_per_pool + 1e-9))
    if cluster.gpus_per_pool:
        gpus, each = int(resources.get("GPU", 0)), cluster.gpus_per_pool
        limits.append(gpus * int(1 / each + 1e-9) if each <= 1 else int(gpus / each))
    return min(limits, default=1)


def _describe(node: dict[str, Any], cluster: ClusterConfig) -> str:
    resources = node["Resources"]
    room = pools_on(resources, cluster)
    return f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs: room for {room}"

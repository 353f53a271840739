"""Where pools live: so many a node, as evenly as there is room, or in the bundles of a placement group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster_fl.config import ClusterConfig
from cluster_fl.errors import UserError

Place = Hashable
Resources = Mapping[str, float]


class Places(ABC):
    """Where a run's pools may live.

    Attributes:
        wanted: how many pools there are to be; None: as many as there is room for.
    """

    def __init__(self, cluster: ClusterConfig) -> None:
        self._cluster = cluster
        self._avoided: set[Place] = set()
        self.wanted = None if cluster.pools == "auto" else int(cluster.pools)

    @abstractmethod
    def present(self) -> Mapping[Place, Resources]:
        """The places that there are at the moment, and what each has in all."""

    @abstractmethod
    def strategy(self, place: Place) -> Any:
        """What Ray is told to bring a pool there."""

    def missing(self, held: Mapping[Place, int]) -> list[Place]:
        """Where pools are to be started now, the emptiest places first.

        Args:
            held: how many pools each place has.
        """
        own = {place: has for place, has in self.present().items() if place not in self._avoided}
        room = {place: pools_on(has, self._cluster) for place, has in own.items()}
        count = {place: held.get(place, 0) for place in room}
        chosen: list[Place] = []
        while self.wanted is None or sum(count.values()) < self.wanted:
            free = [place for place in room if count[place] < room[place]]
            if not free:
                break
            place = min(free, key=lambda place: (count[place], -room[place], str(place)))
            count[place] += 1
            chosen.append(place)
        return chosen

    def avoid(self, place: Place) -> None:
        """No pool is to be started there again."""
        self._avoided.add(place)

    def describe(self) -> str:
        """What each place has room for."""
        rooms = (
            f"{has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs: room for {pools_on(has, self._cluster)}"
            for has in self.present().values()
        )
        return "; ".join(rooms) or "there is no node"


class Nodes(Places):
    """The nodes that are alive: fractions of a GPU never straddle two of them."""

    def present(self) -> Mapping[Place, Resources]:
        return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}

    def strategy(self, place: Place) -> NodeAffinitySchedulingStrategy:
        return NodeAffinitySchedulingStrategy(str(place), soft=False)


class Bundles(Places):
    """The bundles of a placement group but the first, which is the driver's (a sweep's trial).

    Ray moves a bundle whose node is lost.
    """

    def __init__(self, cluster: ClusterConfig, group: PlacementGroup) -> None:
        super().__init__(cluster)
        self._group = group

    def present(self) -> Mapping[Place, Resources]:
        return dict(list(enumerate(self._group.bundle_specs))[1:])

    def strategy(self, place: Place) -> PlacementGroupSchedulingStrategy:
        assert isinstance(place, int)
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=place)


def places(cluster: ClusterConfig) -> Places:
    """Those of the connected cluster, or of the placement group that the caller runs in.

    Raises:
        UserError: not even one pool fits, or fewer than ``cluster.pools``; says what each place has.
    """
    group = ray.util.get_current_placement_group()
    found = Nodes(cluster) if group is None else Bundles(cluster, group)
    room = len(found.missing({}))
    if room < (found.wanted or 1):
        each = f"{cluster.cpus_per_pool:g} CPUs and {cluster.gpus_per_pool:g} GPUs each"
        raise UserError("cluster.pools", cluster.pools, f"only {room} fit with {each} ({found.describe()}).")
    return found


def pools_on(resources: Resources, cluster: ClusterConfig) -> int:
    """Pools that one node, or one bundle, has room for."""
    limits = []
    if cluster.cpus_per_pool:
        limits.append(int(resources.get("CPU", 0) / cluster.cpus_per_pool + 1e-9))
    if cluster.gpus_per_pool:
        gpus, each = resources.get("GPU", 0), cluster.gpus_per_pool
        if gpus < 1:  # a bundle's share of one
            limits.append(int(gpus / each + 1e-9))
        else:
            limits.append(int(gpus) * int(1 / each + 1e-9) if each <= 1 else int(gpus / each))
    return min(limits, default=1)

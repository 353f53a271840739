"""How many pools fit, for many shapes of nodes; no Ray needed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.placement import pool_count, pools_on
from actors.session import own_resources
from cluster_fl.config import ClusterConfig
from cluster_fl.errors import UserError


def pools(cpus: float, gpus: float, cpus_each: float, gpus_each: float) -> int:
    cluster = ClusterConfig(cpus_per_pool=cpus_each, gpus_per_pool=gpus_each)
    return pools_on({"CPU": cpus, "GPU": gpus}, cluster)


@pytest.mark.parametrize(
    ("cpus", "gpus", "cpus_each", "gpus_each", "expected"),
    [
        (4, 0, 1, 0, 4),
        (4, 0, 2, 0, 2),
        (5, 0, 2, 0, 2),
        (1, 0, 2, 0, 0),
        (2, 0, 0.5, 0, 4),
        (1, 0, 0.1, 0, 10),
        (3, 0, 0.3, 0, 10),
        (64, 1, 1, 0.3, 3),
        (64, 2, 1, 0.3, 6),  # 2 / 0.3 is 6.67, but none straddles two GPUs
        (64, 2, 1, 0.7, 2),  # 2 / 0.7 is 2.86
        (64, 1, 1, 0.1, 10),
        (64, 1, 1, 0.05, 20),
        (64, 1, 1, 0.2, 5),
        (64, 4, 1, 0.25, 16),
        (64, 4, 1, 1.0, 4),
        (64, 4, 1, 2, 2),
        (64, 5, 1, 2, 2),
        (64, 1, 1, 2, 0),
        (64, 8, 1, 4, 2),
        (3, 4, 1, 0.25, 3),  # the cores limit
        (64, 0, 1, 0.5, 0),
        (1, 2, 0, 0.5, 4),  # no cores of its own
        (0, 0, 1, 0, 0),
    ],
)
def test_room(cpus: float, gpus: float, cpus_each: float, gpus_each: float, expected: int) -> None:
    assert pools(cpus, gpus, cpus_each, gpus_each) == expected


def test_a_node_without_gpus_names_none() -> None:
    assert pools_on({"CPU": 4.0}, ClusterConfig(gpus_per_pool=0.5)) == 0
    assert pools_on({}, ClusterConfig()) == 0


@given(st.integers(0, 16), st.integers(1, 10_000))
def test_fractions_are_dealt_gpu_by_gpu(gpus: int, parts: int) -> None:
    """Against dealing one by one in Ray's unit, a ten-thousandth of a GPU."""
    dealt, free = 0, [10_000] * gpus
    for i in range(gpus):
        while free[i] >= parts:
            free[i] -= parts
            dealt += 1
    assert pools(10**6, gpus, 1, parts / 10_000) == dealt


def nodes(*shapes: tuple[float, float], dead: int = 0) -> list[dict[str, Any]]:
    alive = [{"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus}} for cpus, gpus in shapes]
    return alive + [{"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}] * dead


@pytest.mark.parametrize(
    ("cluster", "shapes", "expected"),
    [
        (ClusterConfig(), [(2, 0), (3, 0)], 5),
        (ClusterConfig(cpus_per_pool=2), [(3, 0), (3, 0)], 2),  # three could come of six cores together
        (ClusterConfig(gpus_per_pool=0.5), [(2, 0), (2, 1), (1, 1)], 3),
        (ClusterConfig(gpus_per_pool=2), [(8, 1), (8, 1)], None),
        (ClusterConfig(pools=2), [(2, 0), (3, 0)], 2),
        (ClusterConfig(pools=6), [(2, 0), (3, 0)], None),
        (ClusterConfig(), [], None),
    ],
)
def test_pools_are_counted_node_by_node(
    monkeypatch: pytest.MonkeyPatch,
    cluster: ClusterConfig,
    shapes: list[tuple[float, float]],
    expected: int | None,
) -> None:
    monkeypatch.setattr("actors.placement.ray.nodes", lambda: nodes(*shapes, dead=1))
    if expected is not None:
        assert pool_count(cluster) == expected
        return
    with pytest.raises(UserError, match=rf"^cluster\.pools={cluster.pools}: only \d+ fit") as caught:
        pool_count(cluster)
    assert str(caught.value).count("room for") == len(shapes)


@given(
    st.integers(1, 40),
    st.sampled_from([0, 0.25, 0.5, 1, 1.5, 3]),
    st.sampled_from([0, 0.1, 0.3, 0.5, 1, 2, 3]),
)
def test_a_cluster_of_our_own_has_room_for_what_was_asked(pools: int, cpus: float, gpus: float) -> None:
    cluster = ClusterConfig(pools=pools, cpus_per_pool=cpus, gpus_per_pool=gpus)
    own = own_resources(cluster)
    if cpus or gpus:
        assert pools_on({"CPU": own["num_cpus"], "GPU": own.get("num_gpus", 0)}, cluster) >= pools
    assert all(float(amount).is_integer() for amount in own.values())

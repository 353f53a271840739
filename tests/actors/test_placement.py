"""How many pools fit, for many shapes of nodes; no Ray needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.placement import Nodes, places, pools_on
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
    """As Ray lists them; their names are their positions."""
    alive = [(True, {"CPU": cpus, "GPU": gpus}) for cpus, gpus in shapes]
    listed = alive + [(False, {"CPU": 64.0, "GPU": 8.0})] * dead
    return [
        {"Alive": here, "NodeID": str(number), "Resources": has} for number, (here, has) in enumerate(listed)
    ]


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts nodes where Ray would list them."""
    monkeypatch.setattr("actors.placement.ray.util.get_current_placement_group", lambda: None)

    def put(*shapes: tuple[float, float], dead: int = 1) -> None:
        monkeypatch.setattr("actors.placement.ray.nodes", lambda: nodes(*shapes, dead=dead))

    return put


@pytest.mark.parametrize(
    ("cluster", "shapes", "expected"),
    [
        (ClusterConfig(), [(2, 0), (3, 0)], "10101"),
        (ClusterConfig(cpus_per_pool=2), [(3, 0), (3, 0)], "01"),  # three could come of six cores together
        (ClusterConfig(gpus_per_pool=0.5), [(2, 0), (2, 1), (1, 1)], "121"),
        (ClusterConfig(pools=2), [(2, 0), (3, 0)], "10"),
        (ClusterConfig(pools=4), [(2, 0), (8, 0), (1, 0)], "1021"),
        (ClusterConfig(pools=3), [(2, 0), (3, 0), (2, 0)], "102"),
    ],
)
def test_pools_are_spread_node_by_node(
    show: Callable[..., None], cluster: ClusterConfig, shapes: list[tuple[float, float]], expected: str
) -> None:
    show(*shapes)
    assert "".join(map(str, places(cluster).missing({}))) == expected


@pytest.mark.parametrize(
    ("cluster", "shapes", "told"),
    [
        (ClusterConfig(gpus_per_pool=2), [(8, 1), (8, 1)], "8 CPUs, 1 GPUs: room for 0"),
        (ClusterConfig(pools=6), [(2, 0), (3, 0)], "2 CPUs, 0 GPUs: room for 2; 3 CPUs, 0 GPUs: room for 3"),
        (ClusterConfig(), [], "there is no node"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_arithmetic(
    show: Callable[..., None], cluster: ClusterConfig, shapes: list[tuple[float, float]], told: str
) -> None:
    show(*shapes)
    with pytest.raises(UserError, match=rf"^cluster\.pools={cluster.pools}: only \d+ fit") as caught:
        places(cluster)
    assert told in str(caught.value)


def test_nodes_come_and_go(show: Callable[..., None]) -> None:
    show((2, 0), (2, 0))
    every, three = places(ClusterConfig()), places(ClusterConfig(pools=3))
    assert every.missing({"0": 2, "1": 1}) == ["1"]
    assert every.missing({"0": 2, "1": 2}) == three.missing({"0": 2, "1": 1}) == []
    show((2, 0), (2, 0), (2, 0))  # one more
    assert every.missing({"0": 2, "1": 2}) == ["2", "2"]
    assert three.missing({"0": 2, "1": 1}) == []
    assert three.missing({"0": 1, "1": 1}) == ["2"]
    show((2, 0), dead=2)  # two less; their pools' ends may not have shown yet
    assert every.missing({"0": 1, "1": 2, "2": 2}) == ["0"]
    assert three.missing({"1": 2}) == ["0", "0"]
    show()
    assert every.missing({}) == three.missing({}) == []


def test_a_place_that_is_avoided_gets_no_pools(show: Callable[..., None]) -> None:
    show((2, 0), (2, 0))
    found = places(ClusterConfig())
    found.avoid("0")
    assert found.missing({}) == ["1", "1"]


@given(
    st.lists(st.integers(0, 5), max_size=6),
    st.lists(st.integers(0, 5), max_size=6),
    st.none() | st.integers(1, 12),
)
def test_pools_are_as_even_as_there_is_room(room: list[int], held: list[int], wanted: int | None) -> None:
    has = {
        str(number): min(pools, most) for number, (pools, most) in enumerate(zip(held, room, strict=False))
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actors.placement.ray.nodes", lambda: nodes(*((cpus, 0) for cpus in room)))
        found = Nodes(ClusterConfig(pools="auto" if wanted is None else wanted))
        started = Counter(found.missing(has))
    after = {str(node): has.get(str(node), 0) + started[str(node)] for node in range(len(room))}
    assert all(after[str(node)] <= room[node] for node in range(len(room)))
    total = sum(room) if wanted is None else max(sum(has.values()), min(wanted, sum(room)))
    assert sum(after.values()) == total
    # Nobody got one more while somebody else with room had fewer.
    for node in started:
        fewer = [other for other in after if after[other] < after[str(node)] - 1]
        assert all(after[other] == room[int(other)] for other in fewer)


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

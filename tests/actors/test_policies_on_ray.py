"""Round policies on real Ray: which pool trains what, and when it answers, is nobody's simulated time.

The whole matrix of methods and policies runs in this process (tests/methods/test_policies.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from actors.driver import Driver
from actors.events import Working
from actors.pools import InlinePools, Pools
from actors.ray_pools import RayPools
from actors.session import connected
from cluster_fl.config import ClusterConfig
from cluster_fl.experiment import Experiment
from cluster_fl.records import RunFolder
from tests.tiny import lines, outcome, run_here, tiny

POOLS = 4
STRAGGLERS = ("time.stragglers=lognormal", "time.dropout=0.1")
BUFFERED = ("time.policy=fedbuff", "time.policy.buffer=3", "rounds=6", "evaluate.every=3", *STRAGGLERS)
SLOW = pytest.mark.slow
POLICIES = [
    pytest.param(("time.policy=deadline", "time.policy.deadline_s=0.15"), marks=SLOW),
    pytest.param(
        ("time.policy=deadline", "time.policy.deadline_s=0.15", "time.policy.late=smaller"), marks=SLOW
    ),
    pytest.param(("time.policy=over_select", "clients.per_round=4"), marks=SLOW),
    pytest.param(("time.policy=tiers", "time.policy.tiers=2", "clients.per_round=3"), marks=SLOW),
    pytest.param(("time.policy=semi_sync", "time.policy.period_s=0.06"), marks=SLOW),
    pytest.param(("time.policy=fedasync", "rounds=6", "evaluate.every=3"), marks=SLOW),
]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with connected(ClusterConfig(pools=POOLS)):
            yield


@pytest.mark.parametrize("policy", POLICIES)
def test_pools_do_not_show(policy: tuple[str, ...], tmp_path: Path) -> None:
    config = tiny(tmp_path, *STRAGGLERS, *policy, "cluster.pools=2")
    run_here(config, tmp_path / "here", InlinePools)
    run_here(config, tmp_path / "ray", RayPools)
    assert outcome(tmp_path / "ray") == outcome(tmp_path / "here")


@pytest.mark.parametrize("pools", [pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW), POOLS])
def test_their_number_does_not_show_in_a_buffered_run(pools: int, tmp_path: Path) -> None:
    config = tiny(tmp_path, *BUFFERED, f"cluster.pools={pools}")
    run_here(config, tmp_path / "here", InlinePools)
    run_here(config, tmp_path / "ray", RayPools)
    assert outcome(tmp_path / "ray") == outcome(tmp_path / "here")
    started = [one["version"] for record in lines(tmp_path / "ray")[1:] for one in record["participants"]]
    rounds = [record["round"] for record in lines(tmp_path / "ray")[1:] for _ in record["participants"]]
    assert any(version < round for version, round in zip(started, rounds, strict=True))


def test_a_killed_pool_and_a_resumed_driver_leave_a_buffered_run_alone(tmp_path: Path) -> None:
    """A pool dies in the merge of round 2; the driver stops in round 4, with clients under way, and goes on here."""
    config = tiny(tmp_path, *BUFFERED, "cluster.pools=2")
    run_here(config, tmp_path / "here", InlinePools)
    made: list[RayPools] = []

    def make(experiment: Experiment) -> Pools:
        made.append(RayPools(experiment))
        return made[0]

    events = Driver(config, RunFolder(tmp_path / "ray"), make).run()
    for event in events:
        if isinstance(event, Working) and (event.round, event.phase, event.done) == (2, "train", 0):
            ray.kill(made[0]._alive[0].actor)
        if isinstance(event, Working) and (event.round, event.phase, event.done) == (4, "train", 1):
            break
    events.close()
    assert sum(record["retries"] for record in lines(tmp_path / "ray")) >= 1
    run_here(config, tmp_path / "ray", InlinePools, resume=True)
    assert outcome(tmp_path / "ray") == outcome(tmp_path / "here")

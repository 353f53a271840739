"""Published methods on real Ray: one that streams, ones with several passes, ones whose clients keep a state.

The whole matrix runs in this process (tests/methods/test_bits.py); here pools are actors, and one is killed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from actors.driver import Driver
from actors.events import Working
from actors.pools import Pools
from actors.ray_pools import RayPools
from actors.session import connected
from cluster_fl.config import ClusterConfig
from cluster_fl.experiment import Experiment
from cluster_fl.records import RunFolder
from tests.methods.common import small
from tests.tiny import lines, outcome, run_here


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with connected(ClusterConfig(pools=2)):
            yield


@pytest.mark.parametrize(
    ("method", "phase"),
    [("heterofl", "train"), ("nestfl", "compare"), ("feddf", "teach"), ("hermes", "train")],
)
def test_a_pool_killed_in_a_phase_leaves_the_bits_alone(method: str, phase: str, tmp_path: Path) -> None:
    config = small(tmp_path, method, "cluster.pools=2")
    run_here(config, tmp_path / "here")
    made: list[RayPools] = []

    def make(experiment: Experiment) -> Pools:
        made.append(RayPools(experiment))
        return made[0]

    for event in Driver(config, RunFolder(tmp_path / "ray"), make).run():
        if isinstance(event, Working) and (event.round, event.phase, event.done) == (1, phase, 0):
            # The driver waits for its next event: the pool dies before it is asked, or in the middle of its task.
            ray.kill(made[0]._alive[0].actor)
    assert outcome(tmp_path / "ray") == outcome(tmp_path / "here")
    assert sum(record["retries"] for record in lines(tmp_path / "ray")) >= 1

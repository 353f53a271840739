"""Real Ray with several nodes on this machine: pools and nodes that die or join never show in the bits."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.driver import Driver
from actors.events import Planned, RoundDone, Working
from actors.pools import InlinePools
from actors.ray_pools import RayPools
from cluster_fl.config import Config
from cluster_fl.errors import UserError
from cluster_fl.experiment import Experiment
from cluster_fl.records import RunFolder
from tests.actors.nodes import Nodes, cluster
from tests.processes import DEADLINE_S
from tests.tiny import lines, outcome, run_here, tiny

Computed = tuple[list[dict[str, Any]], dict[str, Any]]
Act = Callable[[Nodes], None]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with cluster(1, 1) as made:
        yield made


@pytest.fixture
def two(nodes: Nodes) -> Nodes:
    """The cluster with two nodes of one CPU, whatever the test before did to it."""
    while nodes.count < 2:
        nodes.add()
    while nodes.count > 2:
        nodes.kill_node()
    return nodes


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Computed:
    """The run without Ray."""
    folder = tmp_path_factory.mktemp("inline")
    run_here(tiny(folder), folder / "run", InlinePools)
    return outcome(folder / "run")


def kill_pool(nodes: Nodes) -> None:
    nodes.kill_pool()


def kill_node(nodes: Nodes) -> None:
    nodes.kill_node()


def replace_node(nodes: Nodes) -> None:
    nodes.kill_node()
    nodes.add()


def add_node(nodes: Nodes) -> None:
    nodes.add()


class Watched(RayPools):
    """Tells, once, when a task of round 1 has returned and its result has not been fetched yet."""

    returned: Callable[[], None] | None = None
    round = 0

    def _first(self, running: Sequence[Any]) -> Any:
        done = super()._first(running)
        if done in running and self.round == 1 and self.returned is not None:
            act, self.returned = self.returned, None
            act()
        return done


def disturbed(config: Config, path: Path, when: str, act: Callable[[], None]) -> None:
    """A run to which something happens, once, in round 1."""
    made: list[Watched] = []

    def make(experiment: Experiment) -> Watched:
        made.append(Watched(experiment))
        if when == "return":
            made[0].returned = act
        return made[0]

    acted = when == "return"
    for event in Driver(config, RunFolder(path), make).run():
        if isinstance(event, Working):
            made[0].round = event.round
        begun = isinstance(event, Working) and (event.round, event.phase, event.done) == (1, when, 1)
        if not acted and (begun or (when == "checkpoint" and _saved(path, 2))):
            acted = True
            act()
    assert acted
    assert made[0].returned is None


def _saved(path: Path, rounds: int) -> bool:
    return (path / "checkpoints" / f"round-{rounds:05d}").exists()


WHEN = ("train", "return", "evaluate", "checkpoint")
CASES = [
    pytest.param(when, act, marks=[] if (when, act) in quick else [pytest.mark.slow])
    for quick in [{("train", kill_node), ("return", replace_node), ("evaluate", kill_pool)}]
    for when in WHEN
    for act in (kill_pool, kill_node, replace_node, add_node)
]


@pytest.mark.parametrize(("when", "act"), CASES)
def test_whatever_dies_or_joins_leaves_the_bits_alone(
    tmp_path: Path, two: Nodes, reference: Computed, when: str, act: Act
) -> None:
    config = tiny(tmp_path, "train.cohort_size=1", "cluster.retries=10")
    disturbed(config, tmp_path / "run", when, lambda: act(two))
    assert outcome(tmp_path / "run") == reference


def test_a_node_that_joins_is_used_from_the_next_phase_on(
    tmp_path: Path, two: Nodes, reference: Computed
) -> None:
    made: list[RayPools] = []

    def make(experiment: Experiment) -> RayPools:
        made.append(RayPools(experiment))
        return made[0]

    config = tiny(tmp_path, "train.cohort_size=1")
    for event in Driver(config, RunFolder(tmp_path / "run"), make).run():
        if isinstance(event, RoundDone) and event.record["round"] == 0:
            two.add()
        if isinstance(event, RoundDone) and event.record["round"] == 1:
            ray.wait(list(made[0]._starting), timeout=DEADLINE_S)
    assert outcome(tmp_path / "run") == reference
    assert [record["wall"]["pools"] for record in lines(tmp_path / "run")] == [2, 2, 3]
    assert [record["retries"] for record in lines(tmp_path / "run")] == [0, 0, 0]


def test_pools_are_spread_and_what_does_not_fit_is_refused_at_once(tmp_path: Path, two: Nodes) -> None:
    planned = run_here(tiny(tmp_path, "rounds=1", "cluster.pools=2"), tmp_path / "run", RayPools)[0]
    assert isinstance(planned, Planned)
    assert planned.pools == 2
    with pytest.raises(
        UserError, match=r"^cluster\.pools=3: only 2 fit .*1 CPUs, 0 GPUs: room for 1; "
    ) as caught:
        run_here(tiny(tmp_path, "cluster.pools=3"), tmp_path / "more", RayPools)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_thirty_random_kills(tmp_path: Path, two: Nodes) -> None:
    """A soak: after each of 30 moments of a run, drawn with a fixed seed, a pool or a node dies, or a node joins."""
    long = ("rounds=12", "train.cohort_size=1", "cluster.retries=30")
    run_here(tiny(tmp_path, *long), tmp_path / "calm", InlinePools)
    rng = random.Random(7)
    events = Driver(tiny(tmp_path, *long), RunFolder(tmp_path / "run"), RayPools).run()
    kills, left = 0, rng.randint(1, 4)
    for event in events:
        if kills == 30 or not isinstance(event, Working | RoundDone):
            continue
        left -= 1
        if left:
            continue
        left = rng.randint(1, 4)
        pools = two.pools()
        if pools and rng.random() < 0.7:
            two.kill_pool(rng.randrange(len(pools)))
        else:
            two.kill_node(rng.randrange(two.count))
            two.add()
        kills += 1
    assert kills == 30
    assert outcome(tmp_path / "run") == outcome(tmp_path / "calm")

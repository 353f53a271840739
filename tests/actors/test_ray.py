"""Real Ray on this machine: the number of pools, their deaths and their order never show in the bits."""

from __future__ import annotations

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from actors.driver import Driver
from actors.events import Finished, Planned, RoundDone, Working
from actors.pools import InlinePools
from actors.ray_pools import RayPools
from actors.session import Session, connected
from cluster_fl import enlisting
from cluster_fl.aggregation.nested import PartialSum
from cluster_fl.config import ClusterConfig
from cluster_fl.errors import RunError, UserError
from cluster_fl.experiment import Experiment, prepare
from cluster_fl.records import RunFolder, weights_sha256
from cluster_fl.training import cohort
from cluster_fl.training.cohort import Cohort, CohortResult
from cluster_fl.training.worker import Worker
from tests.processes import children, listeners, wait
from tests.test_merging import TwoPasses, Weighed
from tests.tiny import lines, outcome, planned, round_of, run_here, tiny

POOLS = 4
Computed = tuple[list[dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with connected(ClusterConfig(pools=POOLS)):
            yield


@pytest.fixture(autouse=True)
def no_pool_is_left() -> Iterator[None]:
    """A pool that outlives its run would take the next one's cores."""
    yield
    wait(lambda: ray.available_resources().get("CPU", 0) == ray.cluster_resources()["CPU"])


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Computed:
    """The run without Ray."""
    folder = tmp_path_factory.mktemp("inline")
    run_here(tiny(folder), folder / "run", InlinePools)
    return outcome(folder / "run")


@pytest.mark.parametrize("pools", [1, pytest.param(2, marks=pytest.mark.slow), POOLS])
def test_the_number_of_pools_does_not_show(tmp_path: Path, reference: Computed, pools: int) -> None:
    events = run_here(tiny(tmp_path, f"cluster.pools={pools}"), tmp_path / "run", RayPools)
    assert outcome(tmp_path / "run") == reference
    assert [event.pools for event in events if isinstance(event, Planned)] == [pools]
    assert [record["wall"]["pools"] for record in lines(tmp_path / "run")] == [pools] * 3
    assert [record["retries"] for record in lines(tmp_path / "run")] == [0] * 3


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["static", "per_level"])
def test_nor_with_another_norm(tmp_path: Path, norm: str) -> None:
    config = tiny(tmp_path, f"model.norm={norm}", "cluster.pools=1", "rounds=2")
    run_here(config, tmp_path / "inline", InlinePools)
    run_here(config, tmp_path / "ray", RayPools)
    assert outcome(tmp_path / "ray") == outcome(tmp_path / "inline")


@pytest.mark.parametrize("size", [1, 3])
def test_the_size_of_cohorts_does_not_show(tmp_path: Path, reference: Computed, size: int) -> None:
    """Sums are exact, so even this leaves the weights as they are; no Ray is needed to see it."""
    run_here(tiny(tmp_path, f"train.cohort_size={size}"), tmp_path / "run", InlinePools)
    assert outcome(tmp_path / "run")[1]["weights_sha256"] == reference[1]["weights_sha256"]


def test_a_driver_actor_tells_the_same_as_a_driver_here(tmp_path: Path, reference: Computed) -> None:
    config = tiny(tmp_path, "cluster.pools=1")
    session = Session(config, RunFolder(tmp_path / "run"), resume=False)
    events = list(session.run())
    assert outcome(tmp_path / "run") == reference
    assert isinstance(events[0], Planned)
    assert [event.record for event in events if isinstance(event, RoundDone)] == lines(tmp_path / "run")
    assert isinstance(events[-1], Finished)
    assert events[-1].summary == RunFolder(tmp_path / "run").summary()
    assert session.stop() == 3


def test_a_users_mistake_arrives_as_such(tmp_path: Path) -> None:
    config = tiny(tmp_path, "clients.count=2", "clients.per_round=2")
    with pytest.raises(UserError, match="gets no client") as caught:
        list(Session(config, RunFolder(tmp_path / "run"), resume=False).run())
    assert caught.value.key == "clients.count"
    assert not (tmp_path / "run").exists()


def test_a_cluster_of_our_own_listens_to_this_machine_alone() -> None:
    found = listeners([*children(os.getpid()), os.getpid()])
    assert found
    assert found <= {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, and the same for IPv6


def test_more_pools_than_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = tiny(tmp_path, "cluster.pools=100")
    with pytest.raises(UserError, match=r"^cluster\.pools=100: only \d+ fit"):
        run_here(config, tmp_path / "run", RayPools)
    assert not (tmp_path / "run").exists()


def everybodys(experiment: Experiment) -> list[Cohort]:
    round = round_of(experiment, clients=range(experiment.config.clients.count))
    return cohort.form(round, planned(round), experiment.program, False)


def test_the_published_state_is_never_written(tmp_path: Path) -> None:
    """Pools share its memory: a write in one would show in all, and here."""
    experiment = prepare(tiny(tmp_path, "cluster.pools=1"))
    pools = RayPools(experiment)
    try:
        handle = pools.publish(experiment.initial_state())
        before = weights_sha256(ray.get(handle))
        tasks = everybodys(experiment)
        results = dict(pools.execute(tasks, [handle] * len(tasks)))
        assert sorted(results) == list(range(len(tasks)))
        assert weights_sha256(ray.get(handle)) == before == weights_sha256(experiment.initial_state())
    finally:
        pools.close()


# Failures.


@dataclass(frozen=True)
class Saboteur(Cohort, ABC):
    """A cohort that trains and then does something else than to return."""

    mark: str = ""

    def run(self, worker: Worker, state: Mapping[str, np.ndarray]) -> CohortResult:
        result = super().run(worker, state)
        self.sabotage()
        return result

    @abstractmethod
    def sabotage(self) -> None:
        """What it does instead."""


@dataclass(frozen=True)
class DiesOnce(Saboteur):
    def sabotage(self) -> None:
        if not Path(self.mark).exists():
            Path(self.mark).write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Dies(Saboteur):
    def sabotage(self) -> None:
        with Path(self.mark).open("a") as file:
            file.write(f"{os.getpid()}\n")
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Raises(Saboteur):
    def sabotage(self) -> None:
        raise ValueError("the first line\nand a second")


@dataclass(frozen=True)
class Objects(Saboteur):
    def sabotage(self) -> None:
        raise UserError("train.lr", 3, "is the task's own complaint.")


class Unpicklable(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")
        self.callback = lambda: one


@dataclass(frozen=True)
class RaisesUnpicklable(Saboteur):
    def sabotage(self) -> None:
        raise Unpicklable(1, 2)


@pytest.fixture
def sabotaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[type[Saboteur], int], Path]:
    """Makes the first cohort of a round a saboteur; returns the file in which that leaves its mark."""
    original = enlisting.form

    def install(kind: type[Saboteur], round: int) -> Path:
        def form(*arguments: Any) -> list[Cohort]:
            cohorts = original(*arguments)
            if cohorts[0].round == round:
                values = {field.name: getattr(cohorts[0], field.name) for field in fields(cohorts[0])}
                cohorts[0] = kind(**values, mark=str(tmp_path / "mark"))
            return cohorts

        monkeypatch.setattr(enlisting, "form", form)
        return tmp_path / "mark"

    return install


@pytest.mark.parametrize(("pools", "round"), [(2, 0), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_pool_killed_in_mid_round_leaves_the_bits_alone(
    tmp_path: Path,
    reference: Computed,
    sabotaged: Callable[[type[Saboteur], int], Path],
    pools: int,
    round: int,
) -> None:
    mark = sabotaged(DiesOnce, round)
    run_here(tiny(tmp_path, f"cluster.pools={pools}"), tmp_path / "run", RayPools)
    assert mark.read_text() != str(os.getpid())
    assert outcome(tmp_path / "run") == reference
    assert [record["retries"] for record in lines(tmp_path / "run")] == [int(r == round) for r in range(3)]


@pytest.mark.parametrize("retries", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_cohort_that_always_kills_its_pool_is_given_up(
    tmp_path: Path, sabotaged: Callable[[type[Saboteur], int], Path], retries: int
) -> None:
    mark = sabotaged(Dies, 1)
    config = tiny(tmp_path, "cluster.pools=1", f"cluster.retries={retries}")
    with pytest.raises(RunError) as caught:
        run_here(config, tmp_path / "run", RayPools)
    message = str(caught.value)
    assert message.startswith("dies of level 1, clients 2, 5: its pool died")
    assert f"cluster.retries={retries}" in message
    assert "\n" not in message
    pids = mark.read_text().split()
    assert len(set(pids)) == len(pids) == retries + 1
    assert len(lines(tmp_path / "run")) == 1


@pytest.mark.slow
def test_after_giving_up_the_run_can_go_on(
    tmp_path: Path,
    reference: Computed,
    sabotaged: Callable[[type[Saboteur], int], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context():
        sabotaged(Dies, 1)
        with pytest.raises(RunError):
            run_here(tiny(tmp_path, "cluster.pools=1", "cluster.retries=0"), tmp_path / "run", RayPools)
    monkeypatch.undo()
    run_here(tiny(tmp_path, "cluster.pools=2"), tmp_path / "run", RayPools, resume=True)
    assert outcome(tmp_path / "run") == reference


@pytest.mark.parametrize(
    ("kind", "told"), [(Raises, "ValueError: the first line"), (RaisesUnpicklable, "Unpicklable")]
)
def test_what_a_task_raises_is_one_line(
    tmp_path: Path, sabotaged: Callable[[type[Saboteur], int], Path], kind: type[Saboteur], told: str
) -> None:
    sabotaged(kind, 0)
    with pytest.raises(RunError) as caught:
        run_here(tiny(tmp_path, "cluster.pools=1"), tmp_path / "run", RayPools)
    message = str(caught.value)
    assert message.startswith(f"{kind.__name__.lower()} of level 1, clients ")
    assert told in message
    assert "\n" not in message


def test_a_tasks_own_complaint_keeps_its_key(
    tmp_path: Path, sabotaged: Callable[[type[Saboteur], int], Path]
) -> None:
    sabotaged(Objects, 0)
    with pytest.raises(UserError, match=r"^train\.lr=3: is the task's own complaint\.$"):
        run_here(tiny(tmp_path, "cluster.pools=1"), tmp_path / "run", RayPools)


@dataclass(frozen=True)
class DiesOnceWeighing(Weighed):
    """Takes the pool and all that it has kept of the round with it."""

    mark: str = ""

    def run(self, worker: Worker, state: Mapping[str, np.ndarray]) -> PartialSum:
        if not Path(self.mark).exists():
            Path(self.mark).write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(worker, state)


@dataclass(frozen=True)
class Unlucky(TwoPasses):
    mark: str

    def weighing(self, cohort: Cohort, weights: Mapping[int, float]) -> Weighed:
        return DiesOnceWeighing(cohort, weights, mark=self.mark)


def test_several_passes_give_the_same_whoever_kept_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, in two pools, and in two of which one dies between the passes."""
    merges = {"inline": TwoPasses(), "ray": TwoPasses(), "dies": Unlucky(str(tmp_path / "mark"))}
    config = tiny(tmp_path, "cluster.pools=2", "rounds=1", "clients.per_round=8")
    for name, merge in merges.items():
        monkeypatch.setattr(Experiment, "merge", merge)
        run_here(config, tmp_path / name, InlinePools if name == "inline" else RayPools)
    assert outcome(tmp_path / "ray") == outcome(tmp_path / "dies") == outcome(tmp_path / "inline")
    assert (tmp_path / "mark").exists()
    assert [record["retries"] for record in lines(tmp_path / "dies")] == [1]


def test_divergence_names_the_clients(tmp_path: Path) -> None:
    messages = []
    for make in (InlinePools, RayPools):
        config = tiny(tmp_path, "train.lr=1e30", "train.on_nan=stop", "cluster.pools=1")
        with pytest.raises(
            RunError, match=r"^round 0: training diverged on clients 1, 2, 3, 4, 5, 6 "
        ) as caught:
            run_here(config, tmp_path / make.__name__, make)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert not (tmp_path / "RayPools" / "rounds.jsonl").exists()


def test_closing_ends_pools_that_are_busy(tmp_path: Path) -> None:
    """As after Ctrl-C in a notebook, whose traceback keeps everything alive."""
    experiment = prepare(tiny(tmp_path, "cluster.pools=2", "train.cohort_size=1"))
    pools = RayPools(experiment)
    handle = pools.publish(experiment.initial_state())
    tasks = everybodys(experiment)
    phase = pools.execute(tasks, [handle] * len(tasks))
    next(phase)
    pools.close()
    wait(lambda: ray.available_resources().get("CPU", 0) == ray.cluster_resources()["CPU"])
    del phase


def test_a_run_that_is_left_alone_can_be_resumed(tmp_path: Path, reference: Computed) -> None:
    """The caller stops reading events in the middle of round 1."""
    driver = Driver(tiny(tmp_path, "cluster.pools=1"), RunFolder(tmp_path / "run"), RayPools)
    events = driver.run()
    for event in events:
        if isinstance(event, Working) and (event.round, event.done) == (1, 1):
            break
    events.close()  # type: ignore[attr-defined]
    assert driver.stop() == 1
    assert len(lines(tmp_path / "run")) == 1
    run_here(tiny(tmp_path), tmp_path / "run", InlinePools, resume=True)
    assert outcome(tmp_path / "run") == reference

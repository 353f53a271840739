"""Merges: one pass whose sums come in any order, and several passes over updates that a pool may have lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from cluster_fl.aggregation.nested import CoverageMean, PartialSum, aggregate, moved
from cluster_fl.aggregation.server import CONTROL, Controlled, Move
from cluster_fl.errors import RunError
from cluster_fl.experiment import Experiment, prepare
from cluster_fl.merging import Merge, Merged, Phase, Phases, Streaming, collect
from cluster_fl.models.layered import Layered
from cluster_fl.nesting.plan import State
from cluster_fl.rounds import Round
from cluster_fl.training.cohort import Cohort, form
from cluster_fl.training.program import Context, LocalProgram, Trained
from cluster_fl.training.worker import Worker
from tests.tiny import planned, round_of, tiny, worker_of

CLIENTS = 8


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return prepare(tiny(tmp_path_factory.mktemp("tiny"), "model.norm=per_level", "train.cohort_size=3"))


@pytest.fixture(scope="module")
def round(experiment: Experiment) -> Round:
    return round_of(experiment, clients=range(CLIENTS))


def cohorts(experiment: Experiment, round: Round, keep: bool = False) -> list[Cohort]:
    return form(round, planned(round), experiment.program, keep)


@dataclass(frozen=True)
class Watched(LocalProgram):
    """Notes who trained; may do something to the module afterwards."""

    inner: LocalProgram
    trained: list[int]
    after: Callable[[Layered, Context], None] = lambda model, context: None

    def train(self, model: Layered, context: Context) -> Trained:
        self.trained.append(context.client)
        done = self.inner.train(model, context)
        self.after(model, context)
        extra = {name: np.full_like(context.received[name], context.client) for name in ("stem.conv.weight",)}
        return dataclasses.replace(done, extra=extra)


def watched(experiment: Experiment, program: LocalProgram) -> Worker:
    worker = worker_of(experiment)
    worker.program = program
    return worker


def driven(phases: Phases, next_worker: Callable[[Phase], Worker], backwards: bool = False) -> Merged:
    """Runs a merge's tasks here, in any order; it gets the results in the order of the tasks."""
    try:
        phase = next(phases)
        while True:
            worker, results = next_worker(phase), dict[int, object]()
            order = range(len(phase.tasks))
            for position in reversed(order) if backwards else order:
                results[position] = phase.take(phase.tasks[position].run(worker, phase.states[position]))
            phase = phases.send([results[position] for position in order])
    except StopIteration as end:
        merged: Merged = end.value
        return merged


def bits(state: State) -> dict[str, bytes]:
    return {key: array.tobytes() for key, array in state.items()}


# One pass.


def test_streaming_moves_by_the_mean_of_all_cohorts(experiment: Experiment, round: Round) -> None:
    formed, worker = cohorts(experiment, round), worker_of(experiment)
    expected = aggregate(round.state, [one.run(worker, round.state).partial for one in formed])
    for backwards in (False, True):
        merged = driven(Streaming(Move()).phases(round, formed), lambda _: worker, backwards)
        assert bits(merged.state) == bits(expected)
        assert bits(merged.state) != bits(round.state)
        assert [report.clients for report in merged.reports] == [one.clients for one in formed]
        assert (merged.memory, merged.personal) == ({}, {})


def test_what_the_server_publishes_reaches_the_clients_and_not_the_weights(
    experiment: Experiment, round: Round
) -> None:
    step = Controlled(Move(), CLIENTS)
    merge = Streaming(step)
    started = dataclasses.replace(round, memory=merge.initial(round.state))
    formed, phases = cohorts(experiment, started), list[Phase]()
    worker = watched(experiment, Watched(experiment.program, []))

    def noting(phase: Phase) -> Worker:
        phases.append(phase)
        return worker

    merged = driven(merge.phases(started, formed), noting)
    (phase,) = phases
    (sent,) = {id(state): state for state in phase.states}.values()
    assert sent.keys() == round.state.keys() | {CONTROL + key for key in round.state}
    assert merged.state.keys() == round.state.keys()
    plain = driven(Streaming(Move()).phases(round, formed), lambda _: worker)
    assert bits(merged.state) == bits(plain.state)


def test_extras_are_summed_over_clients(experiment: Experiment, round: Round) -> None:
    """Each sends its number, for every element that it holds; and none of it shows in the mean."""
    formed, worker = cohorts(experiment, round), watched(experiment, Watched(experiment.program, []))
    found = dict[str, object]()

    def keeping() -> Phases:
        collected = yield from collect(round, formed, round.state)
        found.update(extra=collected.extra, mean=collected.mean)
        return Merged({}, {}, collected.reports)

    driven(keeping(), lambda _: worker)
    sums: dict[str, np.ndarray] = found["extra"]  # type: ignore[assignment]
    expected = np.zeros(round.state["stem.conv.weight"].shape)
    for client, level in enumerate(round.plan.level_of):
        expected[round.plan.holding(int(level)).where["stem.conv.weight"]] += client
    assert list(sums) == ["stem.conv.weight"]
    assert sums["stem.conv.weight"].tolist() == expected.tolist()
    assert found["mean"].count == CLIENTS  # type: ignore[attr-defined]


def test_divergence_stops_the_round_and_names_the_clients(experiment: Experiment, round: Round) -> None:
    train = dataclasses.replace(round.config.train, on_nan="stop")
    round = dataclasses.replace(round, config=dataclasses.replace(round.config, train=train))

    def break_some(model: Layered, context: Context) -> None:
        if context.client in (6, 2):
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] = float("nan")

    worker = watched(experiment, Watched(experiment.program, [], break_some))
    phases = Streaming(Move()).phases(round, cohorts(experiment, round))
    with pytest.raises(RunError, match=r"^round 0: training diverged on clients 2, 6 "):
        driven(phases, lambda _: worker)


# Several passes.


@dataclass(frozen=True)
class Weighed:
    """A cohort's sum once more, in which each client counts as the merge says."""

    cohort: Cohort
    weights: Mapping[int, float]
    work: float = 1.0

    @property
    def home(self) -> tuple[int, int]:
        return self.cohort.home

    def run(self, worker: Worker, state: Mapping[str, np.ndarray]) -> PartialSum:
        part = self.cohort.empty(worker, state)
        for update in self.cohort.updates(worker, state):
            part.add(update.holding, update.deltas, self.weights[update.client], update.coverage)
        return part


@dataclass(frozen=True)
class TwoPasses(Merge):
    """First all losses are seen, then the better half of the clients counts double."""

    keeps_updates = True

    def phases(self, round: Round, cohorts: Sequence[Cohort]) -> Phases:
        collected = yield from collect(round, cohorts, round.state)
        losses = {c: loss for r in collected.reports for c, loss in zip(r.clients, r.losses, strict=True)}
        median = float(np.median(list(losses.values())))
        weights = {client: 2.0**-4 * (1 + (loss < median)) for client, loss in losses.items()}
        mean = CoverageMean(round.state)
        yield Phase("weigh", [self.weighing(one, weights) for one in cohorts], round.state, mean.add)
        return Merged(moved(round.state, mean.result().updates), {}, collected.reports)

    def weighing(self, cohort: Cohort, weights: Mapping[int, float]) -> Weighed:
        return Weighed(cohort, weights)


def test_updates_may_be_kept_or_made_again(experiment: Experiment, round: Round) -> None:
    """By the pool that trained, by another one, or by a new one for each task: the same bits."""
    formed, program = cohorts(experiment, round, keep=True), Watched(experiment.program, [])
    one = watched(experiment, program)
    kept = driven(TwoPasses().phases(round, formed), lambda _: one)
    assert sorted(program.trained) == list(range(CLIENTS))

    program.trained.clear()
    again = driven(TwoPasses().phases(round, formed), lambda _: watched(experiment, program))
    assert sorted(program.trained) == sorted([*range(CLIENTS)] * 2)
    assert bits(again.state) == bits(kept.state)

    program.trained.clear()
    forgetful = cohorts(experiment, round, keep=False)  # a pool that was not told to keep
    unkept = driven(TwoPasses().phases(round, forgetful), lambda _: watched(experiment, program))
    assert bits(unkept.state) == bits(kept.state)

    plain = driven(Streaming(Move()).phases(round, formed), lambda _: one)
    assert bits(plain.state) != bits(kept.state)  # the second pass weighs otherwise
    assert kept.reports == plain.reports


def test_updates_of_diverged_clients_are_not_kept(experiment: Experiment, round: Round) -> None:
    def break_first(model: Layered, context: Context) -> None:
        if context.client == first.clients[0]:
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] = float("inf")

    first = next(one for one in cohorts(experiment, round, keep=True) if len(one.clients) > 1)
    worker = watched(experiment, Watched(experiment.program, [], break_first))
    assert [update.client for update in first.updates(worker, round.state)] == list(first.clients[1:])

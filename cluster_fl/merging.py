"""From a round's cohorts to the next weights: one pass over the clients' updates, or several.

A merge is a generator of phases. It yields the tasks that it wants run and the state that they read, gets their
results, and returns what the round came to. Whoever drives it decides where tasks run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cluster_fl.aggregation.nested import CoverageMean, Mean
from cluster_fl.aggregation.server import ServerStep, server_step
from cluster_fl.config import Config
from cluster_fl.errors import RunError
from cluster_fl.nesting.plan import Plan, State
from cluster_fl.rounds import Round
from cluster_fl.training.cohort import Cohort, CohortReport, CohortResult
from cluster_fl.training.worker import Task


def itself(result: Any) -> Any:
    return result


@dataclass(frozen=True)
class Phase:
    """Tasks that may run side by side, all reading ``state``, or each its own of several.

    ``take`` is called with each result as it arrives; the merge gets what it returns, in the order of the
    tasks. So sums need not be held until all are there.
    """

    name: str
    tasks: Sequence[Task[Any]]
    state: Mapping[str, np.ndarray] | Sequence[Mapping[str, np.ndarray]]
    take: Callable[[Any], Any] = itself

    @property
    def states(self) -> Sequence[Mapping[str, np.ndarray]]:
        """What each task reads."""
        return [self.state] * len(self.tasks) if isinstance(self.state, Mapping) else self.state


@dataclass(frozen=True)
class Merged:
    """What a round came to. ``personal`` is what its clients keep, by client."""

    state: State
    memory: State
    reports: list[CohortReport]
    personal: dict[int, State] = field(default_factory=dict)


Phases = Generator[Phase, list[Any], Merged]


class Merge(ABC):
    """How a method merges a round.

    Attributes:
        keeps_updates: pools keep the clients' updates for further passes.
        asynchronous: it can merge clients that started from different weights.
    """

    keeps_updates = False
    asynchronous = True

    def initial(self, state: State) -> State:
        """The server's memory before round 0."""
        return {}

    @abstractmethod
    def phases(self, round: Round, cohorts: Sequence[Cohort]) -> Phases: ...


@dataclass(frozen=True)
class Streaming(Merge):
    """One pass: every cohort sends one sum, and the server step makes the next weights of their mean."""

    step: ServerStep

    def initial(self, state: State) -> State:
        return self.step.initial(state)

    def phases(self, round: Round, cohorts: Sequence[Cohort]) -> Phases:
        collected = yield from collect(round, cohorts, sent(round, cohorts, self.step))
        state, memory = self.step.apply(round.state, collected.mean, collected.extra, round.memory)
        return Merged(state, memory, collected.reports, collected.personal)


def streaming(config: Config, plan: Plan) -> Merge:
    """The merge of most methods, with the configured server step."""
    return Streaming(server_step(config, plan))


@dataclass(frozen=True)
class Collected:
    """What the training of a round brought. ``extra``: sums of what clients sent besides, by the state's key."""

    mean: Mean
    extra: dict[str, np.ndarray]
    reports: list[CohortReport]
    personal: dict[int, State]


def sent(round: Round, cohorts: Sequence[Cohort], step: ServerStep) -> list[State]:
    """What each cohort starts from: the weights of the round that it started in, and what clients need besides."""
    versions = {version: round.start(version) for version in {cohort.round for cohort in cohorts}}
    published = {version: step.sent(start.state, start.memory) for version, start in versions.items()}
    return [published[cohort.round] for cohort in cohorts]


def collect(
    round: Round, cohorts: Sequence[Cohort], published: Sequence[State]
) -> Generator[Phase, list[Any], Collected]:
    """Trains the cohorts.

    Args:
        published: what each starts from (:func:`sent`).

    Raises:
        RunError: training diverged on a client, and ``train.on_nan`` is stop.
    """
    mean, extra = CoverageMean(round.state), CoverageMean(round.state)
    personal: dict[int, State] = {}

    def take(result: CohortResult) -> CohortReport:
        mean.add(result.partial)
        if result.extra is not None:
            extra.add(result.extra)
        personal.update(result.personal)
        return result.report

    reports = refusing(round, (yield Phase("train", cohorts, published, take)))
    unit = cohorts[0].extra_weight if cohorts else 1.0
    sums = {key: total / unit for key, total in extra.sums().items()}
    return Collected(pulled(round, cohorts, mean.result()), sums, reports, personal)


def pulled(round: Round, cohorts: Sequence[Cohort], mean: Mean) -> Mean:
    """FedAsync's update: towards what a client trained, w + pull (w_client - w), instead of by what it learnt.

    The mean is that client's update already times ``pull``.
    """
    if not round.pull or not cohorts:
        return mean
    before = round.start(cohorts[0].round).state
    updates = {
        key: np.where(
            mean.weights[key] > 0,
            update + round.pull * (before[key].astype(np.float64) - round.state[key]),
            0.0,
        )
        for key, update in mean.updates.items()
    }
    return replace(mean, updates=updates)


def refusing(round: Round, reports: Sequence[CohortReport], more: Collection[int] = ()) -> list[CohortReport]:
    """The reports, in which the clients ``more`` are refused as well.

    Raises:
        RunError: a client is refused, and ``train.on_nan`` is stop.
    """
    reports = [
        replace(report, refused=tuple(c for c in report.clients if c in report.refused or c in more))
        for report in reports
    ]
    refused = sorted(client for report in reports for client in report.refused)
    if refused and round.config.train.on_nan == "stop":
        raise RunError(
            f"round {round.number}: training diverged on client{'s' if len(refused) > 1 else ''} "
            f"{', '.join(map(str, refused))} (not finite or changed by over 2048); lower train.lr, set "
            "train.clip_norm, or leave such clients out (train.on_nan=refuse)."
        )
    return reports

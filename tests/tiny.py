"""The smallest run that has everything: three levels, shared and own exits, uneven levels, two evaluations.

Its split is given, so that nothing is searched, and a round takes a fraction of a second.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.driver import Driver, MakePools
from actors.events import Event, RoundDone
from actors.pools import InlinePools
from cluster_fl.assignment import Allocation, SubmodelRule, assign
from cluster_fl.compose import compose
from cluster_fl.config import Config
from cluster_fl.data.partition import Shares
from cluster_fl.experiment import Experiment
from cluster_fl.merging import Phase
from cluster_fl.nesting.anatomy import Anatomy
from cluster_fl.nesting.plan import Assignment, State
from cluster_fl.nesting.submodel import Submodel
from cluster_fl.records import RunFolder
from cluster_fl.rounds import Round
from cluster_fl.timing.attempts import Attempts
from cluster_fl.training.worker import Worker

TINY = """
method: scalefl
rounds: 3
clients: {count: 8, per_round: 6}
levels: {pairs: [{width: 0.5, depth: 1}, {width: 0.5, depth: 2}, {width: 1.0, depth: 3}]}
model: {name: resnet8, options: {widths: [4, 8, 16]}}
data: {name: digits, held_out: 80}
train: {epochs: 1, batch_size: 16, lr: 0.1, cohort_size: 2}
evaluate: {every: 2}
"""
LEVELS = 3

# What the wall clock or the number of pools decides; everything else is decided by the configuration.
WALL = ("wall_time_s", "wall", "retries")


def write_tiny(folder: Path) -> Path:
    file = folder / "tiny.yaml"
    file.write_text(TINY)
    return file


def tiny(folder: Path, *overrides: str) -> Config:
    """The tiny configuration, composed from a file in ``folder``."""
    return compose([write_tiny(folder)], overrides)


def worker_of(experiment: Experiment, shares: Shares | None = None) -> Worker:
    """A pool's worker in this process."""
    made, cpu = experiment, torch.device("cpu")
    return Worker(made.config, made.plan, made.program, made.dataset, shares or made.population.shares, cpu)


def round_of(
    experiment: Experiment, state: State | None = None, number: int = 0, clients: Iterable[int] = ()
) -> Round:
    """A round in which the server and the clients have kept nothing."""
    made, participants = experiment, np.array(list(clients), dtype=np.int64)
    start = made.initial_state() if state is None else state
    return Round(number, made.config, made.plan, made.population, start, {}, lambda _: {}, participants)


def select(round: Round) -> Round:
    """The round with participants, drawn from everybody."""
    config, there = round.config, round.population.availability
    nobody = np.zeros(0, dtype=np.int64)
    clients = there.draw(config.seed, round.number, 0, config.clients.per_round, 0.0, nobody)
    return replace(round, participants=clients)


def assigned(round: Round, allocation: Allocation, rule: SubmodelRule) -> list[Assignment]:
    """What every participant trains when nothing but the method decides."""
    return assign(round, allocation(round), rule)


def attempts_of(experiment: Experiment, round: Round) -> Attempts:
    """What the round's participants do when they start at 0."""
    return experiment.clock.dispatch(round).attempts(round.number, round.participants, 0.0, np.inf)


def results(phase: Phase, worker: Worker) -> list[Any]:
    """What a phase's merge gets when one worker runs it."""
    each = zip(phase.tasks, phase.states, strict=True)
    return [phase.take(worker.execute(task, state).result) for task, state in each]


def planned(round: Round) -> list[Assignment]:
    """Every participant at its own level."""
    levels = [(int(client), int(round.plan.level_of[client])) for client in round.participants]
    return [Assignment(client, level, round.plan.level(level).submodel) for client, level in levels]


def scattered(anatomy: Anatomy, submodel: Submodel, seed: int) -> Submodel:
    """As many channels of every group as a prefix has, but any."""
    rng = np.random.default_rng(seed)
    chosen = tuple(
        tuple(int(c) for c in np.sort(rng.permutation(group.size)[:count]))
        for group, count in zip(anatomy.groups, submodel.channels, strict=True)
    )
    return replace(submodel, channels=chosen)


def run_here(
    config: Config, path: Path, make_pools: MakePools = InlinePools, resume: bool = False
) -> list[Event]:
    """A whole run with its driver in this process."""
    return list(Driver(config, RunFolder(path), make_pools, resume).run())


def stopped_after(config: Config, path: Path, rounds: int, make_pools: MakePools = InlinePools) -> None:
    """A run that ends, without a word, when so many rounds are complete."""
    with closing(Driver(config, RunFolder(path), make_pools).run()) as events:
        done = (event for event in events if isinstance(event, RoundDone))
        assert len(list(islice(done, rounds))) == rounds


def timeless(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what the wall clock decides."""
    return [{key: value for key, value in record.items() if key not in WALL} for record in records]


def outcome(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What a finished run computed: its rounds and its summary, without wall times."""
    folder = RunFolder(path)
    summary = folder.summary()
    assert summary is not None, "the run did not finish"
    return timeless(lines(path)), timeless([summary])[0]


def lines(path: Path) -> Sequence[dict[str, Any]]:
    """All lines of rounds.jsonl; every one of them must be whole."""
    return [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]

"""Accuracy of every level's model on every client's own samples, and what follows from that table.

``global`` is the global level's row, ``local`` each client's own level, ``worst`` the lowest level, ``personal``
what each client has made of its model for itself. Each is a mean over clients, and each is given for the last
exit and for the mean over the level's exits (which is what ScaleFL's released code reports), and for the exits'
ensemble where the method answers by one. What a method does not define is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster_fl.data.batching import batch_sizes
from cluster_fl.models import norm
from cluster_fl.models.layered import Layered
from cluster_fl.nesting.extraction import load
from cluster_fl.nesting.plan import Plan, State
from cluster_fl.nesting.submodel import Submodel
from cluster_fl.rounds import Round
from cluster_fl.seeding import Purpose, generator, torch_generator
from cluster_fl.training.program import Answer, Context, Ensemble, LocalProgram
from cluster_fl.training.worker import Worker

# Small enough to balance two pools, large enough that a call's overhead does not show.
SAMPLES_PER_TASK = 500
BATCHES_PER_TASK = 50

PERSONAL = 0  # where a level's number stands otherwise

Statistics = dict[str, np.ndarray]


@dataclass(frozen=True)
class Counts:
    """Correct answers: (clients, exits), and samples: (clients,). Level 0: of the clients' personal models.

    ``together``: correct answers of the exits' ensemble, (clients,); None if the method has none.
    """

    level: int
    clients: tuple[int, ...]
    correct: np.ndarray
    samples: np.ndarray
    together: np.ndarray | None = None


@dataclass(frozen=True)
class Evaluate:
    """Runs one level's model over some clients' ``held_out`` or ``test`` parts."""

    level: int
    submodel: Submodel
    clients: tuple[int, ...]
    part: str
    work: float
    statistics: Statistics | None = None
    home: None = None

    def run(self, worker: Worker, state: Mapping[str, np.ndarray]) -> Counts:
        model = _model(worker, self.level, self.submodel, state, self.statistics)
        rows = [getattr(worker.shares, self.part)[client] for client in self.clients]
        # A batch never mixes clients where its statistics would show in the answers.
        batched = worker.plan.evaluates_batches
        groups = [[i] for i in range(len(rows))] if batched else [list(range(len(rows)))]
        exits, ensemble = len(self.submodel.exits), worker.program.ensemble
        correct = np.zeros((len(rows), exits + (ensemble is not None)), dtype=np.int64)
        samples = np.zeros(len(rows), dtype=np.int64)
        for group in groups:
            owner = np.concatenate([np.full(len(rows[i]), i) for i in group])
            hits = right_answers(model, worker, np.concatenate([rows[i] for i in group]), ensemble)
            np.add.at(correct, owner[: len(hits)], hits)
            np.add.at(samples, owner[: len(hits)], 1)
        together = None if ensemble is None else correct[:, exits]
        return Counts(self.level, self.clients, correct[:, :exits], samples, together)


@dataclass(frozen=True)
class EvaluatePersonal:
    """Runs one client's personal model, which may have to be trained first, over its ``held_out`` or ``test`` part.

    Attributes:
        level, submodel, statistics: of the model that the client's own is made from.
        personal: what the client kept from its last participation.
    """

    round: int
    client: int
    level: int
    submodel: Submodel
    personal: State
    part: str
    work: float
    statistics: Statistics | None
    home: None = None

    @property
    def clients(self) -> tuple[int, ...]:
        return (self.client,)

    def run(self, worker: Worker, state: Mapping[str, np.ndarray]) -> Counts:
        model = _model(worker, self.level, self.submodel, state, self.statistics)
        holding = worker.plan.holding(self.level, self.submodel)
        context = Context(
            worker=worker,
            round=self.round,
            client=self.client,
            level=worker.plan.level(self.level),
            submodel=self.submodel,
            holding=holding,
            received=holding.gather(state),
            state=state,
            personal=self.personal,
            generator=torch_generator(worker.config.seed, Purpose.EVALUATE, self.round, self.client),
            epochs=worker.config.train.epochs,
        )
        answer = worker.program.personalise(model, context)
        hits = right_answers(answer, worker, getattr(worker.shares, self.part)[self.client])
        return Counts(PERSONAL, self.clients, hits.sum(axis=0, keepdims=True), np.array([len(hits)]))


@dataclass(frozen=True)
class Collect:
    """Sums batch statistics of one level's model over batches of pooled training rows (HeteroFL's sBN)."""

    level: int
    submodel: Submodel
    rows: np.ndarray
    sizes: tuple[int, ...]
    work: float
    home: None = None

    def run(self, worker: Worker, state: Mapping[str, np.ndarray]) -> tuple[int, int, Statistics]:
        """(level, number of batches, mean of their statistics)."""
        model = worker.fresh(self.submodel)
        load(model, worker.plan.holding(self.level, self.submodel).gather(state))
        worker.program.deploy(model, worker.plan.level(self.level))
        norm.start_collecting(model)
        model.eval()
        for _, module in norm.batch_norms(model):
            module.train()
        with torch.no_grad():
            for rows in np.split(self.rows, np.cumsum(self.sizes)[:-1]):
                model(worker.data.batch(rows)[0])
        means = {name: t.double().cpu().numpy() for name, t in norm.statistics(model).items()}
        return self.level, len(self.sizes), means


def evaluations(
    round: Round,
    served: Sequence[Submodel],
    clients: Sequence[int] | np.ndarray,
    part: str,
    statistics: Mapping[int, Statistics],
) -> list[Evaluate]:
    """The tasks that fill the table: every level's model on every given client."""
    sizes = [len(getattr(round.population.shares, part)[c]) for c in clients]
    tasks = []
    for level, submodel in zip(round.plan.levels, served, strict=True):
        for chunk in _chunks(sizes, SAMPLES_PER_TASK):
            work = sum(sizes[i] for i in chunk) * level.cost.macs / 3  # a forward without its backward
            who = tuple(int(clients[i]) for i in chunk)
            own = statistics.get(level.number)
            tasks.append(Evaluate(level.number, submodel, who, part, work, own))
    return tasks


def personal_evaluations(
    round: Round,
    program: LocalProgram,
    served: Sequence[Submodel],
    clients: Sequence[int] | np.ndarray,
    part: str,
    statistics: Mapping[int, Statistics],
) -> list[EvaluatePersonal]:
    """The tasks that run every given client's personal model; none for a method without such."""
    if not program.personalises:
        return []
    plan, shares = round.plan, round.population.shares
    tasks = []
    for client in map(int, clients):
        level = program.personal_level(int(plan.level_of[client]))
        samples = len(getattr(shares, part)[client]) + len(shares.train[client])
        tasks.append(
            EvaluatePersonal(
                round=round.number,
                client=client,
                level=level,
                submodel=served[level - 1],
                personal=round.personal(client),
                part=part,
                work=float(samples * plan.level(level).cost.macs),
                statistics=statistics.get(level),
            )
        )
    return tasks


def collections(round: Round, served: Sequence[Submodel]) -> list[Collect]:
    """The tasks that collect static batch norm statistics; none under another norm policy."""
    plan, config = round.plan, round.config
    if not (plan.batch_norms and plan.model.norm == "static"):
        return []
    pooled = np.concatenate(round.population.shares.train)
    pooled = generator(config.seed, Purpose.STATISTICS, round.number).permutation(pooled)
    sizes = batch_sizes(len(pooled), config.train.batch_size, 2)
    tasks = []
    for level, submodel in zip(plan.levels, served, strict=True):
        start = 0
        for first in range(0, len(sizes), BATCHES_PER_TASK):
            chunk = tuple(sizes[first : first + BATCHES_PER_TASK])
            rows = pooled[start : start + sum(chunk)]
            start += len(rows)
            tasks.append(Collect(level.number, submodel, rows, chunk, len(rows) * level.cost.macs / 3))
    return tasks


def combine(parts: Iterable[tuple[int, int, Statistics]]) -> dict[int, Statistics]:
    """Per level, the mean over all batches. ``parts`` in task order: floating point sums keep one order."""
    totals: dict[int, tuple[int, Statistics]] = {}
    for level, batches, means in parts:
        before, total = totals.get(level, (0, {name: np.zeros_like(v) for name, v in means.items()}))
        totals[level] = before + batches, {n: total[n] + batches * v for n, v in means.items()}
    return {
        level: {name: (value / batches).astype(np.float32) for name, value in total.items()}
        for level, (batches, total) in totals.items()
    }


def accuracy(plan: Plan, counts: Iterable[Counts]) -> dict[str, Any]:
    """The accuracy block of a record: ``global``, ``local``, ``worst``, ``personal`` and ``levels``, fractions each.

    A client without samples is left out of every mean; a value that no client has is None.
    """
    clients = len(plan.level_of)
    # Row 0 holds the personal models.
    parts = list(counts)
    kinds = ["last_exit", "exit_mean"]
    if any(part.together is not None for part in parts):
        kinds.append("ensemble")
    tables = {kind: np.full((len(plan.levels) + 1, clients), np.nan) for kind in kinds}
    for part in parts:
        seen = part.samples > 0
        who = np.asarray(part.clients)[seen]
        share = part.correct[seen] / part.samples[seen, None]
        tables["last_exit"][part.level, who] = share[:, -1]
        tables["exit_mean"][part.level, who] = share.mean(axis=1)
        if part.together is not None:
            tables["ensemble"][part.level, who] = part.together[seen] / part.samples[seen]
    own = (plan.level_of, np.arange(clients))
    blocks = [{kind: _mean(t[row]) for kind, t in tables.items()} for row in range(len(plan.levels) + 1)]
    levels = blocks[1:]
    return {
        "global": levels[plan.global_level - 1] if plan.global_level is not None else None,
        "local": {kind: _mean(table[own]) for kind, table in tables.items()} if plan.serves else None,
        "worst": {kind: _lowest([b[kind] for b in levels]) for kind in tables} if plan.serves else None,
        "personal": None if blocks[0]["last_exit"] is None else blocks[0],
        "levels": levels if plan.serves else [],
    }


def _mean(values: np.ndarray) -> float | None:
    valid = values[~np.isnan(values)]
    return float(valid.mean()) if len(valid) else None


def _lowest(values: Sequence[float | None]) -> float | None:
    return min((v for v in values if v is not None), default=None)


def _model(
    worker: Worker,
    level: int,
    submodel: Submodel,
    state: Mapping[str, np.ndarray],
    statistics: Statistics | None,
) -> Layered:
    model = worker.module(submodel) if statistics is None else worker.fresh(submodel)
    load(model, worker.plan.holding(level, submodel).gather(state))
    worker.program.deploy(model, worker.plan.level(level))
    if statistics is not None:
        norm.set_statistics(model, {name: torch.tensor(value) for name, value in statistics.items()})
    return model.eval()


@torch.no_grad()
def right_answers(
    answer: Answer, worker: Worker, rows: np.ndarray, ensemble: Ensemble | None = None
) -> np.ndarray:
    """(rows that a batch can hold, exits): whether each exit's answer is right; then the ensemble's, if any."""
    smallest = 2 if worker.plan.evaluates_batches else 1
    sizes = batch_sizes(len(rows), worker.config.evaluate.batch_size, smallest)
    hits: list[Tensor] = []
    for batch in np.split(rows[: sum(sizes)], np.cumsum(sizes)[:-1]) if sizes else []:
        inputs, labels = worker.data.batch(batch)
        exits = answer(inputs)
        answers = exits if ensemble is None else [*exits, ensemble(exits)]
        hits.append(torch.stack([logits.argmax(1) == labels for logits in answers], dim=1))
    if not hits:
        return np.zeros((0, 1), dtype=np.int64)
    return torch.cat(hits).cpu().numpy().astype(np.int64)


def _chunks(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Consecutive positions whose sizes sum to about ``limit``."""
    chunks: list[list[int]] = [[]]
    filled = 0
    for position, size in enumerate(sizes):
        if chunks[-1] and filled + size > limit:
            chunks.append([])
            filled = 0
        chunks[-1].append(position)
        filled += size
    return [chunk for chunk in chunks if chunk]

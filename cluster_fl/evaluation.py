"""Accuracy of every level's model on every client's own samples, and what follows from that table.

``global`` is the top level's row, ``local`` each client's own level, ``worst`` the lowest level. Each is a
mean over clients, and each is given for the last exit and for the mean over the level's exits (which is what
ScaleFL's released code reports).
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
from cluster_fl.nesting.plan import Plan
from cluster_fl.population import Population
from cluster_fl.seeding import Purpose, generator
from cluster_fl.training.worker import Worker

# Small enough to balance two pools, large enough that a call's overhead does not show.
SAMPLES_PER_TASK = 500
BATCHES_PER_TASK = 50

Statistics = dict[str, np.ndarray]


@dataclass(frozen=True)
class Counts:
    """Correct answers of one level's model: (clients, exits), and samples: (clients,)."""

    level: int
    clients: tuple[int, ...]
    correct: np.ndarray
    samples: np.ndarray


@dataclass(frozen=True)
class Evaluate:
    """Runs one level's model over some clients' ``held_out`` or ``test`` parts."""

    level: int
    clients: tuple[int, ...]
    part: str
    work: float
    statistics: Statistics | None = None

    def run(self, worker: Worker, state: Mapping[str, np.ndarray]) -> Counts:
        model = _model(worker, self.level, state, self.statistics)
        rows = [getattr(worker.shares, self.part)[client] for client in self.clients]
        size, batched = worker.config.evaluate.batch_size, worker.plan.evaluates_batches
        # A batch never mixes clients where its statistics would show in the answers.
        groups = [[i] for i in range(len(rows))] if batched else [list(range(len(rows)))]
        exits = len(worker.plan.level(self.level).submodel.exits)
        correct = np.zeros((len(rows), exits), dtype=np.int64)
        samples = np.zeros(len(rows), dtype=np.int64)
        for group in groups:
            owner = np.concatenate([np.full(len(rows[i]), i) for i in group])
            together = np.concatenate([rows[i] for i in group])
            seen = sum(sizes := batch_sizes(len(together), size, 2 if batched else 1))
            hits = _hits(model, worker, together[:seen], sizes)
            np.add.at(correct, owner[:seen], hits)
            np.add.at(samples, owner[:seen], 1)
        return Counts(self.level, self.clients, correct, samples)


@dataclass(frozen=True)
class Collect:
    """Sums batch statistics of one level's model over batches of pooled training rows (HeteroFL's sBN)."""

    level: int
    rows: np.ndarray
    sizes: tuple[int, ...]
    work: float

    def run(self, worker: Worker, state: Mapping[str, np.ndarray]) -> tuple[int, int, Statistics]:
        """(level, number of batches, mean of their statistics)."""
        model = worker.fresh(self.level)
        load(model, worker.plan.received(state, self.level))
        norm.start_collecting(model)
        model.train()
        with torch.no_grad():
            for rows in np.split(self.rows, np.cumsum(self.sizes)[:-1]):
                model(worker.data.batch(rows)[0])
        means = {name: t.double().cpu().numpy() for name, t in norm.statistics(model).items()}
        return self.level, len(self.sizes), means


def evaluations(
    plan: Plan,
    population: Population,
    clients: Sequence[int] | np.ndarray,
    part: str,
    statistics: Mapping[int, Statistics],
) -> list[Evaluate]:
    """The tasks that fill the table: every level's model on every given client."""
    sizes = [len(getattr(population.shares, part)[c]) for c in clients]
    tasks = []
    for level in plan.levels:
        for chunk in _chunks(sizes, SAMPLES_PER_TASK):
            work = sum(sizes[i] for i in chunk) * level.cost.macs / 3  # a forward without its backward
            who = tuple(int(clients[i]) for i in chunk)
            tasks.append(Evaluate(level.number, who, part, work, statistics.get(level.number)))
    return tasks


def collections(plan: Plan, population: Population, batch_size: int, seed: int, round: int) -> list[Collect]:
    """The tasks that collect static batch norm statistics; none under another norm policy."""
    if not (plan.batch_norms and plan.model.norm == "static"):
        return []
    pooled = np.concatenate(population.shares.train)
    pooled = generator(seed, Purpose.STATISTICS, round).permutation(pooled)
    sizes = batch_sizes(len(pooled), batch_size, 2)
    tasks = []
    for level in plan.levels:
        start = 0
        for first in range(0, len(sizes), BATCHES_PER_TASK):
            chunk = tuple(sizes[first : first + BATCHES_PER_TASK])
            rows = pooled[start : start + sum(chunk)]
            start += len(rows)
            tasks.append(Collect(level.number, rows, chunk, len(rows) * level.cost.macs / 3))
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


def accuracy(plan: Plan, level_of: np.ndarray, counts: Iterable[Counts]) -> dict[str, Any]:
    """The accuracy block of a record: ``global``, ``local``, ``worst`` and ``levels``, fractions each.

    A client without samples is left out of every mean; a value that no client has is None.
    """
    clients = len(level_of)
    tables = {kind: np.full((len(plan.levels), clients), np.nan) for kind in ("last_exit", "exit_mean")}
    for part in counts:
        seen = part.samples > 0
        who = np.asarray(part.clients)[seen]
        share = part.correct[seen] / part.samples[seen, None]
        tables["last_exit"][part.level - 1, who] = share[:, -1]
        tables["exit_mean"][part.level - 1, who] = share.mean(axis=1)
    own = (level_of - 1, np.arange(clients))
    levels = [{kind: _mean(t[row]) for kind, t in tables.items()} for row in range(len(plan.levels))]
    return {
        "global": levels[-1],
        "local": {kind: _mean(table[own]) for kind, table in tables.items()},
        "worst": {kind: _lowest([level[kind] for level in levels]) for kind in tables},
        "levels": levels,
    }


def _mean(values: np.ndarray) -> float | None:
    valid = values[~np.isnan(values)]
    return float(valid.mean()) if len(valid) else None


def _lowest(values: Sequence[float | None]) -> float | None:
    return min((v for v in values if v is not None), default=None)


def _model(
    worker: Worker, level: int, state: Mapping[str, np.ndarray], statistics: Statistics | None
) -> Layered:
    model = worker.module(level) if statistics is None else worker.fresh(level)
    load(model, worker.plan.received(state, level))
    if statistics is not None:
        norm.set_statistics(model, {name: torch.tensor(value) for name, value in statistics.items()})
    return model.eval()


@torch.no_grad()
def _hits(model: Layered, worker: Worker, rows: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """(rows, exits): whether each exit's answer is right."""
    hits: list[Tensor] = []
    for batch in np.split(rows, np.cumsum(sizes)[:-1]) if sizes else []:
        inputs, labels = worker.data.batch(batch)
        hits.append(torch.stack([logits.argmax(1) == labels for logits in model(inputs)], dim=1))
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

"""Distillation from an ensemble on the server's unlabelled samples: clients' models teach, a level's model learns.

Teachers answer once a round, in fixed batches, since under batch statistics an answer depends on its company.
Their logits are summed on the exact grid: neither the order nor the number of pools shows in the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster_fl.aggregation.exact import fits, on_grid
from cluster_fl.config import Config
from cluster_fl.data.batching import batch_sizes
from cluster_fl.data.partition import Shares
from cluster_fl.models.layered import Layered
from cluster_fl.nesting.extraction import load, read
from cluster_fl.nesting.plan import State
from cluster_fl.nesting.submodel import Submodel
from cluster_fl.option import option
from cluster_fl.seeding import Purpose, generator, torch_generator
from cluster_fl.training.cohort import Update
from cluster_fl.training.passes import OfCohort
from cluster_fl.training.worker import Worker

# Of the published state, where the students read what their teachers said.
TEACHERS = "teachers/logits"


@dataclass
class Distillation:
    """How a student learns; for a method's options."""

    steps: int = option(10_000, "most steps of a student in a round; 0: no distillation", low=0)
    batch_size: int = option(128, "public samples in a batch", low=2)
    lr: float = option(1e-3, "Adam's learning rate, which falls to 0 over the steps as a cosine", above=0)
    clip_norm: float = option(5.0, "largest norm of a step's gradient", above=0)
    check_every: int = option(
        100, "steps between two looks at the held-out part; one more after the last", low=1
    )
    patience: int = option(1000, "steps without a gain there after which a student stops", low=1)
    count_start: bool = option(False, "the model that a student starts from may be the best one")


@dataclass(frozen=True)
class Taught:
    """Sum of a cohort's logits (public, classes), scaled by its ``extra_weight``, and how many clients are in it.

    ``refused`` are clients whose logits were not finite or 2^11 or more.
    """

    logits: np.ndarray
    teachers: int
    refused: tuple[int, ...]


@dataclass(frozen=True)
class Teach(OfCohort):
    """A cohort's trained models answer for the public samples, in the round's order of them.

    Attributes:
        least: the accuracy on the validation part below which a client does not teach; 0: everybody does.
    """

    batch_size: int
    least: float
    work: float

    def run(self, worker: Worker, state: Mapping[str, np.ndarray]) -> Taught:
        rows = public_rows(worker.config, worker.shares, self.cohort.round)
        total, teachers, refused = np.zeros((len(rows), worker.plan.model.classes)), 0, []
        submodels = {member.client: member.submodel for member in self.cohort.members}
        for update in self.cohort.updates(worker, state):
            model = _trained(worker, submodels[update.client], update, state)
            if self.least and _accuracy(worker, model, self.cohort.round) < self.least:
                continue
            logits = answers(worker, model, rows, self.batch_size).double().cpu().numpy()
            if not fits(logits):
                refused.append(update.client)
                continue
            total += on_grid(logits * self.cohort.extra_weight)
            teachers += 1
        return Taught(total, teachers, tuple(refused))


@dataclass(frozen=True)
class Distil:
    """Trains one level's model on what the teachers said; returns its tensors, by name."""

    round: int
    level: int
    submodel: Submodel
    settings: Distillation
    work: float
    home: None = None

    def run(self, worker: Worker, state: Mapping[str, np.ndarray]) -> State:
        student = worker.module(self.submodel)
        load(student, worker.plan.holding(self.level, self.submodel).gather(state))
        rows = public_rows(worker.config, worker.shares, self.round)
        validates = any(map(len, worker.shares.held_out))
        return distil(
            student,
            lambda chosen: worker.data.batch(rows[chosen.numpy()])[0],
            torch.tensor(state[TEACHERS], device=worker.device),
            self.settings,
            torch_generator(worker.config.seed, Purpose.DISTIL, self.round, self.level),
            worker.plan.smallest_batch,
            (lambda model: _accuracy(worker, model, self.round)) if validates else None,
        )


def distil(
    student: Layered,
    inputs: Callable[[Tensor], Tensor],
    logits: Tensor,
    settings: Distillation,
    generator: torch.Generator,
    smallest: int = 1,
    accuracy: Callable[[Layered], float] | None = None,
) -> State:
    """Trains ``student`` in place on KL(softmax(logits) || softmax(student)); the weights of the best one.

    Args:
        inputs: the samples (B, ...) of given numbers (B,).
        logits: the teachers' mean, (samples, classes).
        smallest: the fewest samples a batch may have.
        accuracy: of a model on the validation part; None: the last student is the best.
    """
    steps = torch.optim.Adam(student.parameters(), lr=settings.lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(steps, settings.steps)
    batches = _batches(len(logits), settings.batch_size, smallest, generator)
    best, best_at, highest = read(student), 0, -math.inf
    if accuracy is not None and settings.count_start:
        highest = accuracy(student.eval())
    for step in range(1, settings.steps + 1):
        chosen = next(batches)
        loss = divergence(student.train()(inputs(chosen))[-1], logits[chosen.to(logits.device)])
        steps.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), settings.clip_norm)
        steps.step()
        schedule.step()
        if accuracy is None or (step % settings.check_every and step < settings.steps):
            continue
        found = accuracy(student.eval())
        if found > highest:
            best, best_at, highest = read(student), step, found
        if step - best_at >= settings.patience:
            break
    return read(student) if accuracy is None else best


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)), mean over samples; both (B, classes), T = 1."""
    return F.kl_div(F.log_softmax(student, dim=1), F.softmax(teacher, dim=1), reduction="batchmean")


def public_rows(config: Config, shares: Shares, round: int) -> np.ndarray:
    """The public samples in the round's order. Mixed, since a data set's own order may be one of classes."""
    return generator(config.seed, Purpose.DISTIL, round).permutation(shares.public)


@torch.no_grad()
def answers(worker: Worker, model: Layered, rows: np.ndarray, batch_size: int) -> Tensor:
    """Logits of the last exit in evaluation mode, (rows, classes), in consecutive batches."""
    sizes = batch_sizes(len(rows), batch_size, worker.plan.smallest_batch)
    parts = np.split(rows, np.cumsum(sizes)[:-1])
    return torch.cat([model.eval()(worker.data.batch(part)[0])[-1] for part in parts])


def _accuracy(worker: Worker, model: Layered, round: int) -> float:
    """On all clients' held-out samples together, in an order that mixes clients."""
    pooled = np.concatenate(worker.shares.held_out)
    rows = generator(worker.config.seed, Purpose.DISTIL, round).permutation(pooled)
    size = max(worker.config.evaluate.batch_size, worker.plan.smallest_batch)
    found = answers(worker, model, rows, size).argmax(1)
    return float((found == worker.data.batch(rows)[1]).double().mean())


def _trained(worker: Worker, submodel: Submodel, update: Update, state: Mapping[str, np.ndarray]) -> Layered:
    """The client's model as its training left it."""
    model = worker.module(submodel)
    received = update.holding.gather(state)
    load(model, {n: (received[n] + delta).astype(np.float32) for n, delta in update.deltas.items()})
    return model


def _batches(samples: int, batch_size: int, smallest: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Numbers of the samples of one batch after the other, epoch after epoch."""
    sizes = batch_sizes(samples, batch_size, smallest)
    while True:
        yield from torch.randperm(samples, generator=generator).split(sizes)

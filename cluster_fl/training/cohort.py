"""A cohort: clients of a round whose submodels have one shape, in client order, in chunks of a fixed size.

Its composition depends on the configuration, the round and the seed alone. It is what one call trains, what
is placed and repeated, and what returns one partial sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from cluster_fl.aggregation.exact import fits, weight_unit
from cluster_fl.aggregation.nested import PartialSum
from cluster_fl.errors import ClusterFLError, RunError
from cluster_fl.nesting.extraction import load, read
from cluster_fl.nesting.plan import Assignment, Holding, State
from cluster_fl.nesting.submodel import Submodel
from cluster_fl.rounds import Round
from cluster_fl.seeding import Purpose, torch_generator
from cluster_fl.training.program import Context, LocalProgram, Trained
from cluster_fl.training.worker import Worker


@dataclass(frozen=True)
class CohortReport:
    """What the clients of a cohort reported, in their order.

    ``refused`` are clients with something that was not finite or out of range: they are in no sum and keep nothing.
    """

    clients: tuple[int, ...]
    losses: tuple[float, ...]
    steps: tuple[int, ...]
    refused: tuple[int, ...]


@dataclass(frozen=True)
class CohortResult:
    """``extra`` sums what clients sent besides; ``personal`` is what they keep, by client."""

    partial: PartialSum
    extra: PartialSum | None
    report: CohortReport
    personal: dict[int, State]


@dataclass(frozen=True)
class Update:
    """One client's trained submodel: its deltas (float64) and how far it speaks for them, by tensor name."""

    client: int
    weight: float
    holding: Holding
    deltas: dict[str, np.ndarray]
    coverage: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Terms:
    """On what terms a client takes part, as the clock has it.

    Attributes:
        version: the round whose weights it started from.
        scale: its update counts so many times (staleness).
        epochs: that it trains; None: ``train.epochs``.
        first: the assignment of its first epochs, if it went over to a smaller submodel, and how many they were.
    """

    version: int
    scale: float = 1.0
    epochs: int | None = None
    first: tuple[Assignment, int] | None = None


@dataclass(frozen=True)
class Member:
    """One client of a cohort.

    Attributes:
        personal: what it kept from its last participation.
        scale, epochs, first: as in :class:`Terms`.
    """

    client: int
    weight: float
    submodel: Submodel
    personal: State = field(default_factory=dict)
    scale: float = 1.0
    epochs: int | None = None
    first: tuple[Assignment, int] | None = None


@dataclass(frozen=True)
class Cohort:
    """Trains its members, each from the same state.

    Attributes:
        round: in which its members started.
        merged: the round that merges them.
        number: of the cohort in that round.
        extra_weight: with what each client counts in the sum of what it sends besides its update.
        keep: the pool keeps the updates for further passes of the same round.
    """

    round: int
    number: int
    level: int
    members: tuple[Member, ...]
    extra_weight: float
    work: float
    keep: bool = False
    merged: int | None = None

    @property
    def home(self) -> tuple[int, int]:
        return self.round if self.merged is None else self.merged, self.number

    @property
    def clients(self) -> tuple[int, ...]:
        return tuple(member.client for member in self.members)

    def run(self, worker: Worker, state: Mapping[str, np.ndarray]) -> CohortResult:
        partial, extra, personal = self.empty(worker, state), None, {}
        losses, steps, kept, refused = [], [], [], []
        for member in self.members:
            with self._naming(member):
                update, done = _train(self, member, worker, state)
            losses.append(done.loss)
            steps.append(done.steps)
            # A client that took no step has nothing to say, so it does not dilute the mean either.
            if not _sound(done) or (
                done.steps and not partial.add(update.holding, update.deltas, member.weight, update.coverage)
            ):
                refused.append(member.client)
                continue
            if done.steps and self.keep:
                kept.append(update)
            if done.extra:
                sent = _only(update.holding, done.extra)
                extra = extra or self.empty(worker, state, frozenset(done.extra))
                changes = {n: a.astype(np.float64) for n, a in done.extra.items()}
                extra.add(sent, changes, self.extra_weight)
            if done.personal is not None:
                personal[member.client] = done.personal
        if self.keep:
            worker.keep(*self.home, kept)
        report = CohortReport(self.clients, tuple(losses), tuple(steps), tuple(refused))
        return CohortResult(partial, extra, report, personal)

    @contextmanager
    def _naming(self, member: Member) -> Iterator[None]:
        """Whatever its training raises is told with the client's number."""
        try:
            yield
        except ClusterFLError:
            raise
        except Exception as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise RunError(
                f"round {self.round}: training of client {member.client} failed: {said}"
            ) from error

    def updates(self, worker: Worker, state: Mapping[str, np.ndarray]) -> list[Update]:
        """What its clients sent in this round: kept by this pool, or trained once more from ``state``."""
        if worker.kept(*self.home) is None:
            replace(self, keep=True).run(worker, state)
        updates: list[Update] = worker.kept(*self.home)
        return updates

    def empty(
        self, worker: Worker, state: Mapping[str, np.ndarray], names: frozenset[str] | None = None
    ) -> PartialSum:
        """A sum of these tensors (all if None): in the submodel's coordinates if all members share it."""
        first = self.members[0].submodel
        holding = worker.plan.holding(self.level, first)
        if names is not None:
            holding = _only(holding, names)
        if all(member.submodel == first for member in self.members):
            return PartialSum.of(holding, state)
        return PartialSum.over(state, holding.keys.values())


def _sound(done: Trained) -> bool:
    """Whether everything besides the update itself can be used; the sum looks at that while it adds."""
    kept = (done.personal or {}).values()
    return (
        math.isfinite(done.loss)
        and all(fits(sent) for sent in (done.extra or {}).values())
        and all(bool(np.isfinite(array).all()) for array in kept if array.dtype.kind == "f")
    )


def _train(
    cohort: Cohort, member: Member, worker: Worker, state: Mapping[str, np.ndarray]
) -> tuple[Update, Trained]:
    generator = torch_generator(worker.config.seed, Purpose.TRAIN, cohort.round, member.client)
    own = Assignment(member.client, cohort.level, member.submodel)
    total = worker.config.train.epochs if member.epochs is None else member.epochs
    if member.first is None:
        update, done = _stage(cohort, member, worker, (state, state), (own, total), generator)
        return _scaled(update, member.scale), done
    larger, epochs = member.first
    before, done = _stage(cohort, member, worker, (state, state), (larger, epochs), generator)
    now = _moved(state, before)
    update, then = _stage(cohort, member, worker, (now, state), (own, total - epochs), generator)
    steps = done.steps + then.steps
    loss = (done.loss * done.steps + then.loss * then.steps) / steps if steps else 0.0
    return _scaled(update, member.scale), replace(then, loss=loss, steps=steps)


def _stage(
    cohort: Cohort,
    member: Member,
    worker: Worker,
    states: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]],
    what: tuple[Assignment, int],
    generator: torch.Generator,
) -> tuple[Update, Trained]:
    """So many epochs of one submodel.

    Args:
        states: the weights that it begins with, and those that the update is counted from.
        what: the submodel, and the epochs.
    """
    (state, origin), (assignment, epochs), plan = states, what, worker.plan
    holding = plan.holding(assignment.level, assignment.submodel)
    module = worker.module(assignment.submodel)
    load(module, holding.gather(state))
    received = holding.gather(origin)
    context = Context(
        worker=worker,
        round=cohort.round,
        client=member.client,
        level=plan.level(assignment.level),
        submodel=assignment.submodel,
        holding=holding,
        received=received,
        state=state,
        personal=member.personal,
        generator=generator,
        epochs=epochs,
    )
    done = worker.program.train(module.train(), context)
    after = read(module) | done.also
    deltas = {name: array.astype(np.float64) - received[name] for name, array in after.items()}
    return Update(member.client, member.weight, holding, deltas, done.coverage), done


def _scaled(update: Update, factor: float) -> Update:
    if factor == 1:
        return update
    return replace(update, deltas={name: delta * factor for name, delta in update.deltas.items()})


def _moved(state: Mapping[str, np.ndarray], update: Update) -> dict[str, np.ndarray]:
    """The state as a client has it after an update of its own."""
    now = dict(state)
    for name, delta in update.deltas.items():
        key, where = update.holding.keys[name], update.holding.where[name]
        now[key] = now[key].copy()
        now[key][where] += delta.astype(np.float32)
    return now


def _only(holding: Holding, names: Iterable[str]) -> Holding:
    return Holding({n: holding.keys[n] for n in names}, {n: holding.where[n] for n in names})


def form(
    round: Round,
    assignments: Sequence[Assignment],
    program: LocalProgram,
    keep: bool,
    terms: Sequence[Terms] | None = None,
) -> list[Cohort]:
    """The cohorts of a round, by the round that they started in, level and shape, and then in client order.

    Args:
        terms: of each assignment; None: all start now and train all epochs.
    """
    config, shares = round.config, round.population.shares
    terms = [Terms(round.number)] * len(assignments) if terms is None else terms
    samples = [len(shares.train[a.client]) for a in assignments]
    counts = samples if config.aggregation.weights == "samples" else [1] * len(samples)
    unit, extra_weight = weight_unit(max(1, sum(counts))), weight_unit(max(1, len(assignments)))
    alike: dict[tuple[int, int, Submodel], list[int]] = {}
    for position, (own, term) in enumerate(zip(assignments, terms, strict=True)):
        alike.setdefault((term.version, own.level, own.submodel.shape), []).append(position)
    cohorts: list[Cohort] = []
    for (version, number, _), positions in sorted(alike.items(), key=lambda item: (*item[0][:2], item[1])):
        level = round.plan.level(number)
        each = level.cost.macs * config.train.epochs * program.effort(level).compute
        for start in range(0, len(positions), config.train.cohort_size):
            chunk = positions[start : start + config.train.cohort_size]
            members = tuple(
                Member(
                    client=assignments[i].client,
                    weight=counts[i] * unit,
                    submodel=assignments[i].submodel,
                    personal=round.personal(assignments[i].client) if program.keeps_state else {},
                    scale=terms[i].scale,
                    epochs=terms[i].epochs,
                    first=terms[i].first,
                )
                for i in chunk
            )
            work = float(sum(samples[i] for i in chunk) * each)
            made = Cohort(version, len(cohorts), number, members, extra_weight, work, keep, round.number)
            cohorts.append(made)
    return cohorts

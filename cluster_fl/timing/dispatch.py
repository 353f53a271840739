"""The simulated clock of a run: who is asked, and what it takes them on their devices.

Everything here is arithmetic over arrays; nothing is trained. The weights matter only where a method's submodels
are of sizes that the plan does not know (``resizes``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from cluster_fl.assignment import Allocation, SubmodelRule, fixed
from cluster_fl.config import Config
from cluster_fl.nesting.plan import Plan
from cluster_fl.nesting.submodel import Submodel
from cluster_fl.population import Population
from cluster_fl.rounds import Round
from cluster_fl.seeding import Purpose, generator
from cluster_fl.timing.attempts import Attempts
from cluster_fl.timing.draws import uniforms
from cluster_fl.timing.load import load
from cluster_fl.timing.stragglers import least, slowdown
from cluster_fl.timing.work import Charge, Work, roofline_batch
from cluster_fl.training.program import LocalProgram


@dataclass(frozen=True)
class Clock:
    """What a run's attempts are made of; one for all its rounds."""

    config: Config
    plan: Plan
    population: Population
    program: LocalProgram
    allocation: Allocation
    rule: SubmodelRule

    def dispatch(self, round: Round) -> Dispatcher:
        """For the clients that start from a round's weights."""
        return Dispatcher(self, round)

    @cached_property
    def charges(self) -> list[Charge]:
        """Of each level."""
        return [self.charge(number) for number in range(1, len(self.plan.levels) + 1)]

    def charge(self, level: int, submodel: Submodel | None = None) -> Charge:
        batch = roofline_batch(self.config, self.population.devices)
        return Charge.of(self.plan, self.program, self.plan.level(level), submodel, batch)

    def work(self, clients: np.ndarray, levels: np.ndarray) -> Work:
        """What the levels' own submodels take, in all epochs."""
        return self.charged(self.charges, levels - 1, clients)

    def charged(self, charges: Sequence[Charge], which: np.ndarray, clients: np.ndarray) -> Work:
        """What other submodels take; ``which``: the number of each client's charge."""
        samples = self.population.samples[clients] * self.config.train.epochs
        return Work.of(charges, which, self.population.devices, clients, samples)

    @cached_property
    def fastest_first(self) -> np.ndarray:
        """All clients, by what their own level takes them undisturbed."""
        everyone = np.arange(self.config.clients.count)
        levels = np.minimum(self.plan.level_of, self.population.largest)
        return np.argsort(self.work(everyone, levels).seconds, kind="stable")

    def fastest(self) -> float:
        """Seconds below which nobody finishes a round, however lucky: the policy's ``late`` included."""
        config, everyone = self.config, np.arange(self.config.clients.count)
        own = self.allocation is fixed and config.time.policy.late != "smaller"
        levels = np.minimum(self.plan.level_of, self.population.largest) if own else np.ones_like(everyone)
        work, total = self.work(everyone, levels), config.train.epochs
        share = 1 / total if config.time.policy.late == "partial" and total else 1.0
        seconds = work.download + work.compute * share * least(config.time.stragglers) + work.upload
        return float(seconds[self.population.samples > 0].min(initial=np.inf))


@dataclass(frozen=True)
class Dispatcher:
    """A :class:`~cluster_fl.timing.policies.Dispatch` of one round."""

    clock: Clock
    round: Round

    def draw(
        self,
        round: int,
        turn: int,
        count: int,
        time: float,
        busy: np.ndarray,
        among: np.ndarray | None = None,
    ) -> np.ndarray:
        config, there = self.clock.config, self.clock.population.availability
        if among is None:
            return there.draw(config.seed, round, turn, count, time, busy)
        free = np.setdiff1d(among[there.available(time, among)], busy, assume_unique=True)
        rng = generator(config.seed, Purpose.SELECT, round, turn)
        return np.sort(rng.choice(free, min(count, len(free)), replace=False))

    def next_available(self, time: float, busy: np.ndarray, among: np.ndarray | None = None) -> float:
        there = self.clock.population.availability
        if among is None:
            return there.next_available(time, busy)
        free = np.setdiff1d(among, busy, assume_unique=True)
        return float(there.next_start(time, free).min(initial=np.inf))

    def tier(self, round: int, shares: Sequence[float]) -> np.ndarray:
        tiers = np.array_split(self.clock.fastest_first, len(shares))
        rng = generator(self.clock.config.seed, Purpose.TIER, round)
        return np.sort(tiers[rng.choice(len(shares), p=np.array(shares) / sum(shares))])

    def attempts(self, round: int, clients: np.ndarray, start: float, deadline: float) -> Attempts:
        clock, view = self.clock, replace(self.round, participants=clients)
        levels = np.minimum(clock.allocation(view), clock.population.largest[clients])
        total, late = clock.config.train.epochs, clock.config.time.policy.late
        if np.isinf(deadline) or late == "drop":
            return self._made(view, levels, total, start)
        if late == "partial":
            ways = (self._made(view, levels, epochs, start) for epochs in range(total, 0, -1) or (total,))
        else:
            smaller = range(len(clock.plan.levels), 0, -1)
            ways = (self._made(view, np.minimum(levels, level), total, start) for level in smaller)
        return _most(ways, start + deadline)

    def _made(self, view: Round, levels: np.ndarray, epochs: int, start: float) -> Attempts:
        """So many epochs of these levels, with everything that disturbs a device."""
        clock, clients = self.clock, view.participants
        work = self._resized(view, levels) if clock.rule.resizes else clock.work(clients, levels)
        work, last = self._under_load(work, clients, levels, epochs)
        slow = slowdown(clock.config.time.stragglers, clock.config.seed, view.number, clients)
        total = clock.config.train.epochs
        share = epochs / total if total else 1.0
        return self._placed(
            replace(work, compute=work.compute * slow * share), clients, levels, last, epochs, start
        )

    def _resized(self, view: Round, levels: np.ndarray) -> Work:
        """What submodels take whose sizes only the rule knows."""
        clock, known, which = self.clock, dict[tuple[int, Submodel], int](), []
        for level, own in zip(levels, clock.rule.submodels(view, levels), strict=True):
            which.append(known.setdefault((int(level), own.shape), len(known)))
        charges = [clock.charge(level, own) for level, own in known]
        return clock.charged(charges, np.array(which, dtype=np.int64), view.participants)

    def _under_load(
        self, work: Work, clients: np.ndarray, levels: np.ndarray, epochs: int
    ) -> tuple[Work, np.ndarray]:
        """The same work beside others', and the level that each ends with."""
        clock = self.clock
        time, number = clock.config.time, self.round.number
        busy = load(time.load, clock.config.seed, clients, number)
        if not time.load.mid_round:
            return replace(work, compute=work.compute / (1 - busy)), levels
        later, rest, last = load(time.load, clock.config.seed, clients, number, half=1), work, levels
        # A client goes over to the next smaller level between two epochs.
        before = first_half(epochs) / epochs if epochs > 1 else 0.5
        if time.policy.switch and epochs > 1:
            last = np.where((later > busy) & (levels > 1), levels - 1, levels)
            rest = clock.work(clients, last)
        compute = before * work.compute / (1 - busy) + (1 - before) * rest.compute / (1 - later)
        return Work(work.download, compute, rest.upload, work.down, rest.up), last

    def _placed(
        self, work: Work, clients: np.ndarray, first: np.ndarray, last: np.ndarray, epochs: int, start: float
    ) -> Attempts:
        """When everything happens that the work consists of, on devices that come and go."""
        config, there = self.clock.config, self.clock.population.availability
        begin = np.full(len(clients), start)
        parts = work.download, work.download + work.compute, work.seconds
        lost = np.full(len(clients), np.inf)
        if config.time.availability.away == "lose":
            downloaded, computed, finish = (begin + part for part in parts)
            lost = there.until_away(begin, clients)
        else:
            downloaded, computed, finish = there.finish(begin, np.stack(parts), clients)
        if config.time.dropout:
            falls = uniforms(config.seed, Purpose.LOSS, self.round.number, clients) < config.time.dropout
            moment = uniforms(config.seed, Purpose.LOSS, self.round.number, clients, draw=1)
            lost = np.where(falls, np.minimum(lost, begin + moment * (finish - begin)), lost)
        return Attempts(
            client=clients,
            level=last,
            version=np.full(len(clients), self.round.number),
            epochs=np.full(len(clients), epochs),
            first=first,
            start=begin,
            downloaded=downloaded,
            computed=computed,
            finish=finish,
            lost=lost,
            down=work.down,
            up=work.up,
        )


def first_half(epochs: int) -> int:
    """Epochs before the middle of a client's training."""
    return epochs - epochs // 2


def _most(ways: Iterable[Attempts], cut: float) -> Attempts:
    """For each client the first way that is done before ``cut``, or else the last."""
    made: Attempts | None = None
    for way in ways:
        made = way if made is None else way.where(made.finish > cut, made)
    assert made is not None
    return made

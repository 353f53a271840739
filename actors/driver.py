"""The driver: plans the run, takes it through its rounds, keeps the simulated clock.

It only yields events and writes the run folder; whoever called it shows them. It does not know whether its
pools are Ray actors or live in its own process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from actors.events import Event, Finished, Planned, RoundDone, Working
from actors.pools import Pools, Usage
from cluster_fl import evaluation, experiment
from cluster_fl.aggregation.nested import aggregate
from cluster_fl.config import Config
from cluster_fl.errors import RunError
from cluster_fl.experiment import Experiment
from cluster_fl.records import Progress, RunFolder, weights_sha256
from cluster_fl.timing.clock import client_seconds, synchronous
from cluster_fl.training import cohort
from cluster_fl.training.cohort import CohortResult
from cluster_fl.training.worker import Task

Result = TypeVar("Result")
MakePools = Callable[[Experiment], Pools]
# Yields events while it works and returns a value: `value = yield from step(...)`.
Step = Generator[Event, None, Result]


@dataclass
class Stopwatch:
    """Wall-clock seconds spent in each phase of a round."""

    at: float
    phases: dict[str, float]

    @staticmethod
    def start() -> Stopwatch:
        return Stopwatch(time.perf_counter(), {})

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self.at
        self.at = now


class Driver:
    """One run. ``run`` is a generator of events; ``stop`` may be called beside it, from another thread."""

    def __init__(
        self, config: Config, folder: RunFolder, make_pools: MakePools, resume: bool = False
    ) -> None:
        self._config, self._folder, self._make_pools, self._resume = config, folder, make_pools, resume
        self._complete: Progress | None = None

    def run(self) -> Iterator[Event]:
        """Plan, then round after round; the last event is :class:`Finished`.

        Raises:
            UserError: the configuration cannot work; nothing has been written.
            RunError: a cohort kept killing its pools, an update was refused, ...
        """
        self._experiment = experiment.prepare(self._config)
        self._pools = self._make_pools(self._experiment)
        try:
            progress = self._begin()
            yield Planned(self._experiment.plan.as_json(), progress.rounds, self._pools.count)
            for number in range(progress.rounds, self._config.rounds):
                progress, record = yield from self._round(number, progress)
                yield RoundDone(record)
            yield Finished((yield from self._summarise(progress)))
        finally:
            self._pools.close()

    def stop(self) -> int:
        """Makes sure that the last complete round has a checkpoint; returns how many are complete."""
        if self._complete is None:
            return 0
        if self._complete.rounds:
            self._folder.save(self._config, self._complete)
        return self._complete.rounds

    def _begin(self) -> Progress:
        found = self._folder.load(self._config) if self._resume else None
        if not self._resume:
            self._folder.create(self._config)
        progress = found or Progress(0, self._experiment.initial_state())
        self._folder.write_plan(self._experiment.plan.as_json())
        self._folder.rewind(progress.rounds)
        self._complete = progress
        self._published = self._pools.publish(progress.state)
        return progress

    def _round(self, number: int, before: Progress) -> Step[tuple[Progress, dict[str, Any]]]:
        config, plan, population = self._config, self._experiment.plan, self._experiment.population
        watch, self._pools.usage, retries = Stopwatch.start(), Usage(), self._pools.retries

        participants = population.select(config, number)
        cohorts = cohort.form(config, plan, population, number, participants)
        watch.lap("select")
        results = yield from self._phase(cohorts, number, "train")
        watch.lap("train")
        _refuse_divergence(results, number)
        state = aggregate(plan, before.state, [result.partial for result in results])
        watch.lap("aggregate")
        seconds, payload = self._clock(participants)
        self._published = self._pools.publish(state)
        watch.lap("publish")
        accuracy = None
        if (number + 1) % config.evaluate.every == 0 or number + 1 == config.rounds:
            accuracy = yield from self._accuracy(number, population.judges(config, number), "held_out")
        watch.lap("evaluate")

        progress = Progress(
            rounds=number + 1,
            state=state,
            sim_time_s=before.sim_time_s + synchronous(seconds),
            wall_time_s=before.wall_time_s + sum(watch.phases.values()),
            bytes_down=before.bytes_down + int(payload.sum()),
            bytes_up=before.bytes_up + int(payload.sum()),
        )
        record: dict[str, Any] = {
            "round": number,
            "sim_time_s": progress.sim_time_s,
            "wall_time_s": progress.wall_time_s,
            "participants": [
                {"client": int(c), "level": int(population.level_of[c]), "seconds": float(s)}
                for c, s in zip(participants, seconds, strict=True)
            ],
            "train_loss": _mean_loss(results),
            "bytes_down": int(payload.sum()),
            "bytes_up": int(payload.sum()),
            "retries": self._pools.retries - retries,
        }
        if accuracy is not None:
            record["accuracy"] = accuracy
        record["wall"] = self._wall(watch)
        self._commit(progress, record)
        return progress, record

    def _commit(self, progress: Progress, record: dict[str, Any]) -> None:
        """A round is complete once its record is written; a checkpoint only ever follows its record."""
        self._folder.append_round(record)
        self._complete = progress
        if progress.rounds % self._config.checkpoint.every == 0 or progress.rounds == self._config.rounds:
            self._folder.save(self._config, progress)

    def _phase(self, tasks: Sequence[Task[Result]], number: int, name: str) -> Step[list[Result]]:
        """Runs tasks on the pools; returns their results in task order, whatever order they came in."""
        results: list[Any] = [None] * len(tasks)
        yield Working(number, name, 0, len(tasks))
        for done, (position, outcome) in enumerate(self._pools.execute(tasks, self._published), start=1):
            results[position] = outcome.result
            yield Working(number, name, done, len(tasks))
        return results

    def _clock(self, participants: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Simulated seconds and bytes each way of every participant."""
        plan, population = self._experiment.plan, self._experiment.population
        costs = [plan.level(int(level)).cost for level in population.level_of[participants]]
        macs, payload = (np.array([getattr(c, name) for c in costs]) for name in ("macs", "bytes"))
        samples = (
            np.array([len(population.shares.train[c]) for c in participants]) * self._config.train.epochs
        )
        return client_seconds(population.devices, participants, macs, payload, samples), payload

    def _accuracy(self, number: int, clients: np.ndarray, part: str) -> Step[dict[str, Any]]:
        plan, population, config = self._experiment.plan, self._experiment.population, self._config
        collect = evaluation.collections(plan, population, config.train.batch_size, config.seed, number)
        statistics = (
            evaluation.combine((yield from self._phase(collect, number, "statistics"))) if collect else {}
        )
        tasks = evaluation.evaluations(plan, population, clients, part, statistics)
        counts = yield from self._phase(tasks, number, "evaluate")
        return evaluation.accuracy(plan, population.level_of, counts)

    def _wall(self, watch: Stopwatch) -> dict[str, Any]:
        usage = self._pools.usage
        return {
            "phases": {phase: round(seconds, 4) for phase, seconds in watch.phases.items()},
            "pools": self._pools.count,
            "busy_s": round(usage.busy_s, 4),
            "tail_s": round(usage.tail_s, 4),
        }

    def _summarise(self, progress: Progress) -> Step[dict[str, Any]]:
        start = time.perf_counter()
        everyone = np.arange(self._config.clients.count)
        accuracy = yield from self._accuracy(self._config.rounds, everyone, "test")
        progress = replace(progress, wall_time_s=progress.wall_time_s + time.perf_counter() - start)
        summary = {
            "rounds": progress.rounds,
            "sim_time_s": progress.sim_time_s,
            "wall_time_s": progress.wall_time_s,
            "bytes": progress.bytes_down + progress.bytes_up,
            "bytes_down": progress.bytes_down,
            "bytes_up": progress.bytes_up,
            "accuracy": accuracy,
            "weights_sha256": weights_sha256(progress.state),
        }
        self._folder.write_summary(summary)
        return summary


def _refuse_divergence(results: Sequence[CohortResult], number: int) -> None:
    refused = sorted(client for result in results for client in result.refused)
    if refused:
        raise RunError(
            f"round {number}: training diverged on client{'s' if len(refused) > 1 else ''} "
            f"{', '.join(map(str, refused))} (weights not finite or changed by over 2048); lower train.lr "
            "or set train.clip_norm."
        )


def _mean_loss(results: Sequence[CohortResult]) -> float | None:
    """Mean over the clients that trained, in client order so that the sum's bits are always the same."""
    losses = sorted(
        (client, loss)
        for result in results
        for client, loss, steps in zip(result.clients, result.losses, result.steps, strict=True)
        if steps
    )
    return sum(loss for _, loss in losses) / len(losses) if losses else None

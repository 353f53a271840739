"""The driver: plans the run, takes it through its rounds, keeps the simulated clock.

It only yields events and writes the run folder; whoever called it shows them. It does not know whether its
pools are Ray actors or live in its own process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from actors.events import Event, Finished, Planned, RoundDone, Working
from actors.pools import Pools
from actors.stopwatch import Stopwatch
from cluster_fl import evaluation, experiment
from cluster_fl.aggregation.nested import CoverageMean
from cluster_fl.config import Config
from cluster_fl.errors import RunError, UserError
from cluster_fl.experiment import Experiment
from cluster_fl.records import Progress, RunFolder, weights_sha256
from cluster_fl.timing.rounds import RoundCost, round_cost
from cluster_fl.training import cohort
from cluster_fl.training.cohort import CohortReport, CohortResult
from cluster_fl.training.worker import Task

Result = TypeVar("Result")
MakePools = Callable[[Experiment], Pools]
Record = dict[str, Any]
# Yields events while it works and returns a value: `value = yield from step(...)`.
Step = Generator[Event, None, Result]


def _itself(result: Result) -> Result:
    return result


class Driver:
    """One run. ``run`` is a generator of events; ``stop`` may be called beside it, from another thread."""

    def __init__(
        self, config: Config, folder: RunFolder, make_pools: MakePools, resume: bool = False
    ) -> None:
        self._config, self._folder, self._make_pools, self._resume = config, folder, make_pools, resume
        self._complete: Progress | None = None
        self._saving = threading.Lock()  # `stop` may save beside `run`

    def run(self) -> Iterator[Event]:
        """Plan, then round after round; the last event is :class:`Finished`.

        Raises:
            UserError: the configuration cannot work; nothing has been written.
            RunError: a cohort kept killing its pools, training diverged, ...
        """
        self._experiment = experiment.prepare(self._config)
        self._plan, self._population = self._experiment.plan, self._experiment.population
        self._pools = self._make_pools(self._experiment)
        try:
            progress = self._begin()
            yield Planned(self._plan.as_json(), progress.rounds, self._pools.count)
            for number in range(progress.rounds, self._config.rounds):
                progress = yield from self._round(number, progress)
            yield Finished((yield from self._summarise(progress)))
        finally:
            self._pools.close()

    def stop(self) -> int:
        """Makes sure that the last complete round has a checkpoint; returns how many are complete."""
        if self._complete is None:
            return 0
        if self._complete.rounds:
            self._save(self._complete)
        return self._complete.rounds

    def _begin(self) -> Progress:
        found = self._folder.load(self._config) if self._resume else None
        if not self._resume:
            self._folder.create(self._config)
        device, same = self._pools.device, self._experiment.sha256()
        progress = found or Progress(0, self._experiment.initial_state(), device=device, experiment=same)
        if progress.device != device:
            right = f"the run began on {progress.device} and would go on with other bits on {device}."
            raise UserError("cluster.gpus_per_pool", self._config.cluster.gpus_per_pool, right)
        if progress.experiment != same:
            raise RunError(
                f"{self._folder.path}: the plan or the partition comes out otherwise than when the run began; "
                "go on with the same versions of cluster-fl and its libraries."
            )
        self._folder.write_plan(self._plan.as_json())
        self._folder.rewind(progress.rounds)
        self._complete = progress
        self._published = self._pools.publish(progress.state)
        self._watch = Stopwatch()
        return progress

    def _round(self, number: int, before: Progress) -> Step[Progress]:
        """select -> cohorts -> pools train -> aggregate -> clock -> evaluate -> record -> checkpoint."""
        participants = self._population.select(self._config, number)
        cohorts = cohort.form(self._config, self._plan, self._population, number, participants)
        self._watch.lap("select")
        mean = CoverageMean(self._plan, before.state)
        reports = yield from self._phase(cohorts, number, "train", lambda result: _take(result, mean))
        self._watch.lap("train")
        _stop_on_divergence(reports, number)
        state = mean.result()
        self._published = self._pools.publish(state)
        self._watch.lap("aggregate")
        cost = round_cost(self._plan, self._population, participants, self._config.train.epochs)
        self._watch.lap("clock")
        accuracy = yield from self._evaluate(number)
        self._watch.lap("evaluate")
        record = self._record(number, participants, reports, cost, accuracy)
        progress = _advance(before, state, cost, record)
        self._commit(progress, record)
        self._watch.lap("record")
        yield RoundDone(record)
        return progress

    def _phase(
        self, tasks: Sequence[Task[Result]], number: int, name: str, take: Callable[[Result], Any] = _itself
    ) -> Step[list[Any]]:
        """Runs tasks on the pools; returns what ``take`` makes of each result at its arrival, in task order."""
        results: list[Any] = [None] * len(tasks)
        yield Working(number, name, 0, len(tasks))
        for done, (position, outcome) in enumerate(self._pools.execute(tasks, self._published), start=1):
            results[position] = take(outcome.result)
            yield Working(number, name, done, len(tasks))
        return results

    def _evaluate(self, number: int) -> Step[Record | None]:
        """Accuracy on held-out parts, where this round's turn has come."""
        if (number + 1) % self._config.evaluate.every and number + 1 < self._config.rounds:
            return None
        judges = self._population.judges(self._config, number)
        return (yield from self._accuracy(number, judges, "held_out"))

    def _accuracy(self, number: int, clients: np.ndarray, part: str) -> Step[Record]:
        batch, seed = self._config.train.batch_size, self._config.seed
        collect = evaluation.collections(self._plan, self._population, batch, seed, number)
        collected = (yield from self._phase(collect, number, "statistics")) if collect else []
        statistics = evaluation.combine(collected)
        tasks = evaluation.evaluations(self._plan, self._population, clients, part, statistics)
        counts = yield from self._phase(tasks, number, "evaluate")
        return evaluation.accuracy(self._plan, self._population.level_of, counts)

    def _record(
        self,
        number: int,
        participants: np.ndarray,
        reports: Sequence[CohortReport],
        cost: RoundCost,
        accuracy: Record | None,
    ) -> Record:
        """The round's line of rounds.jsonl; both clocks follow in :func:`_advance`."""
        phases, usage = self._watch.read(), self._pools.take_usage()
        who = zip(participants, cost.seconds, strict=True)
        record = {
            "round": number,
            "participants": [
                {"client": int(c), "level": int(self._population.level_of[c]), "seconds": float(s)}
                for c, s in who
            ],
            "train_loss": _mean_loss(reports),
            "bytes_down": cost.bytes,
            "bytes_up": cost.bytes,
            "retries": usage.retries,
            "wall": {
                "phases": {phase: round(seconds, 4) for phase, seconds in phases.items()},
                "pools": self._pools.count,
                "busy_s": round(usage.busy_s, 4),
                "tail_s": round(usage.tail_s, 4),
            },
        }
        return record if accuracy is None else record | {"accuracy": accuracy}

    def _commit(self, progress: Progress, record: Record) -> None:
        """A round is complete once its record is written; a checkpoint only ever follows its record."""
        self._folder.append_round(record)
        self._complete = progress
        if progress.rounds % self._config.checkpoint.every == 0 or progress.rounds == self._config.rounds:
            self._save(progress)

    def _save(self, progress: Progress) -> None:
        with self._saving:
            self._folder.save(self._config, progress)

    def _summarise(self, progress: Progress) -> Step[Record]:
        everyone = np.arange(self._config.clients.count)
        accuracy = yield from self._accuracy(self._config.rounds, everyone, "test")
        self._watch.lap("test")
        summary = {
            "rounds": progress.rounds,
            "sim_time_s": progress.sim_time_s,
            "wall_time_s": progress.wall_time_s + sum(self._watch.read().values()),
            "bytes": progress.bytes_down + progress.bytes_up,
            "bytes_down": progress.bytes_down,
            "bytes_up": progress.bytes_up,
            "accuracy": accuracy,
            "weights_sha256": weights_sha256(progress.state),
        }
        self._folder.write_summary(summary)
        return summary


def _advance(before: Progress, state: dict[str, np.ndarray], cost: RoundCost, record: Record) -> Progress:
    """Where the run stands after a round; puts both clocks into the round's record."""
    progress = replace(
        before,
        rounds=before.rounds + 1,
        state=state,
        sim_time_s=before.sim_time_s + cost.length,
        wall_time_s=before.wall_time_s + sum(record["wall"]["phases"].values()),
        bytes_down=before.bytes_down + cost.bytes,
        bytes_up=before.bytes_up + cost.bytes,
    )
    record |= {"sim_time_s": progress.sim_time_s, "wall_time_s": progress.wall_time_s}
    return progress


def _take(result: CohortResult, mean: CoverageMean) -> CohortReport:
    """Adds a cohort's sum at once, so that the driver never holds more than one."""
    mean.add(result.partial)
    return result.report


def _stop_on_divergence(reports: Sequence[CohortReport], number: int) -> None:
    refused = sorted(client for report in reports for client in report.refused)
    if refused:
        raise RunError(
            f"round {number}: training diverged on client{'s' if len(refused) > 1 else ''} "
            f"{', '.join(map(str, refused))} (weights not finite or changed by over 2048); lower train.lr "
            "or set train.clip_norm."
        )


def _mean_loss(reports: Sequence[CohortReport]) -> float | None:
    """Mean over the clients that trained, in client order so that the sum's bits are always the same."""
    losses = sorted(
        (client, loss)
        for report in reports
        for client, loss, steps in zip(report.clients, report.losses, report.steps, strict=True)
        if steps
    )
    return sum(loss for _, loss in losses) / len(losses) if losses else None

"""The driver: plans the run, takes it through its rounds, keeps the simulated clock.

It only yields events and writes the run folder; whoever called it shows them. It does not know whether its
pools are Ray actors or live in its own process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from actors.events import Event, Finished, Planned, RoundDone, Working
from actors.pools import Pools
from actors.stopwatch import Stopwatch
from cluster_fl import evaluation, experiment
from cluster_fl.config import Config
from cluster_fl.enlisting import enlist
from cluster_fl.errors import RunError, UserError
from cluster_fl.evaluation import Counts
from cluster_fl.experiment import Experiment
from cluster_fl.merging import Merged, Phase
from cluster_fl.nesting.plan import State
from cluster_fl.records import Progress, RunFolder, weights_sha256
from cluster_fl.rounds import Round, Start
from cluster_fl.timing import intervals, timeline
from cluster_fl.timing import policies as clock
from cluster_fl.timing.attempts import participants
from cluster_fl.training.cohort import Cohort, CohortReport
from cluster_fl.training.worker import Task

# Clients whose labels the caller hears of: as many as fit in a picture.
SHOWN = 200

Result = TypeVar("Result")
MakePools = Callable[[Experiment], Pools]
Record = dict[str, Any]
# Yields events while it works and returns a value: `value = yield from step(...)`.
Step = Generator[Event, None, Result]


class Driver:
    """One run. ``run`` is a generator of events; ``stop`` may be called beside it, from another thread."""

    def __init__(
        self, config: Config, folder: RunFolder, make_pools: MakePools, resume: bool = False
    ) -> None:
        self._config, self._folder, self._make_pools, self._resume = config, folder, make_pools, resume
        self._complete: Progress | None = None
        self._published: dict[int, tuple[Mapping[str, np.ndarray], Any]] = {}  # by the state's identity
        self._in_use: set[int] = set()  # identities of the weights that somebody is under way from
        self._saving = threading.Lock()  # `stop` may save beside `run`

    def run(self) -> Generator[Event, None, None]:
        """Plan, then round after round; the last event is :class:`Finished`.

        Raises:
            UserError: the configuration cannot work, or another process has the folder; nothing has been written.
            RunError: a cohort kept killing its pools, the disk is full, ... The last complete round has a checkpoint
                then, if it could be written.
        """
        self._experiment = experiment.prepare(self._config)
        self._plan, self._population = self._experiment.plan, self._experiment.population
        self._pools = self._make_pools(self._experiment)
        try:
            with self._folder.locked(), self._kept():
                if not self._resume:
                    self._folder.create(self._config)
                progress = self._begin()
                yield self._planned(progress.rounds)
                for number in range(progress.rounds, self._config.rounds):
                    progress = yield from self._round(number, progress)
                yield Finished((yield from self._summarise(progress)))
        finally:
            self._pools.close()

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Whatever ends the run, the rounds that are complete stay."""
        try:
            yield
        except Exception as error:
            with suppress(OSError):
                self.stop()
            if isinstance(error, OSError):
                told = f"{error.filename or self._folder.path}: {error.strerror or error}."
                raise RunError(told) from error
            raise

    def stop(self) -> int:
        """Makes sure that the last complete round has a checkpoint; returns how many are complete."""
        if self._complete is None:
            return 0
        if self._complete.rounds:
            self._save(self._complete)
        return self._complete.rounds

    def _begin(self) -> Progress:
        found = self._folder.load(self._config) if self._resume else None
        progress = found or self._first()
        if progress.device != self._pools.device:
            right = (
                f"the run began on {progress.device} and would go on with other bits on {self._pools.device}."
            )
            raise UserError("cluster.gpus_per_pool", self._config.cluster.gpus_per_pool, right)
        if progress.experiment != self._experiment.sha256():
            raise RunError(
                f"{self._folder.path}: the plan or the partition comes out otherwise than when the run began; "
                "go on with the same versions of cluster-fl and its libraries."
            )
        self._folder.write_plan(self._plan.as_json())
        self._folder.rewind(progress.rounds)
        self._complete = progress
        self._watch = Stopwatch()
        return progress

    def _first(self) -> Progress:
        state = self._experiment.initial_state()
        memory = self._experiment.merge.initial(state)
        return Progress(0, state, memory, device=self._pools.device, experiment=self._experiment.sha256())

    def _planned(self, start: int) -> Planned:
        data = self._experiment.dataset
        samples = self._population.label_counts(data.labels, data.classes, SHOWN)
        return Planned(self._plan.as_json(), start, self._pools.count, samples)

    def _round(self, number: int, before: Progress) -> Step[Progress]:
        """clock (who is asked, who counts) -> cohorts -> pools train and merge -> evaluate -> record -> checkpoint."""
        made = self._experiment
        self._in_use = {id(start.state) for start in before.starts.values()} | {id(before.state)}
        round = self._view(number, before)
        step = made.policy.step(before.standing, made.clock.dispatch(round))
        self._watch.lap("clock")
        cohorts = enlist(round, step, made.rule, made.program, made.merge.keeps_updates)
        self._watch.lap("select")
        merged = yield from self._merge(replace(round, pull=step.pull), cohorts)
        after = self._after(before, merged, step)
        self._watch.lap("aggregate")
        accuracy = yield from self._evaluate(number, after)
        self._watch.lap("evaluate")
        record = self._record(step, merged.reports, accuracy)
        progress = _advance(after, record)
        self._commit(progress, record, step)
        self._watch.lap("record")
        yield RoundDone(record)
        return progress

    def _view(self, number: int, progress: Progress) -> Round:
        """A round that starts from where the run stands."""

        def personal(client: int) -> State:
            at = progress.clients.get(client)
            return {} if at is None else self._folder.clients.load(client, at)

        return Round(
            number=number,
            config=self._config,
            plan=self._plan,
            population=self._population,
            state=progress.state,
            memory=progress.memory,
            personal=personal,
            starts=progress.starts,
        )

    def _merge(self, round: Round, cohorts: Sequence[Cohort]) -> Step[Merged]:
        """Runs the phases that the method's merge asks for; nothing moves where nobody counts."""
        if not cohorts:
            return Merged(round.state, round.memory, [])
        phases = self._experiment.merge.phases(round, cohorts)
        try:
            phase = next(phases)
            while True:
                self._watch.lap("aggregate")
                results = yield from self._phase(phase, round.number)
                self._watch.lap(phase.name)
                phase = phases.send(results)
        except StopIteration as end:
            merged: Merged = end.value
            return merged

    def _after(self, before: Progress, merged: Merged, step: clock.Step) -> Progress:
        """The next weights, memory and time; what clients keep goes to disk at once."""
        for client, arrays in merged.personal.items():
            self._folder.clients.save(client, step.round, arrays)
        known = before.starts | {step.round: Start(before.state, before.memory)}
        flight = step.after.flight
        return replace(
            before,
            rounds=step.after.round,
            state=merged.state,
            memory=merged.memory,
            clients=before.clients | dict.fromkeys(merged.personal, step.round),
            flight=flight,
            starts={version: known[version] for version in np.unique(flight.version).tolist()},
            sim_time_s=step.end,
        )

    def _phase(self, phase: Phase, number: int) -> Step[list[Any]]:
        """Runs a phase on the pools; what ``phase.take`` made of each result, in task order."""
        results: list[Any] = [None] * len(phase.tasks)
        yield Working(number, phase.name, 0, len(phase.tasks))
        outcomes = self._pools.execute(phase.tasks, self._publish(phase.states))
        for done, (position, outcome) in enumerate(outcomes, start=1):
            results[position] = phase.take(outcome.result)
            yield Working(number, phase.name, done, len(phase.tasks))
        return results

    def _publish(self, states: Sequence[Mapping[str, np.ndarray]]) -> list[Any]:
        """The pools' handle of each state. Those of the last phase, and weights in use, are remembered."""
        read = {id(state): state for state in states}
        known = {key: self._published[key] for key in self._published if key in read or key in self._in_use}
        for key in read.keys() - known.keys():
            known[key] = read[key], self._pools.publish(read[key])
        self._published = known
        return [known[id(state)][1] for state in states]

    def _evaluate(self, number: int, progress: Progress) -> Step[Record | None]:
        """Accuracy on held-out parts, where this round's turn has come."""
        if (number + 1) % self._config.evaluate.every and number + 1 < self._config.rounds:
            return None
        judges = self._population.judges(self._config, number)
        return (yield from self._accuracy(number, progress, judges, "held_out"))

    def _accuracy(self, number: int, progress: Progress, clients: np.ndarray, part: str) -> Step[Record]:
        if not any(len(getattr(self._population.shares, part)[client]) for client in clients):
            return evaluation.accuracy(self._plan, [])
        made, round = self._experiment, self._view(number, progress)
        served = made.rule.serve(round)
        collect = evaluation.collections(round, served)
        collected = (
            (yield from self._phase(Phase("statistics", collect, round.state), number)) if collect else []
        )
        statistics = evaluation.combine(collected)
        tasks: list[Task[Counts]] = []
        if self._plan.serves:
            tasks += evaluation.evaluations(round, served, clients, part, statistics)
        tasks += evaluation.personal_evaluations(round, made.program, served, clients, part, statistics)
        counts = yield from self._phase(Phase("evaluate", tasks, round.state), number)
        return evaluation.accuracy(self._plan, counts)

    def _record(self, step: clock.Step, reports: Sequence[CohortReport], accuracy: Record | None) -> Record:
        """The round's line of rounds.jsonl; the wall clock follows in :func:`_advance`."""
        phases, usage = self._watch.read(), self._pools.take_usage()
        record = {
            "round": step.round,
            "participants": participants(step.ended),
            "refused": sorted(client for report in reports for client in report.refused),
            "train_loss": _mean_loss(reports),
            "bytes_down": int(step.ended.down.sum()),
            "bytes_up": int(step.ended.up.sum()),
            "sim_time_s": step.end,
            "retries": usage.retries,
            "wall": {
                "phases": {phase: round(seconds, 4) for phase, seconds in phases.items()},
                "pools": self._pools.count,
                "busy_s": round(usage.busy_s, 4),
                "tail_s": round(usage.tail_s, 4),
                "store_bytes": usage.store_bytes,
            },
        }
        return record if accuracy is None else record | {"accuracy": accuracy}

    def _commit(self, progress: Progress, record: Record, step: clock.Step) -> None:
        """A round is complete once its record is written; a checkpoint only ever follows its record."""
        self._folder.timeline.append(step, self._pauses(step))
        self._folder.append_round(record)
        self._complete = progress
        if progress.rounds % self._config.checkpoint.every == 0 or progress.rounds == self._config.rounds:
            self._save(progress)

    def _pauses(self, step: clock.Step) -> np.ndarray:
        return intervals.pauses(step.ended, self._population.availability)

    def _save(self, progress: Progress) -> None:
        with self._saving:
            self._folder.save(self._config, progress)

    def _summarise(self, progress: Progress) -> Step[Record]:
        everyone = np.arange(self._config.clients.count)
        accuracy = yield from self._accuracy(self._config.rounds, progress, everyone, "test")
        self._watch.lap("test")
        last = timeline.unfinished(progress.standing)
        self._folder.finish_timeline(last, self._pauses(last))
        self._watch.lap("record")
        summary = {
            "rounds": progress.rounds,
            "sim_time_s": progress.sim_time_s,
            "wall_time_s": progress.wall_time_s + sum(self._watch.read().values()),
            "bytes": progress.bytes_down + progress.bytes_up,
            "bytes_down": progress.bytes_down,
            "bytes_up": progress.bytes_up,
            "refused": progress.refused,
            "accuracy": accuracy,
            "weights_sha256": weights_sha256(progress.state),
            "clients_sha256": self._folder.clients.sha256(progress.clients),
        }
        self._folder.write_summary(summary)
        return summary


def _advance(after: Progress, record: Record) -> Progress:
    """The totals after a round; puts the wall clock into the round's record."""
    progress = replace(
        after,
        wall_time_s=after.wall_time_s + sum(record["wall"]["phases"].values()),
        bytes_down=after.bytes_down + record["bytes_down"],
        bytes_up=after.bytes_up + record["bytes_up"],
        refused=after.refused + len(record["refused"]),
    )
    record |= {"wall_time_s": progress.wall_time_s}
    return progress


def _mean_loss(reports: Sequence[CohortReport]) -> float | None:
    """Mean over the clients whose update was taken, in client order so that the sum's bits are always the same."""
    losses = sorted(
        (client, loss)
        for report in reports
        for client, loss, steps in zip(report.clients, report.losses, report.steps, strict=True)
        if steps and client not in report.refused
    )
    return sum(loss for _, loss in losses) / len(losses) if losses else None

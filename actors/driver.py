"""The driver: plans the run, takes it through its rounds, keeps the simulated clock.

It only yields events and writes the run folder; whoever called it shows them. It does not know whether its
pools are Ray actors or live in its own process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from actors.events import Event, Finished, Planned, RoundDone, Working
from actors.pools import Pools
from actors.stopwatch import Stopwatch
from cluster_fl import evaluation, experiment
from cluster_fl.assignment import assign
from cluster_fl.config import Config
from cluster_fl.errors import RunError, UserError
from cluster_fl.evaluation import Counts
from cluster_fl.experiment import Experiment
from cluster_fl.merging import Merged, Phase
from cluster_fl.nesting.plan import Assignment, State
from cluster_fl.records import Progress, RunFolder, weights_sha256
from cluster_fl.rounds import Round
from cluster_fl.timing.rounds import RoundCost, round_cost
from cluster_fl.training import cohort
from cluster_fl.training.cohort import Cohort, CohortReport
from cluster_fl.training.worker import Task

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
        self._published: tuple[Mapping[str, np.ndarray], Any] | None = None
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

    def _round(self, number: int, before: Progress) -> Step[Progress]:
        """select -> assign -> cohorts -> pools train and merge -> clock -> evaluate -> record -> checkpoint."""
        made = self._experiment
        round = self._view(number, before).select()
        assignments = assign(round, made.allocation, made.rule)
        cohorts = cohort.form(round, assignments, made.program, made.merge.keeps_updates)
        self._watch.lap("select")
        merged = yield from self._merge(round, cohorts)
        after = self._kept(before, merged, number)
        self._watch.lap("aggregate")
        cost = round_cost(round, assignments, made.program)
        self._watch.lap("clock")
        accuracy = yield from self._evaluate(number, after)
        self._watch.lap("evaluate")
        record = self._record(number, assignments, merged.reports, cost, accuracy)
        progress = _advance(after, cost, record)
        self._commit(progress, record)
        self._watch.lap("record")
        yield RoundDone(record)
        return progress

    def _view(self, number: int, progress: Progress) -> Round:
        """A round that starts from where the run stands."""

        def personal(client: int) -> State:
            at = progress.clients.get(client)
            return {} if at is None else self._folder.clients.load(client, at)

        return Round(
            number, self._config, self._plan, self._population, progress.state, progress.memory, personal
        )

    def _merge(self, round: Round, cohorts: Sequence[Cohort]) -> Step[Merged]:
        """Runs the phases that the method's merge asks for."""
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

    def _kept(self, before: Progress, merged: Merged, number: int) -> Progress:
        """The next weights and memory; what clients keep goes to disk at once."""
        for client, arrays in merged.personal.items():
            self._folder.clients.save(client, number, arrays)
        clients = before.clients | dict.fromkeys(merged.personal, number)
        return replace(before, state=merged.state, memory=merged.memory, clients=clients)

    def _phase(self, phase: Phase, number: int) -> Step[list[Any]]:
        """Runs a phase on the pools; what ``phase.take`` made of each result, in task order."""
        results: list[Any] = [None] * len(phase.tasks)
        yield Working(number, phase.name, 0, len(phase.tasks))
        outcomes = self._pools.execute(phase.tasks, self._publish(phase.state))
        for done, (position, outcome) in enumerate(outcomes, start=1):
            results[position] = phase.take(outcome.result)
            yield Working(number, phase.name, done, len(phase.tasks))
        return results

    def _publish(self, state: Mapping[str, np.ndarray]) -> Any:
        """The pools' handle of a state; the last one is remembered, since many phases read the same."""
        if self._published is None or self._published[0] is not state:
            self._published = state, self._pools.publish(state)
        return self._published[1]

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

    def _record(
        self,
        number: int,
        assignments: Sequence[Assignment],
        reports: Sequence[CohortReport],
        cost: RoundCost,
        accuracy: Record | None,
    ) -> Record:
        """The round's line of rounds.jsonl; both clocks follow in :func:`_advance`."""
        phases, usage = self._watch.read(), self._pools.take_usage()
        record = {
            "round": number,
            "participants": [
                {"client": a.client, "level": a.level, "seconds": float(seconds)}
                for a, seconds in zip(assignments, cost.seconds, strict=True)
            ],
            "train_loss": _mean_loss(reports),
            "bytes_down": int(cost.down.sum()),
            "bytes_up": int(cost.up.sum()),
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
        accuracy = yield from self._accuracy(self._config.rounds, progress, everyone, "test")
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
            "clients_sha256": self._folder.clients.sha256(progress.clients),
        }
        self._folder.write_summary(summary)
        return summary


def _advance(before: Progress, cost: RoundCost, record: Record) -> Progress:
    """Where the run stands after a round; puts both clocks into the round's record."""
    progress = replace(
        before,
        rounds=before.rounds + 1,
        sim_time_s=before.sim_time_s + cost.length,
        wall_time_s=before.wall_time_s + sum(record["wall"]["phases"].values()),
        bytes_down=before.bytes_down + record["bytes_down"],
        bytes_up=before.bytes_up + record["bytes_up"],
    )
    record |= {"sim_time_s": progress.sim_time_s, "wall_time_s": progress.wall_time_s}
    return progress


def _mean_loss(reports: Sequence[CohortReport]) -> float | None:
    """Mean over the clients that trained, in client order so that the sum's bits are always the same."""
    losses = sorted(
        (client, loss)
        for report in reports
        for client, loss, steps in zip(report.clients, report.losses, report.steps, strict=True)
        if steps
    )
    return sum(loss for _, loss in losses) / len(losses) if losses else None

"""A trial without Ray's part in it: an ordinary run that tells how it stands after every evaluation."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from actors.driver import Driver, MakePools
from actors.events import Event, Planned, RoundDone
from cluster_fl.config import Config
from cluster_fl.errors import RunError
from cluster_fl.records import RunFolder
from ops.begun import is_begun
from ops.sweeping.ledger import measured
from ops.tracking import tracker


@dataclass(frozen=True)
class Report:
    """How a trial stands after ``rounds`` rounds, and whether that was known before this start of it."""

    rounds: int
    value: float
    sim_time_s: float
    finished: bool = False
    replayed: bool = False


class Trial:
    """A run folder's run, begun or gone on with."""

    def __init__(
        self, config: Config, folder: RunFolder, make_pools: MakePools, metric: str, group: str, replay: bool
    ) -> None:
        self._config, self._folder, self._metric, self._replay = config, folder, metric, replay
        self._driver = Driver(config, folder, make_pools, is_begun(folder, config, folder.path.name, "trial"))
        self._tracker = tracker(config, folder, group, quiet=True)

    def reports(self) -> Generator[Report, None, None]:
        """The last one once the run is finished and all is told. Closed early, it leaves a run that can go on.

        With ``replay`` those of an earlier start come first: a scheduler that starts afresh has to hear them.
        """
        last: Mapping[str, Any] | None = None
        with self._tracker, closing(_events(self._driver)) as events:
            for event in events:
                self._tracker.show(event)
                if isinstance(event, Planned):
                    known = [
                        one
                        for one in self._folder.rounds()
                        if one["round"] < event.start and "accuracy" in one
                    ]
                    last = known[-1] if known else None
                    for record in known if self._replay else ():
                        if record["round"] + 1 < self._config.rounds:
                            yield self._report(record, replayed=True)
                elif isinstance(event, RoundDone) and "accuracy" in event.record:
                    last = event.record
                    # The last round's report waits for the end: whoever hears of it may stop the run.
                    if last["round"] + 1 < self._config.rounds:
                        yield self._report(last)
        assert last is not None, "the last round is always evaluated"
        yield self._report(last, finished=True)

    def keep(self) -> None:
        """Makes sure that the last complete round has a checkpoint."""
        self._driver.stop()

    def _report(self, record: Mapping[str, Any], finished: bool = False, replayed: bool = False) -> Report:
        value = measured(record, self._metric)
        if value is None:
            raise RunError(f"{self._config.method} has no {self._metric} to choose by (sweep.metric).")
        return Report(record["round"] + 1, value, record["sim_time_s"], finished, replayed)


def _events(driver: Driver) -> Generator[Event, None, None]:
    """The driver's; whatever ends them early, the last complete round is kept."""
    events: Iterator[Event] = driver.run()
    try:
        yield from events
    except GeneratorExit:
        driver.stop()
        raise

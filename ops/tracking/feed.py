"""From a driver's events to what a tracker shows: rows of numbers, pictures, the plan, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL.Image import Image

from actors.events import Event, Finished, Planned, RoundDone
from cluster_fl.config import Config
from cluster_fl.errors import ClusterFLError
from cluster_fl.records import RunFolder
from cluster_fl.timing import timeline
from ops.tracking import pictures
from ops.tracking.history import History, Row

# Pictures of a round's clients in a run; of a longer run, every second round's or fewer.
TIMELINES = 50
COLUMNS = ("level", "width", "depth", "exits", "params", "macs", "bytes", "ratio", "clients")

# Rows of one kind, by column.
Table = list[dict[str, Any]]


class Sink(Protocol):
    """Where it is shown. Methods may block and may raise."""

    def log(
        self, step: int, row: Row, pictures: Mapping[str, Image], tables: Mapping[str, Table]
    ) -> None: ...

    def keep(self, rounds: int, root: Path, files: Iterable[Path]) -> None:
        """Keeps a checkpoint: ``files`` below ``root``, after ``rounds`` rounds."""

    def close(self, finished: bool) -> None: ...


class Feed:
    """Tells a sink the whole run, whenever it began: rounds that are over are told from their records.

    A sink that was told of them before shows them once; see each sink.
    """

    def __init__(self, config: Config, folder: RunFolder, make: Callable[[], Sink]) -> None:
        self._config, self._folder, self._make = config, folder, make
        self._sink: Sink | None = None
        self._history, self._finished = History(), False
        self._opening: tuple[dict[str, Image], dict[str, Table]] = ({}, {})

    def show(self, event: Event) -> None:
        if isinstance(event, Planned):
            self._sink = self._make()
            self._opening = {"classes": pictures.heatmap(event.samples)}, {"plan": _plan_table(event.plan)}
            for record in self._folder.rounds():
                if record["round"] < event.start:
                    self._round(self._sink, record)
        elif self._sink is None:
            return
        elif isinstance(event, RoundDone):
            self._round(self._sink, event.record)
            if self._config.tracking.artifacts:
                self._keep(self._sink, event.record["round"] + 1)
        elif isinstance(event, Finished):
            self._sink.log(event.summary["rounds"], self._history.last(event.summary), {}, {})
            self._finished = True

    def close(self) -> None:
        if self._sink is not None:
            self._sink.close(self._finished)

    def _round(self, sink: Sink, record: Mapping[str, Any]) -> None:
        shown, tables = self._opening
        self._opening = {}, {}
        number = record["round"]
        if is_drawn(number, self._config.rounds) and (drawn := self._timeline(number)) is not None:
            shown["timeline"] = drawn
        sink.log(number, self._history.row(record), shown, tables)

    def _timeline(self, number: int) -> Image | None:
        try:
            return pictures.timeline(timeline.of_round(self._folder.path, number))
        except ClusterFLError:
            return None  # damaged, or cut back meanwhile: not worth losing the rest for

    def _keep(self, sink: Sink, rounds: int) -> None:
        try:
            files = self._folder.checkpoint_files(rounds)
            if files:
                sink.keep(rounds, self._folder.path, files)
        except FileNotFoundError:
            return  # newer ones have replaced it: the run is faster than the network


def is_drawn(number: int, rounds: int) -> bool:
    """Whether the clients of this round are drawn."""
    return number % -(-rounds // TIMELINES) == 0


def _plan_table(plan: Mapping[str, Any]) -> Table:
    levels: Sequence[Mapping[str, Any]] = plan["levels"]
    return [{column: _cell(level[column]) for column in COLUMNS if column in level} for level in levels]


def _cell(value: Any) -> Any:
    """Lists as words: a table's column has one type."""
    return " ".join(map(str, value)) if isinstance(value, list) else value

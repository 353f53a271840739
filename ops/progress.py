"""Shows a run while it runs: a bar on a terminal, a line a round anywhere else."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from actors.events import Event, Planned, RoundDone, Working
from ops.accuracy import NAMES, last_exit


class Screen:
    """Events in, text out; with ``quiet`` nothing at all."""

    def __init__(self, rounds: int, quiet: bool, console: Console | None = None) -> None:
        self._rounds, self._quiet = rounds, quiet
        self._console = console or Console(stderr=True)
        self._accuracy, self._remaining = "", ""
        self._started, self._first = time.monotonic(), 0
        self._bar: Progress | None = None

    def __enter__(self) -> Screen:
        if not self._quiet and self._console.is_terminal:
            columns = (
                TextColumn("round {task.fields[at]}"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[doing]}"),
                TextColumn("{task.fields[accuracy]}", style="bold"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[remaining]}"),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task(
                "", total=self._rounds, at="", doing="starting", accuracy="", remaining=""
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def show(self, event: Event) -> None:
        if self._quiet:
            return
        if isinstance(event, Planned):
            self._planned(event)
        elif isinstance(event, Working):
            self._update(event.round, f"{event.phase} {event.done}/{event.total}")
        elif isinstance(event, RoundDone):
            self._round_done(event.record)

    def _planned(self, event: Planned) -> None:
        self._first, self._started = event.start, time.monotonic()
        levels = len(event.plan["levels"])
        clients = sum(level["clients"] for level in event.plan["levels"])
        start = f", from round {event.start}" if event.start else ""
        self._line(
            f"{clients} clients at {levels} levels, {self._rounds} rounds{start}, {_count(event.pools, 'pool')}"
        )

    def _round_done(self, record: dict[str, Any]) -> None:
        done = record["round"] + 1
        elapsed = time.monotonic() - self._started
        left = elapsed / (done - self._first) * (self._rounds - done)
        self._remaining = f"{_duration(left)} left" if done < self._rounds else ""
        if "accuracy" in record:
            self._accuracy = _accuracy(record["accuracy"])
        if self._bar is None:
            loss = "-" if record["train_loss"] is None else f"{record['train_loss']:.4f}"
            parts = [
                f"round {done}/{self._rounds}",
                f"loss {loss}",
                _refused(record),
                self._accuracy,
                f"{_duration(elapsed)}",
                self._remaining,
            ]
            self._line("  ".join(part for part in parts if part))
        else:
            self._update(record["round"], "", done)

    def _update(self, number: int, doing: str, done: int | None = None) -> None:
        if self._bar is not None:
            at = f"{min(number + 1, self._rounds)}/{self._rounds}"
            self._bar.update(
                self._task, completed=number if done is None else done, at=at, doing=doing,
                accuracy=self._accuracy, remaining=self._remaining,
            )  # fmt: skip

    def _line(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


def _accuracy(block: dict[str, Any]) -> str:
    shown = ((name, last_exit(block, name)) for name in NAMES)
    return "  ".join(f"{name} {value:.1%}" for name, value in shown if value is not None)


def _refused(record: dict[str, Any]) -> str:
    """Who was left out of a round, in words."""
    refused = record["refused"]
    return f"{_count(len(refused), 'update')} refused (not finite)" if refused else ""


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

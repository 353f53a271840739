"""The end of a sweep: which settings are best, the table, and best.yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster_fl.compose import to_yaml
from cluster_fl.config import RunConfig
from cluster_fl.errors import RunError
from cluster_fl.records import RunFolder, write_text
from ops.accuracy import last_exit
from ops.sweeping.ledger import Ledger, Row
from ops.sweeping.space import Settings
from ops.tables import wide_console

BEST = "best.yaml"


@dataclass(frozen=True)
class Best:
    """The settings that did best: ``value`` is the mean over their trials, which differ in their seed alone."""

    settings: Settings
    value: float
    rows: tuple[Row, ...]


def best(ledger: Ledger) -> Best | None:
    """None if no trial has a value.

    Trials that differ in their seed alone count together, by their mean, so a lucky seed does not win. Of settings
    with a trial that was cut or failed only those with the most rounds count, and only where no others are.
    """
    groups: dict[str, list[Row]] = {}
    for row in ledger.rows:
        groups.setdefault(readable(_without_seed(row.settings)), []).append(row)
    known = [rows for rows in groups.values() if all(row.value is not None for row in rows)]
    if not known:
        return None
    sign = 1 if ledger.sweep.section.mode == "max" else -1

    def rank(rows: Sequence[Row]) -> tuple[bool, int, float]:
        finished = all(row.state == "finished" for row in rows)
        return finished, 0 if finished else min(row.rounds for row in rows), sign * _mean(rows)

    chosen = max(known, key=rank)
    return Best(_without_seed(chosen[0].settings), _mean(chosen), tuple(chosen))


def write_best(ledger: Ledger, found: Best) -> Path:
    """The configuration of the best settings as a run of its own, with its first seed; where it is.

    Raises:
        RunError: the disk will not have it.
    """
    sweep, row = ledger.sweep, found.rows[0]
    config = sweep.config(row.point)
    config = replace(config, run=RunConfig(config.run.root, f"{sweep.name}-best"))
    file = sweep.path / BEST
    heading = (
        f"# The best of {len(ledger.rows)} trials of the sweep {sweep.name}: {readable(found.settings)}\n"
        f"# {told(sweep.section.metric, found.value)} on the held-out part ({', '.join(r.trial for r in found.rows)}).\n"
        f"#   cluster-fl run {file}\n"
    )
    try:
        write_text(file, heading + to_yaml(config))
    except OSError as error:
        raise RunError(f"{file} cannot be written: {error.strerror}.") from error
    return file


def as_json(found: Best | None, file: Path | None) -> dict[str, Any] | None:
    if found is None or file is None:
        return None
    trials = [row.trial for row in found.rows]
    return {"settings": found.settings, "value": found.value, "trials": trials, "file": str(file)}


def show(ledger: Ledger, found: Best | None, file: Path | None, console: Console | None = None) -> None:
    """A row a trial, the best first; those of the best settings carry an asterisk."""
    console = console or wide_console(240)
    sweep = ledger.sweep
    names = ("rounds", f"{sweep.section.metric} (held out)", "test", "simulated s", "state")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("trial", *sweep.space.keys, *names):
        table.add_column(name, justify="right" if name in names else "left", overflow="fold")
    sign = 1 if sweep.section.mode == "max" else -1
    order = sorted(
        ledger.rows, key=lambda row: (row.value is None, -row.rounds, -sign * (row.value or 0.0), row.trial)
    )
    for row in order:
        mark = " *" if found is not None and row in found.rows else ""
        cells = (
            f"{row.trial}{mark}",
            *(_cell(row.settings[key]) for key in sweep.space.keys),
            str(row.rounds),
            _number(sweep.section.metric, row.value),
            _number(sweep.section.metric, tested(ledger, row)),
            "" if row.sim_time_s is None else _seconds(row.sim_time_s),
            row.state,
        )
        table.add_row(*map(Text, cells))
    console.print(table)
    for row in order:
        if row.error is not None:
            console.print(f"{row.trial} failed: {row.error}", markup=False, soft_wrap=True)
    if found is not None:
        value, seeds = told(sweep.section.metric, found.value), len(found.rows)
        over = f", mean over {seeds} seeds" if seeds > 1 else ""
        console.print(f"best: {readable(found.settings)}  {value}{over}", markup=False, soft_wrap=True)
        console.print(f"as a configuration: {file}", markup=False, soft_wrap=True)
    console.print(f"sweep folder: {sweep.path}", markup=False, soft_wrap=True)


def tested(ledger: Ledger, row: Row) -> float | None:
    """The metric on all clients' test parts, where it is an accuracy and the trial has got there."""
    summary = RunFolder(ledger.sweep.path / row.folder).summary()
    return None if summary is None else last_exit(summary["accuracy"], ledger.sweep.section.metric)


def readable(settings: Mapping[str, Any]) -> str:
    return "  ".join(f"{key}={_cell(value)}" for key, value in settings.items())


def told(metric: str, value: float | None) -> str:
    return f"{metric} {_number(metric, value)}"


def _number(metric: str, value: float | None) -> str:
    if value is None:
        return ""
    if metric == "sim_time_s":
        return _seconds(value)
    return f"{value:.4f}" if metric == "train_loss" else f"{value:.2%}"


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_cell(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_cell, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _without_seed(settings: Mapping[str, Any]) -> Settings:
    return {key: value for key, value in settings.items() if key != "seed"}


def _mean(rows: Sequence[Row]) -> float:
    return fmean(row.value for row in rows if row.value is not None)

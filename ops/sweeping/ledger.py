"""What a sweep's folder says of its trials: sweep.json. What a trial's rounds were is in its own run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster_fl.errors import RunError, UserError
from cluster_fl.records import RunFolder, pretty, write_text
from ops.sweeping.definition import Sweep
from ops.sweeping.space import Point, Settings

FILE = "sweep.json"
# finished: all rounds. stopped: cut by the scheduler. The others are still to be done, failed ones once more.
DONE = ("finished", "stopped")


@dataclass
class Row:
    """One trial.

    Attributes:
        point: what was proposed, in numbers; ``settings`` is what that means.
        folder: of its run, below the sweep's: with pbt, of the last one that it went on in.
        rounds: that are complete and evaluated; ``value`` is the metric after them.
        changes: with pbt, where it went on from another trial's weights: round, trial, settings.
    """

    trial: str
    point: Point
    settings: Settings
    state: str = "waiting"
    folder: str = ""
    rounds: int = 0
    value: float | None = None
    sim_time_s: float | None = None
    error: str | None = None
    changes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.state in DONE


class Ledger:
    """The rows of a sweep, in the order in which they were proposed, and their file."""

    def __init__(self, sweep: Sweep, rows: list[Row]) -> None:
        self.sweep, self.rows = sweep, rows

    @staticmethod
    def of(sweep: Sweep, resume: bool) -> Ledger:
        """The one of a sweep that has begun, or a new one; writes nothing.

        Raises:
            UserError: the folder holds another sweep; or none, and ``resume`` asks for one.
            RunError: the file is damaged.
        """
        file = sweep.path / FILE
        if file.exists():
            return Ledger(sweep, _read(sweep, file))
        if resume:
            right = f"has no sweep to go on with in {sweep.path.parent}; start it without --resume."
            raise UserError("run.name", sweep.name, right)
        ledger = Ledger(sweep, [])
        if sweep.section.search.name == "random":
            for point in sweep.points:
                ledger.propose(point)
        return ledger

    @property
    def total(self) -> int:
        """Trials that there are going to be."""
        return len(self.sweep.points)

    @property
    def complete(self) -> bool:
        return len(self.rows) == self.total and all(row.done for row in self.rows)

    def propose(self, point: Point) -> Row:
        """A new trial."""
        name = f"trial-{len(self.rows):0{max(2, len(str(self.total - 1)))}d}"
        RunFolder(self.sweep.path / name).refuse_existing()
        row = Row(name, point, self.sweep.space.settings(point), folder=name)
        self.rows.append(row)
        return row

    def open_rows(self) -> Iterator[Row]:
        """Those that are still to be done."""
        return (row for row in self.rows if not row.done)

    def __getitem__(self, trial: str) -> Row:
        return next(row for row in self.rows if row.trial == trial)

    def reports(self, row: Row) -> Iterator[tuple[int, float]]:
        """The rounds and the metric after each evaluation, from the run's own records."""
        for record in RunFolder(self.sweep.path / row.folder).rounds():
            value = measured(record, self.sweep.section.metric)
            if "accuracy" in record and value is not None:
                yield record["round"] + 1, value

    def save(self, best: Mapping[str, Any] | None = None) -> None:
        """Raises RunError if the disk will not have it."""
        content = {
            "sweep": self.sweep.name,
            "complete": self.complete,
            "metric": self.sweep.section.metric,
            "mode": self.sweep.section.mode,
            "best": best,
            "trials": [asdict(row) for row in self.rows],
            "definition": self.sweep.definition(),
        }
        file = self.sweep.path / FILE
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, pretty(content))
        except OSError as error:
            raise RunError(f"{file} cannot be written: {error.strerror}.") from error


def measured(record: Mapping[str, Any], metric: str) -> float | None:
    """The metric in a round's record; None where there is none."""
    if metric in ("train_loss", "sim_time_s"):
        value: float | None = record[metric]
        return value
    block = (record.get("accuracy") or {}).get(metric)
    return None if block is None else block["last_exit"]


def _read(sweep: Sweep, file: Path) -> list[Row]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        before, rows = content["definition"], [Row(**row) for row in content["trials"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{file} is damaged ({error}); remove the folder, or give the sweep another run.name."
        ) from None
    now = json.loads(json.dumps(sweep.definition()))
    changed = [key for key in now if now[key] != before.get(key)]
    if changed:
        told = ", ".join("the configuration" if key == "configuration" else f"sweep.{key}" for key in changed)
        right = f"{sweep.path} holds a sweep with another {told}; give this one another run.name, or delete that folder."
        raise UserError("run.name", sweep.name, right)
    return rows

"""From finished run folders to one table: values of each run, means over seeds, ties.

A *report* is the content of comparison.json; the tables on the terminal and in Markdown are made from it alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster_fl.records import RunFolder
from ops.accuracy import NAMES as ACCURACIES
from ops.accuracy import last_exit

# What is known of a finished run, in the units of its record: fractions, elements, bytes, seconds.
VALUES = (
    *ACCURACIES, "params", "params_mean", "bytes", "sim_time_s", "sim_time_to_target_s", "wall_time_s",
)  # fmt: skip
Values = dict[str, float | None]

TIE = (
    "Best and tied are marked among methods with two finished seeds or more: two means are a tie if they differ by "
    "less than two standard deviations, pooled over the two methods' seeds."
)


@dataclass(frozen=True)
class Target:
    """The accuracy (fraction) whose simulated time is asked for, and of what."""

    accuracy: float | None
    of: str


@dataclass(frozen=True)
class Run:
    """One seed of a method: finished if it has values, failed if it has an error, else still to come."""

    seed: int
    folder: str
    values: Values | None = None
    error: str | None = None


@dataclass(frozen=True)
class Spread:
    """``std`` is the sample standard deviation (n - 1); None with one value."""

    mean: float
    std: float | None
    count: int

    @classmethod
    def over(cls, values: Iterable[float | None]) -> Spread | None:
        """Of those that are there; None if none is."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        std = statistics.stdev(known) if len(known) > 1 else None
        return cls(statistics.fmean(known), std, len(known))


def measure(folder: RunFolder, target: Target) -> Values:
    """The table's values of a finished run. ``params_mean`` is the mean over all clients of their own level's."""
    summary, levels = folder.summary(), folder.plan()["levels"]
    assert summary is not None, f"{folder.path} is not finished"
    clients = sum(level["clients"] for level in levels)
    values: Values = {name: last_exit(summary["accuracy"], name) for name in ACCURACIES}
    return values | {
        "params": max(level["params"] for level in levels),
        "params_mean": sum(level["params"] * level["clients"] for level in levels) / clients,
        "bytes": summary["bytes"],
        "sim_time_s": summary["sim_time_s"],
        "sim_time_to_target_s": time_to(target, folder.rounds()),
        "wall_time_s": summary["wall_time_s"],
    }


def time_to(target: Target, records: Iterable[Mapping[str, Any]]) -> float | None:
    """Simulated seconds until the first evaluated round at or above the target; None if there is none."""
    if target.accuracy is None:
        return None
    for record in records:
        reached = last_exit(record.get("accuracy", {}), target.of)
        if reached is not None and reached >= target.accuracy:
            seconds: float = record["sim_time_s"]
            return seconds
    return None


def method_report(label: str, method: str, variant: str, runs: Sequence[Run]) -> dict[str, Any]:
    """One row: every seed's values, and mean and standard deviation over the finished ones."""
    finished = [run.values for run in runs if run.values is not None]
    spreads = {name: Spread.over(values[name] for values in finished) for name in VALUES}
    return {
        "label": label,
        "method": method,
        "variant": variant,
        "runs": [_run_report(run) for run in runs],
        "mean": {name: spread and spread.mean for name, spread in spreads.items()},
        "std": {name: spread and spread.std for name, spread in spreads.items()},
    }


def _run_report(run: Run) -> dict[str, Any]:
    state = "finished" if run.values is not None else "waiting" if run.error is None else "failed"
    values = run.values or dict.fromkeys(VALUES)
    return {"seed": run.seed, "folder": run.folder, "state": state, "error": run.error, **values}


def report(target: Target, seeds: Sequence[int], methods: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of comparison.json. ``marks`` says of each accuracy whether the method is best, tied or neither."""
    rows = [dict(method, marks={}) for method in methods]
    for name in ACCURACIES:
        found = marks([Spread.over(run[name] for run in row["runs"]) for row in rows])
        for row, mark in zip(rows, found, strict=True):
            row["marks"][name] = mark
    return {"target": target.accuracy, "target_of": target.of, "seeds": list(seeds), "methods": rows}


def marks(spreads: Sequence[Spread | None]) -> list[str | None]:
    """Who has the highest mean ("best") and who is tied with it ("tied").

    Two methods are tied if their means are equal or differ by less than twice the pooled standard deviation

        sqrt(((n_a - 1) sd_a^2 + (n_b - 1) sd_b^2) / (n_a + n_b - 2)),

    which for as many seeds of each is the root of the mean variance. A reader can redo it from the table. It
    is not the standard error of the difference: with a handful of seeds that would call noise a result.
    Methods with fewer than two values are neither; with fewer than two methods left nobody is.
    """
    judged = [(at, spread) for at, spread in enumerate(spreads) if spread and spread.std is not None]
    found: list[str | None] = [None] * len(spreads)
    if len(judged) < 2:
        return found
    top, best = max(judged, key=lambda pair: pair[1].mean)
    for at, spread in judged:
        gap = best.mean - spread.mean
        if gap == 0 or gap < 2 * _pooled(best, spread):
            found[at] = "tied"
    found[top] = "best"
    return found


def _pooled(a: Spread, b: Spread) -> float:
    assert a.std is not None
    assert b.std is not None
    squares = (a.count - 1) * a.std**2 + (b.count - 1) * b.std**2
    return math.sqrt(squares / (a.count + b.count - 2))


# From a report to text. A cell is its text and whether it is marked.

Cell = tuple[str, bool]


@dataclass(frozen=True)
class Sheet:
    """The table as text: header, rows of cells, and the lines below."""

    header: list[str]
    rows: list[list[Cell]]
    notes: list[str]


def sheet(content: Mapping[str, Any]) -> Sheet:
    """The table of a report: percent, MB (10^6 bytes) and seconds; mean ± standard deviation over the seeds."""
    methods, target = content["methods"], content["target"]
    shown = [
        name for name in ACCURACIES if name != "personal" or any(m["mean"][name] is not None for m in methods)
    ]
    header = ["method", *("worst level %" if name == "worst" else f"{name} %" for name in shown)]
    header += ["params (largest / mean client)", "MB sent", "simulated s"]
    if target is not None:
        header.append(f"simulated s to {100 * target:g} % {content['target_of']}")
    header.append("wall s")
    rows = [_row(method, shown, target is not None) for method in methods]
    return Sheet(header, rows, _notes(content, shown))


def _row(method: Mapping[str, Any], shown: Sequence[str], with_target: bool) -> list[Cell]:
    runs = method["runs"]
    finished = sum(run["state"] == "finished" for run in runs)
    some = "" if finished == len(runs) else f" ({finished} of {len(runs)} seeds)"

    def text(name: str, unit: float = 1.0, digits: int = 1) -> str:
        mean, std = method["mean"][name], method["std"][name]
        if mean is None:
            return "-"
        spread = "" if std is None else f" ± {std / unit:,.{digits}f}"
        return f"{mean / unit:,.{digits}f}{spread}"

    mean = method["mean"]
    cells = [(method["label"] + some, False)]
    cells += [(text(name, 0.01, 2), method["marks"][name] is not None) for name in shown]
    params = "-" if mean["params"] is None else f"{round(mean['params']):,} / {round(mean['params_mean']):,}"
    cells += [(params, False), (text("bytes", 1e6), False), (text("sim_time_s"), False)]
    if with_target:
        reached = sum(run["sim_time_to_target_s"] is not None for run in runs)
        part = f" ({reached}/{finished})" if 0 < reached < finished else ""
        cells.append((text("sim_time_to_target_s") + part, False))
    return [*cells, (text("wall_time_s"), False)]


def _notes(content: Mapping[str, Any], shown: Sequence[str]) -> list[str]:
    methods, seeds = content["methods"], content["seeds"]
    notes = []
    if len(seeds) > 1:
        notes.append(f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}.")
    verdicts = [verdict for name in shown if (verdict := _verdict(methods, name))]
    if verdicts:
        notes += [TIE, *verdicts]
    notes += [
        f"{method['label']} seed {run['seed']} failed: {run['error']}"
        for method in methods
        for run in method["runs"]
        if run["state"] == "failed"
    ]
    return notes


def _verdict(methods: Sequence[Mapping[str, Any]], name: str) -> str:
    """The best of an accuracy and who is tied with it, or nothing where nobody was judged."""
    labels = {mark: [m["label"] for m in methods if m["marks"][name] == mark] for mark in ("best", "tied")}
    if not labels["best"]:
        return ""
    tied = f"; tied with it: {', '.join(labels['tied'])}" if labels["tied"] else ""
    return f"{name}: best {labels['best'][0]}{tied}"


def markdown(content: Mapping[str, Any]) -> str:
    """The table for a page; marked cells are bold."""
    made = sheet(content)
    lines = [made.header, ["---", *["---:"] * (len(made.header) - 1)]]
    lines += [[f"**{text}**" if marked else text for text, marked in row] for row in made.rows]
    table = "\n".join(f"| {' | '.join(_escape(cell) for cell in line)} |" for line in lines)
    notes = "\n".join(f"- {_escape(note)}" for note in made.notes)
    return f"{table}\n" + (f"\n{notes}\n" if notes else "")


def _escape(text: str) -> str:
    return text.replace("|", "\\|")

"""Tables on the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster_fl.config import Config
from cluster_fl.nesting.plan import Plan
from ops.accuracy import NAMES, last_exit
from ops.comparison import sheet

CANDIDATES = 8


def show_plan(plan: Plan, config: Config, console: Console | None = None) -> None:
    """The levels, and what else the search could have chosen for each."""
    console = console or wide_console()
    metric = config.levels.metric
    table = columns("level", "width", "depth", "exits", "params", "MACs", "bytes", "cost / full", "clients")
    for level in plan.as_json()["levels"]:
        table.add_row(
            str(level["level"]), f"{level['width']:g}", str(level["depth"]), " ".join(map(str, level["exits"])),
            f"{level['params']:,}", f"{level['macs']:,}", f"{level['bytes']:,}", f"{level['ratio']:.3f}",
            str(level["clients"]),
        )  # fmt: skip
    console.print(table)
    if config.levels.pairs is not None:
        return
    console.print(
        f"\nCandidates within {config.levels.tolerance:g} of each level's budget, best balanced first ({metric}):"
    )
    candidates = columns("level", "width", "depth", "imbalance", "cost", "cost / budget")
    for number, feasible in enumerate(plan.candidates, start=1):
        for candidate in feasible[:CANDIDATES]:
            candidates.add_row(
                str(number), f"{candidate.width:g}", str(candidate.depth), f"{candidate.imbalance:.3f}",
                f"{candidate.cost:,}", f"{candidate.ratio:.3f}",
            )  # fmt: skip
        if len(feasible) > CANDIDATES:
            candidates.add_row(str(number), f"and {len(feasible) - CANDIDATES} more", "", "", "", "")
    console.print(candidates)


def show_summary(
    plan: dict[str, Any], summary: dict[str, Any], folder: Path, console: Console | None = None
) -> None:
    """The end of a run: a row a level, then the totals and where everything is."""
    console = console or wide_console()
    table = columns("level", "width", "depth", "params", "MACs", "accuracy", "exit mean", "clients")
    # A method of personal models alone has no accuracy of a level.
    accuracies = summary["accuracy"]["levels"] or [{} for _ in plan["levels"]]
    for level, accuracy in zip(plan["levels"], accuracies, strict=True):
        table.add_row(
            str(level["level"]), f"{level['width']:g}", str(level["depth"]), f"{level['params']:,}",
            f"{level['macs']:,}", _percent(accuracy.get("last_exit")), _percent(accuracy.get("exit_mean")),
            str(level["clients"]),
        )  # fmt: skip
    console.print(table)
    found = {name: last_exit(summary["accuracy"], name) for name in NAMES}
    shares = (f"{name} {_percent(value)}" for name, value in found.items() if value is not None)
    console.print("accuracy on all clients' test parts: " + ", ".join(shares))
    console.print(
        f"{summary['rounds']} rounds, {summary['sim_time_s']:,.1f} s simulated, {summary['wall_time_s']:,.1f} s here, "
        f"{summary['bytes'] / 1e6:,.1f} MB sent"
    )
    if summary["refused"]:
        console.print(f"{summary['refused']} updates were refused: not finite, or changed by over 2048")
    console.print(f"run folder: {folder}", soft_wrap=True)


def show_comparison(content: Mapping[str, Any], folder: Path, console: Console | None = None) -> None:
    """A row a method; the best and what is tied with it carry an asterisk."""
    console = console or wide_console(240)
    made = sheet(content)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in made.header:
        table.add_column(name, justify="left" if name == "method" else "right", overflow="fold")
    for row in made.rows:
        table.add_row(*(Text(f"{text} *" if marked else text) for text, marked in row))
    console.print(table)
    for note in made.notes:
        console.print(note, markup=False, soft_wrap=True)
    console.print(f"comparison folder: {folder}", markup=False, soft_wrap=True)


def show_methods(described: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """What can stand behind ``method`` and ``variant``, and below each the method's ``options``."""
    console = console or wide_console(240)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("method, its options", "default", "meaning"):
        table.add_column(name)
    for method in described:
        table.add_row(Text(method["name"], style="bold"), "", Text(_presets(method)))
        for option in method["options"]:
            table.add_row(
                Text(f"  {option['name']}"), Text(_plain(option["default"])), Text(_meaning(option))
            )
    console.print(table)


def _presets(method: Mapping[str, Any]) -> str:
    """Title, the variants that differ from the default, and what the method presets of the other sections."""
    usual = method["variants"].get("default", {})
    others = [name for name, preset in method["variants"].items() if preset != usual]
    parts = [method["title"]]
    parts += [f"variants {', '.join(others)}"] if others else []
    parts += [f"presets {', '.join(_flat(usual))}"] if usual else []
    return "; ".join(parts)


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """``key=value`` of every value of nested sections."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={_plain(value)}"


def _plain(value: Any) -> str:
    """As a YAML would have it."""
    return value if isinstance(value, str) else json.dumps(value)


def _meaning(option: Mapping[str, Any]) -> str:
    choices = f" ({', '.join(option['choices'])})" if option["choices"] else ""
    return f"{option['about']}{choices}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def columns(*names: str) -> Table:
    """A table of numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in names:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def wide_console(width: int = 140) -> Console:
    """The terminal, or so many columns where there is none."""
    console = Console(highlight=False)
    # Off a terminal rich would wrap at 80 columns, which breaks tables that people pipe.
    return console if console.is_terminal else Console(highlight=False, width=width)

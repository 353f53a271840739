"""Tables on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from cluster_fl.config import Config
from cluster_fl.nesting.plan import Plan

CANDIDATES = 8


def show_plan(plan: Plan, config: Config, console: Console | None = None) -> None:
    """The levels, and what else the search could have chosen for each."""
    console = console or _console()
    metric = config.levels.metric
    table = _table("level", "width", "depth", "exits", "params", "MACs", "bytes", "cost / full", "clients")
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
    candidates = _table("level", "width", "depth", "imbalance", "cost", "cost / budget")
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
    console = console or _console()
    table = _table("level", "width", "depth", "params", "MACs", "accuracy", "exit mean", "clients")
    for level, accuracy in zip(plan["levels"], summary["accuracy"]["levels"], strict=True):
        table.add_row(
            str(level["level"]), f"{level['width']:g}", str(level["depth"]), f"{level['params']:,}",
            f"{level['macs']:,}", _percent(accuracy["last_exit"]), _percent(accuracy["exit_mean"]),
            str(level["clients"]),
        )  # fmt: skip
    console.print(table)
    shares = (
        f"{name} {_percent(summary['accuracy'][name]['last_exit'])}" for name in ("global", "local", "worst")
    )
    console.print("accuracy on all clients' test parts: " + ", ".join(shares))
    console.print(
        f"{summary['rounds']} rounds, {summary['sim_time_s']:,.1f} s simulated, {summary['wall_time_s']:,.1f} s here, "
        f"{summary['bytes'] / 1e6:,.1f} MB sent"
    )
    console.print(f"run folder: {folder}", soft_wrap=True)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _console() -> Console:
    console = Console(highlight=False)
    # Off a terminal rich would wrap at 80 columns, which breaks tables that people pipe.
    return console if console.is_terminal else Console(highlight=False, width=140)

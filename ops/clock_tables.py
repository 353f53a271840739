"""Tables of the simulated clock on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ops.tables import columns, wide_console

Content = Mapping[str, Any]
WIDTH = 170


def show_simulation(content: Content, folder: Path | None = None, console: Console | None = None) -> None:
    """A row a policy; then a row for each of its levels: times, and who trains it."""
    console = console or wide_console(WIDTH)
    policies = content["policies"]
    console.print(
        f"{content['method']}, {content['clients']:,} clients, {policies[0]['rounds']:,} rounds of "
        f"{content['per_round']:,}; seconds are simulated ones"
    )
    _show_policies(policies, console)
    _show_levels(policies, console)
    _show_regions(policies, console)
    for policy in policies:
        _say(console, f"{policy['policy']}: {_ends(policy)}")
    for note in content["notes"]:
        _say(console, note)
    if folder is not None:
        _say(console, f"timeline folder: {folder}")


def show_replay(content: Content, console: Console | None = None) -> None:
    """The recorded policy and the replayed one, and what is not known of the latter."""
    console = console or wide_console(WIDTH)
    both = [content["recorded"], content["replayed"]]
    table = columns("", "policy", "rounds", "simulated s", "round mean", "p95", "max", "merged", "late", "lost",
                    "abandoned", "wasted", "waste s", "MB down", "MB up")  # fmt: skip
    for name, one in zip(("recorded", "replayed"), both, strict=True):
        fates, length = one["fates"], one["round_s"]
        table.add_row(
            name, one["policy"], f"{one['rounds']:,}", _seconds(one["sim_time_s"]), _seconds(length["mean"]),
            _seconds(length["p95"]), _seconds(length["max"]),
            *(f"{fates[fate]:,}" for fate in ("merged", "late", "lost", "abandoned")),
            _share(one["waste"]["share"]), _seconds(one["waste"]["seconds"]), _mega(one["bytes_down"]),
            _mega(one["bytes_up"]),
        )  # fmt: skip
    console.print(table)
    _show_regions(both, console)
    for note in (*content["notes"], content["unknown"]):
        _say(console, note)


def _show_policies(policies: list[Content], console: Console) -> None:
    table = columns("policy", "hours", "round mean s", "p50", "p95", "max", "asked", "counted", "work", "paused",
                    "waiting", "wasted", "GB down", "GB up")  # fmt: skip
    for policy in policies:
        length, rounds = policy["round_s"], policy["rounds"]
        table.add_row(
            policy["policy"], _number(policy["sim_time_hours"]),
            *(_seconds(length[name]) for name in ("mean", "p50", "p95", "max")),
            _number(policy["attempts"] / rounds), _number(policy["fates"]["merged"] / rounds),
            _share(policy["utilisation"]), *(_share(_shares(policy)[name]) for name in ("paused", "waiting")),
            _share(policy["waste"]["share"]), _giga(policy["bytes_down"]), _giga(policy["bytes_up"]),
        )  # fmt: skip
    console.print(table)


def _show_levels(policies: list[Content], console: Console) -> None:
    """What a level's participants take, and what their time goes into."""
    table = columns("policy", "level", "mean s", "p50", "p95", "max", "transfer", "compute", "paused", "waiting",
                    "wasted")  # fmt: skip
    for policy in policies:
        for level in policy["levels"]:
            needs, share = level["needs_s"], _shares(level)
            table.add_row(
                policy["policy"], str(level["level"]),
                *(_seconds(needs[name]) for name in ("mean", "p50", "p95", "max")),
                *(_share(share[name]) for name in ("transfer", "compute", "paused", "waiting")),
                _share(level["waste"]["share"]),
            )  # fmt: skip
    console.print(table)


def _show_regions(policies: list[Content], console: Console) -> None:
    """Who is at a level, and how many train what it holds beyond the next smaller one."""
    table = columns("policy", "level", "clients", "asked", "counted", "GB down", "GB up", "parameters beyond",
                    "clients on them", "rounds without")  # fmt: skip
    for policy in policies:
        for level in policy["levels"]:
            region, rounds = level["region"], policy["rounds"]
            table.add_row(
                policy["policy"], str(level["level"]), f"{level['clients']:,}",
                _number(level["attempts"] / rounds), _number(level["fates"]["merged"] / rounds),
                _giga(level["bytes_down"]), _giga(level["bytes_up"]), f"{region['params']:,}",
                _number(region["holders"]), _share(region["rounds_without"]),
            )  # fmt: skip
    console.print(table)


def _shares(one: Content) -> dict[str, float | None]:
    """What the participants' time goes into."""
    spent = {name: seconds or 0.0 for name, seconds in one["time_s"].items()}
    total = sum(spent.values())
    spent["transfer"] = spent["download"] + spent["upload"]
    return {name: seconds / total if total else None for name, seconds in spent.items()}


def _ends(policy: Content) -> str:
    """How attempts ended, and how old the merged ones were."""
    told = [f"{count:,} {fate}" for fate, count in policy["fates"].items() if count]
    told += [f"{policy['under_way']:,} under way at the end"] if policy["under_way"] else []
    ages = policy["staleness"]
    if ages:
        some = [f"{age}: {count:,}" for age, count in enumerate(ages) if count]
        told.append("merged by age in rounds " + ", ".join(some[:12] + (["..."] if len(some) > 12 else [])))
    return "; ".join(told) or "nobody was asked"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _seconds(value: float | None) -> str:
    return (
        "never"
        if value is None
        else f"{value:,.0f}"
        if value >= 1000
        else f"{value:,.1f}"
        if value >= 10
        else f"{value:.3g}"
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _giga(count: int) -> str:
    return f"{count / 1e9:,.3g}" if count < 1e12 else f"{count / 1e9:,.0f}"


def _mega(count: int) -> str:
    return f"{count / 1e6:,.1f}"

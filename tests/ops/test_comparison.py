"""Means, deviations, ties and the tables made of them, by hand."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ops import comparison, tables
from ops.accuracy import NAMES as ACCURACIES
from ops.comparison import VALUES, Run, Spread, Target


def spread(*values: float) -> Spread | None:
    return Spread.over(values)


def test_spread_is_mean_and_sample_deviation() -> None:
    assert spread(1.0, 3.0) == Spread(2.0, 2**0.5, 2)
    assert spread(0.5) == Spread(0.5, None, 1)
    assert Spread.over([None, 0.5, None]) == Spread(0.5, None, 1)
    assert Spread.over([None]) is None


def test_marks() -> None:
    # Deviations are half the gap times sqrt 2: 0.02 * 0.7071 = 0.01414, and twice that is 0.02828.
    best = spread(0.90, 0.92)  # 0.91
    assert comparison.marks([best, spread(0.87, 0.89)]) == ["best", None]  # 0.03 apart
    assert comparison.marks([best, spread(0.875, 0.895)]) == ["best", "tied"]  # 0.025 apart
    assert comparison.marks([spread(0.875, 0.895), best]) == ["tied", "best"]
    # A steady method (no deviation): pooled is 0.01414 / sqrt 2 = 0.01, and twice that is 0.02.
    assert comparison.marks([best, spread(0.892, 0.892)]) == ["best", "tied"]
    assert comparison.marks([best, spread(0.888, 0.888)]) == ["best", None]
    assert comparison.marks([spread(0.5, 0.5), spread(0.5, 0.5), spread(0.4, 0.4)]) == ["best", "tied", None]
    # Three seeds against two: (2 * 0.01^2 + 1 * 0.01414^2) / 3 = 0.01155^2, and twice that is 0.02309.
    three = spread(0.88, 0.89, 0.90)
    assert comparison.marks([spread(0.902, 0.922), three]) == ["best", "tied"]  # 0.022 apart
    assert comparison.marks([spread(0.904, 0.924), three]) == ["best", None]  # 0.024 apart


def test_nobody_is_marked_without_two_seeds() -> None:
    assert comparison.marks([spread(0.9), spread(0.8)]) == [None, None]
    assert comparison.marks([spread(0.9, 0.91), None]) == [None, None]
    assert comparison.marks([spread(0.9, 0.9), spread(0.99), spread(0.8, 0.8)]) == ["best", None, None]


def record(seconds: float, **accuracy: float | None) -> dict[str, Any]:
    blocks = {name: {"last_exit": value, "exit_mean": 1.0} for name, value in accuracy.items()}
    return {"sim_time_s": seconds, "accuracy": blocks} if blocks else {"sim_time_s": seconds}


RECORDS = [
    record(1.0),
    record(2.0, **{"global": 0.5, "worst": None}),
    record(3.0),
    record(4.0, **{"global": 0.8, "worst": 0.3}),
    record(5.0, **{"global": 0.7, "worst": 0.6}),
    record(6.0, **{"global": 0.9, "worst": 0.4}),
]


@pytest.mark.parametrize(
    ("target", "of", "seconds"),
    [
        (0.5, "global", 2.0),
        (0.8, "global", 4.0),
        (0.81, "global", 6.0),
        (0.95, "global", None),
        (0.35, "worst", 5.0),
        (0.1, "personal", None),
        (None, "global", None),
    ],
)
def test_time_to_target(target: float | None, of: str, seconds: float | None) -> None:
    assert comparison.time_to(Target(target, of), RECORDS) == seconds


def crafted(*runs: tuple[float | None, float | None]) -> dict[str, Any]:
    """A report of one method with a seed for each (personal accuracy, seconds to target); None, None: failed."""
    rest = dict.fromkeys(VALUES, 0.5)
    made = [
        Run(n, "", rest | {"personal": personal, "sim_time_to_target_s": seconds})
        if (personal, seconds) != (None, None)
        else Run(n, "", error="it broke")
        for n, (personal, seconds) in enumerate(runs)
    ]
    return comparison.report(
        Target(0.8, "local"), range(len(runs)), [comparison.method_report("m", "scalefl", "default", made)]
    )


@pytest.mark.parametrize(
    ("runs", "label", "personal", "to_target"),
    [
        ([(0.25, 10.0)], "m", "25.00", "10.0"),
        ([(0.25, 10.0), (0.75, 30.0)], "m", "50.00 ± 35.36", "20.0 ± 14.1"),
        ([(0.25, 10.0), (0.75, None)], "m", "50.00 ± 35.36", "10.0 (1/2)"),
        ([(0.25, None), (0.75, None)], "m", "50.00 ± 35.36", "-"),
        ([(0.25, 10.0), (None, None)], "m (1 of 2 seeds)", "25.00", "10.0"),
        ([(None, None)], "m (0 of 1 seeds)", None, "-"),
    ],
)
def test_cells(
    runs: list[tuple[float | None, float | None]], label: str, personal: str | None, to_target: str
) -> None:
    made = comparison.sheet(crafted(*runs))
    cells = dict(zip(made.header, (text for text, _ in made.rows[0]), strict=True))
    assert cells["method"] == label
    assert cells.get("personal %") == personal
    assert cells["simulated s to 80 % local"] == to_target
    broken = runs.index((None, None)) if (None, None) in runs else None
    assert (f"m seed {broken} failed: it broke" in made.notes) == (broken is not None)


def two_methods() -> dict[str, Any]:
    rest = dict.fromkeys(VALUES, 0.5)
    rows = [
        comparison.method_report(
            label, "scalefl", "default", [Run(n, "", rest | {"global": v}) for n, v in enumerate(values)]
        )
        for label, values in (("[red]a", (0.90, 0.92)), ("b", (0.875, 0.895)), ("c", (0.1, 0.2)))
    ]
    return comparison.report(Target(None, "global"), [0, 1], rows)


def test_ties_are_marked_and_told() -> None:
    text = comparison.markdown(two_methods())
    assert "| [red]a | **91.00 ± 1.41** |" in text
    assert "| b | **88.50 ± 1.41** |" in text
    assert "| c | 15.00 ± 7.07 |" in text
    assert "global: best [red]a; tied with it: b" in text
    assert "two standard deviations, pooled" in text
    assert "simulated s to" not in text


@pytest.mark.parametrize("width", [80, 200])
def test_the_terminal_loses_nothing(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    tables.show_comparison(two_methods(), Path("folder"), console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "…" not in text
    assert "[red]a" in text
    assert text.count("*") == 2 + 3 * (len(ACCURACIES) - 1)
    assert ("91.00 ± 1.41 *" in text) == (width == 200)

"""What every method must keep: it learns, and its bits follow from configuration and seed alone."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from actors.driver import Driver
from actors.events import RoundDone
from actors.pools import InlinePools
from cluster_fl import methods
from cluster_fl.records import RunFolder
from tests.methods.common import VARIANTS, UnrulyPools, small
from tests.tiny import outcome, run_here

# Enough to learn digits; the rates are the methods' own where the common one is not theirs.
LEARN = (
    "rounds=8",
    "clients.per_round=8",
    "train.epochs=3",
    "evaluate.every=8",
    "model.options.widths=[8,16,32]",
)
RATES: dict[str, tuple[str, ...]] = {}
CHANCE = 0.1


def ids(variant: tuple[str, ...]) -> str:
    return " ".join(variant)


@pytest.mark.parametrize("variant", VARIANTS, ids=ids)
def test_bits_do_not_depend_on_who_computes(variant: tuple[str, ...], tmp_path: Path) -> None:
    """Several workers that finish in any order, get lost and do things twice; and a run that was interrupted."""
    config = small(tmp_path, *variant)
    run_here(config, tmp_path / "here")
    expected = outcome(tmp_path / "here")
    for count in (2, 4):
        run_here(config, tmp_path / f"unruly{count}", partial(UnrulyPools, count=count, seed=count))
        assert outcome(tmp_path / f"unruly{count}") == expected
    halted = Driver(config, RunFolder(tmp_path / "halted"), InlinePools)
    rounds = (event for event in halted.run() if isinstance(event, RoundDone))
    assert len(list(itertools.islice(rounds, 2))) == 2
    run_here(config, tmp_path / "halted", resume=True)
    assert outcome(tmp_path / "halted") == expected


@pytest.mark.parametrize("name", methods.NAMES)
def test_learns(name: str, tmp_path: Path) -> None:
    """Every model that the method has is right three times as often as chance would be."""
    config = small(tmp_path, name, *LEARN, *RATES.get(name, ()))
    run_here(config, tmp_path / "run")
    accuracy = outcome(tmp_path / "run")[1]["accuracy"]
    found = [block["last_exit"] for block in _blocks(accuracy)]
    assert found
    assert min(found) > 3 * CHANCE


def _blocks(accuracy: dict[str, Any]) -> list[dict[str, float]]:
    blocks = [accuracy[name] for name in ("global", "local", "worst", "personal")]
    return [block for block in (*blocks, *accuracy["levels"]) if block is not None]

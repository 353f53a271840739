"""Every method learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster_fl import methods
from tests.methods.common import small
from tests.tiny import outcome, run_here

# Enough to learn digits.
ENOUGH = ("rounds=5", "clients.per_round=6", "train.epochs=2", "train.lr=0.2", "evaluate.every=5")
# Group norms of four channels learn more slowly.
MORE = {"depthfl": ("model.options.widths=[8,16,32]", "rounds=8", "evaluate.every=8")}
CHANCE = 0.1


@pytest.mark.parametrize("name", methods.NAMES)
def test_learns(name: str, tmp_path: Path) -> None:
    """Every model that the method has is right three times as often as chance would be."""
    config = small(tmp_path, name, *ENOUGH, *MORE.get(name, ()))
    run_here(config, tmp_path / "run")
    accuracy = outcome(tmp_path / "run")[1]["accuracy"]
    found = [block["last_exit"] for block in _blocks(accuracy)]
    assert found
    assert min(found) > 3 * CHANCE


def _blocks(accuracy: dict[str, Any]) -> list[dict[str, float]]:
    blocks = [accuracy[name] for name in ("global", "local", "worst", "personal")]
    return [block for block in (*blocks, *accuracy["levels"]) if block is not None]

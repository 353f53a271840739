"""The free equivalences: with everybody at full level and what is particular turned off, a method is FedAvg."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.methods.common import small
from tests.tiny import outcome, run_here

FULL = (
    "levels.ratios=[1.0]",
    "rounds=2",
    "aggregation.weights=uniform",
    "model.norm=batch",
    "train.clip_norm=null",
)
PLAIN: dict[str, tuple[str, ...]] = {
    "scalefl": (),
    "decoupled": (),
    "fedprox": ("train.correction.mu=0",),
    "fedopt": ("server.optimizer=none", "server.lr=1"),
    "heterofl": ("options.mask=false", "options.label_rows=false", "options.scaler=false"),
    "fedrolex": ("options.mask=false", "options.label_rows=false", "options.scaler=false"),
    "feddropout": ("options.scaler=false",),
    "feddrop": (),
    "nefl": ("options.split=W", "options.steps=fixed", "levels.draw=fixed"),
    "nestfl": ("options.alpha=0",),
    "fjord": (),
    "depthfl": ("train.correction.name=none", "options.distil=false"),
    "inclusivefl": ("levels.pairs=[{}]", "options.own_unit=false", "options.beta=0"),
    "fiarse": (),
    "feddf": ("data.public=0", "options.steps=0"),
}


@pytest.fixture(scope="module")
def fedavg(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _hash(tmp_path_factory.mktemp("fedavg"), "fedavg")


@pytest.mark.parametrize("method", PLAIN)
def test_all_at_full_level_is_fedavg(method: str, tmp_path: Path, fedavg: str) -> None:
    assert _hash(tmp_path, method, *PLAIN[method]) == fedavg


def test_scaffold_begins_as_fedavg(tmp_path: Path) -> None:
    """All control variates are zero in the first round, and only there."""
    one = [_hash(tmp_path / name, name, "rounds=1") for name in ("fedavg", "scaffold")]
    assert one[0] == one[1]
    assert _hash(tmp_path / "two", "scaffold") != _hash(tmp_path / "three", "fedavg")


def _hash(folder: Path, method: str, *overrides: str) -> str:
    """Hash of the weights after two rounds, without the names that say who owns them."""
    folder.mkdir(exist_ok=True)
    run_here(small(folder, method, *FULL, *overrides), folder / "run")
    found: str = outcome(folder / "run")[1]["weights_sha256"]
    return found

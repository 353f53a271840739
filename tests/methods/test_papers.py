"""Every experiment of ``configs/`` as it stands, for two rounds of two clients and one epoch on its real data."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from actors.driver import Driver
from actors.events import RoundDone
from actors.pools import InlinePools
from cluster_fl.compose import compose
from cluster_fl.errors import UserError
from cluster_fl.records import RunFolder
from tests.conftest import CONFIGS, REPOSITORY

DATA = REPOSITORY / "data"
SHORT = (
    "rounds=2",
    "clients.per_round=2",
    "train.epochs=1",
    "evaluate.every=2",
    "evaluate.clients=2",
    f"data.root={DATA}",
    "data.download=false",
)
# What stands in for CIFAR-100 where it is not at hand; the files say so themselves.
SUBSTITUTES = {
    "depthfl_cifar100": ("data.name=cifar10",),
    "fedopt_cifar100": ("data.name=cifar10",),
    "feddf_cifar10": ("data.public=5000", "data.public_name=null"),
}
PAPERS = sorted(
    path.stem for path in CONFIGS.glob("*_*.yaml") if not path.stem.startswith(("compare_", "study_"))
)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPERS)
def test_two_rounds_of_the_paper(name: str, tmp_path: Path) -> None:
    losses = _losses(name, tmp_path / "whole")
    if losses is None and name in SUBSTITUTES:
        losses = _losses(name, tmp_path / "substitute", *SUBSTITUTES[name])
    if losses is None:
        pytest.skip(f"needs the data set of {name}.yaml, or its substitute, in {DATA}")
    assert len(losses) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)


def _losses(name: str, root: Path, *overrides: str) -> list[float] | None:
    """The training losses of both rounds, without the test after them, which takes minutes; None without data."""
    config = compose([CONFIGS / f"{name}.yaml"], [*SHORT, f"run.root={root}", "run.name=run", *overrides])
    driver = Driver(config, RunFolder(root / "run"), InlinePools)
    losses: list[float] = []
    try:
        for event in driver.run():
            if isinstance(event, RoundDone):
                losses.append(event.record["train_loss"])
            if len(losses) == config.rounds:
                break
    except UserError as error:
        if error.key != "data.root":
            raise
        return None
    return losses

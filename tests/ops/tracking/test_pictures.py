"""The pictures show the numbers, whatever their size."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from cluster_fl.timing import timeline
from ops.tracking import pictures
from ops.tracking.pictures import CLIENTS, HIGH, LEFT, LOW, PHASES, TOP, Axis
from tests.tiny import run_here, tiny


@pytest.mark.parametrize("shape", [(1, 1), (8, 10), (200, 10), (200, 100)])
def test_every_cell_has_its_shade(shape: tuple[int, int]) -> None:
    samples = np.random.default_rng(0).integers(0, 50, shape)
    samples[0, 0] = 50
    picture = np.asarray(pictures.heatmap(samples))
    clients, classes = shape
    wide, high = max(3, min(24, 760 // clients)), max(4, min(18, 360 // classes))
    cells = picture[TOP : TOP + classes * high : high, LEFT : LEFT + clients * wide : wide]
    assert cells.shape[:2] == (classes, clients)
    assert (cells == (LOW + samples.T[..., None] / 50 * (HIGH - LOW)).round()).all()


def test_nobody_has_any() -> None:
    cells = np.asarray(pictures.heatmap(np.zeros((3, 4), int)))[TOP : TOP + 4, LEFT : LEFT + 3]
    assert (cells == LOW).all()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """With every kind of end that a deadline and drop-outs make."""
    folder = tmp_path_factory.mktemp("pictures")
    policy = ("time.policy=deadline", "time.policy.deadline_s=0.1", "time.dropout=0.3")
    run_here(tiny(folder, *policy, "rounds=1", "clients.count=70", "clients.per_round=65"), folder / "run")
    return timeline.of_round(folder / "run", 0)


def test_a_bar_for_each_client(table: pa.Table) -> None:
    assert {"merged", "late", "lost"} <= set(table["fate"].to_pylist())
    assert len(table) == 65
    picture = pictures.timeline(table)
    assert picture is not None
    assert picture.height == pictures.timeline(table.slice(0, CLIENTS)).height  # type: ignore[union-attr]
    colours = {colour for _, colour in picture.getcolors(2**16) or []}
    ends = {pictures.ENDS[fate] for fate in table["fate"].to_pylist()}
    assert {*PHASES.values(), *ends} <= colours


def test_a_round_without_attempts(table: pa.Table) -> None:
    assert pictures.timeline(table.slice(0, 0)) is None


def test_ticks_are_round_numbers() -> None:
    assert Axis(0.16, 0.267, 0, 700).ticks() == pytest.approx([0.16, 0.18, 0.2, 0.22, 0.24, 0.26])
    assert Axis(0, 86400, 0, 700).ticks() == [0, 20000, 40000, 60000, 80000]

"""What a sink is told, and that a checkpoint kept elsewhere is a run folder to go on with."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest

from cluster_fl.errors import RunError
from cluster_fl.records import RunFolder
from cluster_fl.timing import timeline
from ops.tracking.feed import TIMELINES, is_drawn
from tests.tiny import outcome, run_here, tiny


@pytest.mark.parametrize("rounds", [1, 49, 50, 51, 100, 101, 1000])
def test_at_most_so_many_rounds_are_drawn(rounds: int) -> None:
    drawn = [number for number in range(rounds) if is_drawn(number, rounds)]
    assert drawn[0] == 0
    assert min(rounds, TIMELINES // 2) < len(drawn) + 1 <= TIMELINES + 1
    assert len({after - before for before, after in itertools.pairwise(drawn)}) <= 1


@pytest.mark.parametrize("words", [(), ("method=scaffold", "train.momentum=0")])
def test_a_kept_checkpoint_can_be_resumed(tmp_path: Path, words: tuple[str, ...]) -> None:
    """With clients that keep something too."""
    config = tiny(tmp_path, "checkpoint.keep=9", *words)
    run_here(config, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    for file in folder.checkpoint_files(2):
        target = tmp_path / "copy" / file.relative_to(folder.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    run_here(config, tmp_path / "copy", resume=True)
    assert outcome(tmp_path / "copy") == outcome(tmp_path / "run")
    assert bool(words) == (tmp_path / "copy" / "clients").exists()
    assert folder.checkpoint_files(7) == []


def test_a_rounds_part_of_the_timeline(tmp_path: Path) -> None:
    """While the run goes on, and from the whole file."""
    run_here(tiny(tmp_path, "rounds=2"), tmp_path)
    whole = timeline.of_round(tmp_path, 1)
    assert set(whole["round"].to_pylist()) == {1}
    assert len(whole) == 6
    timeline.Timeline(tmp_path).rewind(2)
    assert timeline.of_round(tmp_path, 1).equals(whole)
    with pytest.raises(RunError):
        timeline.of_round(tmp_path / "nowhere", 0)

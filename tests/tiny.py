"""The smallest run that has everything: three levels, shared and own exits, uneven levels, two evaluations.

Its split is given, so that nothing is searched, and a round takes a fraction of a second.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from actors.driver import Driver, MakePools
from actors.events import Event
from actors.pools import InlinePools
from cluster_fl.compose import compose
from cluster_fl.config import Config
from cluster_fl.records import RunFolder

TINY = """
method: scalefl
rounds: 3
clients: {count: 8, per_round: 6}
levels: {pairs: [{width: 0.5, depth: 1}, {width: 0.5, depth: 2}, {width: 1.0, depth: 3}]}
model: {name: resnet8, options: {widths: [4, 8, 16]}}
data: {name: digits, held_out: 80}
train: {epochs: 1, batch_size: 16, lr: 0.1, cohort_size: 2}
evaluate: {every: 2}
"""
LEVELS = 3

# What the wall clock or the number of pools decides; everything else is decided by the configuration.
WALL = ("wall_time_s", "wall", "retries")


def write_tiny(folder: Path) -> Path:
    file = folder / "tiny.yaml"
    file.write_text(TINY)
    return file


def tiny(folder: Path, *overrides: str) -> Config:
    """The tiny configuration, composed from a file in ``folder``."""
    return compose([write_tiny(folder)], overrides)


def run_here(
    config: Config, path: Path, make_pools: MakePools = InlinePools, resume: bool = False
) -> list[Event]:
    """A whole run with its driver in this process."""
    return list(Driver(config, RunFolder(path), make_pools, resume).run())


def timeless(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what the wall clock decides."""
    return [{key: value for key, value in record.items() if key not in WALL} for record in records]


def outcome(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What a finished run computed: its rounds and its summary, without wall times."""
    folder = RunFolder(path)
    summary = folder.summary()
    assert summary is not None, "the run did not finish"
    return timeless(lines(path)), timeless([summary])[0]


def lines(path: Path) -> Sequence[dict[str, Any]]:
    """All lines of rounds.jsonl; every one of them must be whole."""
    return [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]

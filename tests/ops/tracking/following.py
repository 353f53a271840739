"""Runs with a tracker, in this process."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from actors.driver import Driver
from actors.events import RoundDone
from actors.pools import InlinePools
from cluster_fl.config import Config
from cluster_fl.records import RunFolder
from ops.tracking import tracker

WANDB = ("tracking=wandb", "tracking.mode=offline")
# Of the right form, and nobody's.
KEY = "c1u5te2f1" * 5


def follow(config: Config, path: Path, resume: bool = False, rounds: int | None = None) -> None:
    """The run, to its end or until so many of its rounds are over."""
    folder, done = RunFolder(path), 0
    events = Driver(config, folder, InlinePools, resume).run()
    with tracker(config, folder, quiet=True) as shown, closing(events):  # type: ignore[type-var]
        for event in events:
            shown.show(event)
            done += isinstance(event, RoundDone)
            if done == rounds:
                return

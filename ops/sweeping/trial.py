"""A trial as Ray Tune sees it: the run's driver in the trial's own process, its pools in the trial's bundles.

A step is one evaluation. What a user can do something about ends the trial with a report of it, not with an
exception: Tune would try again.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ray import tune

from actors.ray_pools import RayPools
from cluster_fl.compose import fingerprint
from cluster_fl.errors import ClusterFLError
from cluster_fl.records import RunFolder
from ops.sweeping.definition import Sweep
from ops.sweeping.reporting import Report, Trial

# In a checkpoint: a run folder, and whose it is.
RUN, OWNER = "run", "trial"


class TuneTrial(tune.Trainable):
    """The trial's number and its point are in ``config``; with pbt the point may become another one.

    ``environment`` is what trackers need of the caller's; it comes through the object store and is on no disk.
    """

    def setup(self, config: dict[str, Any], sweep: Sweep, environment: Mapping[str, str]) -> None:
        os.environ.update(environment)
        torch.set_num_threads(1)
        self._sweep, self._point = sweep, config["proposed"]["point"]
        self._trial: Trial | None = None
        self._reports: Generator[Report, None, None] | None = None
        self._error: ClusterFLError | None = None
        self._forked: dict[str, Any] | None = None  # from which trial, and after how many rounds
        self._folder = RunFolder(sweep.path / self.trial_name)
        try:
            self._config = sweep.config(self._point, self.trial_name)
            self._folder = self._own()
        except ClusterFLError as error:
            self._error = error

    def step(self) -> dict[str, Any]:
        told = {"trial": self.trial_name, "point": self._point, "folder": self._folder.path.name}
        told |= {"forked": self._forked}
        try:
            if self._error is not None:
                raise self._error
            self._reports = self._reports or self._begin()
            report = next(self._reports)
        except ClusterFLError as error:
            self._folder.write_error(error)
            return told | {"error": " ".join(str(error).split()), "done": True}
        return told | asdict(report) | {"error": None, "done": report.finished}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A run folder of its own, since this one goes on."""
        if self._trial is not None:
            self._trial.keep()
        folder = Path(checkpoint_dir)
        RunFolder(folder / RUN).fork(self._config, self._folder)
        (folder / OWNER).write_text(self.trial_name, encoding="utf-8")

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Goes on from another trial's checkpoint, in a run folder of its own; its own it has."""
        folder = Path(checkpoint_dir)
        owner = (folder / OWNER).read_text(encoding="utf-8")
        if self._error is not None or owner == self.trial_name:
            return
        try:
            self._folder = self._next()
            self._folder.fork(self._config, RunFolder(folder / RUN))
            self._forked = {"trial": owner, "rounds": sum(1 for _ in self._folder.rounds())}
        except ClusterFLError as error:
            self._error = error

    def cleanup(self) -> None:
        if self._reports is not None:
            self._reports.close()

    def _begin(self) -> Generator[Report, None, None]:
        section = self._sweep.section
        replay = section.scheduler.name == "asha"
        self._trial = Trial(self._config, self._folder, RayPools, section.metric, self._sweep.name, replay)
        return self._trial.reports()

    def _own(self) -> RunFolder:
        """Where the trial goes on: its newest run with this configuration, else a new one."""
        for folder in reversed(self._runs()):
            if fingerprint(folder.config()) == fingerprint(self._config):
                return folder
        return self._next()

    def _next(self) -> RunFolder:
        taken = len(self._runs())
        return RunFolder(self._sweep.path / (f"{self.trial_name}-fork-{taken}" if taken else self.trial_name))

    def _runs(self) -> list[RunFolder]:
        """Oldest first."""
        found = [RunFolder(self._sweep.path / self.trial_name)]
        while found[-1].config_file.exists():
            found.append(RunFolder(self._sweep.path / f"{self.trial_name}-fork-{len(found)}"))
        return found[:-1]

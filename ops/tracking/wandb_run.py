"""A run in Weights & Biases. The only module that imports ``wandb`` while a run goes on.

A round's number is its W&B step, and the same round has the same numbers whenever it is trained. So a resumed run goes
on in the same W&B run by telling the rounds that W&B does not have (:mod:`ops.tracking.identity`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import wandb
from PIL.Image import Image

from cluster_fl.config import Config, TrackingConfig
from ops.tracking.behind import one_line, warn
from ops.tracking.feed import Table
from ops.tracking.history import METRICS, Row
from ops.tracking.identity import Identity

# Seconds until W&B counts as not reachable, and for the rest at the end of a run, without and with checkpoints;
# W&B's own variables (WANDB_INIT_TIMEOUT, WANDB_FINISH_TIMEOUT) come first.
INIT_S, FINISH_S, FINISH_ARTIFACTS_S = 30.0, 60.0, 600.0


class WandbRun:
    """A sink."""

    def __init__(self, config: Config, path: Path, group: str | None, name: str, quiet: bool) -> None:
        wanted = config.tracking
        # Without this W&B asks on a terminal for a key that it does not find.
        wandb.setup(wandb.Settings(silent=True))
        self._path, self._known = path, Identity.of(path)
        self._known.supersede(path)
        self._run = _begin(
            wanted,
            project=wanted.project,
            entity=wanted.entity,
            group=group,
            name=name,
            tags=wanted.tags,
            id=self._known.id,
            dir=str(path),
            config=asdict(config),
            settings=_settings(wanted),
        )
        if not self._run.offline:
            self._known.sent = self._run.starting_step
        self._known.save(path)
        self._next = self._known.sent
        for metric in METRICS:
            self._run.define_metric(metric.name, step_metric=metric.step, summary=metric.summary)
        if self._run.url and not quiet:
            warn(self._run.url)

    def log(self, step: int, row: Row, pictures: Mapping[str, Image], tables: Mapping[str, Table]) -> None:
        if step < self._next:
            return  # W&B has it from before the run was resumed
        self._next = step + 1
        try:
            shown: dict[str, Any] = {name: wandb.Image(picture) for name, picture in pictures.items()}
            shown |= {name: _table(rows) for name, rows in tables.items()}
            if shown:
                self._run.log(
                    shown, step=step, commit=False
                )  # W&B's server is asked about tables: it may fail
        finally:
            self._run.log(row, step=step, commit=True)

    def keep(self, rounds: int, root: Path, files: Iterable[Path]) -> None:
        artifact = wandb.Artifact(f"run-{self._run.id}", type="checkpoint", metadata={"rounds": rounds})
        for file in files:
            # Copied at once: the run removes its older checkpoints.
            artifact.add_file(str(file), file.relative_to(root).as_posix(), policy="mutable")
        self._run.log_artifact(artifact, aliases=["latest", f"round-{rounds}"])

    def close(self, finished: bool) -> None:
        try:
            self._run.finish(exit_code=0 if finished else 1)
        except TimeoutError:
            send = f"wandb sync --include-online {self._run.settings.sync_dir}"
            warn(f"W&B does not answer; `{send}` sends what it has not taken")
            return
        if self._run.offline:
            self._known.written = self._next
        else:
            self._known.sent = self._next
        self._known.save(self._path)


def _begin(wanted: TrackingConfig, **common: Any) -> wandb.Run:
    """Online where that is wanted and possible, else offline."""
    if wanted.mode == "online":
        try:
            # No mode: WANDB_MODE may say otherwise.
            return wandb.init(**common, resume="allow")
        except Exception as error:
            why = one_line(str(error)).split(" while retrying")[0]
            _start_afresh()
            run = wandb.init(**common, mode="offline")
            warn(f"W&B did not take the run ({why}); `wandb sync {run.settings.sync_dir}` sends it later")
            return run
    return wandb.init(**common, mode="offline")


def _start_afresh() -> None:
    """A new process of W&B's: an old one does not give back the id of a run that it could not begin."""
    wandb.teardown()
    os.environ.pop("WANDB_SERVICE", None)  # the old one may be another program's, which goes on
    wandb.setup(wandb.Settings(silent=True))


def _settings(wanted: TrackingConfig) -> wandb.Settings:
    """Nothing of the machine or the command is sent: it may hold secrets."""
    limits = {
        "init_timeout": INIT_S,
        "finish_timeout": FINISH_ARTIFACTS_S if wanted.artifacts else FINISH_S,
    }
    return wandb.Settings(
        silent=True,
        console="off",
        disable_code=True,
        disable_git=True,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        reinit="create_new",  # a process may hold several runs
        finish_timeout_raises=True,
        **{name: seconds for name, seconds in limits.items() if f"WANDB_{name.upper()}" not in os.environ},
    )


def _table(rows: Table) -> wandb.Table:
    columns = list(rows[0])
    return wandb.Table(columns, [[row[column] for column in columns] for row in rows], allow_mixed_types=True)

"""What a run writes and reads back: plain YAML, JSON and safetensors; nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cluster_fl.compose import compose, fingerprint, to_yaml
from cluster_fl.config import Config
from cluster_fl.errors import RunError, UserError


@dataclass(frozen=True)
class Progress:
    """Where a run stands after its last complete round: all that a resumed run needs besides its config.

    ``rounds`` are complete; times are seconds and bytes are totals since round 0. ``device`` and
    ``experiment`` (:meth:`Experiment.sha256`) are what a resumed run must find as they were.
    """

    rounds: int
    state: dict[str, np.ndarray]
    sim_time_s: float = 0.0
    wall_time_s: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    device: str = "cpu"
    experiment: str = ""


def weights_sha256(state: Mapping[str, np.ndarray]) -> str:
    """Hash of all shared and per-level tensors' bytes (float32, C order) in name order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(np.ascontiguousarray(state[name]).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class RunFolder:
    """``run.root/run.name``. Every file appears whole or not at all; ``rounds.jsonl`` grows by whole lines."""

    path: Path

    def refuse_existing(self) -> None:
        """Raises UserError if the folder holds a run already, or part of one."""
        if any((self.path / name).exists() for name in ("config.yaml", "rounds.jsonl", "checkpoints")):
            right = f"{self.path} holds a run already; go on with `cluster-fl resume {self.path}`."
            raise UserError("run.name", self.path.name, right)

    def create(self, config: Config) -> None:
        """Raises UserError if the folder holds a run already or cannot be written."""
        self.refuse_existing()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _write(self.config_file, to_yaml(config))
        except OSError as error:
            raise UserError("run.root", self.path.parent, f"cannot be written: {error.strerror}.") from None

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def rounds_file(self) -> Path:
        return self.path / "rounds.jsonl"

    def config(self, overrides: Sequence[str] = ()) -> Config:
        """The run's configuration. Raises UserError if this is no run folder."""
        if not self.config_file.exists():
            raise UserError("RUN_DIR", self.path, "is no run folder: it has no config.yaml.")
        return compose([self.config_file], overrides)

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        _write(self.path / "plan.json", _pretty(plan))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        _write(self.path / "summary.json", _pretty(summary))

    def write_error(self, error: Exception) -> str:
        """Keeps the full report of a failure; says where, or nothing if the run never began."""
        if not self.path.is_dir():
            return ""
        log = self.path / "error.log"
        _write(log, "".join(traceback.format_exception(error)))
        return f"The full report is in {log}."

    def summary(self) -> dict[str, Any] | None:
        file = self.path / "summary.json"
        return json.loads(file.read_text()) if file.exists() else None

    def plan(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.path / "plan.json").read_text())
        return content

    def append_round(self, record: Mapping[str, Any]) -> None:
        with self.rounds_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rounds(self) -> Iterator[dict[str, Any]]:
        """The records so far; a last line cut short by a crash is left out."""
        if self.rounds_file.exists():
            for line in self.rounds_file.read_text(encoding="utf-8").splitlines():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    return

    def save(self, config: Config, progress: Progress) -> None:
        """Writes a checkpoint beside the others and removes all but the newest ``checkpoint.keep``."""
        folder = self.path / "checkpoints"
        target = folder / f"round-{progress.rounds:05d}"
        if target.exists():
            return
        draft = folder / f".{target.name}.{os.getpid()}"
        draft.mkdir(parents=True, exist_ok=True)
        save_file(
            {n: np.ascontiguousarray(a) for n, a in progress.state.items()}, draft / "state.safetensors"
        )
        meta = {key: value for key, value in asdict(progress).items() if key != "state"}
        meta |= {"fingerprint": fingerprint(config), "weights_sha256": weights_sha256(progress.state)}
        _write(draft / "meta.json", _pretty(meta))
        _sync(draft / "state.safetensors")
        os.replace(draft, target)
        _sync(folder)
        abandoned = folder.glob(".round-*")  # drafts of processes that were killed
        for old in (*self._checkpoints()[: -config.checkpoint.keep], *abandoned):
            shutil.rmtree(old)

    def _checkpoints(self) -> list[Path]:
        """Oldest first."""
        found = (self.path / "checkpoints").glob("round-*")
        return sorted(found, key=lambda path: int(path.name.removeprefix("round-")))

    def load(self, config: Config) -> Progress | None:
        """The newest checkpoint, or None if no round has been completed.

        Raises:
            UserError: the checkpoint was written under another configuration.
            RunError: it is damaged.
        """
        found = self._checkpoints()
        if not found:
            return None
        try:
            meta = json.loads((found[-1] / "meta.json").read_text())
            state = load_file(found[-1] / "state.safetensors")
            written, checksum = meta.pop("fingerprint"), meta.pop("weights_sha256")
            progress = Progress(state=state, **meta)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise RunError(
                f"{found[-1]}: the checkpoint is damaged ({error}); remove it to go on from the one before."
            ) from None
        if written != fingerprint(config):
            raise UserError(
                "RUN_DIR",
                self.path,
                f"{found[-1].name} was written under another configuration than its config.yaml.",
            )
        if checksum != weights_sha256(state):
            raise RunError(
                f"{found[-1]}: the weights do not match their checksum; remove it to go on from the one before."
            )
        return progress

    def rewind(self, rounds: int) -> None:
        """Cuts ``rounds.jsonl`` back to the first ``rounds`` rounds."""
        kept = [record for record in self.rounds() if record["round"] < rounds]
        if self.rounds_file.exists():
            _write(self.rounds_file, "".join(json.dumps(record) + "\n" for record in kept))


def _sync(path: Path) -> None:
    """Makes a file or a folder's entries survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _pretty(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)

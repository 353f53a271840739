"""What a run writes and reads back: plain YAML, JSON and safetensors; nothing is ever unpickled."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from cluster_fl.compose import compose, fingerprint, to_yaml
from cluster_fl.config import Config
from cluster_fl.errors import RunError, UserError
from cluster_fl.files import sync
from cluster_fl.rounds import Start
from cluster_fl.timing import trace
from cluster_fl.timing.attempts import Attempts
from cluster_fl.timing.policies import Standing, Step
from cluster_fl.timing.timeline import Timeline

# What of a run's progress is in files of its own beside meta.json.
ARRAYS = ("state", "memory", "flight", "starts")
# In the file of an earlier round's start, before the keys.
STATE, MEMORY = "state/", "memory/"


@dataclass(frozen=True)
class Progress:
    """Where a run stands after its last complete round: all that a resumed run needs besides its config.

    ``rounds`` are complete; times are seconds; bytes and refused updates are totals since round 0. ``memory``
    is the server's besides the weights, and ``clients`` says of each client with state of its own in which round
    it was kept.
    ``flight`` are the clients at work, and ``starts`` what they started from, by round.
    ``device`` and ``experiment`` (:meth:`Experiment.sha256`) are what a resumed run must find as they were.
    """

    rounds: int
    state: dict[str, np.ndarray]
    memory: dict[str, np.ndarray] = field(default_factory=dict)
    clients: dict[int, int] = field(default_factory=dict)
    flight: Attempts = field(default_factory=Attempts.none)
    starts: dict[int, Start] = field(default_factory=dict)
    sim_time_s: float = 0.0
    wall_time_s: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    refused: int = 0
    device: str = "cpu"
    experiment: str = ""

    @property
    def standing(self) -> Standing:
        """Where the clock stands."""
        return Standing(self.rounds, self.sim_time_s, self.flight)


def weights_sha256(state: Mapping[str, np.ndarray]) -> str:
    """Hash of all shared and per-level tensors' bytes (float32, C order) in name order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(np.ascontiguousarray(state[name]).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class ClientStates:
    """What clients keep between rounds: a file for a client and a round, so that a resumed run finds each as it was.

    A file counts only if a checkpoint, or the run in progress, names its round.
    """

    path: Path

    def load(self, client: int, round: int) -> dict[str, np.ndarray]:
        """Raises RunError if the file is missing or damaged."""
        file = self.file(client, round)
        try:
            with safe_open(str(file), framework="np") as opened:
                names = opened.keys()
                arrays: dict[str, np.ndarray] = {name: opened.get_tensor(name) for name in names}
                expected = (opened.metadata() or {}).get("sha256")
        except (OSError, SafetensorError) as error:
            raise RunError(f"{file} is missing or damaged ({error}).") from None
        if expected != weights_sha256(arrays):
            raise RunError(f"{file} is damaged: it does not match its checksum.")
        return arrays

    def save(self, client: int, round: int, arrays: Mapping[str, np.ndarray]) -> None:
        file = self.file(client, round)
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{file.name}.{os.getpid()}")
        save_arrays(draft, arrays, {"sha256": weights_sha256(arrays)})
        os.replace(draft, file)
        for folder in (file.parent, self.path, self.path.parent):
            sync(folder)

    def sha256(self, clients: Mapping[int, int]) -> str | None:
        """Hash of all clients' states in client order; None if nobody keeps any."""
        if not clients:
            return None
        digest = hashlib.sha256()
        for client in sorted(clients):
            digest.update(weights_sha256(self.load(client, clients[client])).encode())
        return digest.hexdigest()

    def prune(self, kept: Sequence[Mapping[int, int]], rounds: int) -> None:
        """Removes the files of the first ``rounds`` rounds that no checkpoint names.

        Later ones may be of a round that is not complete. ``kept`` is the ``clients`` of each checkpoint.
        """
        wanted = {self.file(client, at) for clients in kept for client, at in clients.items()}
        for file in self.path.glob("*/*round-*"):
            at = int(file.name.partition("round-")[2].partition(".")[0])
            if file not in wanted and at < rounds:
                file.unlink()

    def file(self, client: int, round: int) -> Path:
        """Where a client's state of a round lies."""
        return self.path / f"{client:06d}" / f"round-{round:05d}.safetensors"


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Raises OSError if the disk is full, or will not be written for another reason."""
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    sync(path)


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
        with self._writable():
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.config_file, to_yaml(config))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else can have the folder meanwhile. The lock ends with the process, however that ends.

        Raises:
            UserError: another process has it, or it cannot be written.
        """
        with self._writable():
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("a+", encoding="utf-8")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                right = f"is being written by {file.read() or 'another process'}; wait for it, or stop it."
                raise UserError("run.name", self.path.name, right) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError("run.root", self.path.parent, f"cannot be written: {error.strerror}.") from None

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def rounds_file(self) -> Path:
        return self.path / "rounds.jsonl"

    @property
    def clients(self) -> ClientStates:
        """What clients keep between rounds."""
        return ClientStates(self.path / "clients")

    @property
    def timeline(self) -> Timeline:
        """How every client spent its time."""
        return Timeline(self.path)

    def finish_timeline(self, last: Step, pauses: np.ndarray) -> None:
        """Makes one file of it, and a trace if it is not too long; as :meth:`Timeline.finish`."""
        self.timeline.finish(last, pauses)
        trace.add(self.path, [record["sim_time_s"] for record in self.rounds()])

    def fork(self, config: Config, source: RunFolder) -> None:
        """Begins a run here where the newest checkpoint of another stands; it goes on under ``config``.

        Its earlier rounds are the other's. The folder appears whole or not at all.

        Raises:
            UserError: the folder holds a run already.
            RunError: the other has no checkpoint, or a damaged one.
        """
        self.refuse_existing()
        progress = source.load(source.config())
        if progress is None:
            raise RunError(f"{source.path} has no complete round to go on from.")
        draft = RunFolder(self.path.with_name(f".{self.path.name}.{os.getpid()}"))
        try:
            draft.create(config)
            for name in ("rounds.jsonl", "timeline", "timeline.parquet", "clients"):
                _copy(source.path / name, draft.path / name)
            draft.rewind(progress.rounds)
            draft.save(config, progress)
            os.replace(draft.path, self.path)
        except OSError:
            shutil.rmtree(draft.path, ignore_errors=True)
            raise
        sync(self.path.parent)

    def config(self, overrides: Sequence[str] = ()) -> Config:
        """The run's configuration. Raises UserError if this is no run folder."""
        if not self.config_file.exists():
            raise UserError("RUN_DIR", self.path, "is no run folder: it has no config.yaml.")
        return compose([self.config_file], overrides)

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        write_text(self.path / "plan.json", pretty(plan))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_text(self.path / "summary.json", pretty(summary))

    def write_error(self, error: Exception) -> str:
        """Keeps the full report of a failure; says where, or nothing if the run never began."""
        if not self.path.is_dir():
            return ""
        log = self.path / "error.log"
        try:
            write_text(log, "".join(traceback.format_exception(error)))
        except OSError:
            return ""
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
        try:
            self._write_checkpoint(draft, config, progress)
            os.replace(draft, target)
        except OSError:
            shutil.rmtree(draft, ignore_errors=True)  # a full disk needs the room
            raise
        sync(folder)
        abandoned = folder.glob(".round-*")  # drafts of processes that were killed
        for old in (*self._checkpoints()[: -config.checkpoint.keep], *abandoned):
            shutil.rmtree(old)
        self.clients.prune([self._named(kept) for kept in self._checkpoints()], progress.rounds)

    def _write_checkpoint(self, draft: Path, config: Config, progress: Progress) -> None:
        draft.mkdir(parents=True, exist_ok=True)
        save_arrays(draft / "state.safetensors", progress.state)
        if progress.memory:
            save_arrays(draft / "memory.safetensors", progress.memory)
        if len(progress.flight):
            save_arrays(draft / "flight.safetensors", progress.flight.columns())
        for version, start in progress.starts.items():
            save_arrays(draft / _start_name(version), _start_arrays(start))
        meta = {f.name: getattr(progress, f.name) for f in fields(progress) if f.name not in ARRAYS}
        meta |= {
            "fingerprint": fingerprint(config),
            "weights_sha256": weights_sha256(progress.state),
            "memory_sha256": weights_sha256(progress.memory),
            "flight_sha256": weights_sha256(progress.flight.columns()),
            "starts_sha256": {
                version: weights_sha256(_start_arrays(start)) for version, start in progress.starts.items()
            },
        }
        write_text(draft / "meta.json", pretty(meta))

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
            meta = self._meta(found[-1])
            state = load_file(found[-1] / "state.safetensors")
            memory = _load_if_there(found[-1] / "memory.safetensors")
            flight = replace(Attempts.none(), **_load_if_there(found[-1] / "flight.safetensors"))
            versions = {int(version): sha for version, sha in meta.pop("starts_sha256").items()}
            saved = {version: load_file(found[-1] / _start_name(version)) for version in versions}
            written = meta.pop("fingerprint")
            expected = (
                meta.pop("weights_sha256"),
                meta.pop("memory_sha256"),
                meta.pop("flight_sha256"),
                versions,
            )
            starts = {version: _start(arrays) for version, arrays in saved.items()}
            if versions.keys() != set(flight.version.tolist()):
                raise ValueError("it lacks the weights from which some clients started")
            progress = Progress(state=state, memory=memory, flight=flight, starts=starts, **meta)
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
        kept = {version: weights_sha256(arrays) for version, arrays in saved.items()}
        sums = weights_sha256(state), weights_sha256(memory), weights_sha256(flight.columns()), kept
        if expected != sums:
            raise RunError(
                f"{found[-1]}: the weights do not match their checksum; remove it to go on from the one before."
            )
        return progress

    def checkpoint_files(self, rounds: int) -> list[Path]:
        """What a run needs to go on after ``rounds`` rounds; nothing if there is no such checkpoint.

        Raises:
            FileNotFoundError: the checkpoint is just being removed.
        """
        target = self.path / "checkpoints" / f"round-{rounds:05d}"
        if not target.exists():
            return []
        kept = self._meta(target)["clients"].items()
        own = [self.clients.file(client, at) for client, at in kept]
        return [self.config_file, self.rounds_file, *sorted(target.iterdir()), *own]

    def _meta(self, checkpoint: Path) -> dict[str, Any]:
        meta: dict[str, Any] = json.loads((checkpoint / "meta.json").read_text())
        # JSON's keys are strings.
        return meta | {"clients": {int(client): int(at) for client, at in meta["clients"].items()}}

    def _named(self, checkpoint: Path) -> dict[int, int]:
        """The client states that a checkpoint names; none if it is damaged, since it is of no use then."""
        try:
            clients: dict[int, int] = self._meta(checkpoint)["clients"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        return clients

    def rewind(self, rounds: int) -> None:
        """Cuts ``rounds.jsonl`` and the timeline back to the first ``rounds`` rounds."""
        self.timeline.rewind(rounds)
        kept = [record for record in self.rounds() if record["round"] < rounds]
        if self.rounds_file.exists():
            write_text(self.rounds_file, "".join(json.dumps(record) + "\n" for record in kept))


def _start_name(version: int) -> str:
    return f"start-{version:05d}.safetensors"


def _start_arrays(start: Start) -> dict[str, np.ndarray]:
    memory = {MEMORY + key: array for key, array in start.memory.items()}
    return {STATE + key: array for key, array in start.state.items()} | memory


def _start(arrays: Mapping[str, np.ndarray]) -> Start:
    state = {key.removeprefix(STATE): array for key, array in arrays.items() if key.startswith(STATE)}
    memory = {key.removeprefix(MEMORY): array for key, array in arrays.items() if key.startswith(MEMORY)}
    return Start(state, memory)


def _copy(source: Path, target: Path) -> None:
    """A file or a folder, if it is there."""
    if source.is_dir():
        shutil.copytree(source, target)
    elif source.exists():
        shutil.copyfile(source, target)


def _load_if_there(file: Path) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = load_file(file) if file.exists() else {}
    return arrays


def pretty(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise

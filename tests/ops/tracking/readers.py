"""Reads what trackers have written, record by record, from the formats themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tensorboardX.proto.event_pb2 import Event
from wandb.proto.wandb_internal_pb2 import Record

from tests.processes import wait

# LevelDB's log: after 7 bytes of W&B's own, blocks of records, each with 7 bytes in front: checksum, length, kind.
BLOCK, HEAD, W_AND_B = 32768, 7, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class Told:
    """What one W&B file says."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, tuple[str, list[str]]] = field(default_factory=dict)  # name -> step metric, summaries
    run: Any = None
    artifacts: list[Any] = field(default_factory=list)
    exit_code: int | None = None


def wandb_folders(path: Path) -> list[Path]:
    """The folders of the W&B runs in a run folder, oldest first."""
    return sorted((path / "wandb").glob("*run-*-*"), key=lambda folder: folder.name.split("run-")[1])


def wandb_told(folder: Path) -> Told:
    """Of a run that has ended: W&B's own process writes the end of the file a moment later."""
    wait(lambda: is_closed(folder))
    return _wandb_told(folder)


def is_closed(folder: Path) -> bool:
    """Whether the file has its end; a record of which only a part is written is none."""
    try:
        return _wandb_told(folder).exit_code is not None
    except DecodeError:
        return False


def _wandb_told(folder: Path) -> Told:
    (file,) = folder.glob("run-*.wandb")
    told = Told()
    for data in _leveldb(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            told.rows.append(_items(record.history.item))
        elif kind == "run":
            told.run = record.run
            told.config |= _items(record.run.config.update)
        elif kind == "metric":
            metric = record.metric
            summaries = [one for one in ("max", "last") if getattr(metric.summary, one)]
            told.metrics[metric.name or metric.glob_name] = (metric.step_metric, summaries)
        elif kind == "artifact":
            told.artifacts.append(record.artifact)
        elif kind == "exit":
            told.exit_code = record.exit.exit_code
    return told


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _leveldb(content: bytes) -> Iterator[bytes]:
    content, at, parts = content[W_AND_B:], 0, b""
    # Blocks are counted with W&B's own bytes.
    while at + HEAD <= len(content):
        left = BLOCK - (at + W_AND_B) % BLOCK
        if left < HEAD:
            at += left
            continue
        length = int.from_bytes(content[at + 4 : at + 6], "little")
        kind, data = content[at + 6], content[at + HEAD : at + HEAD + length]
        at += HEAD + length
        parts = data if kind in (FULL, FIRST) else parts + data
        if kind in (FULL, LAST):
            yield parts


def tensorboard_events(path: Path) -> list[Event]:
    """All events of a run folder, file by file in the order in which they were begun."""
    found = []
    for file in sorted(
        (path / "tensorboard").iterdir(), key=lambda file: (file.stat().st_ctime_ns, file.name)
    ):
        content, at = file.read_bytes(), 0
        while at < len(content):
            # TFRecord: length, its checksum, data, its checksum.
            length = int.from_bytes(content[at : at + 8], "little")
            event = Event()
            event.ParseFromString(content[at + 12 : at + 12 + length])
            found.append(event)
            at += 12 + length + 4
    return found

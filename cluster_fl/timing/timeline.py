"""The timeline of a run: a row for every attempt of a client, as Parquet.

While a run goes on its rows are in ``timeline/``, a file a round, which pyarrow, pandas and polars read as one data
set; at its end one file ``timeline.parquet`` takes their place. :func:`read` reads either. The columns:

- ``round``: the round that the attempt ended in; ``round_begin_s``, ``round_end_s``: when that began and ended.
- ``client``, ``level``: who trains what size. ``first``: the level with which it began.
- ``version``: the round whose weights it started from. ``epochs``: that it trains.
- ``fate``: merged, late, lost, stale, abandoned (:class:`Fate`), or unfinished: under way when the run ended.
- ``start_s``, ``downloaded_s``, ``computed_s``, ``finish_s``: when it starts and when each part would be done, whether
  it got there or not; null: never. ``lost_s``: when it drops out; null: never. ``stop_s``: when it really stopped.
- ``paused_download_s``, ``paused_compute_s``, ``paused_upload_s``: seconds of each part, up to the stop, in which the
  device was not available.
- ``bytes_down``, ``bytes_up``: whole bytes that came through until the stop. ``size_down``, ``size_up``: of the whole
  transfers.

Times are simulated seconds since the run began.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster_fl.errors import RunError, UserError
from cluster_fl.files import sync
from cluster_fl.timing.attempts import Attempts, Ended, Fate
from cluster_fl.timing.intervals import PHASES
from cluster_fl.timing.policies import Standing, Step

FATES = [*(fate.name.lower() for fate in Fate), "unfinished"]
UNFINISHED = len(Fate)
# Columns whose values are an attempt's own, by their names here.
NUMBERS = ("client", "level", "first", "version", "epochs")
TIMES = ("start", "downloaded", "computed", "finish", "lost")
TYPES = {"round": pa.int32(), "client": pa.int64(), "level": pa.int16(), "first": pa.int16()}
TYPES |= {"version": pa.int32(), "epochs": pa.int32(), "fate": pa.dictionary(pa.int8(), pa.string())}
TYPES |= {f"{name}_s": pa.float64() for name in (*TIMES, "stop", "round_begin", "round_end")}
TYPES |= {f"paused_{phase}_s": pa.float64() for phase in PHASES}
TYPES |= {name: pa.int64() for name in ("bytes_down", "bytes_up", "size_down", "size_up")}
SCHEMA = pa.schema(TYPES)
ROWS = 2**17  # rows in a group of the whole file, at least: what is in memory at a time


def rows(step: Step, pauses: np.ndarray) -> pa.Table:
    """A round's attempts. ``pauses``: seconds of each phase, (3, attempts) (:func:`intervals.pauses`)."""
    ended, own = step.ended, step.ended.attempts
    count = len(own)
    arrays = {"round": np.full(count, step.round), "stop_s": ended.stop}
    arrays |= {name: getattr(own, name) for name in NUMBERS}
    arrays |= {f"{name}_s": getattr(own, name) for name in TIMES}
    arrays |= {"round_begin_s": np.full(count, step.begin), "round_end_s": np.full(count, step.end)}
    arrays |= {f"paused_{phase}_s": pauses[number] for number, phase in enumerate(PHASES)}
    arrays |= {"bytes_down": ended.down, "bytes_up": ended.up, "size_down": own.down, "size_up": own.up}
    made = {name: pa.array(array, TYPES[name], mask=_never(array)) for name, array in arrays.items()}
    made["fate"] = _fates(ended.fate)
    return pa.table([made[name] for name in TYPES], schema=SCHEMA)


def unfinished(standing: Standing) -> Step:
    """What is under way where a run ends, as if it were a round of its own."""
    time, flight = standing.time, standing.flight
    ended = replace(Ended.of(flight, Fate.LATE, 0.0), fate=np.full(len(flight), UNFINISHED))
    ended = replace(ended, stop=np.minimum(flight.end, time)).sorted()
    return Step(time, ended, np.zeros(0), Standing(standing.round + 1, time))


def steps(table: pa.Table) -> Iterator[tuple[Step, np.ndarray]]:
    """The rounds of a timeline in order, each with its pauses; those without an attempt are not in it.

    What was under way at the end is a round of its own (:func:`unfinished`).
    """
    found = {name: _values(table[name]) for name in TYPES}
    bounds = np.append(np.flatnonzero(np.diff(found["round"], prepend=-1)), len(found["round"]))
    for low, high in pairwise(bounds):
        own = {name: array[low:high] for name, array in found.items()}
        columns = {name: own[name].astype(np.int64) for name in NUMBERS}
        columns |= {name: own[f"{name}_s"] for name in TIMES}
        attempts = Attempts(**columns, down=own["size_down"], up=own["size_up"])
        ended = Ended(attempts, own["fate"], own["stop_s"])
        after = Standing(int(own["round"][0]) + 1, float(own["round_end_s"][0]))
        step = Step(float(own["round_begin_s"][0]), ended, np.ones(len(ended.merged)), after)
        yield step, np.stack([own[f"paused_{phase}_s"] for phase in PHASES])


def read(folder: Path | str) -> pa.Table:
    """All rows of a run folder so far, by round and then by client.

    Raises:
        UserError: there are none.
        RunError: a file is damaged.
    """
    here = Timeline(Path(folder))
    files = [here.file] if here.file.exists() else here.parts()
    if not files:
        raise UserError(
            "RUN_DIR", folder, f"has no timeline: neither {here.file.name} nor {here.folder.name}/."
        )
    return pa.concat_tables([_read(file) for file in files])


def of_round(folder: Path | str, number: int) -> pa.Table:
    """The rows of one round of a run folder, also while the run goes on.

    Raises:
        RunError: a file is missing or damaged.
    """
    here = Timeline(Path(folder))
    part = here.part(number)
    if part.exists():
        with suppress(RunError):  # the end of the run may just have put it into the whole file
            return _read(part)
    return _read(here.file, pc.field("round") == number)


def count(folder: Path) -> int:
    """Rows of a whole timeline, without reading them."""
    rows: int = pq.read_metadata(Timeline(folder).file).num_rows
    return rows


@dataclass(frozen=True)
class Timeline:
    """What a run folder holds of its timeline. Every file appears whole or not at all.

    A round's file is there before the round's line in ``rounds.jsonl``, which comes before its checkpoint. As long
    as a part of the rounds' files is gone, all rounds are in the whole file.
    """

    path: Path

    @property
    def file(self) -> Path:
        return self.path / "timeline.parquet"

    @property
    def folder(self) -> Path:
        return self.path / "timeline"

    def parts(self) -> list[Path]:
        """The rounds' files, in the order of the rounds."""
        return sorted(self.folder.glob("round-*.parquet"), key=_number)

    def part(self, number: int) -> Path:
        """A round's file."""
        return self.folder / f"round-{number:05d}.parquet"

    def append(self, step: Step, pauses: np.ndarray) -> None:
        """Keeps a round; it replaces what is there of the same round."""
        self._write(step.round, rows(step, pauses))

    def rewind(self, rounds: int) -> None:
        """Keeps the first ``rounds`` rounds alone, as files of their own again."""
        if self.file.exists():
            table = _read(self.file)
            for number in set(range(rounds)) - set(map(_number, self.parts())):
                self._write(number, table.filter(pc.field("round") == number))
            self.file.unlink()
        for part in self.parts():
            if _number(part) >= rounds:
                part.unlink()
        for draft in self.path.glob(".round-*.parquet.*"):  # of processes that were killed
            draft.unlink()

    def finish(self, last: Step, pauses: np.ndarray) -> None:
        """Puts the rounds' files, and what is under way at the end (:func:`unfinished`), into one."""
        with Writer.to(self.file) as writer:
            for part in self.parts():
                writer.add(_read(part))
            writer.add(rows(last, pauses))
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _write(self, number: int, table: pa.Table) -> None:
        self.folder.mkdir(exist_ok=True)
        with whole(self.part(number), self.path) as file:
            pq.write_table(table, file, compression="zstd")


class Writer:
    """Writes tables as one file, many rounds in a row group."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = pq.ParquetWriter(file, SCHEMA, compression="zstd")
        self._waiting: list[pa.Table] = []

    @staticmethod
    @contextmanager
    def to(path: Path) -> Iterator[Writer]:
        """A writer whose file appears at the end of the block, if that is reached."""
        with whole(path, path.parent) as file:
            writer = Writer(file)
            try:
                yield writer
            finally:
                writer.close()

    def add(self, table: pa.Table) -> None:
        self._waiting.append(table)
        if sum(map(len, self._waiting)) >= ROWS:
            self._flush()

    def close(self) -> None:
        if self._waiting:
            self._flush()
        self._file.close()

    def _flush(self) -> None:
        table = pa.concat_tables(self._waiting).combine_chunks()
        self._file.write_table(table, row_group_size=max(len(table), 1))
        self._waiting = []


@contextmanager
def whole(path: Path, drafts: Path) -> Iterator[BinaryIO]:
    """A file that appears at the end of the block, whole or not at all; its draft lies in ``drafts``."""
    draft = drafts / f".{path.name}.{os.getpid()}"
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    sync(path.parent)


def _number(part: Path) -> int:
    return int(part.stem.removeprefix("round-"))


def _never(array: np.ndarray) -> np.ndarray | None:
    """Where a moment never comes; None: nowhere."""
    infinite = np.isposinf(array) if array.dtype == np.float64 else np.zeros(0)
    return infinite if infinite.any() else None


def _fates(codes: np.ndarray) -> pa.DictionaryArray:
    """Every table has the same dictionary, whoever occurs in it."""
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int8)), pa.array(FATES))


def _values(column: pa.ChunkedArray) -> np.ndarray:
    """A column as numbers: fates by their codes, and what never comes at infinity."""
    if pa.types.is_dictionary(column.type):
        column = pc.index_in(column.cast(pa.string()), pa.array(FATES)).cast(pa.int8())
    elif pa.types.is_floating(column.type):
        column = pc.fill_null(column, np.inf)
    result: np.ndarray = column.to_numpy()
    return result


def _read(file: Path, rows: pc.Expression | None = None) -> pa.Table:
    try:
        table = pq.read_table(file, schema=SCHEMA, partitioning=None, filters=rows)
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{file} is damaged ({str(error).splitlines()[0]}).") from None
    at = table.schema.get_field_index("fate")
    return table.set_column(at, SCHEMA.field(at), _fates(_values(table["fate"])))

"""Availability traces from a CSV file of the user's."""

from __future__ import annotations

import csv
import gzip
import zlib
from pathlib import Path

import numpy as np

from cluster_fl.errors import UserError
from cluster_fl.timing import tables
from cluster_fl.timing.traces import LONGEST, RESOLUTION

COLUMNS = ("user", "start_s", "end_s")
TRACE_COLUMNS = ("trace_start_s", "trace_end_s")


def read(file: str) -> tables.Availability:
    """The traces in a CSV file, also a compressed one (``.gz``); users in the order in which they come.

    A row is an interval of a user (any text), in seconds: ``user, start_s, end_s``; a user whose row has no times is
    there and never available. ``trace_start_s, trace_end_s``, the same in all rows of a user, say between when it was
    watched, which is the period with which its intervals repeat; in a file without these columns all repeat from 0 to
    the latest end. Rows may come in any order, other columns are passed over, and times count to 1/1024 s.

    Raises:
        UserError: what is wrong, and in which line first.
    """
    header, rows = _rows(file)
    traced = any(name in header for name in TRACE_COLUMNS)
    wanted = COLUMNS + TRACE_COLUMNS if traced else COLUMNS
    if missing := [name for name in wanted if name not in header]:
        raise _bad(file, f"has no column {missing[0]}; its first line must name {', '.join(wanted)}.")
    user_at, *times_at = (header.index(name) for name in wanted)
    numbers: dict[str, int] = {}
    owner, times = np.empty(len(rows), dtype=np.int64), np.empty((len(rows), len(times_at)))
    for index, (line, row) in enumerate(rows):
        try:
            owner[index] = numbers.setdefault(row[user_at].strip(), len(numbers))
            times[index] = [_seconds(row[at]) for at in times_at]
        except (IndexError, ValueError):
            right = f"line {line} must hold {', '.join(wanted)}, times in seconds and not negative."
            raise _bad(file, right) from None

    def refuse(wrong: np.ndarray, right: str) -> None:
        if wrong.any():
            raise _bad(file, f"line {rows[int(np.argmax(wrong))][0]}: {right}.")

    start, end = times[:, 0], times[:, 1]
    refuse(np.isnan(start) != np.isnan(end), "start_s and end_s must both be given, or neither")
    refuse(end < start, "end_s must not be before start_s")
    if not (end > start).any():
        raise _bad(file, "holds no interval: nobody could ever take part.")
    begin, stop = times[:, 2:].T if traced else (np.zeros(len(rows)), np.full(len(rows), np.nanmax(end)))
    refuse(~(stop > begin), "trace_end_s must be after trace_start_s")
    first = np.unique(owner, return_index=True)[1]
    same = (begin == begin[first][owner]) & (stop == stop[first][owner])
    refuse(~same, "trace_start_s and trace_end_s must be those of the user's lines before")
    refuse((start < begin) | (end > stop), "the interval must lie between trace_start_s and trace_end_s")
    order = np.lexsort((end, start, owner))
    order = order[~np.isnan(start[order])]
    overlaps = (owner[order][1:] == owner[order][:-1]) & (start[order][1:] < end[order][:-1])
    refuse(
        np.isin(np.arange(len(rows)), order[1:][overlaps]), "the interval overlaps with another of its user"
    )
    offsets = np.searchsorted(owner[order], np.arange(len(numbers) + 1))
    return tables.Availability(offsets, start[order], end[order], begin[first], stop[first])


def _rows(file: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The first line, and the others that are not empty with their numbers."""
    path = Path(file).expanduser()
    try:
        with (gzip.open if path.suffix == ".gz" else open)(
            path, "rt", encoding="utf-8-sig", newline=""
        ) as text:
            reader = csv.reader(text)
            header = [name.strip() for name in next(reader, [])]
            return header, [(reader.line_num, row) for row in reader if row]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as problem:
        raise _bad(file, f"cannot be read: {problem}.") from problem


def _seconds(text: str) -> float:
    if not text.strip():
        return float("nan")
    value = float(text)
    if not 0 <= value <= LONGEST:
        raise ValueError
    return round(value / RESOLUTION) * RESOLUTION


def _bad(file: str, right: str) -> UserError:
    return UserError("time.availability.file", file, right)

"""Reads a CSV of devices, one a row, with a header; ``.gz`` too.

Its columns are called like the options of ``time.devices``: gflops, down_mbps and up_mbps must be there, memory_mb,
memory_gbps and latency_s may be, in any order, and others are not read.
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from array import array
from pathlib import Path
from typing import IO

import numpy as np

from cluster_fl.errors import UserError

REQUIRED = ("gflops", "down_mbps", "up_mbps")
# Infinite: no limit of memory, and no wait for it.
MEMORY = ("memory_mb", "memory_gbps")
COLUMNS = (*REQUIRED, *MEMORY, "latency_s")


def read(path: str) -> dict[str, np.ndarray]:
    """The columns that there are, (rows,), float64, in the units of their names.

    Raises:
        UserError: naming time.devices.file, and what is wrong where.
    """
    try:
        with _open(path) as file:
            return _columns(path, file)
    except OSError as error:
        raise _wrong(path, f"cannot be read: {error.strerror or error}.") from None
    except (EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise _wrong(path, f"must be a CSV in UTF-8, of which it is none or a part: {error}.") from None


def _open(path: str) -> IO[str]:
    if path.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return Path(path).open(encoding="utf-8-sig", newline="")


def _wrong(path: str, right: str) -> UserError:
    return UserError("time.devices.file", path, right)


def _columns(path: str, file: IO[str]) -> dict[str, np.ndarray]:
    reader = csv.reader(file)
    names = [name.strip().lower() for name in next(reader, [])]
    for key in COLUMNS:
        if names.count(key) != 1 and (key in REQUIRED or key in names):
            found = ", ".join(name[:40] for name in names[:20]) or "nothing"
            raise _wrong(path, f"must have one column {key}; its first line names {found}.")
    where = {key: names.index(key) for key in COLUMNS if key in names}
    columns = {key: array("d") for key in where}
    for row in filter(None, reader):
        for key, position in where.items():
            text = row[position] if position < len(row) else ""
            value = _number(text)
            if not _valid(key, value):
                least = "a number of at least 0" if key == "latency_s" else "a positive number"
                right = f"must have {least} in line {reader.line_num}, column {key}; it has {text[:40]!r}."
                raise _wrong(path, right)
            columns[key].append(value)
    if not columns["gflops"]:
        raise _wrong(path, "must have a row for each device below its header; it has none.")
    return {key: np.array(column) for key, column in columns.items()}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _valid(key: str, value: float) -> bool:
    if value == math.inf:
        return key in MEMORY
    return value >= 0 if key == "latency_s" else value > 0

"""A timeline as a trace: a row for every client and one for the server, to open in https://ui.perfetto.dev.

The format is Chrome's Trace Event Format as JSON, gzipped; chrome://tracing opens it too. A simulated second is a
second there. What a client does are slices, whose category is how the attempt ended; an attempt that did not count
has a mark where it stopped.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cluster_fl.timing.attempts import Fate
from cluster_fl.timing.intervals import PHASES, milestones, waiting
from cluster_fl.timing.policies import Step
from cluster_fl.timing.timeline import FATES, UNFINISHED, count, read, steps, whole

NAME = "trace.json.gz"
# A trace of that many attempts has about a million slices, which the viewers still take.
MOST = 200_000
CLIENTS, SERVER = 1, 2  # numbers of processes: rows come in groups
MICROSECONDS = 1e6
# Colours that chrome://tracing knows by name; other viewers choose their own.
COLOURS = {
    "download": "thread_state_runnable",
    "compute": "thread_state_running",
    "upload": "thread_state_iowait",
    "waiting": "thread_state_sleeping",
}
COLOUR_OF_WASTE = {Fate.LATE: "bad", Fate.LOST: "terrible", Fate.STALE: "olive", Fate.ABANDONED: "grey"}


def add(folder: Path, ends: Sequence[float]) -> bool:
    """Puts the trace of ``timeline.parquet`` beside it, unless that has more than ``MOST`` attempts: false then.

    The file appears whole or not at all, and the same timeline gives the same bytes.

    Args:
        ends: when each round ended, simulated seconds.
    """
    if count(folder) > MOST:
        return False
    write(folder / NAME, read(folder), ends)
    return True


def write(path: Path, table: pa.Table, ends: Sequence[float]) -> None:
    """As :func:`add`, of any timeline (:func:`timeline.read`) and however long it is."""
    with (
        whole(path, path.parent) as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8") as text,
    ):
        text.write('{"displayTimeUnit":"ms","traceEvents":[')
        for number, event in enumerate(_events(table, ends)):
            text.write(f"{',' if number else ''}\n{event}")
        text.write("\n]}\n")


def _events(table: pa.Table, ends: Sequence[float]) -> Iterator[str]:
    yield from _names(table)
    begin = 0
    for number, end in enumerate(_microseconds(np.asarray(ends))):
        yield _slice(SERVER, SERVER, f"round {number}", "round", begin, end - begin, "", f'"round":{number}')
        begin = end
    for step, pauses in steps(table):
        yield from _round(step, pauses)


def _names(table: pa.Table) -> Iterator[str]:
    for process, name in ((SERVER, "server"), (CLIENTS, "clients")):
        yield _metadata("process_name", process, process, {"name": name})
        yield _metadata("process_sort_index", process, process, {"sort_index": -process})
    yield _metadata("thread_name", SERVER, SERVER, {"name": "rounds"})
    clients, levels = table["client"].to_numpy(), table["level"].to_numpy()
    order = np.lexsort((levels, clients))
    clients, levels = clients[order], levels[order]
    firsts = np.flatnonzero(np.diff(clients, prepend=-1))
    for first, last in zip(firsts, np.append(firsts[1:], len(clients)) - 1, strict=True):
        client, low, high = int(clients[first]), int(levels[first]), int(levels[last])
        name = f"client {client}, level {low}" if low == high else f"client {client}, levels {low} to {high}"
        yield _metadata("thread_name", CLIENTS, client + 1, {"name": name})
        yield _metadata("thread_sort_index", CLIENTS, client + 1, {"sort_index": client})


def _round(step: Step, pauses: np.ndarray) -> Iterator[str]:
    own, ended = step.ended.attempts, step.ended
    # The update that has arrived waits from the last of these moments to the next one.
    moments = np.vstack([milestones(ended), ended.stop + waiting(ended, step.end)])
    columns = zip(
        own.client.tolist(), own.level.tolist(), own.version.tolist(), ended.fate.tolist(),
        _microseconds(moments.T), pauses.T.tolist(), strict=True,
    )  # fmt: skip
    for client, level, version, fate, moment, paused in columns:
        about = f'"round":{step.round},"version":{version},"level":{level}'
        for number, name in enumerate((*PHASES, "waiting")):
            begin, end = moment[number : number + 2]
            if end > begin:
                colour = COLOUR_OF_WASTE.get(fate, COLOURS[name])
                away = f',"paused_s":{paused[number]:.3f}' if name in PHASES and paused[number] else ""
                yield _slice(CLIENTS, client + 1, name, FATES[fate], begin, end - begin, colour, about + away)
        if fate not in (Fate.MERGED, UNFINISHED):
            yield _mark(client + 1, FATES[fate], moment[len(PHASES)])


def _slice(
    process: int, row: int, name: str, category: str, begin: int, length: int, colour: str, about: str
) -> str:
    shade = f'"cname":"{colour}",' if colour else ""
    return (
        f'{{"ph":"X","name":"{name}","cat":"{category}","pid":{process},"tid":{row},"ts":{begin},"dur":{length},'
        f'{shade}"args":{{{about}}}}}'
    )


def _mark(row: int, name: str, at: int) -> str:
    return f'{{"ph":"i","s":"t","name":"{name}","cat":"{name}","pid":{CLIENTS},"tid":{row},"ts":{at}}}'


def _metadata(kind: str, process: int, row: int, content: dict[str, str | int]) -> str:
    event = {"ph": "M", "name": kind, "pid": process, "tid": row, "ts": 0, "args": content}
    return json.dumps(event, separators=(",", ":"))


def _microseconds(seconds: np.ndarray) -> list[Any]:
    """Whole ones, so that what follows one upon another neither overlaps nor leaves a gap."""
    result: list[Any] = np.rint(seconds * MICROSECONDS).astype(np.int64).tolist()
    return result

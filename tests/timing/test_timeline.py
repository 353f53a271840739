"""The timeline comes back bit for bit, survives a crash anywhere, and opens as a trace."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from cluster_fl.errors import RunError, UserError
from cluster_fl.records import RunFolder
from cluster_fl.timing import timeline, trace
from cluster_fl.timing.attempts import Attempts, Ended, Fate
from cluster_fl.timing.policies import Standing, Step
from cluster_fl.timing.timeline import Timeline, Writer
from tests.tiny import lines, run_here, tiny

ROUNDS = 5
EMPTY = 2  # a round in which no attempt ended


def step(number: int, count: int = 6) -> Step:
    """A round with every fate and with moments that never come."""
    rng = np.random.default_rng(number)
    moments = 10.0 * number + np.cumsum(rng.random((4, count)), axis=0)
    moments[3, -1:] = np.inf
    own = Attempts(
        client=np.sort(rng.permutation(20)[:count]),
        level=rng.integers(1, 4, count),
        version=np.full(count, number),
        epochs=np.full(count, 2),
        first=rng.integers(1, 4, count),
        start=moments[0],
        downloaded=moments[1],
        computed=moments[2],
        finish=moments[3],
        lost=np.where(rng.random(count) < 0.5, np.inf, moments[2]),
        down=rng.integers(1, 10**6, count),
        up=rng.integers(1, 10**6, count),
    )
    fates = np.arange(count) % len(Fate)
    ended = Ended.of(own, fates, np.minimum(own.end, 10.0 * number + 9))
    return Step(10.0 * number, ended, np.ones(len(ended.merged)), Standing(number + 1, 10.0 * (number + 1)))


def pauses(one: Step) -> np.ndarray:
    return np.random.default_rng(one.round).random((3, len(one.ended.attempts))) / 10


STEPS = [step(number, 0 if number == EMPTY else 6) for number in range(ROUNDS)]
LAST = timeline.unfinished(Standing(ROUNDS, 10.0 * ROUNDS, step(4).ended.attempts))


def filled(path: Path, rounds: int = ROUNDS) -> Timeline:
    path.mkdir(exist_ok=True)
    made = Timeline(path)
    for one in STEPS[:rounds]:
        made.append(one, pauses(one))
    return made


def finish(made: Timeline) -> bytes:
    made.finish(LAST, pauses(LAST))
    return made.file.read_bytes()


def content(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def assert_same(found: tuple[Step, np.ndarray], expected: Step) -> None:
    one, paused = found
    assert (one.round, one.begin, one.end) == (expected.round, expected.begin, expected.end)
    assert one.ended.stop.tobytes() == expected.ended.stop.tobytes()
    assert one.ended.fate.tolist() == expected.ended.fate.tolist()
    for name, column in expected.ended.attempts.columns().items():
        own = getattr(one.ended.attempts, name)
        assert (own.dtype, own.tobytes()) == (column.dtype, column.tobytes()), name
    assert paused.tobytes() == pauses(expected).tobytes()


# Reading and writing.


@pytest.mark.parametrize("whole", [False, True])
def test_it_comes_back_bit_for_bit(tmp_path: Path, whole: bool) -> None:
    made = filled(tmp_path / "run")
    if whole:
        finish(made)
    found = list(timeline.steps(timeline.read(made.path)))
    expected = [one for one in STEPS if one.round != EMPTY] + ([LAST] if whole else [])
    for one, own in zip(found, expected, strict=True):
        assert_same(one, own)


def test_what_never_comes_is_null(tmp_path: Path) -> None:
    table = timeline.read(filled(tmp_path).path).to_pydict()
    attempts = [one.ended.attempts for one in STEPS]
    for name in ("lost", "finish"):
        never = [np.isinf(getattr(own, name)) for own in attempts]
        assert [value is None for value in table[f"{name}_s"]] == np.concatenate(never).tolist()
    assert None not in table["stop_s"]


def test_bytes_are_those_that_came_through(tmp_path: Path) -> None:
    table = timeline.read(filled(tmp_path).path)
    for name in ("down", "up"):
        assert (
            table[f"bytes_{name}"].to_pylist()
            == np.concatenate([getattr(one.ended, name) for one in STEPS]).tolist()
        )
        assert all(
            sent <= size
            for sent, size in zip(
                table[f"bytes_{name}"].to_pylist(), table[f"size_{name}"].to_pylist(), strict=True
            )
        )


def test_a_fate_has_a_name(tmp_path: Path) -> None:
    made = filled(tmp_path)
    finish(made)
    table = timeline.read(tmp_path)
    assert table["fate"].unique().to_pylist() == [
        "merged",
        "late",
        "lost",
        "stale",
        "abandoned",
        "unfinished",
    ]
    assert table.filter(ds.field("fate") == "unfinished")["round"].unique().to_pylist() == [ROUNDS]


def test_rounds_are_a_data_set_that_is_read_at_once(tmp_path: Path) -> None:
    made = filled(tmp_path)
    rows = sum(len(one.ended.attempts) for one in STEPS)
    assert len(pq.read_table(made.folder)) == len(ds.dataset(made.folder).to_table()) == rows
    assert pq.read_table(made.folder).schema.equals(timeline.SCHEMA)


def test_a_round_outgrows_its_digits(tmp_path: Path) -> None:
    made = Timeline(tmp_path)
    for number in (100_000, 99_999, 9):
        one = step(number)
        made.append(one, pauses(one))
    assert [found.round for found, _ in timeline.steps(timeline.read(tmp_path))] == [9, 99_999, 100_000]


def test_appending_again_replaces(tmp_path: Path) -> None:
    made = filled(tmp_path)
    before = content(tmp_path)
    made.append(STEPS[1], pauses(STEPS[1]))
    assert content(tmp_path) == before


def test_many_rounds_share_a_row_group(tmp_path: Path) -> None:
    made = filled(tmp_path)
    finish(made)
    assert pq.read_metadata(made.file).num_row_groups == 1


def test_a_long_timeline_is_written_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "ROWS", 10)
    made = filled(tmp_path)
    finish(made)
    assert pq.read_metadata(made.file).num_row_groups == 3
    assert len(timeline.read(tmp_path)) == timeline.count(tmp_path) == 30


def test_no_timeline_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no timeline"):
        timeline.read(tmp_path)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kept", [0, 40, -1])
def test_a_damaged_file_is_told(tmp_path: Path, whole: bool, kept: int) -> None:
    made = filled(tmp_path)
    if whole:
        finish(made)
    file = made.file if whole else made.parts()[1]
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(RunError, match=f"{file.name} is damaged"):
        timeline.read(tmp_path)


# Crashes.


class Crash(BaseException):
    """Like a power cut: nobody handles it."""


def crashing(monkeypatch: pytest.MonkeyPatch, at: int) -> Callable[[], int]:
    """Makes the call number ``at`` of those that change the disk crash; returns a counter of calls."""
    calls = 0

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at + 1:
                raise Crash
            return original(*args, **kwargs)

        return function

    for name in ("replace", "fsync", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    return lambda: calls


def crash_points(act: Callable[[Path], object], folder: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        counter = crashing(patch, -1)
        act(folder)
        return counter()


def test_a_crash_while_it_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it happens, the next start finds all rounds, and the end is the same."""
    expected = finish(filled(tmp_path / "whole"))
    points = crash_points(lambda path: finish(Timeline(path)), filled(tmp_path / "count").path)
    assert points > ROUNDS + 3
    for at in range(points):
        made = filled(tmp_path / f"run{at}")
        with monkeypatch.context() as patch:
            crashing(patch, at)
            with pytest.raises(Crash):
                finish(made)
        assert len(timeline.read(made.path)) in (24, 30)
        made.rewind(ROUNDS)
        assert finish(made) == expected, at
        assert list(content(made.path)) == ["timeline.parquet"]


@pytest.mark.parametrize("rounds", [0, 3, ROUNDS])
def test_a_crash_while_it_is_rewound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    """From a whole file, of which a part of the rounds' files is still there."""
    begin = tmp_path / "begin"
    some = filled(tmp_path / "some", 2)
    finish(filled(begin))
    shutil.copytree(some.folder, begin / "timeline")
    expected = content(filled(tmp_path / "expected", rounds).path)
    count = tmp_path / "count"
    shutil.copytree(begin, count)
    points = crash_points(lambda path: Timeline(path).rewind(rounds), count)
    assert content(count) == expected
    for at in range(points):
        path = tmp_path / f"run{at}"
        shutil.copytree(begin, path)
        with monkeypatch.context() as patch:
            crashing(patch, at)
            with pytest.raises(Crash):
                Timeline(path).rewind(rounds)
        Timeline(path).rewind(rounds)
        assert content(path) == expected, at


def test_a_crash_while_a_round_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = filled(tmp_path, 1)
    before = content(tmp_path)
    for at in range(2):  # the sync and the rename
        with monkeypatch.context() as patch:
            crashing(patch, at)
            with pytest.raises(Crash):
                made.append(STEPS[1], pauses(STEPS[1]))
        assert content(tmp_path) == before


def test_drafts_of_dead_processes_are_swept(tmp_path: Path) -> None:
    made = filled(tmp_path)
    (tmp_path / ".round-00003.parquet.12").write_bytes(b"")
    (tmp_path / ".config.yaml.12").write_bytes(b"")
    made.rewind(ROUNDS)
    assert [path.name for path in tmp_path.glob(".*")] == [".config.yaml.12"]


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with Writer.to(tmp_path / "timeline.parquet") as writer:
            writer.add(timeline.rows(STEPS[0], pauses(STEPS[0])))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert content(tmp_path) == {}


# The trace.

Event = dict[str, Any]


def events(path: Path) -> list[Event]:
    found: list[Event] = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return found


def check(found: list[Event]) -> None:
    """The rules of the Trace Event Format for what is used of it, and those of Perfetto: no slices overlap."""
    slices: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    named = {(e["pid"], e["tid"]) for e in found if e["ph"] == "M" and e["name"] == "thread_name"}
    for event in found:
        assert isinstance(event["name"], str)
        assert {"pid", "tid", "ts"} <= event.keys()
        assert all(isinstance(event[key], int) and event[key] >= 0 for key in ("pid", "tid", "ts"))
        assert event["ph"] in ("X", "M", "i")
        if event["ph"] == "X":
            assert isinstance(event["dur"], int)
            assert event["dur"] >= 0
            assert isinstance(event["args"], dict)
            assert isinstance(event["cat"], str)
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        if event["ph"] == "i":
            assert event["s"] == "t"
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "process_sort_index", "thread_name", "thread_sort_index")
            assert event["args"].keys() == {"sort_index" if event["name"].endswith("index") else "name"}
        else:
            assert (event["pid"], event["tid"]) in named
    for own in slices.values():
        assert all(first[1] <= second[0] for first, second in pairwise(sorted(own)))


def slices_of(found: list[Event], client: int) -> list[tuple[str, float, float, str]]:
    """Name, begin and end in seconds, and category."""
    return [
        (e["name"], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6, e["cat"])
        for e in found
        if e["ph"] == "X" and (e["pid"], e["tid"]) == (trace.CLIENTS, client + 1)
    ]


def one_round() -> Step:
    """Client 3 is merged after a wait, client 5 is cut while it computes, client 9 drops out while it downloads."""
    columns = {
        "client": [3, 5, 9], "level": [1, 2, 2], "version": [0, 0, 0], "epochs": [1, 1, 1], "first": [1, 2, 2],
        "start": [0.0, 0.0, 0.0], "downloaded": [1.0, 2.0, 4.0], "computed": [2.0, 30.0, 5.0],
        "finish": [2.5, 31.0, 6.0], "lost": [np.inf, np.inf, 3.0], "down": [10, 20, 20], "up": [10, 20, 20],
    }  # fmt: skip
    own = Attempts(**{name: np.array(column) for name, column in columns.items()})
    ended = Ended.of(own, np.array([Fate.MERGED, Fate.LATE, Fate.LOST]), np.array([2.5, 8.0, 3.0]))
    return Step(0.0, ended, np.ones(1), Standing(1, 8.0))


def test_what_a_client_does_is_slices(tmp_path: Path) -> None:
    paused = np.array([[0.0, 0.25, 0.0], [0.0, 1.5, 0.0], [0.0, 0.0, 0.0]])
    trace.write(tmp_path / trace.NAME, timeline.rows(one_round(), paused), [8.0, 9.5])
    found = events(tmp_path / trace.NAME)
    check(found)
    assert slices_of(found, 3) == [
        ("download", 0, 1, "merged"),
        ("compute", 1, 2, "merged"),
        ("upload", 2, 2.5, "merged"),
        ("waiting", 2.5, 8, "merged"),
    ]
    assert slices_of(found, 5) == [("download", 0, 2, "late"), ("compute", 2, 8, "late")]
    assert slices_of(found, 9) == [("download", 0, 3, "lost")]
    assert [e["args"].get("paused_s") for e in found if e["ph"] == "X" and e["tid"] == 6] == [0.25, 1.5]
    assert [(e["name"], e["ts"], e["tid"]) for e in found if e["ph"] == "i"] == [
        ("late", 8_000_000, 6), ("lost", 3_000_000, 10),
    ]  # fmt: skip
    rounds = [(e["name"], e["ts"], e["dur"]) for e in found if e["pid"] == trace.SERVER and e["ph"] == "X"]
    assert rounds == [("round 0", 0, 8_000_000), ("round 1", 8_000_000, 1_500_000)]
    names = {e["args"]["name"] for e in found if e["ph"] == "M" and e["name"] == "thread_name"}
    assert names == {"rounds", "client 3, level 1", "client 5, level 2", "client 9, level 2"}


def test_a_client_of_several_levels_is_named_so(tmp_path: Path) -> None:
    trace.write(tmp_path / trace.NAME, timeline.read(filled(tmp_path).path), [10.0] * ROUNDS)
    names = [e["args"]["name"] for e in events(tmp_path / trace.NAME) if e["name"] == "thread_name"]
    assert any(", levels 1 to 3" in name for name in names)


def test_the_same_timeline_is_the_same_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(filled(tmp_path))
    made = []
    for day in (1e9, 1.7e9):
        monkeypatch.setattr("time.time", lambda day=day: day)
        trace.add(tmp_path, [10.0] * ROUNDS)
        made.append((tmp_path / trace.NAME).read_bytes())
    assert made[0] == made[1]


def test_a_timeline_that_is_too_long_gets_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(filled(tmp_path))
    monkeypatch.setattr(trace, "MOST", 29)
    trace.add(tmp_path, [10.0] * ROUNDS)
    assert not (tmp_path / trace.NAME).exists()
    monkeypatch.setattr(trace, "MOST", 30)
    trace.add(tmp_path, [10.0] * ROUNDS)
    assert (tmp_path / trace.NAME).exists()


# Of a run.

SETTINGS = {
    "over_select": ("time.policy.name=over_select", "clients.per_round=5", "time.dropout=0.2"),
    "fedbuff": (
        "time.policy.name=fedbuff",
        "time.policy.buffer=2",
        "clients.per_round=5",
        "time.dropout=0.2",
    ),
}


@pytest.fixture(scope="module", params=SETTINGS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    run_here(tiny(folder, *SETTINGS[request.param], "rounds=4", "checkpoint.every=3"), folder / "run")
    return folder / "run"


def test_a_runs_timeline_is_what_its_records_say(run: Path) -> None:
    table = timeline.read(run).to_pylist()
    records, finished = lines(run), [row for row in table if row["fate"] != "unfinished"]
    told = [(record["round"], person) for record in records for person in record["participants"]]
    assert [(row["round"], row["client"], row["level"], row["fate"], row["version"]) for row in finished] == [
        (number, one["client"], one["level"], one["fate"], one["version"]) for number, one in told
    ]
    assert [row["stop_s"] - row["start_s"] for row in finished] == [one["seconds"] for _, one in told]
    for record in records:
        own = [row for row in finished if row["round"] == record["round"]]
        for name in ("bytes_down", "bytes_up"):
            assert sum(row[name] for row in own) == record[name]
        assert {row["round_end_s"] for row in own} <= {record["sim_time_s"]}


def test_who_is_under_way_at_the_end_is_unfinished(run: Path) -> None:
    table, end = timeline.read(run).to_pylist(), lines(run)[-1]["sim_time_s"]
    left = [row for row in table if row["fate"] == "unfinished"]
    assert bool(left) == (run.parent.name.startswith("fedbuff"))
    assert all(row["start_s"] <= row["stop_s"] <= end for row in left)


def test_a_runs_trace_can_be_opened(run: Path) -> None:
    found = events(run / trace.NAME)
    check(found)
    clients = {row["client"] for row in timeline.read(run).to_pylist()}
    rows = {e["tid"] - 1 for e in found if e["name"] == "thread_name" and e["pid"] == trace.CLIENTS}
    assert rows == clients
    assert sum(e["cat"] == "round" for e in found if e["ph"] == "X") == 4


def test_a_resumed_run_leaves_the_same_files(run: Path, tmp_path: Path) -> None:
    """Killed after its last round: the newest checkpoint is one round older."""
    path = tmp_path / "run"
    shutil.copytree(run, path)
    folder = RunFolder(path)
    config = folder.config()
    for gone in ("summary.json", "timeline.parquet", trace.NAME):
        (path / gone).unlink()
    shutil.rmtree(path / "checkpoints" / "round-00004")
    made = Timeline(path)
    for one, paused in timeline.steps(timeline.read(run)):
        if one.round < 4:
            made.append(one, paused)
    run_here(config, path, resume=True)
    for name in ("timeline.parquet", trace.NAME):
        assert (path / name).read_bytes() == (run / name).read_bytes()
    assert not made.folder.exists()

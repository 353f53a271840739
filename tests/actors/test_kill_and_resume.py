"""A run that is killed anywhere and resumed ends in the bits of one that was not."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster_fl.errors import RunError, UserError
from cluster_fl.records import RunFolder
from tests.processes import Command, line_count
from tests.tiny import outcome, run_here, tiny, write_tiny

Computed = tuple[Any, ...]
ROUNDS = 6
# Rounds of about a second, so that the kill comes long before the end.
LONG = (f"rounds={ROUNDS}", "train.epochs=3")


def left(path: Path) -> Computed:
    """What a finished run computed, and its timeline to the byte."""
    return *outcome(path), *((path / name).read_bytes() for name in ("timeline.parquet", "trace.json.gz"))


@pytest.fixture(scope="module")
def long_reference(tmp_path_factory: pytest.TempPathFactory) -> Computed:
    folder = tmp_path_factory.mktemp("long")
    run_here(tiny(folder, *LONG), folder / "run")
    return left(folder / "run")


def killed_and_resumed(folder: Path, after: int, run: list[str], resume: list[str]) -> int:
    """Kills a run when ``after`` rounds are on disk and resumes it; returns how many were when it was dead."""
    path, file = folder / "run", write_tiny(folder)
    words = ["run", str(file), *LONG, f"run.root={folder}", "run.name=run", *run]
    with Command(words, folder) as command:
        command.await_(lambda: (path / "plan.json").exists() and line_count(path / "rounds.jsonl") >= after)
        command.kill()
        assert command.tree() == []
    assert not (path / "summary.json").exists()
    survived = line_count(path / "rounds.jsonl")
    with Command(["resume", str(path), "--quiet", *resume], folder) as command:
        assert command.wait() == 0, command.err
    return survived


@pytest.mark.parametrize("after", [0, pytest.param(1, marks=pytest.mark.slow), 3])
def test_kill_9(tmp_path: Path, long_reference: Computed, after: int) -> None:
    survived = killed_and_resumed(tmp_path, after, ["--debug"], ["--debug"])
    assert after <= survived < ROUNDS
    assert left(tmp_path / "run") == long_reference


@pytest.mark.slow  # test_a_crash_at_any_write has checkpoints every second round as well
def test_kill_9_between_checkpoints(tmp_path: Path, long_reference: Computed) -> None:
    """Three rounds are on disk and two are in the checkpoint, so the third is done again."""
    killed_and_resumed(tmp_path, 3, ["--debug", "checkpoint.every=2"], ["--debug", "checkpoint.every=4"])
    assert left(tmp_path / "run") == long_reference


@pytest.mark.slow
def test_kill_9_of_a_whole_ray_cluster(tmp_path: Path, long_reference: Computed) -> None:
    """Other pools after than before, and nothing of Ray is left."""
    killed_and_resumed(tmp_path, 1, ["cluster.pools=2"], ["cluster.pools=1"])
    assert left(tmp_path / "run") == long_reference


@pytest.mark.slow
@pytest.mark.parametrize("where", [["--debug"], ["cluster.pools=2"]], ids=["here", "ray"])
def test_twenty_kills_at_random_moments(tmp_path: Path, where: list[str]) -> None:
    """One run, killed and resumed again and again. A moment is an amount of the tree's processor time, drawn by a seed."""
    long, rng, path = ("rounds=150",), random.Random(11), tmp_path / "run"
    words = [
        "run",
        str(write_tiny(tmp_path)),
        *long,
        f"run.root={tmp_path}",
        "run.name=run",
        "--quiet",
        *where,
    ]
    for _ in range(20):
        moment = rng.uniform(2, 7) if where == ["--debug"] else rng.uniform(10, 25)
        with Command(words, tmp_path) as command:
            command.await_(lambda command=command, moment=moment: command.seconds() > moment)  # type: ignore[misc]
            command.kill()
    assert not (path / "summary.json").exists()
    survived = line_count(path / "rounds.jsonl")
    with Command(words, tmp_path) as command:  # a run of that name goes on
        assert command.wait(600) == 0, command.err
    run_here(tiny(tmp_path, *long), tmp_path / "calm")
    assert 0 < survived < 150
    assert left(path) == left(tmp_path / "calm")


# The same without processes: a crash at every single write.


class Crash(BaseException):
    """Like a power cut: nobody handles it."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Computed:
    folder = tmp_path_factory.mktemp("short")
    run_here(tiny(folder), folder / "run")
    return left(folder / "run")


def crashing(monkeypatch: pytest.MonkeyPatch, name: str, at: int) -> Callable[[], int]:
    """Makes the call number ``at`` (from 0) of an ``os`` function crash; returns a counter of calls."""
    original, calls = getattr(os, name), 0

    def function(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at + 1:
            raise Crash
        return original(*arguments)

    monkeypatch.setattr(os, name, function)
    return lambda: calls


def filling(monkeypatch: pytest.MonkeyPatch, name: str, at: int) -> None:
    """From the call number ``at`` (from 0) of an ``os`` function on, the disk is full."""
    original, calls = getattr(os, name), 0

    def function(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")
        return original(*arguments)

    monkeypatch.setattr(os, name, function)


@pytest.fixture(scope="module")
def writes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """How many renames and syncs a run has."""
    folder, found = tmp_path_factory.mktemp("count"), dict[str, int]()
    for name in ("replace", "fsync"):
        with pytest.MonkeyPatch.context() as patch:
            counter = crashing(patch, name, -1)
            run_here(tiny(folder, "checkpoint.every=2"), folder / name)
            found[name] = counter()
    return found


# config, plan, three rounds of the timeline, two checkpoints of two renames each, timeline, trace, summary; and a sync
# before each but the folders', one more after each of the timeline's, and three rounds.
WRITES = {"replace": 12, "fsync": 22}


def test_the_list_of_writes_is_complete(writes: dict[str, int]) -> None:
    assert writes == WRITES


# Every rename, and the sync of the first round's line; the other syncs fall between two renames.
POINTS = [
    pytest.param(name, at, marks=[] if name == "replace" or at == 4 else [pytest.mark.slow])
    for name, count in WRITES.items()
    for at in range(count)
]


@pytest.mark.parametrize(("name", "at"), POINTS)
def test_a_crash_at_any_write(
    tmp_path: Path, reference: Computed, monkeypatch: pytest.MonkeyPatch, name: str, at: int
) -> None:
    config, path = tiny(tmp_path, "checkpoint.every=2"), tmp_path / "run"
    with monkeypatch.context() as patch:
        crashing(patch, name, at)
        with pytest.raises(Crash):
            run_here(config, path)
    begun = (path / "config.yaml").exists()
    assert begun == (at > 0)
    if not begun:
        with pytest.raises(UserError, match="no run folder"):
            RunFolder(path).config()
    run_here(config, path, resume=begun)
    assert left(path) == reference


@pytest.mark.parametrize(
    ("name", "at"),
    [point for point in POINTS if point.values[1] in (1, 2, 5, 6, 7) or point.marks],  # type: ignore[union-attr]
)
def test_a_full_disk_at_any_write(
    tmp_path: Path, reference: Computed, monkeypatch: pytest.MonkeyPatch, name: str, at: int
) -> None:
    """One line, nothing half-written, and the rounds that were complete are still there."""
    config, path = tiny(tmp_path, "checkpoint.every=2"), tmp_path / "run"
    with monkeypatch.context() as patch:
        filling(patch, name, at)
        with pytest.raises((UserError, RunError), match="No space left on device") as caught:
            run_here(config, path)
    assert "\n" not in str(caught.value)
    assert [file.name for file in path.rglob(".*") if file.name != ".lock"] == []
    run_here(config, path, resume=(path / "config.yaml").exists())
    assert left(path) == reference


def test_a_run_may_be_resumed_again_and_again(tmp_path: Path, reference: Computed) -> None:
    path = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        crashing(patch, "fsync", 4)  # the first round's line
        with pytest.raises(Crash):
            run_here(tiny(tmp_path), path)
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            crashing(patch, "fsync", 6)
            with pytest.raises(Crash):
                run_here(tiny(tmp_path), path, resume=True)
    run_here(tiny(tmp_path), path, resume=True)
    assert left(path) == reference

"""``cluster-fl replay``: the recorded times again under their own policy, and another one's by brute force."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster_fl.records import RunFolder
from cluster_fl.replay import UNKNOWN, Replay, prepare
from cluster_fl.timing import timeline
from cluster_fl.timing.attempts import Attempts, Fate
from cluster_fl.timing.policies import Step
from tests.ops.test_cli import Shell
from tests.tiny import lines, run_here, tiny

ROUNDS = 5
# Participants take 0.05 to 0.3 s; some are lost, some rounds begin before anybody is there, some clients pause.
DISTURBED = (
    f"rounds={ROUNDS}",
    "time.stragglers.name=lognormal",
    "time.dropout=0.15",
    "time.load.shares=[0,0.5]",
    "time.availability.source=markov",
    "time.availability.on_s=1",
    "time.availability.off_s=3",
)
POLICIES = {
    "wait": ("clients.count=30",),
    "scarce": ("clients.count=12", "time.availability.on_s=2", "time.availability.off_s=60"),
    "waits_long": ("clients.count=30", "time.policy.timeout_s=0.5"),
    "over_select": ("clients.count=30", "time.policy.name=over_select", "time.policy.factor=1.5"),
    "deadline": (
        "clients.count=30", "time.policy.name=deadline", "time.policy.deadline_s=0.1", "time.policy.min_share=0.5",
    ),
    "smaller": (
        "clients.count=30", "time.policy.name=deadline", "time.policy.deadline_s=0.1", "time.policy.late=smaller",
    ),
    "partial": (
        "clients.count=30", "time.policy.name=deadline", "time.policy.deadline_s=0.1", "time.policy.late=partial",
        "train.epochs=3",
    ),
    "tiers": ("clients.count=30", "time.policy.name=tiers", "time.policy.tiers=3"),
    "fedbuff": ("clients.count=30", "time.policy.name=fedbuff", "time.policy.buffer=3"),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the clock's runs are; each is made when it is asked for first."""
    folder = tmp_path_factory.mktemp("runs")

    class Made(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            run_here(tiny(folder, *DISTURBED, *POLICIES[name]), folder / name)
            self[name] = folder / name
            return self[name]

    return Made()


def replayed(path: Path, *words: str) -> tuple[Replay, list[Step]]:
    made = prepare(RunFolder(path), [f"time.policy.{word}" for word in words])
    return made, list(made.replayed())


def told(steps: Sequence[Step]) -> list[Any]:
    """All of some rounds, to the bit."""
    return [
        (
            step.round, step.begin, step.end, step.ended.fate.tolist(), step.ended.stop.tobytes(),
            {name: column.tobytes() for name, column in step.ended.attempts.columns().items()},
        )
        for step in steps
    ]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "fedbuff"])
def test_its_own_policy_gives_what_was_recorded(runs: dict[str, Path], name: str) -> None:
    made, steps = replayed(runs[name])
    assert told(steps) == told(made.steps)
    assert [step.end for step in steps] == [record["sim_time_s"] for record in lines(runs[name])]


def test_a_recorded_round_has_everything_that_is_to_be_replayed(runs: dict[str, Path]) -> None:
    """Or the other tests would pass without having tested it."""
    found = timeline.read(runs["wait"]).to_pylist()
    assert {row["fate"] for row in found} == {"merged", "lost"}
    assert any(row["start_s"] > row["round_begin_s"] for row in timeline.read(runs["scarce"]).to_pylist())
    assert any(row["paused_compute_s"] or row["paused_upload_s"] for row in found)


def test_without_a_deadline_it_is_waiting(runs: dict[str, Path]) -> None:
    made, steps = replayed(runs["wait"], "name=deadline", "deadline_s=inf")
    assert told(steps) == told(made.steps)


def test_over_selection_by_1_is_waiting(runs: dict[str, Path]) -> None:
    made, steps = replayed(runs["wait"], "name=over_select", "factor=1")
    assert told(steps) == told(made.steps)


def by_hand(asked: Attempts, begin: float, wanted: int, deadline: float) -> tuple[float, dict[int, Fate]]:
    """One client after the other: when the round ends and how each does; lost clients are given up at once."""
    arrivals = sorted(
        (float(finish), int(client))
        for client, finish, lost in zip(asked.client, asked.finish, asked.lost, strict=True)
        if finish < lost
    )
    if len(arrivals) >= wanted:
        end = arrivals[wanted - 1][0]
    else:
        end = max(min(float(f), float(lost)) for f, lost in zip(asked.finish, asked.lost, strict=True))
    end = min(end, begin + deadline)
    counted = {client for finish, client in arrivals[:wanted] if finish <= end}
    fates = {}
    for client, finish, lost in zip(asked.client.tolist(), asked.finish, asked.lost, strict=True):
        gone = lost <= finish and lost <= end
        fates[client] = Fate.MERGED if client in counted else Fate.LOST if gone else Fate.LATE
    return end, fates


@pytest.mark.parametrize("recorded", ["wait", "scarce", "over_select", "tiers"])
@pytest.mark.parametrize(
    ("words", "factor", "deadline"),
    [
        (("name=wait",), 1.0, np.inf),
        (("name=deadline", "deadline_s=0.08"), 1.0, 0.08),
        (("name=over_select", "factor=1.2"), 1.2, np.inf),
        (("name=over_select", "factor=2"), 2.0, np.inf),
    ],
    ids=str,
)
def test_another_policy_by_brute_force(
    runs: dict[str, Path], recorded: str, words: tuple[str, ...], factor: float, deadline: float
) -> None:
    made, steps = replayed(runs[recorded], *words)
    asked = 9 if recorded == "over_select" else 6
    wanted = max(count for count in range(1, asked + 1) if int(np.ceil(round(factor * count, 9))) <= asked)
    now = 0.0
    for step, before in zip(steps, made.steps, strict=True):
        old = before.ended.attempts
        start = now + (float(old.start[0]) - before.begin)
        moved = {name: getattr(old, name) - old.start[0] + start for name in timeline.TIMES}
        shifted = Attempts(**(old.columns() | moved))
        end, fates = by_hand(shifted, start, wanted, deadline)
        assert step.begin == now
        assert step.end == pytest.approx(end, abs=1e-9)
        own = step.ended.attempts
        assert dict(zip(own.client.tolist(), step.ended.fate.tolist(), strict=True)) == fates
        assert own.start == pytest.approx(start)
        for name in ("finish", "computed", "downloaded"):
            took, take = getattr(old, name) - old.start, getattr(own, name) - own.start
            assert take == pytest.approx(took, abs=1e-9)
        now = step.end


@pytest.mark.parametrize("late", ["smaller", "partial"])
def test_what_clients_do_less_is_computed_anew(runs: dict[str, Path], tmp_path: Path, late: str) -> None:
    """Against a real run under that policy, whose first round asks the same clients at the same time."""
    words = ("name=deadline", "deadline_s=0.1", f"late={late}")
    made, steps = replayed(runs["wait"], *words)
    assert "anew" in " ".join(made.notes)
    config = tiny(
        tmp_path, *DISTURBED, *POLICIES["wait"], *(f"time.policy.{word}" for word in words), "rounds=1"
    )
    run_here(config, tmp_path / "run")
    (first, _), *_ = timeline.steps(timeline.read(tmp_path / "run"))
    assert told(steps[:1]) == told([first])
    for step, before in zip(steps, made.steps, strict=True):
        assert step.ended.attempts.client.tolist() == before.ended.attempts.client.tolist()
        assert (step.ended.attempts.level <= before.ended.attempts.level).all()


def test_a_run_that_is_not_finished(runs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(runs["wait"], path)
    made = timeline.Timeline(path)
    made.rewind(3)
    _, steps = replayed(path)
    assert [step.end for step in steps] == [record["sim_time_s"] for record in lines(path)[:3]]


# The command.


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path, capsys)


def test_the_document(shell: Shell, runs: dict[str, Path]) -> None:
    words = ("time.policy.name=deadline", "time.policy.deadline_s=0.08")
    before = {path: path.read_bytes() for path in runs["wait"].rglob("*") if path.is_file()}
    code, out, err = shell("replay", str(runs["wait"]), *words, "--json")
    assert (code, err) == (0, "")
    assert {path: path.read_bytes() for path in runs["wait"].rglob("*") if path.is_file()} == before
    found = json.loads(out)
    assert found["unknown"] == UNKNOWN
    assert "accuracy" in UNKNOWN
    recorded, other = found["recorded"], found["replayed"]
    records = lines(runs["wait"])
    assert (recorded["policy"], other["policy"]) == ("wait", "deadline")
    assert recorded["sim_time_s"] == records[-1]["sim_time_s"] > other["sim_time_s"]
    assert recorded["bytes_up"] == sum(record["bytes_up"] for record in records)
    fates = [one["fate"] for record in records for one in record["participants"]]
    assert recorded["fates"] == {fate.name.lower(): fates.count(fate.name.lower()) for fate in Fate}
    assert sum(other["fates"].values()) == len(fates)
    assert other["fates"]["late"] > 0
    assert other["waste"]["seconds"] > recorded["waste"]["seconds"]
    assert len(other["levels"]) == 3


def test_the_table_says_the_same(shell: Shell, runs: dict[str, Path]) -> None:
    words = ("time.policy.name=over_select", "time.policy.factor=1.5")
    found = json.loads(shell("replay", str(runs["wait"]), *words, "--json")[1])
    code, out, err = shell("replay", str(runs["wait"]), *words)
    assert (code, err) == (0, "")
    for one in (found["recorded"], found["replayed"]):
        row = next(line for line in out.splitlines() if f" {one['policy']} " in line)
        assert str(one["fates"]["merged"]) in row.split()
        assert str(one["fates"]["late"]) in row.split()
    assert UNKNOWN in out
    assert "the first 4 count" in out
    assert shell("replay", str(runs["wait"]), *words, "--quiet") == (0, "", "")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["rounds=3"], ["rounds=3", "time.policy.*"]),
        (["time.dropout=0"], ["time.dropout=0", "time.policy.*"]),
        (["time.policy=semi_sync"], ["time.policy=semi_sync", "synchronous"]),
        (["time.policy={name: fedbuff}"], ["time.policy.name=fedbuff", "synchronous"]),
        (["nothing"], ["nothing"]),
        (["time.policy.name=fedbuff"], ["time.policy.name=fedbuff", "synchronous"]),
        (["time.policy.name=semi_sync"], ["time.policy.name=semi_sync", "synchronous"]),
        (["time.policy.name=tiers"], ["time.policy.name=tiers", "other clients"]),
        (["time.policy.name=fastest"], ["time.policy.name=fastest"]),
        (["time.policy.name=deadline"], ["time.policy.deadline_s=None"]),
        (["time.policy.nam=wait"], ["time.policy.nam=wait", "time.policy.name"]),
    ],
)
def test_a_mistake_is_one_line(
    shell: Shell, runs: dict[str, Path], words: list[str], told: list[str]
) -> None:
    line = shell.refuses("replay", str(runs["wait"]), *words)
    assert all(part in line for part in told), line


def test_an_asynchronous_run_has_no_rounds_to_replay(shell: Shell, runs: dict[str, Path]) -> None:
    line = shell.refuses("replay", str(runs["fedbuff"]), "time.policy.name=wait")
    assert f"RUN_DIR={runs['fedbuff']}" in line


def test_a_folder_without_a_timeline(shell: Shell, runs: dict[str, Path]) -> None:
    path = shell.folder / "run"
    shutil.copytree(runs["wait"], path)
    (path / "timeline.parquet").unlink()
    assert "no timeline" in shell.refuses("replay", str(path))
    assert "no run folder" in shell.refuses("replay", str(shell.folder))


def test_a_damaged_timeline_is_a_failure(shell: Shell, runs: dict[str, Path]) -> None:
    path = shell.folder / "run"
    shutil.copytree(runs["wait"], path)
    (path / "timeline.parquet").write_bytes(b"PAR1")
    code, out, err = shell("replay", str(path))
    assert (code, out, err.count("\n")) == (1, "", 1)


def test_help_has_an_example(shell: Shell) -> None:
    code, out, _ = shell("replay", "--help")
    assert code == 0
    assert "example: cluster-fl replay runs/quickstart" in " ".join(out.split())

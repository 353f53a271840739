"""Sweeps with Ray Tune: killed and gone on with, population based, proposed by Optuna, and what goes wrong in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster_fl.compose import compose, fingerprint
from cluster_fl.records import RunFolder
from ops.sweeping.ledger import DONE
from ops.tracking.history import METRICS, History
from tests.conftest import CONFIGS
from tests.ops.tracking.following import KEY, WANDB
from tests.ops.tracking.readers import Told, is_closed, wandb_folders, wandb_told
from tests.processes import Command
from tests.tiny import TINY, lines, timeless

# A sweep starts many processes.
DEADLINE_S = 1800.0
SECTION = """
sweep:
  space: {{train.lr: {space}}}
  search: {search}
  scheduler: {scheduler}
"""


def sweep_file(folder: Path, space: str, search: str = "{trials: 3}", scheduler: str = "none") -> Path:
    file = folder / "small.yaml"
    file.write_text(TINY + SECTION.format(space=space, search=search, scheduler=scheduler))
    return file


def content(path: Path) -> dict[str, Any]:
    """sweep.json; nothing if it is not there yet."""
    file = path / "sweep.json"
    return json.loads(file.read_text()) if file.exists() else {"trials": []}


def states(path: Path) -> list[str]:
    return [row["state"] for row in content(path)["trials"]]


def closed(path: Path) -> set[str]:
    """The trials that are done and whose W&B file has its end."""
    done = [row for row in content(path)["trials"] if row["state"] in DONE]
    files = {row["trial"]: wandb_folders(path / row["folder"]) for row in done}
    return {trial for trial, folders in files.items() if folders and is_closed(folders[-1])}


def run(folder: Path, file: Path, *words: str) -> Command:
    words = ("sweep", str(file), f"run.root={folder}", *words)
    return Command(words, folder, environment={"WANDB_API_KEY": KEY})


def finished(folder: Path, file: Path, *words: str) -> tuple[str, str]:
    """stdout and stderr of a sweep that runs to its end."""
    with run(folder, file, *words) as command:
        assert command.wait(DEADLINE_S) == 0, command.err
        return command.out, command.err


def check_rounds(path: Path, row: dict[str, Any]) -> None:
    """The folder of a trial is a whole run, or the beginning of one, and the table says what it says."""
    folder = RunFolder(path / row["folder"])
    records = lines(folder.path)
    assert [record["round"] for record in records] == list(range(len(records)))
    assert row["rounds"] == len(records)
    assert row["value"] == records[-1]["accuracy"]["global"]["last_exit"]
    assert (folder.summary() is not None) == (row["state"] == "finished")


def check_tracked(told: Told, path: Path, row: dict[str, Any]) -> None:
    """The W&B file of a trial is its run folder's."""
    folder, history = RunFolder(path / row["folder"]), History()
    rows = [history.row(record) for record in folder.rounds()]
    summary = folder.summary()
    rows += [] if summary is None else [history.last(summary)]
    assert len(told.rows) == len(rows)
    for one, right in zip(told.rows, rows, strict=True):
        assert {name: one[name] for name in right} == pytest.approx(right)
    assert (told.run.run_group, told.run.display_name) == (path.name, row["trial"])
    assert told.config["train"]["lr"] == row["settings"]["train.lr"]
    assert {name: step for name, (step, _) in told.metrics.items()} == {
        metric.name: metric.step or "" for metric in METRICS
    }
    assert "plan/path" in told.rows[0]


@pytest.mark.slow
def test_asha_killed_and_gone_on_with(tmp_path: Path) -> None:
    """configs/sweep/lr_asha.yaml as it stands. What was done before the kill is not done again."""
    file, path = CONFIGS / "sweep" / "lr_asha.yaml", tmp_path / "lr_asha"
    with run(tmp_path, file, *WANDB) as command:
        command.await_(lambda: len(closed(path)) >= 2, DEADLINE_S)
        told = closed(path)
        command.kill()
        assert command.tree() == []
    # What Ray Tune keeps is still there, and no key is in it.
    assert (path / ".tune").exists()
    assert not [one for one in path.rglob("*") if one.is_file() and KEY.encode() in one.read_bytes()]
    before = {row["trial"]: row for row in content(path)["trials"]}
    assert "waiting" in states(path), "it was killed in the middle"
    records = {
        trial: lines(path / trial)
        for trial, row in before.items()
        if (path / trial / "rounds.jsonl").exists()
    }

    out, err = finished(tmp_path, file, *WANDB, "--resume")
    after = content(path)
    assert after["complete"]
    assert len(after["trials"]) == 12
    assert set(states(path)) == set(DONE), err
    for row in after["trials"]:
        old = before[row["trial"]]
        assert row["settings"] == old["settings"]
        if old["state"] in DONE:
            assert row == old
        # What was on disk is still there as it was.
        known = records.get(row["trial"], [])
        assert timeless(lines(path / row["folder"]))[: len(known)] == timeless(known)
        check_rounds(path, row)
        # The kill may have come between the end of a trial and that of its W&B file.
        if row["trial"] in told or old["state"] not in DONE:
            (tracked,) = wandb_folders(path / row["folder"])
            check_tracked(wandb_told(tracked), path, row)

    best = max((row for row in after["trials"] if row["state"] == "finished"), key=lambda row: row["value"])
    assert after["best"]["settings"] == best["settings"]
    config = compose([path / "best.yaml"])
    assert fingerprint(config) == fingerprint(RunFolder(path / best["folder"]).config())
    assert all(row["trial"] in out for row in after["trials"])
    assert f"{best['trial']} *" in out
    assert not (path / ".tune").exists()

    told_again, _ = finished(tmp_path, file, *WANDB, "--json")
    assert json.loads(told_again) == after  # nothing was left to do


@pytest.mark.slow
def test_population_based(tmp_path: Path) -> None:
    """A trial that goes on from another's weights is a run of its own, which began as the other one did."""
    file = sweep_file(
        tmp_path, "{log: [0.0001, 1.0]}", "{trials: 4}", "{name: pbt, interval: 2, quantile: 0.5}"
    )
    finished(
        tmp_path, file, "rounds=6", "evaluate.every=1", "sweep.concurrent=4", "cluster.cpus_per_pool=0.5"
    )
    path = tmp_path / "small"
    rows = content(path)["trials"]
    assert {row["state"] for row in rows} == {"finished"}
    forked = [row for row in rows if row["changes"]]
    assert forked
    for row in rows:
        check_rounds(path, row)
        config = yaml.safe_load((path / row["folder"] / "config.yaml").read_text())
        assert config["train"]["lr"] == row["settings"]["train.lr"]
    for row in forked:
        change = row["changes"][-1]
        assert change["folder"] == row["folder"]
        donors = [
            lines(one.parent)[: change["rounds"]] for one in path.glob(f"{change['trial']}*/rounds.jsonl")
        ]
        assert lines(path / row["folder"])[: change["rounds"]] in donors


@pytest.mark.slow
def test_optuna_goes_on_after_ctrl_c(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    file = sweep_file(tmp_path, "{log: [0.001, 1.0]}", "{name: optuna, trials: 4}")
    path = tmp_path / "small"
    with run(tmp_path, file, "rounds=2", "sweep.concurrent=1") as command:
        command.await_(lambda: states(path).count("finished") == 2, DEADLINE_S)
        command.interrupt()
        assert command.wait(DEADLINE_S) == 130
        assert "2 of 4 trials" in command.err
        assert "--resume" in command.err
    before = content(path)["trials"]
    finished(tmp_path, file, "rounds=2", "sweep.concurrent=1", "--resume")
    rows = content(path)["trials"]
    assert states(path) == ["finished"] * 4
    assert [row["point"] for row in rows[: len(before)]] == [row["point"] for row in before]
    assert len({row["settings"]["train.lr"] for row in rows}) == 4


@pytest.mark.slow
def test_a_trial_that_fails_does_not_end_the_sweep(tmp_path: Path) -> None:
    """Not every method has the accuracy that decides."""
    file = tmp_path / "small.yaml"
    file.write_text(TINY + "sweep: {space: {method: {grid: [decoupled, scalefl]}}, metric: global}\n")
    with run(tmp_path, file, "rounds=2", "levels.pairs=[{width: 0.5},{width: 1.0}]") as command:
        assert command.wait(DEADLINE_S) == 1
        assert "trial-00: decoupled has no global to choose by (sweep.metric)." in command.err
        assert "trial-01 *" in command.out
    assert states(tmp_path / "small") == ["failed", "finished"]

"""Weights & Biases, offline: a run's file holds the whole run, and the run never depends on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cluster_fl.records import RunFolder
from ops.tracking.history import BEST, METRICS, History
from ops.tracking.identity import Identity
from tests.ops.test_cli import Shell, shell  # noqa: F401
from tests.ops.tracking.following import WANDB, follow
from tests.ops.tracking.readers import Told, wandb_folders, wandb_told
from tests.tiny import LEVELS, lines, outcome, run_here, tiny


def expected(path: Path) -> list[dict[str, float]]:
    """The run folder's rows."""
    history = History()
    rows = [history.row(record) for record in lines(path)]
    summary = RunFolder(path).summary()
    return rows if summary is None else [*rows, history.last(summary)]


def check_rows(told: Told, path: Path) -> None:
    rows = expected(path)
    assert [row["_step"] for row in told.rows] == list(range(len(rows)))
    for row, right in zip(told.rows, rows, strict=True):
        assert {name: row[name] for name in right} == pytest.approx(right)


def test_the_file_is_the_run(tracked: Path) -> None:
    (folder,) = wandb_folders(tracked)
    told = wandb_told(folder)
    check_rows(told, tracked)
    assert told.exit_code == 0
    assert (told.run.project, told.run.run_group, told.run.display_name) == ("cluster-fl", "trio", "run")
    assert list(told.run.tags) == ["red", "blue"]
    assert told.config["levels"]["pairs"][0]["width"] == 0.5
    steps = {metric.name: metric.step or "" for metric in METRICS}
    assert {name: step for name, (step, _) in told.metrics.items()} == steps
    assert told.metrics["accuracy/*"] == ("round", BEST.split(","))


def test_the_plan_is_a_table(tracked: Path) -> None:
    (folder,) = wandb_folders(tracked)
    (file,) = (folder / "files" / "media" / "table").glob("plan_*.table.json")
    table = json.loads(file.read_text())
    levels = RunFolder(tracked).plan()["levels"]
    assert len(table["data"]) == LEVELS
    for row, level in zip(table["data"], levels, strict=True):
        cells = dict(zip(table["columns"], row, strict=True))
        assert cells["exits"] == " ".join(map(str, level["exits"]))
        assert (cells["params"], cells["clients"]) == (level["params"], level["clients"])


def test_pictures(tracked: Path) -> None:
    (folder,) = wandb_folders(tracked)
    rows = wandb_told(folder).rows
    assert ["classes/path" in row for row in rows] == [True, False, False, False]
    assert ["timeline/path" in row for row in rows] == [True, True, True, False]
    for row in rows:
        for name in {"classes/path", "timeline/path"} & row.keys():
            assert (folder / "files" / row[name]).read_bytes().startswith(b"\x89PNG")


def test_checkpoints_are_artifacts_if_asked_for(tracked: Path) -> None:
    (folder,) = wandb_folders(tracked)
    kept = [one for one in wandb_told(folder).artifacts if one.type == "checkpoint"]
    assert [set(one.aliases) for one in kept] == [{"latest", f"round-{n}"} for n in (1, 2, 3)]
    assert {entry.path for entry in kept[-1].manifest.contents} >= {
        "config.yaml",
        "rounds.jsonl",
        "checkpoints/round-00003/state.safetensors",
    }


def test_tracking_changes_no_bit(tracked: Path, tmp_path: Path) -> None:
    run_here(tiny(tmp_path), tmp_path / "untracked")
    assert outcome(tracked) == outcome(tmp_path / "untracked")


def test_a_resumed_run_is_the_same_run_and_tells_every_round_once(tmp_path: Path) -> None:
    """Round 2 is cut back and trained again. The second file takes the first one's place, unless that was sent."""
    path, config = tmp_path / "run", tiny(tmp_path, *WANDB, "rounds=4", "checkpoint.every=2")
    follow(config, path, rounds=3)
    (folder,) = wandb_folders(path)
    first = wandb_told(folder)
    assert [row["_step"] for row in first.rows] == [0, 1, 2]
    assert first.exit_code == 1  # it did not finish
    sent = tmp_path / "sent"
    shutil.copytree(path, sent)

    follow(config, path, resume=True)
    (folder,) = wandb_folders(path)
    second = wandb_told(folder)
    assert first.run.run_id == second.run.run_id == Identity.of(path).id
    check_rows(second, path)
    assert second.exit_code == 0
    assert "classes/path" in second.rows[0]

    (folder,) = wandb_folders(sent)
    (folder / f"run-{first.run.run_id}.wandb.synced").touch()  # as `wandb sync` does
    follow(config, sent, resume=True)
    assert [[row["_step"] for row in wandb_told(one).rows] for one in wandb_folders(sent)] == [
        [0, 1, 2],
        [3, 4],
    ]


def test_a_run_may_begin_to_be_tracked_in_its_middle(tmp_path: Path) -> None:
    path = tmp_path / "run"
    follow(tiny(tmp_path, "rounds=4"), path, rounds=2)
    assert not (path / "tracking.json").exists()
    follow(tiny(tmp_path, *WANDB, "rounds=4"), path, resume=True)
    check_rows(wandb_told(*wandb_folders(path)), path)


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    follow(tiny(tmp_path, "tracking=wandb", "tracking.mode=disabled", "rounds=1"), tmp_path / "run")
    assert not {"wandb", "tracking.json"} & {file.name for file in (tmp_path / "run").iterdir()}


def test_without_a_key_the_run_is_written_offline(
    shell: Shell,  # noqa: F811
) -> None:
    code, out, err = shell.run("tracking=wandb", "rounds=1", "--quiet")
    path = shell.root / "run"
    (folder,) = [folder for folder in wandb_folders(path) if folder.name.startswith("offline")]
    assert (code, out, err.count("\n")) == (0, "", 1), err
    assert "API key" in err
    assert f" {folder}`" in err
    check_rows(wandb_told(folder), path)

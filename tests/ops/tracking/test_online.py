"""A server that answers, one that does not, and the key, which is nowhere but in the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ops.tracking.following import KEY
from tests.ops.tracking.readers import wandb_folders, wandb_told
from tests.ops.tracking.test_wandb import check_rows, expected
from tests.ops.tracking.wandb_server import ENTITY, WandbServer
from tests.processes import Command, line_count
from tests.tiny import write_tiny

SETTINGS = ("rounds=4", "train.epochs=3", "checkpoint.every=9", "tracking=wandb", "--quiet", "--debug")


def words(folder: Path) -> list[str]:
    return ["run", str(write_tiny(folder)), *SETTINGS, f"run.root={folder}", "run.name=run"]


def key_is_nowhere(folder: Path) -> None:
    holders = [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert holders == []


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # this process's own W&B is none of the command's


def test_a_resumed_run_goes_on_in_the_same_wandb_run(
    tmp_path: Path, key: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        with Command(words(tmp_path), tmp_path) as command:
            command.await_(lambda: line_count(path / "rounds.jsonl") >= 2)
            command.interrupt()
            assert command.wait() == 130, command.err
        (run,) = server.history
        begun = len(server.history[run])
        assert 1 <= begun < 4
        with Command(["resume", str(path), "--debug", "--quiet"], tmp_path) as command:
            assert command.wait() == 0, command.err
        assert list(server.history) == [run]
        rows, right = server.history[run], expected(path)
    assert [row["_step"] for row in rows] == [0, 1, 2, 3, 4]
    for row, wanted in zip(rows, right, strict=True):
        name = "train/loss" if "train/loss" in wanted else "test/global"
        assert row[name] == pytest.approx(wanted[name])
    key_is_nowhere(tmp_path)


def test_a_server_that_is_not_there(tmp_path: Path, key: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    with Command(words(tmp_path), tmp_path) as command:
        assert command.wait() == 0
        assert (command.out, command.err.count("\n")) == ("", 1), command.err
        (folder,) = [one for one in wandb_folders(tmp_path / "run") if one.name.startswith("offline")]
        assert f"`wandb sync {folder}`" in command.err
    check_rows(wandb_told(folder), tmp_path / "run")
    key_is_nowhere(tmp_path)


def test_the_dashboard_is_saved(tmp_path: Path, key: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        with Command(["dashboard", "tracking.project=mine"], tmp_path) as command:
            assert command.wait() == 0, command.err
            assert command.out.startswith(f"{server.url}/{ENTITY}/mine?nw="), command.out
        (view,) = server.views
    assert (view["entityName"], view["projectName"]) == (ENTITY, "mine")

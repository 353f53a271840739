"""Tracking from the command line: mistakes come before anything starts, comparisons are groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ops.cli import main
from tests.ops.test_cli import Shell, shell  # noqa: F401
from tests.ops.test_compare import ORDER, words
from tests.ops.tracking.following import WANDB, follow
from tests.ops.tracking.readers import wandb_folders, wandb_told
from tests.tiny import tiny


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("tracking=wandbb", "Did you mean wandb?"),
        ("tracking.mode=off", "offline"),
        ("tracking.project=a/b", "plain name"),
        ("tracking.project=' '", "1 to 128"),
        ("tracking.entity=a:b", "plain name"),
        (f"tracking.group={'g' * 129}", "1 to 128"),
        (f"tracking.tags=[fine,{'t' * 65}]", "1 to 64"),
    ],
)
def test_a_mistake_is_one_line(shell: Shell, word: str, told: str) -> None:  # noqa: F811
    assert told in shell.refuses_run(word)


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_package_that_is_not_installed(
    shell: Shell,  # noqa: F811
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("ops.tracking").tracking.PACKAGES, name, "no_such_package")
    line = shell.refuses_run(f"tracking={name}")
    assert f"tracking.name={name}" in line
    assert "pip install" in line


def test_a_comparison_is_a_group(tmp_path: Path) -> None:
    assert main(words(tmp_path, *WANDB, "--quiet")) == 0
    runs = []
    for job in ORDER:
        (folder,) = wandb_folders(tmp_path / "runs" / "both" / job)
        runs.append(wandb_told(folder).run)
    assert {run.run_group for run in runs} == {"both"}
    names = ["scalefl seed 0", "Plain, slower | x seed 0", "scalefl seed 3", "Plain, slower | x seed 3"]
    assert [run.display_name for run in runs] == names
    assert len({run.run_id for run in runs}) == 4


def test_resume_may_turn_it_on(shell: Shell) -> None:  # noqa: F811
    path = shell.root / "run"
    follow(tiny(shell.folder, f"run.root={shell.root}", "run.name=run"), path, rounds=1)
    before = yaml.safe_load((path / "config.yaml").read_text())["tracking"]
    assert shell("resume", str(path), "--debug", "--quiet", "tracking=tensorboard") == (0, "", "")
    assert list((path / "tensorboard").iterdir())
    assert before["name"] == "none"

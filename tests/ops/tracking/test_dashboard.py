"""The dashboard's definition is made without a network, and plots only what runs log."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ops.tracking.history import METRICS
from tests.ops.test_cli import Shell, shell  # noqa: F401
from tests.ops.tracking.readers import wandb_folders, wandb_told


@pytest.fixture
def made(shell: Shell) -> dict[str, Any]:  # noqa: F811
    before = shell.files()
    code, out, err = shell("dashboard", "tracking.project=mine", "tracking.entity=me", "--json")
    assert (code, err) == (0, "")
    assert shell.files() == before
    content: dict[str, Any] = json.loads(out)
    return content


def panels(made: dict[str, Any]) -> list[dict[str, Any]]:
    sections = made["spec"]["section"]["panelBankConfig"]["sections"]
    return [panel for section in sections for panel in section["panels"]]


def plotted(made: dict[str, Any]) -> Iterator[str]:
    """A regular expression for each thing that a panel shows."""
    for panel in panels(made):
        config = panel["config"]
        names = [*config.get("metrics", ()), *([config["xAxis"]] if "xAxis" in config else ())]
        names += [f"{key}/path" for key in config.get("mediaKeys", ())]
        yield from map(re.escape, names)
        if "metricRegex" in config:
            yield config["metricRegex"]
        if panel["viewType"] == "Weave":
            table = re.findall(
                r'"key": {"nodeType": "const", "type": "string", "val": "(\w+)"', json.dumps(config)
            )
            assert len(table) == 1
            yield f"{table[0]}/path"


def test_all_that_it_plots_is_in_a_runs_history(made: dict[str, Any], tracked: Path) -> None:
    (folder,) = wandb_folders(tracked)
    logged = {name for row in wandb_told(folder).rows for name in row}
    wanted = list(plotted(made))
    assert len(wanted) > 40
    assert [one for one in wanted if not any(re.fullmatch(one, name) for name in logged)] == []


def test_it_plots_all_that_runs_log(made: dict[str, Any], tracked: Path) -> None:
    """Some metric of every kind, besides what only the exits' means and ensembles have."""
    (folder,) = wandb_folders(tracked)
    logged = {name for row in wandb_told(folder).rows for name in row}
    seen = {name for name in logged if any(re.fullmatch(one, name) for one in plotted(made))}
    unseen = [metric.name for metric in METRICS if not any(map(metric.covers, seen))]
    assert unseen == ["ensemble/*", "test_exit_mean/*", "test_ensemble/*"]


def test_columns_are_in_a_run(made: dict[str, Any], tracked: Path) -> None:
    (folder,) = wandb_folders(tracked)
    told = wandb_told(folder)
    logged = {f"summary:{name}" for row in told.rows for name in row}
    known = {"run:displayName"} | {f"config:{name}.value" for name in told.config} | logged
    assert set(made["spec"]["section"]["runSets"][0]["runFeed"]["columnOrder"]) <= known


def test_whose_it_is(made: dict[str, Any]) -> None:
    assert (made["entity"], made["project"], made["displayName"]) == ("me", "mine", "cluster-fl")
    assert made["spec"]["section"]["runSets"][0]["filters"]["filters"] == []


def test_one_group_alone(shell: Shell) -> None:  # noqa: F811
    _, out, _ = shell("dashboard", "tracking.group=digits", "--json")
    made = json.loads(out)
    (only,) = made["spec"]["section"]["runSets"][0]["filters"]["filters"]
    assert (only["key"]["name"], only["op"], only["value"]) == ("group", "=", "digits")
    assert made["displayName"] == "cluster-fl: digits"


def test_without_a_key_it_cannot_be_saved(shell: Shell) -> None:  # noqa: F811
    line = shell.refuses("dashboard")
    assert "wandb login" in line
    assert "--json" in line


def test_without_its_package(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("ops.tracking.dashboard.PACKAGE", "no_such_package")
    assert "cluster-fl[tracking]" in shell.refuses("dashboard", "--json")

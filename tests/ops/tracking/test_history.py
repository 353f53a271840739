"""Every number has one name with a meaning, and is the record's."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster_fl.records import RunFolder
from cluster_fl.timing.attempts import Fate
from ops.tracking.history import METRICS, History
from tests.tiny import LEVELS, lines, run_here, tiny

ASYNC = ("time.policy=fedbuff", "time.policy.buffer=3", "time.stragglers=lognormal", "rounds=4")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An asynchronous run: staleness, and attempts that cross rounds."""
    folder = tmp_path_factory.mktemp("history")
    run_here(tiny(folder, *ASYNC), folder / "run")
    return folder / "run"


def test_every_name_is_one_metrics(path: Path) -> None:
    history = History()
    rows = [history.row(record) for record in lines(path)]
    rows.append(history.last(RunFolder(path).summary() or {}))
    names = {name for row in rows for name in row}
    assert {name: sum(metric.covers(name) for metric in METRICS) for name in names} == dict.fromkeys(names, 1)
    unused = [metric.name for metric in METRICS if not any(map(metric.covers, names))]
    assert unused == ["ensemble/*", "test_ensemble/*"]  # no exits' ensemble in this method
    axes = {metric.name for metric in METRICS if metric.step is None}
    assert {metric.step for metric in METRICS} <= {*axes, None}


def test_a_row_is_its_record(path: Path) -> None:
    history, total, before = History(), 0, 0.0
    for record in lines(path):
        row = history.row(record)
        total += record["bytes_down"] + record["bytes_up"]
        assert (row["round"], row["sim_time_s"]) == (record["round"], record["sim_time_s"])
        assert row["bytes/total"] == total
        assert row["time/round_s"] == record["sim_time_s"] - before
        fates = [one["fate"] for one in record["participants"]]
        assert row["clients/ended"] == len(fates) == sum(row[f"clients/{f.name.lower()}"] for f in Fate)
        merged = [one for one in record["participants"] if one["fate"] == "merged"]
        waited = [record["round"] - one["version"] for one in merged]
        assert row["clients/staleness"] == pytest.approx(sum(waited) / len(waited))
        assert row["train/loss"] == record["train_loss"]
        before = record["sim_time_s"]
    assert total == (RunFolder(path).summary() or {})["bytes"]


def test_accuracies_by_model(path: Path) -> None:
    block, history = lines(path)[1]["accuracy"], History()
    row = [history.row(record) for record in lines(path)][1]
    assert row["accuracy/global"] == block["global"]["last_exit"]
    assert row["exit_mean/worst"] == block["worst"]["exit_mean"]
    for level in range(1, LEVELS + 1):
        assert row[f"accuracy/level_{level}"] == block["levels"][level - 1]["last_exit"]
    assert "accuracy/personal" not in row
    assert not any(name.startswith("accuracy/") for name in History().row(lines(path)[0]))


def test_what_nobody_did_is_left_out() -> None:
    record = {
        "round": 0, "participants": [], "refused": [], "train_loss": None, "bytes_down": 0, "bytes_up": 0,
        "sim_time_s": 5.0, "retries": 0, "wall_time_s": 0.0,
        "wall": {"phases": {}, "pools": 1, "busy_s": 0.0, "tail_s": 0.0},
    }  # fmt: skip
    row = History().row(record)
    assert row["clients/ended"] == 0
    assert not {"train/loss", "clients/staleness", "time/client_mean_s", "wall/busy"} & row.keys()

"""Accuracy against simulated time, from records written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ops.curves import at, curve, main


def write(folder: Path, *rounds: tuple[float, float | None]) -> Path:
    folder.mkdir(parents=True)
    lines = []
    for hours, accuracy in rounds:
        record: dict[str, object] = {
            "sim_time_s": hours * 3600,
            "bytes_down": 2_000_000,
            "bytes_up": 1_000_000,
        }
        if accuracy is not None:
            record["accuracy"] = {"global": {"last_exit": accuracy, "exit_mean": 0.0}}
        lines.append(json.dumps(record) + "\n")
    (folder / "rounds.jsonl").write_text("".join(lines))
    return folder


def test_what_was_known_by_then() -> None:
    points = curve(
        [{"sim_time_s": 3600.0}, {"sim_time_s": 7200.0, "accuracy": {"global": {"last_exit": 0.5}}}], "global"
    )
    assert points == [(2.0, 0.5)]
    assert [at(points, hours) for hours in (1.9, 2.0, 9.0)] == [None, 0.5, 0.5]


def test_a_row_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "wait" / "b" / "seed-0", (1, 0.25), (2, None), (3, 0.5))
    write(tmp_path / "wait" / "a", (0.5, None))
    alone = write(tmp_path / "alone", (4, 0.75))
    assert main([str(tmp_path / "wait"), str(alone), "--hours", "0.5", "2", "4"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "| run | 0.5 h | 2 h | 4 h | hours in all | rounds | MB sent |"
    assert rows[2:] == [
        "| wait/a | - | - | - | 0.50 | 1 | 3 |",
        "| wait/b/seed-0 | - | 25.0 | 50.0 | 3.00 | 3 | 9 |",
        "| alone | - | - | 75.0 | 4.00 | 1 | 3 |",
    ]


def test_a_missing_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none"), "--hours", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1

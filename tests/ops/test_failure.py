"""A failure is one line and a report; what was complete stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from ops.cli import main
from tests.tiny import write_tiny


def test_a_failed_run_says_where_its_report_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        str(write_tiny(tmp_path)),
        "train.lr=1e30",
        "train.on_nan=stop",
        f"run.root={tmp_path}",
        "run.name=boom",
    ]
    assert main(["run", *words, "--debug", "--quiet"]) == 1
    told = capsys.readouterr()
    report = tmp_path / "boom" / "error.log"
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert "round 0: training diverged on client" in told.err
    assert str(report) in told.err
    assert "Traceback" in report.read_text()

"""``cluster-fl simulate``: one document, nothing written unless asked for, and one line for a mistake."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from cluster_fl import simulation
from cluster_fl.timing import timeline, trace
from tests.ops.test_cli import Shell
from tests.tiny import LEVELS

FAST = ("clients.count=40", "rounds=6", "time.dropout=0.1", "time.stragglers.name=lognormal")


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path, capsys)


def document(shell: Shell, *words: str) -> dict[str, Any]:
    code, out, err = shell("simulate", str(shell.file), *FAST, "--json", *words)
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def test_the_document(shell: Shell) -> None:
    before = shell.files()
    found = document(shell)
    assert shell.files() == before
    assert (found["method"], found["clients"], found["per_round"], found["notes"]) == ("scalefl", 40, 6, [])
    assert [level["level"] for level in found["plan"]] == [1, 2, 3]
    (policy,) = found["policies"]
    assert (policy["policy"], policy["rounds"], policy["attempts"], policy["under_way"]) == ("wait", 6, 36, 0)
    assert policy["staleness"] is None
    assert sum(policy["fates"].values()) == 36
    assert set(policy["round_s"]) == set(policy["needs_s"]) == {"mean", "p50", "p95", "max"}
    assert 0 < policy["utilisation"] < 1
    assert len(policy["levels"]) == LEVELS
    assert sum(level["region"]["params"] for level in policy["levels"]) == found["plan"][-1]["params"]
    for key in ("bytes_down", "bytes_up"):
        assert sum(level[key] for level in policy["levels"]) == policy[key]
    assert sum(level["clients"] for level in policy["levels"]) == policy["clients"]["count"] == 40


def test_several_policies(shell: Shell) -> None:
    words = ("time.policy.deadline_s=0.1", "time.policy.buffer=3", "--policies", "wait,deadline,fedbuff")
    found = {policy["policy"]: policy for policy in document(shell, *words)["policies"]}
    assert list(found) == ["wait", "deadline", "fedbuff"]
    assert found["wait"] == document(shell)["policies"][0]
    assert found["deadline"]["round_s"]["max"] <= 0.1 + 1e-9
    assert found["fedbuff"]["fates"]["merged"] == 18
    assert sum(found["fedbuff"]["staleness"]) == 18
    assert found["fedbuff"]["under_way"] > 0


def test_the_table_says_the_same(shell: Shell) -> None:
    words = ("time.policy.buffer=3", "--policies", "wait,fedbuff")
    found = document(shell, *words)
    code, out, err = shell("simulate", str(shell.file), *FAST, *words)
    assert (code, err) == (0, "")
    for policy in found["policies"]:
        assert f"{policy['fates']['merged']:,} merged" in out
        for level in policy["levels"]:
            assert f"{level['region']['params']:,}" in out
            assert f"{level['region']['rounds_without']:.1%}" in out
    assert f"{found['policies'][1]['under_way']} under way at the end" in out
    assert "\x1b" not in out


def test_quiet_prints_nothing(shell: Shell) -> None:
    assert shell("simulate", str(shell.file), *FAST, "--quiet") == (0, "", "")


def test_what_is_assumed_is_said(shell: Shell) -> None:
    words = ("data.name=mnist", f"data.root={shell.folder / 'no'}")
    (note,) = document(shell, *words)["notes"]
    assert "spread evenly" in note
    _, out, _ = shell("simulate", str(shell.file), *FAST, *words)
    assert note in out


# --timeline.


def kept(shell: Shell, *words: str) -> tuple[int, str, str]:
    place = (f"run.root={shell.root}", "run.name=planned")
    return shell("simulate", str(shell.file), *FAST, *place, "--timeline", *words)


def test_the_timeline_is_written_if_asked_for(shell: Shell) -> None:
    words = ("time.policy.name=fedbuff", "time.policy.buffer=3")
    code, out, err = kept(shell, *words)
    assert (code, err) == (0, "")
    path = shell.root / "planned"
    assert str(path) in out
    assert sorted(file.name for file in path.iterdir()) == ["timeline.parquet", "trace.json.gz"]
    (policy,) = document(shell, *words)["policies"]
    rows = timeline.read(path).to_pylist()
    fates = [row["fate"] for row in rows]
    assert {fate: fates.count(fate) for fate in policy["fates"]} == policy["fates"]
    assert fates.count("unfinished") == policy["under_way"]
    assert max(row["round_end_s"] for row in rows) == policy["sim_time_s"]
    events = json.loads(gzip.decompress((path / trace.NAME).read_bytes()))["traceEvents"]
    assert sum(event.get("cat") == "round" for event in events) == 6


def test_a_timeline_is_not_written_over_another_one(shell: Shell) -> None:
    assert kept(shell, "--quiet")[0] == 0
    line = shell.refuses(
        "simulate", str(shell.file), f"run.root={shell.root}", "run.name=planned", "--timeline"
    )
    assert "run.name=planned" in line


def test_a_timeline_shows_one_policy(shell: Shell) -> None:
    line = shell.refuses("simulate", str(shell.file), "--timeline", "--policies", "wait,tiers")
    assert "--policies" in line


def test_an_interrupted_simulation_leaves_nothing(
    shell: Shell,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = simulation.steps

    def interrupted(*args: Any) -> Any:
        yield next(real(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(simulation, "steps", interrupted)
    code, out, err = kept(shell)
    assert (code, out, err.count("\n")) == (130, "", 1)
    assert not (shell.root / "planned").exists()


def test_a_root_that_is_a_file(shell: Shell) -> None:
    words = (f"run.root={shell.file}", "run.name=planned")
    line = shell.refuses("simulate", str(shell.file), *FAST, *words, "--timeline")
    assert f"run.root={shell.file}" in line


# Mistakes.


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["clients.count=2000"], ["clients.samples=None", "1357", "2000"]),
        (["clients.samples=0"], ["clients.samples=0", "at least 1"]),
        (["--policies", "wait,fastest"], ["time.policy.name=fastest", "over_select"]),
        (["--policies", "deadline"], ["time.policy.deadline_s=None"]),
        (
            ["time.policy.name=fedbuff", "time.policy.concurrency=9"],
            ["time.policy.concurrency=9", "8 clients"],
        ),
        (["method=hermes", "levels.pairs=null"], ["method=hermes", "weights"]),
        (["nosuch.yaml"], ["nosuch.yaml"]),
        (["time.availability.file=x", "time.availability.source=csv"], ["x"]),
    ],
)
def test_a_mistake_is_one_line(shell: Shell, words: list[str], told: list[str]) -> None:
    line = shell.refuses("simulate", str(shell.file), *words)
    assert all(part in line for part in told), line


def test_help_has_an_example(shell: Shell) -> None:
    code, out, _ = shell("simulate", "--help")
    assert code == 0
    assert "example: cluster-fl simulate configs/simulate.yaml" in " ".join(out.split())


def test_the_shipped_configuration(shell: Shell) -> None:
    """As it stands, but for its size."""
    file = Path(__file__).parents[2] / "configs" / "simulate.yaml"
    words = (
        "clients.count=3000",
        "clients.per_round=50",
        "rounds=3",
        "time.policy.buffer=10",
        "model.name=resnet20",
    )
    code, out, err = shell(
        "simulate", str(file), *words, "levels.grid.depth_step=1", "levels.tolerance=0.3", "--json",
        "--policies", "wait,over_select,deadline,fedbuff",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert [policy["rounds"] for policy in json.loads(out)["policies"]] == [3] * 4

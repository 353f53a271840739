"""The command: one line for a mistake, the contract's files for a run, and nothing that was not asked for."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster_fl.compose import to_yaml
from cluster_fl.records import RunFolder
from ops.cli import main
from tests.processes import Command, line_count
from tests.tiny import LEVELS, lines, outcome, run_here, tiny, write_tiny

Streams = tuple[int, str, str]


class Shell:
    """Calls the command in this process, in a folder of its own."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.root, self.file = folder, folder / "runs", write_tiny(folder)
        self._capsys = capsys

    def __call__(self, *words: str) -> Streams:
        self._capsys.readouterr()
        try:
            code = main(list(words))
        except SystemExit as error:  # argparse
            code = int(error.code or 0)
        out, err = self._capsys.readouterr()
        return code, out, err

    def run(self, *words: str) -> Streams:
        return self("run", str(self.file), "--debug", f"run.root={self.root}", "run.name=run", *words)

    def refuses(self, *words: str) -> str:
        """The one line of a mistake; nothing may have been printed besides or written anywhere."""
        before = self.files()
        code, out, err = self(*words)
        assert (code, out) == (2, "")
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        assert self.files() == before
        return err

    def refuses_run(self, *words: str) -> str:
        return self.refuses("run", str(self.file), "--debug", f"run.root={self.root}", "run.name=run", *words)

    def files(self) -> dict[str, bytes]:
        return {str(p): p.read_bytes() if p.is_file() else b"" for p in self.folder.rglob("*")}


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)  # a report of an unexpected error would land here
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    return Shell(tmp_path, capsys)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("train.epoch=2", ["train.epoch=2", "train.epochs"]),
        ("rounds=many", ["rounds=many", "Integer"]),
        ("rounds=0", ["rounds=0", "at least 1"]),
        ("rounds=", ["rounds=", "needs a value"]),
        ("train.momentum=2", ["train.momentum=2", "at most 1"]),
        ("train=3", ["train=3"]),
        ("clients.per_round=9", ["clients.per_round=9", "only 8 clients"]),
        ("method=fedavgg", ["method=fedavgg", "scalefl"]),
        ("model.name=resnet21", ["model.name=resnet21", "resnet20", "Did you mean resnet"]),
        ("model.options.width=3", ["model.options.width=3", "widths"]),
        ("model.options.widths=[4]", ["model.options.widths=[4]"]),
        ("model.norm=layer", ["model.norm=layer", "per_level"]),
        ("data.name=mnst", ["data.name=mnst", "Did you mean mnist?"]),
        ("data.held_out=100000", ["data.held_out=100000", "1437"]),
        ("levels.shares=[1,0]", ["levels.shares=[1.0, 0.0]", "3 shares"]),
        ("levels.pairs=[{width: 0.5, depth: 9}]", ["levels.pairs", "9"]),
        ("time.devices.gflops=[1,2]", ["time.devices.gflops=[1.0, 2.0]", "3 positive numbers"]),
        ("data.partition.alpha=-1", ["data.partition.alpha=-1", "above 0"]),
    ],
)
def test_a_mistake_is_one_line(shell: Shell, word: str, told: list[str]) -> None:
    line = shell.refuses_run(word)
    assert all(part in line for part in told), line


def test_a_missing_data_folder(shell: Shell) -> None:
    empty = shell.folder / "nothing"
    line = shell.refuses_run("data.name=mnist", f"data.root={empty}", "data.download=false")
    assert f"data.root={empty}" in line
    assert "data.download=true" in line


def test_a_level_without_clients(shell: Shell) -> None:
    split = ["levels.pairs=null", "levels.count=4", "levels.tolerance=1"]
    line = shell.refuses_run("clients.count=3", "clients.per_round=2", *split)
    assert "clients.count=3" in line
    assert "gets no client" in line


def test_an_impossible_tolerance(shell: Shell) -> None:
    line = shell.refuses_run("levels.pairs=null", "levels.count=3", "levels.tolerance=0")
    assert "levels.tolerance=0" in line


def test_a_skew_that_cannot_be(shell: Shell) -> None:
    line = shell.refuses_run("data.partition.name=shards", "data.partition.shards_per_client=1000")
    assert "data.partition.shards_per_client=1000" in line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run", "{file}", "--fast"], "--fast"),
        (["run", "{file}", "--json"], "--json"),
        (["run"], "CONFIG"),
        (["run", "rounds=3"], "CONFIG"),
        (["run", "nosuch.yaml"], "nosuch.yaml"),
        (["run", "{file}", "{file}", "also.yaml"], "also.yaml"),
        (["run", "{file}", "=3"], "=3"),
        (["plan", "{file}", "--debug"], "--debug"),
        (["resume"], "RUN_DIR"),
        (["walk", "{file}"], "walk"),
        ([], "COMMAND"),
    ],
)
def test_a_command_that_is_none(shell: Shell, words: list[str], told: str) -> None:
    assert told in shell.refuses(*(word.format(file=shell.file) for word in words))


def test_a_file_that_is_no_yaml(shell: Shell) -> None:
    bad = shell.folder / "bad.yaml"
    bad.write_text("rounds: [1\n")
    line = shell.refuses("run", str(bad), f"run.root={shell.root}", "--debug")
    assert str(bad) in line
    assert "YAML" in line


def test_a_run_into_the_folder_of_another(shell: Shell) -> None:
    assert shell.run("rounds=1", "--quiet")[0] == 0
    line = shell.refuses_run("rounds=1", "train.lr=0.05", "checkpoint.keep=1")
    assert "run.name=run" in line
    assert str(shell.root / "run") in line
    assert "(train.lr)" in line


def test_a_run_into_a_folder_that_cannot_be_told(shell: Shell) -> None:
    (shell.root / "run" / "checkpoints").mkdir(parents=True)
    assert "holds a run already" in shell.refuses_run("rounds=1")
    (shell.root / "run" / "config.yaml").write_text("rounds: [1")
    assert "config.yaml cannot be used" in shell.refuses_run("rounds=1")


def test_a_root_that_is_a_file(shell: Shell) -> None:
    line = shell.refuses_run(f"run.root={shell.file}")
    assert f"run.root={shell.file}" in line


@pytest.mark.parametrize("name", ["runs", "nothing", "tiny.yaml"])
def test_resuming_what_is_no_run(shell: Shell, name: str) -> None:
    shell.root.mkdir()
    line = shell.refuses("resume", str(shell.folder / name), "--debug")
    assert f"RUN_DIR={shell.folder / name}" in line
    assert "no run folder" in line


def unfinished(shell: Shell) -> Path:
    """A run with a checkpoint of round 2 that was cut before its end."""
    path = shell.root / "run"
    run_here(tiny(shell.folder, "run.name=run", f"run.root={shell.root}"), path)
    (path / "summary.json").unlink()
    return path


def test_resuming_another_configuration(shell: Shell) -> None:
    path = unfinished(shell)
    content = yaml.safe_load((path / "config.yaml").read_text())
    content["train"]["lr"] = 0.05
    (path / "config.yaml").write_text(yaml.safe_dump(content))
    line = shell.refuses("resume", str(path), "--debug")
    assert f"RUN_DIR={path}" in line
    assert "another configuration" in line


@pytest.mark.parametrize("word", ["train.lr=0.5", "rounds=9", "run.name=other", "nothing", "cluster.pool=3"])
def test_what_cannot_change_on_resuming(shell: Shell, word: str) -> None:
    line = shell.refuses("resume", str(unfinished(shell)), word, "--debug")
    assert word.partition("=")[0] in line


def test_a_damaged_checkpoint_is_a_failure_not_a_mistake(shell: Shell) -> None:
    path = unfinished(shell)
    (path / "checkpoints" / "round-00003" / "state.safetensors").write_bytes(b"")
    code, out, err = shell("resume", str(path), "--debug")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "round-00003" in err


def test_divergence_is_a_failure_not_a_mistake(shell: Shell) -> None:
    code, out, err = shell.run("train.lr=1e30", "train.on_nan=stop", "--quiet")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "train.lr" in err
    assert line_count(shell.root / "run" / "rounds.jsonl") == 0


# What a run writes and says.

NUMBERS = {"last_exit", "exit_mean"}


def check_accuracy(block: dict[str, Any]) -> None:
    assert block.keys() == {"global", "local", "worst", "personal", "levels"}
    assert len(block["levels"]) == LEVELS
    assert block["personal"] is None
    for entry in (block["global"], block["local"], block["worst"], *block["levels"]):
        assert entry.keys() == NUMBERS
        assert all(0 <= value <= 1 for value in entry.values())
    assert block["global"] == block["levels"][-1]
    assert block["worst"] == {kind: min(level[kind] for level in block["levels"]) for kind in NUMBERS}


def test_the_run_folder(shell: Shell) -> None:
    code, _, _ = shell.run("rounds=4")
    assert code == 0
    path = shell.root / "run"
    found = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    saved = {
        f"checkpoints/round-0000{n}/{name}" for n in (3, 4) for name in ("meta.json", "state.safetensors")
    }
    written = {
        ".lock",
        "config.yaml",
        "plan.json",
        "rounds.jsonl",
        "summary.json",
        "timeline.parquet",
        "trace.json.gz",
    }
    assert found == written | saved

    config = RunFolder(path).config()
    assert to_yaml(config) == (path / "config.yaml").read_text()
    assert Path(config.data.root).is_absolute()

    levels = json.loads((path / "plan.json").read_text())["levels"]
    fields = {"level", "width", "depth", "exits", "params", "macs", "bytes", "ratio", "clients"}
    assert [level["level"] for level in levels] == [1, 2, 3]
    assert all(fields <= level.keys() for level in levels)
    assert sum(level["clients"] for level in levels) == 8
    assert all(level["bytes"] == 4 * level["params"] for level in levels)  # no buffers: norm=batch

    records = lines(path)
    assert [record["round"] for record in records] == [0, 1, 2, 3]
    assert ["accuracy" in record for record in records] == [False, True, False, True]
    clock = 0.0
    for record in records:
        people = record["participants"]
        assert [p["client"] for p in people] == sorted({p["client"] for p in people})
        assert len(people) == 6
        assert all(p["level"] in (1, 2, 3) for p in people)
        clock += max(p["seconds"] for p in people)
        assert record["sim_time_s"] == clock
        assert (
            record["bytes_down"] == record["bytes_up"] == sum(levels[p["level"] - 1]["bytes"] for p in people)
        )
        assert math.isfinite(record["train_loss"])
        if "accuracy" in record:
            check_accuracy(record["accuracy"])
    assert [r["wall_time_s"] for r in records] == sorted(r["wall_time_s"] for r in records)

    summary = json.loads((path / "summary.json").read_text())
    check_accuracy(summary["accuracy"])
    assert (summary["rounds"], summary["sim_time_s"]) == (4, clock)
    assert summary["bytes"] == 2 * sum(record["bytes_down"] for record in records)
    assert summary["wall_time_s"] >= records[-1]["wall_time_s"]
    meta = json.loads((path / "checkpoints" / "round-00004" / "meta.json").read_text())
    assert summary["weights_sha256"] == meta["weights_sha256"]


def test_the_last_round_is_always_evaluated(shell: Shell) -> None:
    shell.run("rounds=3", "evaluate.every=2", "--quiet")
    assert ["accuracy" in record for record in lines(shell.root / "run")] == [False, True, True]


def test_off_a_terminal_a_round_is_a_line(shell: Shell) -> None:
    code, out, err = shell.run("rounds=4", "evaluate.every=2")
    assert code == 0
    told = [line for line in err.splitlines() if line.startswith("round ")]
    assert [line.split()[1] for line in told] == ["1/4", "2/4", "3/4", "4/4"]
    records = lines(shell.root / "run")
    for number, line in enumerate(told):
        assert f"loss {records[number]['train_loss']:.4f}" in line
        assert ("left" in line) == (number < 3)
        latest = next((r["accuracy"] for r in records[number::-1] if "accuracy" in r), None)
        assert latest is None or f"global {latest['global']['last_exit']:.1%}" in line
    assert len(err.splitlines()) == 5  # and what is run
    assert "\x1b" not in out + err
    summary = json.loads((shell.root / "run" / "summary.json").read_text())
    assert f"global {summary['accuracy']['global']['last_exit']:.2%}" in out
    assert str(shell.root / "run") in out


def test_quiet_prints_nothing(shell: Shell) -> None:
    assert shell.run("--quiet", "rounds=1") == (0, "", "")
    assert shell("resume", str(shell.root / "run"), "--quiet", "--debug") == (0, "", "")
    assert shell("plan", str(shell.file), "--quiet") == (0, "", "")


def test_options_may_stand_anywhere(shell: Shell) -> None:
    words = ["--debug", "--quiet", str(shell.file), "rounds=1", f"run.root={shell.root}", "run.name=a"]
    assert shell("run", *words) == (0, "", "")
    words = [str(shell.file), "--quiet", "rounds=1", "--debug", f"run.root={shell.root}", "run.name=b"]
    assert shell("run", *words) == (0, "", "")
    assert outcome(shell.root / "a") == outcome(shell.root / "b")


def test_plan_json_is_the_runs_plan(shell: Shell) -> None:
    shell.run("--quiet", "rounds=1")
    code, out, err = shell("plan", str(shell.file), "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((shell.root / "run" / "plan.json").read_text())


def test_plan_needs_no_data_and_writes_nothing(shell: Shell) -> None:
    before = shell.files()
    code, out, err = shell(
        "plan", str(shell.file), "data.name=mnist", f"data.root={shell.folder / 'no'}", "data.download=false"
    )
    assert (code, err) == (0, "")
    assert "width" in out
    assert shell.files() == before


def test_resuming_a_finished_run_shows_it_again_and_changes_nothing(shell: Shell) -> None:
    _, out, _ = shell.run("rounds=1")
    before = shell.files()
    code, again, err = shell("resume", str(shell.root / "run"), "--debug")
    assert (code, again, err) == (0, out, "")
    assert shell.files() == before


def test_running_a_finished_run_shows_it_again_and_changes_nothing(shell: Shell) -> None:
    _, out, _ = shell.run("rounds=1")
    before = shell.files()
    code, again, err = shell.run("rounds=1", "checkpoint.keep=1")
    assert (code, again, err) == (0, out, f"finished before: {shell.root / 'run'}\n")
    assert shell.files() == before
    assert shell.run("rounds=1", "--quiet") == (0, "", "")


def test_running_an_unfinished_run_goes_on_with_it(shell: Shell) -> None:
    path = unfinished(shell)
    expected = lines(path)
    code, _, err = shell.run()
    told, planned, *_ = err.splitlines()
    assert (code, told) == (0, f"going on with {path}")
    assert "from round 3" in planned
    assert lines(path) == expected  # not even trained again
    run_here(tiny(shell.folder), shell.root / "undisturbed")
    assert outcome(path) == outcome(shell.root / "undisturbed")


def test_a_run_without_a_name_gets_one(shell: Shell) -> None:
    assert shell("run", str(shell.file), "--debug", "--quiet", "rounds=1", f"run.root={shell.root}")[0] == 0
    (path,) = shell.root.iterdir()
    assert path.name.startswith("tiny-seed0-")


def test_help_is_no_mistake(shell: Shell) -> None:
    code, out, err = shell("--help")
    assert (code, err) == (0, "")
    assert all(command in out for command in ("run", "plan", "resume"))


def test_an_unexpected_error_names_its_report(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ops.commands.compose", lambda *_: 1 / 0)
    code, out, err = shell.run()
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "Traceback" in Path(shell.folder / "cluster-fl-error.log").read_text()
    assert "cluster-fl-error.log" in err


# In a process of its own.


def test_quiet_in_a_fresh_process(tmp_path: Path) -> None:
    """No library's warning either."""
    words = ["run", str(write_tiny(tmp_path)), "--debug", "--quiet", "rounds=1", f"run.root={tmp_path}"]
    with Command(words, tmp_path) as command:
        assert (command.wait(), command.out, command.err) == (0, "", "")


@pytest.mark.parametrize(
    ("pools", "sent"),
    [
        pytest.param("--debug", signal.SIGINT, marks=pytest.mark.slow),
        ("--debug", signal.SIGTERM),
        ("cluster.pools=1", signal.SIGINT),
        pytest.param("cluster.pools=1", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_or_sigterm(tmp_path: Path, pools: str, sent: int) -> None:
    path, settings = tmp_path / "run", ("rounds=5", "train.epochs=3", "checkpoint.every=5")
    words = ["run", str(write_tiny(tmp_path)), *settings, f"run.root={tmp_path}", "run.name=run", "--quiet"]
    with Command([*words, pools], tmp_path) as command:
        command.await_(lambda: line_count(path / "rounds.jsonl") >= 2)
        command.interrupt(sent)
        code = command.wait()
        told = command.err
    assert (code, command.out, told.count("\n")) == (130, "", 1), told
    assert f"cluster-fl resume {path}" in told
    assert list((path / "checkpoints").glob("round-*"))
    assert not (path / "summary.json").exists()
    with Command(["resume", str(path), "--debug", "--quiet"], tmp_path) as command:
        assert (command.wait(), command.out, command.err) == (0, "", "")
    run_here(tiny(tmp_path, *settings), tmp_path / "undisturbed")
    assert outcome(path) == outcome(tmp_path / "undisturbed")

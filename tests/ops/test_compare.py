"""Comparing methods: the table is what the run folders hold, a stop costs nothing, a mistake is one line."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster_fl.compose import compose
from cluster_fl.methods import NAMES
from cluster_fl.records import RunFolder
from ops.cli import main
from tests.ops.test_cli import Shell
from tests.processes import Command, line_count
from tests.tiny import TINY, lines, outcome, run_here, tiny, write_tiny

SHORT = ("rounds=2", "evaluate.every=1", "clients.per_round=3")
COMPARE = """
compare:
  methods:
    - scalefl
    - {label: "Plain, slower | x", method: scalefl, options: {kd_weight: 0}, train: {lr: 0.05}}
  seeds: [0, 3]
  target: 0.2
"""
SLUGS = ("scalefl", "plain-slower-x")
SEEDS = (0, 3)
ORDER = [f"{slug}/seed-{seed}" for seed in SEEDS for slug in SLUGS]
FOLDER = "both"


def write_both(folder: Path, section: str = COMPARE) -> Path:
    file = folder / f"{FOLDER}.yaml"
    file.write_text(TINY + section, encoding="utf-8")
    return file


def words(folder: Path, *more: str, section: str = COMPARE) -> list[str]:
    file, root = write_both(folder, section), f"run.root={folder / 'runs'}"
    return ["compare", str(file), "--debug", root, *SHORT, *more]


def content_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "comparison.json").read_text(encoding="utf-8"))
    return content


def timeless_content(path: Path) -> dict[str, Any]:
    """A comparison without what the wall clock decides."""
    content = content_of(path)
    for method in content["methods"]:
        for values in (*method["runs"], method["mean"], method["std"]):
            del values["wall_time_s"]
    return content


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison that nothing disturbed; nobody may write into it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main([*words(folder), "--quiet", "--table", str(folder / "table.md")]) == 0
    return folder / "runs" / FOLDER


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path, capsys)


# The table and the run folders.


def test_the_values_are_those_of_the_run_folders(done: Path) -> None:
    content = content_of(done)
    assert [method["label"] for method in content["methods"]] == ["scalefl", "Plain, slower | x"]
    assert (content["target"], content["target_of"], content["seeds"]) == (0.2, "global", [0, 3])
    for method, slug in zip(content["methods"], SLUGS, strict=True):
        assert [run["folder"] for run in method["runs"]] == [f"{slug}/seed-{seed}" for seed in SEEDS]
        for run in method["runs"]:
            path = done / run["folder"]
            summary, levels = RunFolder(path).summary(), RunFolder(path).plan()["levels"]
            assert summary is not None
            assert (run["state"], run["error"], run["personal"]) == ("finished", None, None)
            for name in ("global", "local", "worst"):
                assert run[name] == summary["accuracy"][name]["last_exit"]
            for name in ("bytes", "sim_time_s", "wall_time_s"):
                assert run[name] == summary[name]
            assert run["params"] == levels[-1]["params"]
            people = [level["params"] for level in levels for _ in range(level["clients"])]
            assert run["params_mean"] == sum(people) / 8
            reached = [
                record["sim_time_s"]
                for record in lines(path)
                if "accuracy" in record and record["accuracy"]["global"]["last_exit"] >= 0.2
            ]
            assert run["sim_time_to_target_s"] == (reached[0] if reached else None)
        for name in ("global", "local", "worst", "bytes", "sim_time_s"):
            both = [run[name] for run in method["runs"]]
            assert method["mean"][name] == pytest.approx(statistics.mean(both))
            assert method["std"][name] == pytest.approx(abs(both[0] - both[1]) / 2**0.5)


def test_every_run_is_the_ordinary_run(done: Path, tmp_path: Path) -> None:
    run_here(
        tiny(tmp_path, *SHORT, "seed=3", "options.kd_weight=0", "train.lr=0.05"),
        tmp_path / "alone",
    )
    assert outcome(done / "plain-slower-x" / "seed-3") == outcome(tmp_path / "alone")


def test_the_runs_differ_in_what_the_entry_says_alone(done: Path) -> None:
    one, other = (yaml.safe_load((done / slug / "seed-0" / "config.yaml").read_text()) for slug in SLUGS)
    assert (other["options"]["kd_weight"], other["train"]["lr"]) == (0, 0.05)
    other["options"]["kd_weight"], other["train"]["lr"], other["run"] = 0.1, 0.1, one["run"]
    assert one == other


def test_the_markdown_table(done: Path) -> None:
    text = (done.parents[1] / "table.md").read_text(encoding="utf-8")
    header, rule, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert header.startswith("| method | global % | local % | worst level % | params")
    assert "simulated s to 20 % global" in header
    assert "personal" not in header
    assert header.count("|") == rule.count("|")
    assert rows[1].startswith("| Plain, slower \\| x | ")
    for method, row in zip(content_of(done)["methods"], rows, strict=True):
        mean, std = method["mean"], method["std"]
        cells = row.replace("\\|", "").split(" | ")
        for name, cell in zip(("global", "local", "worst"), cells[1:4], strict=True):
            plain = f"{100 * mean[name]:.2f} ± {100 * std[name]:.2f}"
            assert cell == (f"**{plain}**" if method["marks"][name] else plain)
        assert cells[4] == f"{mean['params']:,.0f} / {round(mean['params_mean']):,}"
    assert "over seeds 0, 3" in text


def test_a_second_time_repeats_nothing(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(words(done.parents[1])) == 0
    out, err = capsys.readouterr()
    assert {path: path.read_bytes() for path in done.rglob("*") if path.is_file()} == before
    assert err.splitlines() == [
        "1/4 scalefl seed 0: finished before",
        "2/4 Plain, slower | x seed 0: finished before",
        "3/4 scalefl seed 3: finished before",
        "4/4 Plain, slower | x seed 3: finished before",
    ]
    assert "Plain, slower | x" in out
    assert str(done) in out
    assert main([*words(done.parents[1]), "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out), err) == (content_of(done), "")


# Stopping and going on.


class Killed(BaseException):
    """The end of a process: nobody catches it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int, after: bool) -> None:
    """Makes a call of a run folder's method the last thing that happens."""
    original: Callable[..., Any] = getattr(RunFolder, name)
    calls = 0

    def deadly(self: RunFolder, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise Killed
        result = original(self, *args)
        if calls == call:
            raise Killed
        return result

    monkeypatch.setattr(RunFolder, name, deadly)


@pytest.mark.parametrize(
    ("name", "call", "after", "finished"),
    [
        ("create", 2, True, 1),  # a run with nothing but its configuration
        ("append_round", 3, True, 1),  # a round whose checkpoint is missing
        ("save", 3, True, 1),  # inside a run
        ("write_summary", 2, False, 1),  # all rounds, but no summary
        ("write_summary", 3, True, 3),  # between two runs, before comparison.json
    ],
)
def test_a_kill_changes_nothing(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int, after: bool, finished: int
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        kill_at(patch, name, call, after)
        with pytest.raises(Killed):
            main(words(tmp_path, "--quiet"))
    path = tmp_path / "runs" / FOLDER
    assert len(list(path.rglob("summary.json"))) == finished
    kept = {file: file.read_bytes() for file in path.rglob("summary.json")}
    assert main(words(tmp_path, "--quiet")) == 0
    assert timeless_content(path) == timeless_content(done)
    assert [outcome(path / run) for run in ORDER] == [outcome(done / run) for run in ORDER]
    assert all(file.read_bytes() == content for file, content in kept.items())


def test_the_table_so_far_is_there_after_each_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_at(monkeypatch, "create", 2, True)
    with pytest.raises(Killed):
        main(words(tmp_path, "--quiet"))
    first, second = content_of(tmp_path / "runs" / FOLDER)["methods"]
    assert [run["state"] for run in first["runs"]] == ["finished", "waiting"]
    assert [run["state"] for run in second["runs"]] == ["waiting", "waiting"]
    assert first["mean"]["global"] == first["runs"][0]["global"]
    assert first["std"]["global"] is None
    assert set(second["mean"].values()) == {None}


def test_more_seeds_and_methods_later(tmp_path: Path) -> None:
    assert main(words(tmp_path, "--quiet", "rounds=1", "compare.methods=[scalefl]", "compare.seeds=[3]")) == 0
    path = tmp_path / "runs" / FOLDER
    (method,) = content_of(path)["methods"]
    assert [run["seed"] for run in method["runs"]] == [3]
    kept = (path / "scalefl" / "seed-3" / "rounds.jsonl").read_bytes()
    assert main(words(tmp_path, "--quiet", "rounds=1")) == 0
    assert (path / "scalefl" / "seed-3" / "rounds.jsonl").read_bytes() == kept
    assert len(list(path.rglob("summary.json"))) == 4


@pytest.mark.parametrize("pools", ["--debug", pytest.param("cluster.pools=1", marks=pytest.mark.slow)])
def test_ctrl_c(tmp_path: Path, pools: str) -> None:
    """With Ray too: then both runs are on one cluster, and it goes on without."""
    settings = ("rounds=4", "train.epochs=3", "checkpoint.every=4", "compare.seeds=[0]")
    path = tmp_path / "runs" / FOLDER
    first, second = (path / run for run in ORDER[:2])
    call = [word for word in words(tmp_path, "--quiet", *settings) if word != "--debug"]
    with Command([*call, pools], tmp_path) as command:
        command.await_(lambda: line_count(second / "rounds.jsonl") >= 2)
        command.interrupt()
        code = command.wait()
        told = command.err
    assert (code, command.out, told.count("\n")) == (130, "", 1), told
    assert "1 of 2 runs" in told
    assert "the same command" in told
    assert (first / "summary.json").exists()
    assert list((second / "checkpoints").glob("round-*"))
    assert not (second / "summary.json").exists()
    assert main([*call, "--debug"]) == 0
    changed = (*SHORT, *settings[:3], "options.kd_weight=0", "train.lr=0.05")
    run_here(tiny(tmp_path, *changed), tmp_path / "undisturbed")
    assert outcome(second) == outcome(tmp_path / "undisturbed")


# Mistakes and failures.


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ("", ["compare.methods=[]", "at least one method"]),
        ("compare:", ["compare=None", "methods, seeds, target, target_of"]),
        ("compare: 3", ["compare=3", "methods, seeds, target, target_of"]),
        ("compare: {methods: scalefl}", ["compare.methods=scalefl"]),
        ("compare: {methods: [3]}", ["compare.methods[0]=3", "method's name, or a mapping"]),
        ("compare: {method: [scalefl]}", ["compare.method=", "Did you mean compare.methods?"]),
        ("compare: {methods: [scalefl, scalfl]}", ["compare.methods[1]=scalfl", "Did you mean scalefl?"]),
        (
            "compare: {methods: [scalefl, {label: b, method: scalfl}]}",
            ["compare.methods[1].method=scalfl", "Did you mean scalefl?"],
        ),
        ("compare: {methods: [scalefl, scalefl]}", ["compare.methods[1].label=scalefl", "compare.methods[0]"]),
        (
            "compare: {methods: [{label: A b, method: scalefl}, {label: a-B, method: scalefl}]}",
            ["compare.methods[1].label=a-B", "compare.methods[0]"],
        ),
        ("compare: {methods: [{train: {lr: 1}}]}", ["compare.methods[0].label=None", "must name the entry"]),
        ("compare: {methods: [{label: '..', method: scalefl}]}", ["compare.methods[0].label=..", "folder"]),
        ("compare: {methods: [{label: [a], method: scalefl}]}", ["compare.methods[0].label=['a']"]),
        (
            "compare: {methods: [{lable: x, method: scalefl}]}",
            ["compare.methods[0].lable=x", "Did you mean label?"],
        ),
        (
            "compare: {methods: [scalefl, {label: b, train: {epoch: 2}}]}",
            ["compare.methods[1].train.epoch=2", "Did you mean train.epochs?"],
        ),
        (
            "compare: {methods: [{label: b, options: {kd_wieght: 2}}]}",
            ["compare.methods[0].options.kd_wieght=2", "options.kd_weight"],
        ),
        (
            "compare: {methods: [{label: b, options: {kd_weight: -2}}]}",
            ["compare.methods[0].options.kd_weight=-2", "at least 0"],
        ),
        (
            "compare: {methods: [{label: b, levels: {pairs: [{width: 2, depth: 1}]}}]}",
            ["compare.methods[0].levels.pairs[0].width=2", "at most 1"],
        ),
        ("compare: {methods: [{label: b, train: 3}]}", ["compare.methods[0].train=3"]),
        *(
            (f"compare: {{methods: [{{label: b, {key}}}]}}", ["compare.methods[0].", "same for all methods"])
            for key in ("seed: 3", "run: {name: x}", "clients: {count: 9}", "data: {held_out: 9}", "time: {}")
        ),
        ("compare: {methods: [scalefl], seeds: []}", ["compare.seeds=[]", "different whole numbers"]),
        ("compare: {methods: [scalefl], seeds: [1, 1]}", ["compare.seeds=[1, 1]", "different"]),
        ("compare: {methods: [scalefl], seeds: [0, -1]}", ["compare.seeds=[0, -1]", "from 0"]),
        ("compare: {methods: [scalefl], seeds: [a]}", ["compare.seeds[0]", "'a'", "Integer"]),
        ("compare: {methods: [scalefl], seeds: 3}", ["compare.seeds=3"]),
        ("compare: {methods: [scalefl], target: 80}", ["compare.target=80", "fraction"]),
        ("compare: {methods: [scalefl], target: .nan}", ["compare.target=nan", "fraction"]),
        ("compare: {methods: [scalefl], target_of: locale}", ["compare.target_of=locale", "Did you mean local?"]),
    ],
)  # fmt: skip
def test_a_mistake_in_the_section(shell: Shell, section: str, told: list[str]) -> None:
    call = words(shell.folder, section=section)
    line = shell.refuses(*call)
    assert all(part in line for part in told), line


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("compare.sedes=[0]", ["compare.sedes=[0]", "Did you mean compare.seeds?"]),
        ("compare.seeds=", ["compare.seeds=", "needs a value"]),
        ("method=scalefl", ["method=scalefl", "compare.methods=[scalefl]"]),
        ("seed=5", ["seed=5", "compare.seeds=[5]"]),
        ("train.epoch=2", ["train.epoch=2", "Did you mean train.epochs?", "(for scalefl)"]),
        ("data.held_out=0", ["compare.target=0.2", "data.held_out"]),
        ("run.name=a/b", ["run.name=a/b", "plain folder name"]),
        ("--table=nowhere/x.md", ["--table=nowhere/x.md", "a folder that exists"]),
        ("--fast", ["--fast"]),
    ],
)
def test_a_mistake_on_the_command_line(shell: Shell, word: str, told: list[str]) -> None:
    call = words(shell.folder)
    line = shell.refuses(*call, word)
    assert all(part in line for part in told), line


def test_a_plan_that_cannot_be_is_told_before_the_first_run(shell: Shell) -> None:
    deep = "{label: deep, levels: {pairs: [{width: 0.5, depth: 3}, {width: 1, depth: 9}]}}"
    call = words(shell.folder, section=f"compare: {{methods: [scalefl, {deep}]}}")
    line = shell.refuses(*call)
    assert "levels.pairs" in line
    assert "9" in line


def test_a_root_that_is_a_file(shell: Shell) -> None:
    call = words(shell.folder, "--quiet", f"run.root={shell.file}")
    assert str(shell.file) in shell.refuses(*call)


def test_a_folder_of_another_configuration(shell: Shell) -> None:
    one = "compare: {methods: [scalefl]}\n"
    assert shell(*words(shell.folder, "--quiet", "rounds=1", section=one))[0] == 0
    call = words(shell.folder, "rounds=1", "train.lr=0.05", section=one)
    line = shell.refuses(*call)
    assert f"run.name={FOLDER}" in line
    assert str(shell.root / FOLDER / "scalefl" / "seed-0") in line
    assert "(train.lr)" in line
    assert "delete that folder" in line
    assert shell(*call, "run.name=other", "--quiet")[0] == 0
    assert shell(*words(shell.folder, "--quiet", "rounds=1", "checkpoint.keep=1", section=one))[0] == 0


def test_into_the_folder_of_a_run(shell: Shell) -> None:
    assert shell.run("rounds=1", "--quiet")[0] == 0
    call = words(shell.folder, "run.name=run")
    assert "holds a run already" in shell.refuses(*call)


def test_a_failed_run_does_not_stop_the_others(shell: Shell) -> None:
    section = (
        "compare: {methods: [{label: Wild, train: {lr: 1.0e+30, on_nan: stop}}, scalefl], seeds: [0, 1]}\n"
    )
    code, out, err = shell(*words(shell.folder, "rounds=1", section=section))
    assert code == 1
    assert "Wild (0 of 2 seeds)" in out
    assert "Wild seed 1 failed: round 0: training diverged on client" in out
    *_, last = err.splitlines()
    assert "2 of 4 runs failed; the first, Wild seed 0: round 0: training diverged" in last
    wild, calm = content_of(shell.root / FOLDER)["methods"]
    assert [run["state"] for run in (*wild["runs"], *calm["runs"])] == ["failed"] * 2 + ["finished"] * 2
    assert "diverged" in wild["runs"][0]["error"]
    assert (wild["mean"]["global"], calm["marks"]["global"]) == (None, None)
    assert "Traceback" in (shell.root / FOLDER / "wild" / "seed-1" / "error.log").read_text()
    again = words(shell.folder, "rounds=1", "compare.seeds=[0]", "--quiet", section=section)
    code, out, err = shell(*again)
    assert (code, out, err.count("\n")) == (1, "", 1)


# Layers.


def test_an_entry_goes_between_the_files_and_the_overrides(tmp_path: Path) -> None:
    file = write_both(tmp_path)
    entry = {"train": {"lr": 0.25, "epochs": 7}, "variant": "released", "options": {"kd_detach": True}}
    config = compose([file], ["train.epochs=2"], entry)
    assert (config.train.lr, config.train.epochs, config.train.batch_size) == (0.25, 2, 16)
    assert (config.options.kd_gate, config.options.kd_detach) == (0.25, True)


def test_one_run_of_a_comparisons_file_is_its_shared_part(tmp_path: Path) -> None:
    assert compose([write_both(tmp_path)]) == compose([write_tiny(tmp_path)])


def test_the_seed_of_the_configuration_is_the_default(tmp_path: Path) -> None:
    section = "compare: {methods: [scalefl]}\n"
    assert main(words(tmp_path, "--quiet", "rounds=1", "seed=4", section=section)) == 0
    assert content_of(tmp_path / "runs" / FOLDER)["seeds"] == [4]


# The list of methods.


def test_methods(shell: Shell) -> None:
    code, out, err = shell("methods", "scalefl", "fedprox")
    assert (code, err) == (0, "")
    told = (
        "scalefl",
        "CVPR 2023",
        "variants paper, released",
        "kd_weight",
        "0.1",
        "beta",
        "(batch, element)",
    )
    assert all(word in out for word in (*told, "fedprox", "presets", "train.correction.name=proximal"))
    code, out, _ = shell("methods", "scalefl", "--json")
    (method,) = json.loads(out)
    assert (code, method["name"]) == (0, "scalefl")
    assert method["variants"].keys() == {"paper", "released"}
    weight = next(option for option in method["options"] if option["name"] == "kd_weight")
    assert (weight["default"], weight["low"]) == (0.1, 0)
    assert "Did you mean scalefl?" in shell.refuses("methods", "scalfl")
    assert shell("methods", "scalefl", "--quiet") == (0, "", "")


def test_every_method_is_listed_with_a_meaning_for_every_option(shell: Shell) -> None:
    code, out, _ = shell("methods", "--json")
    described = json.loads(out)
    assert (code, [method["name"] for method in described]) == (0, list(NAMES))
    assert all(method["title"] for method in described)
    assert all(option["about"] for method in described for option in method["options"])

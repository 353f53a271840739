"""The command `sweep` without Ray: mistakes come before anything starts; what is best, and how it is written."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from actors.driver import Driver
from actors.pools import InlinePools
from cluster_fl.compose import compose, fingerprint
from cluster_fl.errors import RunError, UserError
from cluster_fl.records import RunFolder
from ops.sweeping import results
from ops.sweeping.definition import Sweep, prepare
from ops.sweeping.ledger import Ledger
from ops.sweeping.reporting import Report, Trial
from tests.conftest import CONFIGS
from tests.ops.test_cli import Shell, shell  # noqa: F401
from tests.tiny import TINY, lines, outcome, run_here, tiny

SPACE = "sweep.space={train: {lr: {log: [0.01, 1.0]}}}"
TRIALS = "sweep.search.trials=4"


def refused(shell: Shell, *words: str) -> str:  # noqa: F811
    return shell.refuses("sweep", str(shell.file), f"run.root={shell.root}", *words)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "sweep.space={}: must hold at least one setting"),
        ((SPACE,), "sweep.search.trials=None: must say how many"),
        ((SPACE, TRIALS, "data.held_out=0"), "data.held_out=0: leaves nothing to choose by"),
        ((SPACE, TRIALS, "train.lr=0.1"), "train.lr=0.1: is what sweep.space.train.lr decides"),
        ((SPACE, TRIALS, "train={lr: 0.1}"), "is what sweep.space.train.lr decides"),
        ((SPACE, TRIALS, "sweep.metric=globl"), "Did you mean global?"),
        ((SPACE, TRIALS, "sweep.scheduler=ash"), "sweep.scheduler.name=ash: must be one of none, asha, pbt"),
        ((SPACE, TRIALS, "sweep.scheduler.factor=1"), "sweep.scheduler.factor=1: must be at least 2"),
        ((SPACE, TRIALS, "sweep.concurrent=0"), "sweep.concurrent=0: must be auto or at least 1"),
        (
            (SPACE, TRIALS, "sweep.sched=asha"),
            "sweep.sched=asha: is not an option. Did you mean sweep.scheduler?",
        ),
        ((SPACE, TRIALS, "--resume"), "run.name=tiny: has no sweep to go on with"),
        (("sweep.space={train: {lrr: {grid: [1, 2]}}}",), "sweep.space.train.lrr=1: is not an option"),
        (
            ("sweep.space={train: {lr: {grid: [0.1, -1.0]}}}",),
            "sweep.space.train.lr=-1.0: must be at least 0",
        ),
        (("sweep.space={method: {grid: [scalefl, heterfl]}}",), "Did you mean heterofl?"),
        (("sweep.space={seed: {grid: [0, 1]}}", TRIALS), "sweep.search.trials=4: would repeat the same"),
        (("sweep.space={rounds: {grid: [1, 2]}}", "sweep.scheduler=asha"), "is what asha decides"),
        (
            ("sweep.space={levels: {tolerance: {uniform: [0.1, 0.2]}}}", TRIALS, "sweep.scheduler=pbt"),
            "sweep.space.levels.tolerance=: cannot change in the middle of a run",
        ),
        (("sweep.space={train: {lrr: {log: [0.1, 1.0]}}}", TRIALS), "is not an option. Did you mean"),
        (
            (
                "sweep.space={seed: {grid: [0, 1]}, train: {lr: {log: [0.01, 1.0]}}}",
                "sweep.search={name: optuna, trials: 4}",
            ),
            "sweep.space.seed.grid=: has no place with optuna",
        ),
    ],
)
def test_a_mistake_is_one_line(shell: Shell, words: tuple[str, ...], told: str) -> None:  # noqa: F811
    assert told in refused(shell, *words)


def test_a_plan_that_contradicts_itself_is_told_with_its_settings(shell: Shell) -> None:  # noqa: F811
    words = ("levels.pairs=null", "levels.ratios=[0.5,1]", "levels.grid.depth_step=1")
    line = refused_plan(shell, *words, "sweep.space={levels: {tolerance: {grid: [0.5, 0.00001]}}}")
    assert "(for levels.tolerance=1e-05)" in line


def refused_plan(shell: Shell, *words: str) -> str:  # noqa: F811
    code, out, err = shell("sweep", str(shell.file), f"run.root={shell.root}", *words)
    assert code in (1, 2)
    assert (out, err.count("\n")) == ("", 1)
    return err


def test_without_ray_tune(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("ops.sweep.NEEDED", ("no_such_package",))
    assert 'pip install "cluster-fl[sweep]"' in refused(shell, SPACE, TRIALS)


@pytest.mark.parametrize("file", sorted((CONFIGS / "sweep").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_files_that_come_with_it(file: Path, tmp_path: Path) -> None:
    made = prepare([str(file)], [f"run.root={tmp_path}"])
    rows = Ledger.of(made, resume=False).rows
    assert len(rows) == len(made.points) >= 4
    assert all(made.config(row.point, row.trial) for row in rows)
    assert not list(tmp_path.iterdir()), "nothing is written before it starts"


# What is best.


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    file = tmp_path / "small.yaml"
    grids = "{train.lr: {grid: [0.1, 0.2]}, seed: {grid: [0, 1]}}"
    file.write_text(TINY + f"sweep: {{space: {grids}}}\n")
    return prepare([str(file)], [f"run.root={tmp_path / 'runs'}"])


def filled(sweep: Sweep, values: list[float | None], states: list[str] | None = None) -> Ledger:
    ledger = Ledger.of(sweep, resume=False)
    for row, value, state in zip(ledger.rows, values, states or ["finished"] * len(values), strict=True):
        row.value, row.state, row.rounds = value, state, 3 if state == "finished" else 1
    return ledger


def test_settings_count_by_the_mean_over_their_seeds(sweep: Sweep) -> None:
    found = results.best(filled(sweep, [0.9, 0.1, 0.6, 0.7]))
    assert found is not None
    assert found.settings == {"train.lr": 0.2}
    assert found.value == pytest.approx(0.65)
    assert [row.settings["seed"] for row in found.rows] == [0, 1]


def test_trials_that_were_cut_do_not_beat_whole_ones(sweep: Sweep) -> None:
    states = ["stopped", "finished", "finished", "finished"]
    found = results.best(filled(sweep, [0.9, 0.9, 0.6, 0.7], states))
    assert found is not None
    assert found.settings == {"train.lr": 0.2}


def test_of_a_loss_the_least_is_best(sweep: Sweep) -> None:
    loss = replace(sweep, section=replace(sweep.section, metric="train_loss"))
    found = results.best(filled(loss, [0.9, 0.9, 1.6, 1.7]))
    assert found is not None
    assert found.settings == {"train.lr": 0.1}


def test_nothing_is_best_where_nothing_was_measured(sweep: Sweep) -> None:
    assert results.best(filled(sweep, [None] * 4, ["failed"] * 4)) is None


def test_best_yaml_is_a_run(sweep: Sweep) -> None:
    ledger = filled(sweep, [0.1, 0.1, 0.6, 0.7])
    ledger.save()
    found = results.best(ledger)
    assert found is not None
    config = compose([results.write_best(ledger, found)])
    assert (config.train.lr, config.seed, config.run.name) == (0.2, 0, "small-best")
    assert fingerprint(config) == fingerprint(sweep.config(ledger.rows[2].point))


def test_the_table(sweep: Sweep) -> None:
    ledger = filled(sweep, [0.5, 0.25, 0.75, None], ["finished", "stopped", "finished", "failed"])
    ledger.rows[3].error = "no room"
    screen = StringIO()
    found = results.best(ledger)
    results.show(ledger, found, sweep.path / "best.yaml", Console(file=screen, width=200))
    text = screen.getvalue()
    order = [text.index(f"trial-0{number}") for number in (2, 0, 1, 3)]
    assert order == sorted(order)
    assert "75.00%" in text
    assert "trial-03 failed: no room" in text


# Going on.


def test_the_ledger_is_read_back(sweep: Sweep) -> None:
    ledger = filled(sweep, [0.1, None, None, None], ["finished", "running", "failed", "waiting"])
    ledger.save()
    again = Ledger.of(sweep, resume=True)
    assert again.rows == ledger.rows
    assert [row.trial for row in again.open_rows()] == ["trial-01", "trial-02", "trial-03"]


@pytest.mark.parametrize(
    ("override", "told"),
    [("sweep.metric=worst", "another sweep.metric"), ("train.epochs=2", "another the configuration")],
)
def test_another_sweep_of_that_name(sweep: Sweep, tmp_path: Path, override: str, told: str) -> None:
    Ledger.of(sweep, resume=False).save()
    changed = prepare([str(tmp_path / "small.yaml")], [f"run.root={tmp_path / 'runs'}", override])
    with pytest.raises(UserError, match=told):
        Ledger.of(changed, resume=False)
    more = prepare([str(tmp_path / "small.yaml")], [f"run.root={tmp_path / 'runs'}", "sweep.concurrent=3"])
    assert len(Ledger.of(more, resume=False).rows) == 4


def test_a_damaged_ledger(sweep: Sweep) -> None:
    Ledger.of(sweep, resume=False).save()
    (sweep.path / "sweep.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        Ledger.of(sweep, resume=True)


def test_a_run_in_a_trials_place(sweep: Sweep) -> None:
    run_here(replace(sweep.config(sweep.first), rounds=1), sweep.path / "trial-00")
    with pytest.raises(UserError, match="holds a run already"):
        Ledger.of(sweep, resume=False)


# A trial.


def trial(folder: Path, *overrides: str, replay: bool = False) -> Generator[Report, None, None]:
    config = tiny(folder, "rounds=4", "evaluate.every=2", "checkpoint.every=3", *overrides)
    return Trial(config, RunFolder(folder / "run"), InlinePools, "global", "sweep", replay).reports()


def test_a_trial_tells_of_each_evaluation_and_of_the_last_at_its_end(tmp_path: Path) -> None:
    told = list(trial(tmp_path))
    values = [one["accuracy"]["global"]["last_exit"] for one in lines(tmp_path / "run") if "accuracy" in one]
    assert [(one.rounds, one.value, one.finished) for one in told] == [
        (2, values[0], False),
        (4, values[1], True),
    ]
    assert RunFolder(tmp_path / "run").summary() is not None


@pytest.mark.parametrize("replay", [False, True])
def test_a_trial_that_was_cut_goes_on_to_the_same_bits(tmp_path: Path, replay: bool) -> None:
    reports = trial(tmp_path)
    assert next(reports).rounds == 2
    reports.close()
    assert [(one.rounds, one.replayed) for one in trial(tmp_path, replay=replay)] == [(2, True)] * replay + [
        (4, False)
    ]
    whole = tmp_path / "whole"
    whole.mkdir()
    list(trial(whole))
    assert outcome(tmp_path / "run") == outcome(whole / "run")


def test_a_method_without_what_decides(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="decoupled has no global to choose by"):
        list(trial(tmp_path, "method=decoupled", "levels.pairs=[{width: 0.5},{width: 1.0}]"))


# Forks.


def test_a_fork_goes_on_under_another_configuration(tmp_path: Path) -> None:
    """From a copy: with the same configuration it ends in the same bits, with another in others."""
    config = tiny(tmp_path, "rounds=4", "time.policy=fedbuff", "time.policy.buffer=2")
    source = RunFolder(tmp_path / "source")
    events = Driver(config, source, InlinePools).run()
    while not source.checkpoint_files(2):
        next(events)
    events.close()  # type: ignore[attr-defined]
    for name, lr in (("same", 0.1), ("other", 0.01)):
        changed = replace(config, train=replace(config.train, lr=lr))
        folder = RunFolder(tmp_path / name)
        folder.fork(changed, source)
        assert lines(folder.path) == lines(source.path)[:2]
        assert folder.config() == changed
        run_here(changed, folder.path, resume=True)
        assert lines(folder.path)[:2] == lines(source.path)[:2]
    run_here(config, source.path, resume=True)
    assert outcome(tmp_path / "same") == outcome(source.path)
    assert (tmp_path / "same" / "timeline.parquet").read_bytes() == source.timeline.file.read_bytes()
    assert outcome(tmp_path / "other")[1]["weights_sha256"] != outcome(source.path)[1]["weights_sha256"]


def test_what_cannot_be_forked(tmp_path: Path) -> None:
    config = tiny(tmp_path, "rounds=1")
    folder = RunFolder(tmp_path / "run")
    folder.create(config)
    with pytest.raises(RunError, match="no complete round"):
        RunFolder(tmp_path / "fork").fork(config, folder)
    with pytest.raises(UserError, match="holds a run already"):
        folder.fork(config, folder)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["run", "tiny.yaml"]


def test_sweep_json_is_for_machines(sweep: Sweep) -> None:
    ledger = filled(sweep, [0.1, 0.2, 0.3, 0.4])
    ledger.save({"value": 0.35})
    content = json.loads((sweep.path / "sweep.json").read_text())
    assert content["complete"]
    assert (content["metric"], content["mode"], content["best"]) == ("global", "max", {"value": 0.35})
    assert content["trials"][2]["settings"] == {"train.lr": 0.2, "seed": 0}

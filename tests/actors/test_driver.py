"""The driver with pools in its own process: its events, its two threads, and where it refuses to go on."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from actors.driver import Driver
from actors.events import Finished, Planned, RoundDone, Working
from actors.pools import InlinePools
from cluster_fl import records
from cluster_fl.errors import UserError
from cluster_fl.experiment import Experiment, prepare
from cluster_fl.records import RunFolder
from tests.test_merging import TwoPasses
from tests.tiny import lines, outcome, run_here, tiny


def test_events_tell_the_run_in_order(tmp_path: Path) -> None:
    events = run_here(tiny(tmp_path), tmp_path / "run")
    planned, *between, finished = events
    assert isinstance(planned, Planned)
    assert (planned.plan, planned.start, planned.pools) == (RunFolder(tmp_path / "run").plan(), 0, 1)
    assert isinstance(finished, Finished)
    assert finished.summary == RunFolder(tmp_path / "run").summary()
    assert [event.record for event in between if isinstance(event, RoundDone)] == lines(tmp_path / "run")
    phases: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for event in between:
        if isinstance(event, Working):
            phases.setdefault((event.round, event.phase), []).append((event.done, event.total))
    # Evaluated after rounds 1 and 2; then everybody's test part.
    order = [(0, "train"), (1, "train"), (1, "evaluate"), (2, "train"), (2, "evaluate"), (3, "evaluate")]
    assert list(phases) == order
    assert all(steps == [(n, len(steps) - 1) for n in range(len(steps))] for steps in phases.values())


def test_a_resumed_run_says_where_it_starts(tmp_path: Path) -> None:
    driver = Driver(tiny(tmp_path), RunFolder(tmp_path / "run"), InlinePools)
    events = driver.run()
    for event in events:
        if isinstance(event, RoundDone):
            break
    assert driver.stop() == 1
    events.close()
    planned = run_here(tiny(tmp_path), tmp_path / "run", resume=True)[0]
    assert isinstance(planned, Planned)
    assert planned.start == 1


def test_stop_before_anything_is_complete(tmp_path: Path) -> None:
    driver = Driver(tiny(tmp_path), RunFolder(tmp_path / "run"), InlinePools)
    assert driver.stop() == 0
    assert isinstance(next(iter(driver.run())), Planned)
    assert driver.stop() == 0
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_stop_saves_what_has_no_checkpoint_yet(tmp_path: Path) -> None:
    config = tiny(tmp_path, "checkpoint.every=3")
    driver = Driver(config, RunFolder(tmp_path / "run"), InlinePools)
    for event in driver.run():
        if isinstance(event, RoundDone) and event.record["round"] == 1:
            break
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert driver.stop() == 2
    found = RunFolder(tmp_path / "run").load(config)
    assert found is not None
    assert found.rounds == 2
    run_here(config, tmp_path / "run", resume=True)
    run_here(config, tmp_path / "undisturbed")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "undisturbed")


def test_stop_while_a_checkpoint_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C: `stop` is called in one thread while `run` saves in another."""
    config = tiny(tmp_path)
    driver = Driver(config, RunFolder(tmp_path / "run"), InlinePools)
    stopped: list[object] = []
    threads: list[threading.Thread] = []

    def stop() -> None:
        try:
            stopped.append(driver.stop())
        except BaseException as error:
            stopped.append(error)

    def meddled(*arguments: Any) -> None:
        monkeypatch.setattr(records, "save_file", save_file)
        save_file(*arguments)
        threads.append(threading.Thread(target=stop))
        threads[0].start()
        threads[0].join(0.5)  # it gets through, or waits for us: both are right

    monkeypatch.setattr(records, "save_file", meddled)
    for _ in driver.run():
        pass
    threads[0].join(10)
    assert stopped in ([1], [2], [3])
    run_here(config, tmp_path / "undisturbed")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("override", "key"),
    [("clients.count=2", "clients.count"), ("data.held_out=99999", "data.held_out")],
)
def test_a_mistake_writes_nothing(tmp_path: Path, override: str, key: str) -> None:
    with pytest.raises(UserError) as caught:
        run_here(tiny(tmp_path, "clients.per_round=2", override), tmp_path / "run")
    assert caught.value.key == key
    assert not (tmp_path / "run").exists()


def test_no_training_keeps_every_bit_of_a_whole_run(tmp_path: Path) -> None:
    hashes = set()
    for name, override in (
        ("epochs", "train.epochs=0"),
        ("rate", "train.lr=0"),
        ("longer", "train.epochs=0"),
    ):
        rounds = "rounds=4" if name == "longer" else "rounds=1"
        run_here(tiny(tmp_path, override, rounds), tmp_path / name)
        hashes.add(outcome(tmp_path / name)[1]["weights_sha256"])
    assert len(hashes) == 1
    run_here(tiny(tmp_path, "rounds=1"), tmp_path / "trained")
    assert outcome(tmp_path / "trained")[1]["weights_sha256"] not in hashes


def test_a_run_is_the_same_run_again_and_another_with_another_seed(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        run_here(tiny(tmp_path, f"seed={seed}"), tmp_path / name)
    assert outcome(tmp_path / "same") == outcome(tmp_path / "one")
    hashes = [outcome(tmp_path / name)[1]["weights_sha256"] for name in ("one", "other")]
    assert hashes[0] != hashes[1]


def test_a_merge_of_several_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its phases are told and timed like any other."""
    monkeypatch.setattr(Experiment, "merge", TwoPasses())
    events = run_here(tiny(tmp_path, "rounds=1"), tmp_path / "run")
    phases = [event.phase for event in events if isinstance(event, Working) and event.done == 0]
    assert phases == ["train", "weigh", "evaluate", "evaluate"]
    (record,) = lines(tmp_path / "run")
    assert set(record["wall"]["phases"]) >= {"train", "weigh", "aggregate", "evaluate"}
    assert len(record["participants"]) == 6


def test_a_level_that_only_the_server_has(tmp_path: Path) -> None:
    """Nobody affords the largest one: its own part keeps its bits, and it answers all the same."""
    config = tiny(tmp_path, "levels.shares=[0.5,0.5,0]", "rounds=1")
    run_here(config, tmp_path / "run")
    progress = RunFolder(tmp_path / "run").load(config)
    assert progress is not None
    made = prepare(config)
    start = made.initial_state()
    top = start.keys() - {key for level in (1, 2) for key in made.plan.holding(level).keys.values()}
    assert "units.2.conv1.weight" in top
    assert all(progress.state[key].tobytes() == start[key].tobytes() for key in top)
    assert progress.state["stem.conv.weight"].tobytes() != start["stem.conv.weight"].tobytes()
    accuracy = outcome(tmp_path / "run")[1]["accuracy"]
    assert all(level["last_exit"] is not None for level in (*accuracy["levels"], accuracy["global"]))


def test_checkpoints_have_the_servers_memory(tmp_path: Path) -> None:
    """Adam's moments: a resumed run goes on with them."""
    adam = ("server.optimizer=adam", "server.lr=0.01")
    run_here(tiny(tmp_path, *adam), tmp_path / "undisturbed")
    for event in (driver := Driver(tiny(tmp_path, *adam), RunFolder(tmp_path / "run"), InlinePools)).run():
        if isinstance(event, RoundDone) and event.record["round"] == 1:
            break
    assert driver.stop() == 2
    run_here(tiny(tmp_path, *adam), tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "undisturbed")
    found, expected = (
        RunFolder(tmp_path / name).load(tiny(tmp_path, *adam)) for name in ("run", "undisturbed")
    )
    assert found is not None
    assert expected is not None
    assert any(array.any() for array in expected.memory.values())
    assert {key: array.tobytes() for key, array in found.memory.items()} == {
        key: array.tobytes() for key, array in expected.memory.items()
    }

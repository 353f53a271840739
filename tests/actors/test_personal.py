"""What clients keep between rounds: handed back at the next participation, and found again after a crash.

A toy method in which every client notes the rounds that it took part in.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from actors.driver import Driver
from actors.events import Event, RoundDone, Working
from actors.pools import InlinePools
from cluster_fl import methods
from cluster_fl.config import Config
from cluster_fl.errors import RunError
from cluster_fl.methods import scalefl
from cluster_fl.methods.base import Method, Setting
from cluster_fl.models.layered import Layered
from cluster_fl.nesting.plan import Plan
from cluster_fl.records import RunFolder
from cluster_fl.training.program import Answer, Context, LocalProgram, Trained
from tests.tiny import lines, outcome, run_here, tiny

ROUNDS, CLIENTS = 5, 8
SETTINGS = (f"rounds={ROUNDS}", "clients.per_round=3", "method=toy")


@dataclasses.dataclass(frozen=True)
class Diary(LocalProgram):
    """Keeps the rounds. A client that has taken part answers by its level's model, any other one by class 0."""

    inner: LocalProgram
    keeps_state = True
    personalises = True

    def train(self, model: Layered, context: Context) -> Trained:
        done, before = self.inner.train(model, context), context.personal.get("rounds", np.zeros(0, np.int64))
        return dataclasses.replace(done, personal={"rounds": np.append(before, context.round)})

    def personalise(self, model: Layered, context: Context) -> Answer:
        if context.personal:
            return model
        return lambda inputs: [torch.nn.functional.one_hot(torch.zeros(len(inputs), dtype=torch.int64), 10)]


def plan(setting: Setting) -> Plan:
    return dataclasses.replace(scalefl.plan(setting), global_level=None, serves=False)


TOY = Method(
    title="a diary",
    options=scalefl.Options,
    plan=plan,
    program=lambda config, plan: Diary(scalefl.program(config, plan)),
)


@pytest.fixture(autouse=True)
def toy() -> Iterator[None]:
    """Registers the method; pools in this process find it too."""
    module = ModuleType("cluster_fl.methods.toy")
    module.METHOD = TOY
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        patch.setattr(methods, "NAMES", (*methods.NAMES, "toy"))
        yield


def config(folder: Path, *overrides: str) -> Config:
    return tiny(folder, *SETTINGS, *overrides)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The finished run, by how often it has a checkpoint."""
    folder = tmp_path_factory.mktemp("undisturbed")

    @functools.cache
    def finished(every: int) -> Path:
        run_here(config(folder, f"checkpoint.every={every}"), folder / str(every))
        return folder / str(every)

    return finished


def took_part(path: Path) -> dict[int, list[int]]:
    """Each client's rounds, by the records."""
    rounds: dict[int, list[int]] = {}
    for record in lines(path):
        for participant in record["participants"]:
            rounds.setdefault(participant["client"], []).append(record["round"])
    return rounds


def files(path: Path) -> dict[str, bytes]:
    """Everything that clients have kept on disk."""
    clients = path / "clients"
    return {str(f.relative_to(clients)): f.read_bytes() for f in clients.rglob("*") if f.is_file()}


def checkpoints(path: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((path / "checkpoints").glob("*/meta.json"))]


def test_every_client_gets_back_what_it_kept(tmp_path: Path, undisturbed: Callable[[int], Path]) -> None:
    path = undisturbed(1)
    folder, rounds = RunFolder(path), took_part(path)
    assert any(len(own) > 1 for own in rounds.values())
    assert len(rounds) < CLIENTS or min(len(own) for own in rounds.values()) < ROUNDS
    progress = folder.load(config(tmp_path))
    assert progress is not None
    assert progress.clients == {client: own[-1] for client, own in rounds.items()}
    for client, own in rounds.items():
        assert folder.clients.load(client, own[-1])["rounds"].tolist() == own
    summary = folder.summary()
    assert summary is not None
    assert summary["clients_sha256"] == folder.clients.sha256(progress.clients)


def test_a_method_of_personal_models_alone(tmp_path: Path, undisturbed: Callable[[int], Path]) -> None:
    path = undisturbed(1)
    accuracy = outcome(path)[1]["accuracy"]
    assert (accuracy["global"], accuracy["local"], accuracy["worst"], accuracy["levels"]) == (None,) * 3 + (
        [],
    )
    assert 0.1 < accuracy["personal"]["last_exit"] < 1


@pytest.mark.parametrize("every", [1, 2])
def test_only_what_a_checkpoint_names_is_left(
    tmp_path: Path, undisturbed: Callable[[int], Path], every: int
) -> None:
    path = undisturbed(every)
    metas = checkpoints(path)
    assert [meta["rounds"] for meta in metas] == [4, 5]
    named = {
        f"{int(client):06d}/round-{at:05d}.safetensors"
        for meta in metas
        for client, at in meta["clients"].items()
    }
    assert files(path).keys() == named


def stopped_at(events: Iterator[Event], round: int, phase: str) -> None:
    """Reads events until ``round`` has begun a phase, or is done, and then no more."""
    for event in events:
        if isinstance(event, Working) and (event.round, event.phase) == (round, phase):
            break
        if isinstance(event, RoundDone) and phase == "done" and event.record["round"] == round:
            break
    else:
        raise AssertionError("the run came to its end")
    events.close()


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(("round", "phase"), [(2, "train"), (3, "evaluate"), (2, "done"), (3, "done")])
def test_an_interrupted_run_finds_its_clients_again(
    tmp_path: Path, undisturbed: Callable[[int], Path], every: int, round: int, phase: str
) -> None:
    """Before a round's clients have kept anything, after, and between rounds; `stop` is not called."""
    reference, path = undisturbed(every), tmp_path / "run"
    settings = config(tmp_path, f"checkpoint.every={every}")
    stopped_at(Driver(settings, RunFolder(path), InlinePools).run(), round, phase)
    run_here(settings, path, resume=True)
    assert outcome(path) == outcome(reference)
    assert files(path) == files(reference)


def test_a_crash_while_clients_are_being_kept(
    tmp_path: Path, undisturbed: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of the round's files are there, one is half written, others are missing."""
    reference, path, original, whole = undisturbed(1), tmp_path / "run", os.replace, list[Path]()

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == "round-00003.safetensors":
            if whole:
                raise KeyboardInterrupt
            whole.append(Path(target))
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            run_here(config(tmp_path), path)
    assert list((path / "clients").glob("*/round-00003*")) == whole
    run_here(config(tmp_path), path, resume=True)
    assert outcome(path) == outcome(reference)
    assert files(path) == files(reference)


def test_the_checkpoint_before_finds_its_clients_as_well(
    tmp_path: Path, undisturbed: Callable[[int], Path]
) -> None:
    """What the error message about a damaged checkpoint promises."""
    reference, path = undisturbed(1), tmp_path / "run"
    shutil.copytree(reference, path)
    shutil.rmtree(path / "checkpoints" / f"round-{ROUNDS:05d}")
    (path / "summary.json").unlink()
    run_here(config(tmp_path), path, resume=True)
    assert outcome(path) == outcome(reference)
    assert files(path) == files(reference)


def test_a_lost_file_is_said_and_not_made_up(tmp_path: Path, undisturbed: Callable[[int], Path]) -> None:
    reference, path = undisturbed(1), tmp_path / "run"
    shutil.copytree(reference, path)
    client, at = sorted(checkpoints(path)[-1]["clients"].items())[0]
    lost = path / "clients" / f"{int(client):06d}" / f"round-{at:05d}.safetensors"
    lost.unlink()
    with pytest.raises(RunError, match=rf"{lost.name} is missing"):
        run_here(config(tmp_path), path, resume=True)


def test_stopping_between_rounds_saves_the_clients_too(
    tmp_path: Path, undisturbed: Callable[[int], Path]
) -> None:
    reference, path = undisturbed(2), tmp_path / "run"
    settings = config(tmp_path, "checkpoint.every=2")
    driver = Driver(settings, RunFolder(path), InlinePools)
    stopped_at(driver.run(), 2, "done")
    assert driver.stop() == 3
    (_, meta) = checkpoints(path)
    assert meta["clients"] == {
        str(client): max(r for r in own if r < 3) for client, own in took_part(path).items()
    }
    run_here(settings, path, resume=True)
    assert outcome(path) == outcome(reference)


def test_stopping_inside_a_round_spares_what_the_round_has_kept(
    tmp_path: Path, undisturbed: Callable[[int], Path]
) -> None:
    """The round goes on beside `stop` and is committed: its clients' files must still be there."""
    reference, path = undisturbed(2), tmp_path / "run"
    driver = Driver(config(tmp_path, "checkpoint.every=2"), RunFolder(path), InlinePools)
    for event in driver.run():
        if isinstance(event, Working) and (event.round, event.phase, event.done) == (3, "evaluate", 0):
            assert driver.stop() == 3
    assert outcome(path) == outcome(reference)


def test_who_keeps_nothing_has_no_hash(tmp_path: Path) -> None:
    run_here(tiny(tmp_path, "rounds=1"), tmp_path / "run")
    assert outcome(tmp_path / "run")[1]["clients_sha256"] is None
    assert not (tmp_path / "run" / "clients").exists()

"""A client whose training diverges: left out and counted, under every method, or the end of the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.pools import InlinePools
from cluster_fl import methods
from cluster_fl.errors import RunError
from cluster_fl.experiment import prepare
from cluster_fl.records import weights_sha256
from cluster_fl.training import cohort, distillation
from cluster_fl.training.cohort import Cohort, Member, Update
from cluster_fl.training.program import Trained
from cluster_fl.training.worker import Worker
from tests.methods.common import small
from tests.tiny import outcome, run_here

Trains = Callable[[Cohort, Member, Worker, Mapping[str, np.ndarray]], tuple[Update, Trained]]
How = Callable[[Update, Trained], tuple[Update, Trained]]


def broken_update(update: Update, done: Trained) -> tuple[Update, Trained]:
    deltas = {name: np.full_like(delta, np.nan) for name, delta in update.deltas.items()}
    return dataclasses.replace(update, deltas=deltas), done


def broken_loss(update: Update, done: Trained) -> tuple[Update, Trained]:
    return update, dataclasses.replace(done, loss=float("nan"))


def broken_extra(update: Update, done: Trained) -> tuple[Update, Trained]:
    extra = {name: np.full_like(array, np.inf) for name, array in done.extra.items()}
    assert extra
    return update, dataclasses.replace(done, extra=extra)


def broken_personal(update: Update, done: Trained) -> tuple[Update, Trained]:
    personal = {
        name: np.full_like(array, np.nan) if array.dtype.kind == "f" else array
        for name, array in (done.personal or {}).items()
    }
    assert personal
    return update, dataclasses.replace(done, personal=personal)


def absent(update: Update, done: Trained) -> tuple[Update, Trained]:
    """As of a client that has no batch: nothing to say, and nothing new to keep."""
    return update, dataclasses.replace(done, steps=0, extra={}, personal=None)


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, How], None]:
    """From now on, what this client brings back is changed."""
    trains: Trains = cohort._train

    def change(client: int, how: How) -> None:
        def train(
            of: Cohort, member: Member, worker: Worker, state: Mapping[str, np.ndarray]
        ) -> tuple[Update, Trained]:
            update, done = trains(of, member, worker, state)
            return how(update, done) if member.client == client else (update, done)

        monkeypatch.setattr(cohort, "_train", train)

    return change


def run(folder: Path, method: str, *overrides: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Its rounds and its summary."""
    folder.mkdir(exist_ok=True)
    run_here(small(folder, method, "rounds=2", *overrides), folder / "run", InlinePools)
    return outcome(folder / "run")


def asked(record: dict[str, Any]) -> list[int]:
    return sorted(participant["client"] for participant in record["participants"])


def judged(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "refused"}


CASES = [
    *((name, broken_update, ()) for name in methods.NAMES),
    ("scalefl", broken_loss, ()),
    ("scaffold", broken_extra, ()),
    ("perfedavg", broken_personal, ("train.correction.name=feddyn",)),
    ("hermes", broken_personal, ()),
    (
        "fedavg",
        broken_update,
        ("time.policy.name=fedbuff", "time.policy.buffer=2", "time.policy.concurrency=4"),
    ),
]


@pytest.mark.parametrize(("method", "how", "overrides"), CASES)
def test_whoever_diverges_is_counted_and_as_if_it_had_not_trained(
    tmp_path: Path,
    breaking: Callable[[int, How], None],
    method: str,
    how: How,
    overrides: tuple[str, ...],
) -> None:
    calm, _ = run(tmp_path / "calm", method, *overrides)
    client = next(client for record in calm for client in asked(record))
    breaking(client, how)
    records, summary = run(tmp_path / "broken", method, *overrides)
    assert [record["refused"] for record in records] == [
        [client] if client in asked(record) else [] for record in records
    ]
    assert summary["refused"] == sum(len(record["refused"]) for record in records) > 0
    assert [judged(record) for record in records] != [judged(record) for record in calm]

    breaking(client, absent)
    others, without = run(tmp_path / "absent", method, *overrides)
    assert [judged(record) for record in records] == [judged(record) for record in others]
    assert judged(summary) == judged(without)


@pytest.mark.parametrize("policy", ["wait", "fedasync"])
def test_a_run_in_which_all_diverge_keeps_its_weights(tmp_path: Path, policy: str) -> None:
    records, summary = run(tmp_path, "scalefl", "train.lr=1e30", f"time.policy.name={policy}")
    assert all(record["refused"] == asked(record) and record["train_loss"] is None for record in records)
    start = prepare(small(tmp_path, "scalefl", "rounds=2", "train.lr=1e30")).initial_state()
    assert summary["weights_sha256"] == weights_sha256(start)


def test_asked_to_stop_it_stops_and_names_the_client(
    tmp_path: Path, breaking: Callable[[int, How], None]
) -> None:
    calm, _ = run(tmp_path / "calm", "scalefl")
    client = asked(calm[0])[0]
    breaking(client, broken_update)
    with pytest.raises(RunError, match=f"^round 0: training diverged on client {client} "):
        run(tmp_path / "stops", "scalefl", "train.on_nan=stop")


def test_a_teacher_that_answers_nonsense_teaches_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are in range, its logits are not."""
    calm, _ = run(tmp_path / "calm", "feddf")
    client, answers = asked(calm[0])[0], distillation.answers
    trained = distillation._trained
    wrong: list[Any] = []

    def note(worker: Worker, submodel: Any, update: Update, state: Any) -> Any:
        model = trained(worker, submodel, update, state)
        wrong[:] = [model] if update.client == client else []
        return model

    def answer(worker: Worker, model: Any, rows: np.ndarray, size: int) -> torch.Tensor:
        logits = answers(worker, model, rows, size)
        return logits * np.inf if wrong and wrong[0] is model else logits

    monkeypatch.setattr(distillation, "_trained", note)
    monkeypatch.setattr(distillation, "answers", answer)
    records, summary = run(tmp_path / "wrong", "feddf", "rounds=1")
    assert records[0]["refused"] == [client]
    assert summary["refused"] == 1
    with pytest.raises(RunError, match=f"^round 0: training diverged on client {client} "):
        run(tmp_path / "stops", "feddf", "rounds=1", "train.on_nan=stop")

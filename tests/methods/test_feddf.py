"""FedDF: the teachers' sum, what a student learns, and that it is Decoupled without distillation."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cluster_fl.errors import UserError
from cluster_fl.experiment import Experiment, prepare
from cluster_fl.merging import Merged, Phase
from cluster_fl.methods.feddf import Fusion
from cluster_fl.models.layered import Layered
from cluster_fl.nesting.extraction import load, read
from cluster_fl.nesting.plan import State
from cluster_fl.rounds import Round
from cluster_fl.training.cohort import Cohort, form
from cluster_fl.training.distillation import TEACHERS, Distillation, Teach, distil, divergence, public_rows
from cluster_fl.training.worker import Worker
from tests.tiny import outcome, planned, round_of, run_here, tiny, worker_of
from tests.tiny import results as run_phase

LEVELS = "levels.pairs=[{width: 0.5}, {width: 1.0}]"
FEDDF = ("method=feddf", LEVELS, "data.public=60", "options.steps=6", "options.batch_size=25")
BATCHES = (25, 25, 10)
CLIENTS = range(6)


def made(folder: Path, *overrides: str) -> Experiment:
    return prepare(tiny(folder, *FEDDF, *overrides))


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return made(tmp_path_factory.mktemp("feddf"))


def cohorts_of(experiment: Experiment, round: Round) -> list[Cohort]:
    return form(round, planned(round), experiment.program, experiment.merge.keeps_updates)


def play(experiment: Experiment, round: Round, workers: Iterator[Worker]) -> tuple[Merged, dict[str, Phase]]:
    """A round's merge, each phase on the next of ``workers``; what came out, and the phases by name."""
    phases, seen = experiment.merge.phases(round, cohorts_of(experiment, round)), {}
    phase = next(phases)
    while True:
        seen[phase.name], worker = phase, next(workers)
        results = run_phase(phase, worker)
        try:
            phase = phases.send(results)
        except StopIteration as end:
            return end.value, seen


def always(worker: Worker) -> Iterator[Worker]:
    while True:
        yield worker


def fresh(experiment: Experiment) -> Iterator[Worker]:
    while True:
        yield worker_of(experiment)


def bits(state: State) -> dict[str, bytes]:
    return {key: array.tobytes() for key, array in state.items()}


def test_without_steps_it_is_decoupled(tmp_path: Path) -> None:
    run_here(tiny(tmp_path, *FEDDF, "options.steps=0", "rounds=2"), tmp_path / "feddf")
    plain = ("method=decoupled", LEVELS, "data.public=60", "aggregation.weights=samples", "rounds=2")
    run_here(tiny(tmp_path, *plain), tmp_path / "decoupled")
    hashes = [outcome(tmp_path / name)[1]["weights_sha256"] for name in ("feddf", "decoupled")]
    assert hashes[0] == hashes[1]


def test_the_teachers_sum_is_that_of_the_clients_logits(experiment: Experiment) -> None:
    round, worker = round_of(experiment, clients=CLIENTS), worker_of(experiment)
    cohorts = cohorts_of(experiment, round)
    found = [Teach(cohort, 25, 0.0, 1.0).run(worker, round.state) for cohort in cohorts]
    rows = public_rows(experiment.config, experiment.population.shares, round.number)
    assert sorted(rows) == sorted(experiment.population.shares.public)
    assert not np.array_equal(rows, public_rows(experiment.config, experiment.population.shares, 1))
    logits = []
    for cohort in cohorts:
        for member in cohort.members:
            alone = replace(cohort, members=(member,), number=100 + member.client)
            alone.run(worker, round.state)
            model = copy.deepcopy(worker.module(member.submodel)).eval()  # as its training left it
            logits += [in_batches(model, worker, rows)]
    unit = cohorts[0].extra_weight
    assert len(logits) == sum(taught.teachers for taught in found) == len(CLIENTS)
    exact = sum(np.round(one * unit * 2.0**40) / 2.0**40 for one in logits)
    assert np.array_equal(sum(taught.logits for taught in found), exact)
    _, phases = play(experiment, round, always(worker))
    assert np.allclose(phases["distil"].state[TEACHERS], np.mean(logits, axis=0), atol=1e-6)


def in_batches(model: Layered, worker: Worker, rows: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        parts = np.split(rows, np.cumsum(BATCHES)[:-1])
        return torch.cat([model(worker.data.batch(part)[0])[-1] for part in parts]).double().numpy()


def test_the_same_bits_from_kept_updates_and_a_fresh_worker(experiment: Experiment) -> None:
    round = round_of(experiment, clients=CLIENTS)
    kept, _ = play(experiment, round, always(worker_of(experiment)))
    again, _ = play(experiment, round, fresh(experiment))
    assert bits(kept.state) == bits(again.state)
    assert bits(kept.state) != bits(round.state)


def test_nobody_reads_the_public_labels(experiment: Experiment) -> None:
    blind = copy.deepcopy(experiment)
    labels = experiment.dataset.labels.copy()
    labels[experiment.population.shares.public] = -1
    blind = replace(blind, dataset=replace(experiment.dataset, labels=labels))
    round = round_of(experiment, clients=CLIENTS)
    states = [play(one, round, always(worker_of(one)))[0].state for one in (experiment, blind)]
    assert bits(states[0]) == bits(states[1])


def test_a_level_without_clients_keeps_its_model(experiment: Experiment) -> None:
    clients = np.flatnonzero(experiment.plan.level_of == 1)[:2]
    round = round_of(experiment, clients=clients)
    merged, phases = play(experiment, round, always(worker_of(experiment)))
    assert len(phases["distil"].tasks) == 1
    changed = {key for key in merged.state if bits(merged.state)[key] != bits(round.state)[key]}
    assert changed == {key for key in merged.state if key.startswith("level.1/")}


def test_who_hardly_beats_chance_does_not_teach(tmp_path: Path) -> None:
    """Group norms, so that an accuracy does not depend on the batches."""
    experiment = made(tmp_path, "model.norm=group", "model.norm_groups=2")
    round, worker = round_of(experiment, clients=CLIENTS), worker_of(experiment)
    inputs, labels = worker.data.batch(np.concatenate(experiment.population.shares.held_out))
    rows = public_rows(experiment.config, experiment.population.shares, round.number)
    for cohort in cohorts_of(experiment, round):
        accuracies, logits = [], []
        for member in cohort.members:
            replace(cohort, members=(member,), number=100 + member.client).run(worker, round.state)
            model = copy.deepcopy(worker.module(member.submodel)).eval()
            accuracies.append(float((model(inputs)[-1].argmax(1) == labels).double().mean()))
            logits.append(in_batches(model, worker, rows) * cohort.extra_weight)
        for least in (*accuracies, 1.1):
            good = [one for accuracy, one in zip(accuracies, logits, strict=True) if accuracy >= least]
            found = Teach(cohort, 25, least, 1.0).run(worker, round.state)
            assert found.teachers == len(good)
            assert np.allclose(found.logits, sum(good, start=np.zeros_like(logits[0])), rtol=0, atol=1e-9)


def test_without_a_teacher_the_averages_stay(experiment: Experiment) -> None:
    round, worker = round_of(experiment, clients=CLIENTS), worker_of(experiment)
    merged, phases = play(merging(experiment, least=1.1), round, always(worker))
    assert "distil" not in phases
    plain, _ = play(merging(experiment, settings=Distillation(steps=0)), round, always(worker))
    assert bits(merged.state) == bits(plain.state)


def merging(experiment: Experiment, **changes: Any) -> Experiment:
    """The same experiment with another merge."""
    other = copy.copy(experiment)
    assert isinstance(experiment.merge, Fusion)
    other.__dict__["merge"] = replace(experiment.merge, **changes)
    return other


# What a student learns.


@pytest.fixture(scope="module")
def pupil(experiment: Experiment) -> tuple[Layered, torch.Tensor, torch.Tensor]:
    """A fresh student, samples, and what a trained model of the level says of them."""
    worker, round = worker_of(experiment), round_of(experiment, clients=CLIENTS)
    cohort = cohorts_of(experiment, round)[-1]
    student = worker.fresh(cohort.members[0].submodel)
    load(student, experiment.plan.holding(2).gather(round.state))
    cohort.run(worker, round.state)
    inputs = worker.data.batch(experiment.population.shares.public)[0]
    with torch.no_grad():
        logits = worker.module(cohort.members[0].submodel).train()(inputs)[-1]
    return student, inputs, logits


def taught(pupil: tuple[Layered, torch.Tensor, torch.Tensor], settings: Distillation, **more: Any) -> State:
    student, inputs, logits = pupil
    randomness = torch.Generator().manual_seed(3)
    return distil(copy.deepcopy(student), lambda rows: inputs[rows], logits, settings, randomness, 2, **more)


def distance(pupil: tuple[Layered, torch.Tensor, torch.Tensor], weights: State) -> float:
    """KL(teacher || student), mean over the samples."""
    student, inputs, logits = copy.deepcopy(pupil[0]), *pupil[1:]
    load(student, weights)
    with torch.no_grad():
        p, log_q = F.softmax(logits, 1), F.log_softmax(student(inputs)[-1], 1)
    return float((p * (p.log() - log_q)).sum(1).mean())


def test_a_student_moves_towards_its_teacher(pupil: tuple[Layered, torch.Tensor, torch.Tensor]) -> None:
    after = [read(pupil[0]), *(taught(pupil, Distillation(steps=n, batch_size=20)) for n in (5, 20, 80))]
    distances = [distance(pupil, weights) for weights in after]
    assert all(later < earlier for earlier, later in itertools.pairwise(distances))
    assert distances[-1] < 0.3 * distances[0]


def test_the_loss_is_the_divergence_from_the_teacher() -> None:
    student, teacher = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    p, q = (np.exp(one.numpy()) / np.exp(one.numpy()).sum(1, keepdims=True) for one in (teacher, student))
    assert float(divergence(student, teacher)) == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-5)


def test_the_best_student_is_returned(pupil: tuple[Layered, torch.Tensor, torch.Tensor]) -> None:
    seen: list[State] = []
    marks = [0.1, 0.5, 0.4, 0.5, 0.2]

    def accuracy(model: Layered) -> float:
        assert not model.training
        seen.append(read(model))
        return marks[len(seen) - 1]

    settings = Distillation(steps=9, batch_size=20, check_every=2)  # looks after 2, 4, 6, 8 and 9
    best = taught(pupil, settings, accuracy=accuracy)
    assert len(seen) == 5
    assert bits(best) == bits(seen[1])  # the first of equal ones
    assert bits(seen[1]) != bits(seen[3])


def test_a_student_stops_without_a_gain_and_may_stay_what_it_was(
    pupil: tuple[Layered, torch.Tensor, torch.Tensor],
) -> None:
    looks: list[float] = []

    def falling(model: Layered) -> float:
        looks.append(1.0 - 0.1 * len(looks))
        return looks[-1]

    settings = Distillation(steps=20, batch_size=20, check_every=2, patience=4)
    first = taught(pupil, settings, accuracy=falling)
    assert len(looks) == 3  # after 2, the best; after 4 and 6, four steps without a gain
    assert bits(first) != bits(read(pupil[0]))
    looks.clear()
    start = taught(pupil, replace(settings, count_start=True), accuracy=falling)
    assert len(looks) == 3  # at the start, the best; after 2 and 4
    assert bits(start) == bits(read(pupil[0]))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [(("data.public=0",), r"data\.public"), (("options.drop_worst=true", "data.held_out=0"), r"drop_worst")],
)
def test_what_it_cannot_do_without(tmp_path: Path, overrides: tuple[str, ...], key: str) -> None:
    with pytest.raises(UserError, match=key):
        made(tmp_path, *overrides)

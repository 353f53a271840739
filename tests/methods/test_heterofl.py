"""HeteroFL: masked cross-entropy, classifier rows, static norms and the "Local" test, against loops of our own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from torch import Tensor, nn

from cluster_fl import evaluation
from cluster_fl.aggregation.nested import aggregate
from cluster_fl.experiment import Experiment, prepare, tiers
from cluster_fl.models.layered import Layered
from cluster_fl.models.norm import Scaler
from cluster_fl.nesting.extraction import load
from cluster_fl.nesting.plan import State
from cluster_fl.rounds import Round
from cluster_fl.seeding import Purpose, generator
from cluster_fl.training.cohort import form
from cluster_fl.training.objectives import CrossEntropy, MaskedCrossEntropy
from cluster_fl.training.worker import Worker
from tests.tiny import assigned, outcome, run_here, select, tiny, worker_of

WIDTHS = "levels.pairs=[{width: 0.25}, {width: 0.5}, {}]"
CLASSES = 10


def made(folder: Path, *overrides: str) -> Experiment:
    return prepare(tiny(folder, "method=heterofl", WIDTHS, *overrides))


def view(experiment: Experiment, state: State, number: int = 0) -> Round:
    return Round(
        number, experiment.config, experiment.plan, experiment.population, state, {}, lambda client: {}
    )


def held_classes(experiment: Experiment, client: int) -> set[int]:
    rows = experiment.population.shares.train[client]
    return {int(label) for label in experiment.dataset.labels[rows]}


# Masked cross-entropy.


def test_masked_loss_by_hand() -> None:
    logits = torch.tensor([[2.0, -7.0, 0.5], [-1.0, 3.0, 0.25]], requires_grad=True)
    objective = MaskedCrossEntropy(torch.tensor([True, False, True]))
    masked = objective.masked(logits)
    assert masked.tolist() == [[2.0, 0.0, 0.5], [-1.0, 0.0, 0.25]]
    loss = objective([logits], torch.tensor([0, 2]), 0.0)
    totals = [math.exp(2) + 1 + math.exp(0.5), math.exp(-1) + 1 + math.exp(0.25)]
    expected = (math.log(totals[0]) - 2 + math.log(totals[1]) - 0.25) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[:, 1].tolist() == [0.0, 0.0]
    assert gradient[0, 2].item() == pytest.approx(math.exp(0.5) / totals[0] / 2, rel=1e-6)
    # Where all that the client has is unlikely, the absent class wins.
    assert objective.masked(torch.tensor([[-1.0, -9.0, -2.0]])).argmax().item() == 1


@pytest.mark.parametrize("has_class", [None, torch.ones(CLASSES, dtype=torch.bool)])
def test_with_all_classes_it_is_cross_entropy_to_the_bit(has_class: Tensor | None) -> None:
    torch.manual_seed(0)
    labels, values = torch.randint(0, CLASSES, (16,)), torch.randn(16, CLASSES)
    found = []
    for objective in (CrossEntropy(), MaskedCrossEntropy(has_class)):
        logits = values.clone().requires_grad_()
        loss = objective([logits], labels, 0.0)
        found.append((loss.item(), torch.autograd.grad(loss, logits)[0]))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


# Classifier rows.


def by_counting(experiment: Experiment, state: State, updates: list[Any]) -> State:
    """The mean over those who speak for an element, one client and one element's array after the other."""
    total = {key: np.zeros(array.shape) for key, array in state.items()}
    count = {key: np.zeros(array.shape) for key, array in state.items()}
    for update in updates:
        absent = sorted(set(range(CLASSES)) - held_classes(experiment, update.client))
        for name, delta in update.deltas.items():
            mine = np.zeros(state[name].shape, dtype=bool)
            mine[update.holding.where[name]] = True
            whole = np.zeros(state[name].shape)
            whole[update.holding.where[name]] = delta
            if name in ("head.linear.weight", "head.linear.bias"):
                mine[absent] = False
            total[name] += np.where(mine, whole, 0)
            count[name] += mine
    return {
        key: np.where(count[key] > 0, array + total[key] / np.maximum(count[key], 1), array)
        for key, array in state.items()
    }


@pytest.mark.parametrize("rows", [True, False])
def test_rows_of_absent_classes_are_not_spoken_for(rows: bool, tmp_path: Path) -> None:
    few = ("data.partition.name=classes", "data.partition.classes=[2]", "clients.per_round=3")
    experiment = made(tmp_path, *few, "train.cohort_size=4", f"options.label_rows={str(rows).lower()}")
    worker, state = worker_of(experiment), experiment.initial_state()
    round = select(view(experiment, state))
    cohorts = form(round, assigned(round, experiment.allocation, experiment.rule), experiment.program, True)
    after = aggregate(state, [one.run(worker, state).partial for one in cohorts])
    spoken = set().union(*(held_classes(experiment, int(client)) for client in round.participants))
    nobodys = sorted(set(range(CLASSES)) - spoken)
    assert nobodys
    for name in ("head.linear.weight", "head.linear.bias"):
        # Without rows of their own, the mask alone holds them: their gradient is zero, and nothing decays.
        assert np.array_equal(after[name][nobodys], state[name][nobodys])
        assert not np.array_equal(after[name][sorted(spoken)], state[name][sorted(spoken)])
    expected = by_counting(experiment, state, [u for one in cohorts for u in one.updates(worker, state)])
    same = {key: np.allclose(after[key], expected[key], rtol=0, atol=1e-7) for key in state}
    assert all(same[key] for key in state if not key.startswith("head.linear"))
    assert (same["head.linear.weight"] and same["head.linear.bias"]) == rows


def test_weight_decay_of_rows_that_nobody_has_does_not_arrive(tmp_path: Path) -> None:
    few = ("data.partition.name=classes", "data.partition.classes=[1]", "clients.per_round=2")
    experiment = made(tmp_path, *few, "train.weight_decay=0.1", "rounds=1")
    run_here(experiment.config, tmp_path / "run")
    before = experiment.initial_state()["head.linear.weight"]
    after = load_file(tmp_path / "run/checkpoints/round-00001/state.safetensors")["head.linear.weight"]
    who = select(view(experiment, {})).participants
    mine = set().union(*(held_classes(experiment, int(client)) for client in who))
    assert {row for row in range(CLASSES) if not np.array_equal(after[row], before[row])} == mine


# Evaluation: static norms and the local test.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Worker, State]:
    """An experiment of clients with three classes each, and the weights after one round."""
    few = ("data.partition.name=classes", "data.partition.classes=[3]", "train.batch_size=32")
    experiment = made(tmp_path_factory.mktemp("tiny"), *few)
    worker, state = worker_of(experiment), experiment.initial_state()
    round = select(view(experiment, state))
    cohorts = form(round, assigned(round, experiment.allocation, experiment.rule), experiment.program, False)
    return experiment, worker, aggregate(state, [one.run(worker, state).partial for one in cohorts])


def level_module(experiment: Experiment, worker: Worker, state: State, level: int) -> Layered:
    model = worker.fresh(experiment.plan.level(level).submodel)
    load(model, experiment.plan.holding(level).gather(state))
    for module in model.modules():
        if isinstance(module, Scaler):
            module.scale = 1.0
    return model


def statistics_by_loop(
    experiment: Experiment, worker: Worker, state: State, level: int
) -> dict[str, np.ndarray]:
    """Mean over the batches of the pooled training samples of the batch mean and the unbiased variance."""
    model = level_module(experiment, worker, state, level).train()
    seen: dict[str, list[np.ndarray]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            own = seen.setdefault(name, [])
            module.register_forward_pre_hook(
                lambda _, inputs, own=own: own.append(inputs[0].double().numpy())
            )
    pooled = np.concatenate(experiment.population.shares.train)
    pooled = generator(0, Purpose.STATISTICS, 0).permutation(pooled)
    with torch.no_grad():
        for start in range(0, len(pooled), 32):
            model(worker.data.batch(pooled[start : start + 32])[0])
    found = {}
    for name, batches in seen.items():
        found[f"{name}.running_mean"] = np.mean([x.mean(axis=(0, 2, 3)) for x in batches], axis=0)
        found[f"{name}.running_var"] = np.mean([x.var(axis=(0, 2, 3), ddof=1) for x in batches], axis=0)
    return found


def normalising_by(model: nn.Module, statistics: dict[str, np.ndarray]) -> nn.Module:
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = True
            module.running_mean = torch.tensor(statistics[f"{name}.running_mean"]).float()
            module.running_var = torch.tensor(statistics[f"{name}.running_var"]).float()
    return model.eval()


def test_static_statistics_through_the_whole_evaluation(
    trained: tuple[Experiment, Worker, State], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are what the loop finds, whatever the Scaler of training is, and evaluation answers by them."""
    monkeypatch.setattr(evaluation, "BATCHES_PER_TASK", 15)
    experiment, worker, state = trained
    assert [level.submodel.scale for level in experiment.plan.levels] == [0.25, 0.5, 1.0]
    round = view(experiment, state)
    served = experiment.rule.serve(round)
    tasks = evaluation.collections(round, served)
    assert len(tasks) == 3 * 3
    found = evaluation.combine([task.run(worker, state) for task in tasks])
    everyone = list(range(experiment.config.clients.count))
    counts = [t.run(worker, state) for t in evaluation.evaluations(round, served, everyone, "test", found)]
    for level in (1, 2, 3):
        expected = statistics_by_loop(experiment, worker, state, level)
        assert expected.keys() == found[level].keys()
        for name, values in expected.items():
            np.testing.assert_allclose(found[level][name], values, rtol=1e-4, atol=1e-5)
        model = normalising_by(level_module(experiment, worker, state, level), expected)
        own = [part for part in counts if part.level == level]
        for client, correct in (
            (c, n) for part in own for c, n in zip(part.clients, part.correct, strict=True)
        ):
            inputs, labels = worker.data.batch(experiment.population.shares.test[client])
            with torch.no_grad():
                assert int((model(inputs)[-1].argmax(1) == labels).sum()) == correct[-1]


def test_training_hardly_knows_the_scaler(trained: tuple[Experiment, Worker, State]) -> None:
    """In front of a norm by the batch it only moves the norm's epsilon (E11)."""
    experiment, worker, state = trained
    inputs = worker.data.batch(experiment.population.shares.test[0])[0]
    with torch.no_grad():
        plain = level_module(experiment, worker, state, 1).train()(inputs)[-1]
        scaled = worker.fresh(experiment.plan.level(1).submodel).train()
        load(scaled, experiment.plan.holding(1).gather(state))
        assert any(isinstance(module, Scaler) and module.scale == 0.25 for module in scaled.modules())
        assert 0 < (scaled(inputs)[-1] - plain).abs().max().item() < 1e-3


def test_local_is_the_global_model_with_each_clients_mask(
    trained: tuple[Experiment, Worker, State],
) -> None:
    experiment, worker, state = trained
    round = view(experiment, state)
    served = experiment.rule.serve(round)
    tasks = evaluation.collections(round, served)
    statistics = evaluation.combine([task.run(worker, state) for task in tasks])
    clients = range(experiment.config.clients.count)
    counts = [
        task.run(worker, state)
        for task in evaluation.personal_evaluations(
            round, experiment.program, served, list(clients), "test", statistics
        )
    ]
    model = normalising_by(
        level_module(experiment, worker, state, 3), {n: v.astype(float) for n, v in statistics[3].items()}
    )
    expected = []
    for client in clients:
        inputs, labels = worker.data.batch(experiment.population.shares.test[client])
        with torch.no_grad():
            logits = model(inputs)[-1]
        for absent in set(range(CLASSES)) - held_classes(experiment, client):
            logits[:, absent] = 0.0
        expected.append(int((logits.argmax(1) == labels).sum()))
    assert [int(n) for part in counts for n in part.correct[:, -1]] == expected


def test_without_the_mask_there_is_no_local_test(tmp_path: Path) -> None:
    assert not made(tmp_path, "options.mask=false").program.personalises


# Levels.


def test_fixed_and_dynamic_levels(tmp_path: Path) -> None:
    fixed = tiny(
        tmp_path, "method=heterofl", WIDTHS, "levels.order=falling", "clients={count: 100, per_round: 10}"
    )
    assert np.bincount(tiers(fixed)).tolist() == [0, 34, 33, 33]
    assert tiers(fixed).tolist() == [3] * 33 + [2] * 33 + [1] * 34
    dynamic = made(tmp_path, "levels.draw=dynamic", "levels.shares=[0.25,0.25,0.5]")
    rounds = [select(view(dynamic, {}, number)) for number in range(100)]
    drawn = [dynamic.allocation(round) for round in rounds]
    assert np.bincount(np.concatenate(drawn), minlength=4)[1:] / 600 == pytest.approx(
        [0.25, 0.25, 0.5], abs=0.06
    )
    mine = {int(levels[0]) for levels, round in zip(drawn, rounds, strict=True) if round.participants[0] == 0}
    assert mine == {1, 2, 3}


# FedAvg.


@pytest.mark.parametrize(
    "changes",
    [
        ("levels.pairs=[{}]", "options={mask: false, label_rows: false, scaler: false}"),
        (WIDTHS, "levels.shares=[0,0,1]", "options={mask: false, label_rows: false, scaler: false}"),
        (WIDTHS, "levels.shares=[0,0,1]"),  # here every client has every class, and the full width is 1
    ],
)
def test_clients_of_full_width_make_it_fedavg(changes: tuple[str, ...], tmp_path: Path) -> None:
    common = ("rounds=2", "model.norm=static", "train.clip_norm=1.0", "evaluate.every=2")
    run_here(tiny(tmp_path, "method=heterofl", *common, *changes), tmp_path / "ours")
    uniform = ("method=fedavg", "aggregation.weights=uniform", "levels.pairs=[{}]")
    run_here(tiny(tmp_path, *common, *uniform), tmp_path / "fedavg")
    ours, fedavg = outcome(tmp_path / "ours")[1], outcome(tmp_path / "fedavg")[1]
    assert ours["weights_sha256"] == fedavg["weights_sha256"]
    assert ours["accuracy"]["global"] == fedavg["accuracy"]["global"]


def test_variants_change_nothing(tmp_path: Path) -> None:
    configs = [tiny(tmp_path, "method=heterofl", WIDTHS, f"variant={v}") for v in ("paper", "released")]
    for config in configs:
        assert (config.model.norm, config.train.clip_norm) == ("static", 1.0)
        assert (config.levels.rounding, config.aggregation.weights) == ("ceil", "uniform")


def test_masked_loss_is_what_clients_train(tmp_path: Path) -> None:
    """The reported loss of a client without a step size is its masked loss at the received weights."""
    few = ("data.partition.name=classes", "data.partition.classes=[2]", "train.lr=0", "model.norm=none")
    experiment = made(tmp_path, *few, "clients.per_round=1", "train.batch_size=1000")
    worker, state = worker_of(experiment), experiment.initial_state()
    round = select(view(experiment, state))
    (cohort,) = form(
        round, assigned(round, experiment.allocation, experiment.rule), experiment.program, False
    )
    (loss,) = cohort.run(worker, state).report.losses
    model = worker.fresh(cohort.members[0].submodel).train()
    load(model, experiment.plan.holding(cohort.level).gather(state))
    client = cohort.clients[0]
    inputs, labels = worker.data.batch(experiment.population.shares.train[client])
    with torch.no_grad():
        logits = model(inputs)[-1]
    absent = sorted(set(range(CLASSES)) - held_classes(experiment, client))
    logits[:, absent] = 0.0
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)

"""The accuracy block against loops over clients and samples, and what evaluation must not let through."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from cluster_fl import evaluation
from cluster_fl.aggregation.nested import aggregate
from cluster_fl.data.partition import Shares
from cluster_fl.evaluation import (
    PERSONAL,
    Collect,
    Counts,
    Evaluate,
    accuracy,
    collections,
    combine,
    evaluations,
    personal_evaluations,
)
from cluster_fl.experiment import Experiment, prepare
from cluster_fl.models.layered import Layered
from cluster_fl.nesting.extraction import load
from cluster_fl.nesting.plan import Level, Plan, State
from cluster_fl.nesting.submodel import Submodel
from cluster_fl.seeding import Purpose, generator, torch_generator
from cluster_fl.training.cohort import Cohort, form
from cluster_fl.training.program import Answer, Context, LocalProgram, Trained
from cluster_fl.training.worker import Worker
from tests.tiny import LEVELS, lines, planned, round_of, run_here, tiny, worker_of

CLIENTS = 8
BATCH = 30  # so that a client's 45 or so test samples are two batches


@pytest.fixture(scope="module", params=["batch", "static", "per_level"])
def experiment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("tiny")
    return prepare(tiny(folder, f"model.norm={request.param}", f"evaluate.batch_size={BATCH}"))


@pytest.fixture(scope="module")
def worker(experiment: Experiment) -> Worker:
    return worker_of(experiment)


@pytest.fixture(scope="module")
def state(experiment: Experiment, worker: Worker) -> State:
    """Weights after one round, so that answers differ from client to client."""
    start = experiment.initial_state()
    return aggregate(start, [one.run(worker, start).partial for one in cohorts(experiment)])


@pytest.fixture(scope="module")
def statistics(experiment: Experiment, worker: Worker, state: State) -> dict[int, evaluation.Statistics]:
    tasks = collections(round_of(experiment), served(experiment))
    return combine([task.run(worker, state) for task in tasks])


def served(experiment: Experiment) -> list[Submodel]:
    return [level.submodel for level in experiment.plan.levels]


def cohorts(experiment: Experiment, number: int = 0) -> list[Cohort]:
    """Everybody's, in a round."""
    round = round_of(experiment, number=number, clients=range(CLIENTS))
    return form(round, planned(round), experiment.program, keep=False)


def table(
    experiment: Experiment,
    clients: Iterable[int],
    part: str,
    statistics: dict[int, evaluation.Statistics],
    shares: Shares | None = None,
) -> list[Evaluate]:
    """The tasks that fill the table, over these samples."""
    population = dataclasses.replace(experiment.population, shares=shares or experiment.population.shares)
    round = dataclasses.replace(round_of(experiment), population=population)
    return evaluations(round, served(experiment), list(clients), part, statistics)


def level_model(
    experiment: Experiment, worker: Worker, state: State, level: int, stats: evaluation.Statistics | None
) -> nn.Module:
    model = worker.fresh(experiment.plan.level(level).submodel)
    load(model, experiment.plan.holding(level).gather(state))
    for name, module in model.named_modules():
        if stats is not None and isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = True
            module.running_mean = torch.from_numpy(stats[f"{name}.running_mean"])
            module.running_var = torch.from_numpy(stats[f"{name}.running_var"])
    return model.eval()


def share_right(model: nn.Module, worker: Worker, rows: np.ndarray) -> list[float]:
    """Per exit the share of ``rows`` that it answers right, in batches of BATCH, the remainder last."""
    right: list[list[bool]] = []
    with torch.no_grad():
        for start in range(0, len(rows), BATCH):
            images, labels = worker.data.batch(rows[start : start + BATCH])
            answers = [logits.argmax(dim=1) for logits in model(images)]
            for sample in range(len(labels)):
                right.append([bool(answer[sample] == labels[sample]) for answer in answers])
    return [sum(column) / len(rows) for column in zip(*right, strict=True)]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def brute_force(
    experiment: Experiment, worker: Worker, state: State, stats: dict[int, evaluation.Statistics], part: str
) -> dict[str, Any]:
    rows = getattr(experiment.population.shares, part)
    table: dict[tuple[int, int], list[float]] = {}
    for level in range(1, LEVELS + 1):
        model = level_model(experiment, worker, state, level, stats.get(level))
        for client in range(CLIENTS):
            table[level, client] = share_right(model, worker, rows[client])
    level_of = experiment.plan.level_of
    kinds = {"last_exit": lambda exits: exits[-1], "exit_mean": mean}
    levels = [
        {kind: mean([of(table[level, client]) for client in range(CLIENTS)]) for kind, of in kinds.items()}
        for level in range(1, LEVELS + 1)
    ]
    own = [table[int(level_of[client]), client] for client in range(CLIENTS)]
    return {
        "levels": levels,
        "personal": None,
        "global": levels[-1],
        "worst": {kind: min(level[kind] for level in levels) for kind in kinds},
        "local": {kind: mean([of(exits) for exits in own]) for kind, of in kinds.items()},
    }


@pytest.mark.parametrize("part", ["test", "held_out"])
def test_equals_the_loops(
    experiment: Experiment,
    worker: Worker,
    state: State,
    statistics: dict[int, evaluation.Statistics],
    part: str,
) -> None:
    tasks = table(experiment, range(CLIENTS), part, statistics)
    found = accuracy(experiment.plan, [task.run(worker, state) for task in tasks])
    expected = brute_force(experiment, worker, state, statistics, part)
    assert found.keys() == expected.keys()
    assert found["personal"] is None
    for name in ("global", "local", "worst"):
        assert found[name] == pytest.approx(expected[name], rel=1e-12)
    for level, reference in zip(found["levels"], expected["levels"], strict=True):
        assert level == pytest.approx(reference, rel=1e-12)
    assert found["global"]["last_exit"] > 0.2  # it has learnt something: the table is not one of zeros
    assert found["global"]["last_exit"] != found["global"]["exit_mean"]


def test_company_does_not_show(
    experiment: Experiment,
    worker: Worker,
    state: State,
    statistics: dict[int, evaluation.Statistics],
) -> None:
    for level in range(1, LEVELS + 1):
        counts = {
            clients: Evaluate(
                level, experiment.plan.level(level).submodel, clients, "test", 1.0, statistics.get(level)
            ).run(worker, state)
            for clients in [tuple(range(CLIENTS)), (5, 0, 3), *((c,) for c in range(CLIENTS))]
        }
        for clients, found in counts.items():
            assert found.clients == clients
            for position, client in enumerate(clients):
                assert found.correct[position].tolist() == counts[client,].correct[0].tolist()
                assert found.samples[position] == len(experiment.population.shares.test[client])


def test_the_state_is_not_written(
    experiment: Experiment, worker: Worker, state: State, statistics: dict[int, evaluation.Statistics]
) -> None:
    before = {name: array.tobytes() for name, array in state.items()}
    for task in table(experiment, [0, 1], "test", statistics):
        task.run(worker, state)
    for collect in collections(round_of(experiment), served(experiment)):
        collect.run(worker, state)
    assert {name: array.tobytes() for name, array in state.items()} == before


def test_evaluation_leaves_no_trace_in_training(
    experiment: Experiment, worker: Worker, state: State, statistics: dict[int, evaluation.Statistics]
) -> None:
    """A pool evaluates and trains with the same modules."""
    (cohort, *_) = cohorts(experiment, number=3)
    before = cohort.run(worker_of(experiment), state)
    for task in table(experiment, [0, 1], "test", statistics):
        task.run(worker, state)
    after = cohort.run(worker, state)
    assert after.report.losses == before.report.losses
    assert all(after.partial.updates[n].tobytes() == u.tobytes() for n, u in before.partial.updates.items())


@pytest.mark.parametrize("samples", [0, 1, 2])
def test_clients_with_hardly_any_samples(
    experiment: Experiment,
    state: State,
    statistics: dict[int, evaluation.Statistics],
    samples: int,
) -> None:
    shares = experiment.population.shares
    few = dataclasses.replace(shares, test=(shares.test[0][:samples], *shares.test[1:]))
    worker = worker_of(experiment, few)
    tasks = table(experiment, range(CLIENTS), "test", statistics, few)
    found = [task.run(worker, state) for task in tasks]
    normalised = experiment.plan.evaluates_batches and samples == 1  # one sample has no variance
    for counts in found:
        if 0 in counts.clients:
            assert counts.samples[counts.clients.index(0)] == (0 if normalised else samples)
    block = accuracy(experiment.plan, found)
    if samples == 0:
        rest = table(experiment, range(1, CLIENTS), "test", statistics, few)
        assert block == accuracy(experiment.plan, [t.run(worker, state) for t in rest])


def test_every_client_and_level_is_evaluated_once(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "SAMPLES_PER_TASK", 100)
    tasks = table(experiment, [6, 1, 4], "test", {})
    pairs = [(task.level, client) for task in tasks for client in task.clients]
    assert sorted(pairs) == [(level, client) for level in range(1, LEVELS + 1) for client in (1, 4, 6)]
    assert len(tasks) > LEVELS
    assert all(task.work > 0 for task in tasks)


# Fake counts: the arithmetic alone.


def counts(level: int, rights: dict[int, list[int]], samples: int = 100) -> Counts:
    correct = np.array(list(rights.values()))
    return Counts(level, tuple(rights), correct, np.full(len(rights), samples))


def at_levels(experiment: Experiment, *level_of: int, **changes: Any) -> Plan:
    """The plan with as many clients, each at the given level."""
    return dataclasses.replace(experiment.plan, level_of=np.array(level_of), **changes)


def test_the_last_exit_alone_right(experiment: Experiment) -> None:
    block = accuracy(at_levels(experiment, LEVELS), [counts(LEVELS, {0: [0, 0, 0, 100]})])
    assert block["global"] == {"last_exit": 1.0, "exit_mean": 0.25}
    assert block["local"] == block["global"]
    assert block["levels"] == [{"last_exit": None, "exit_mean": None}] * (LEVELS - 1) + [block["global"]]
    assert block["worst"] == block["global"]


def test_local_takes_each_clients_own_level(experiment: Experiment) -> None:
    rows = {1: [10, 20, 30, 40], 2: [50, 60, 70, 80], 3: [90, 91, 92, 93]}
    parts = [counts(level, {c: [hits] for c, hits in enumerate(row)}) for level, row in rows.items()]
    block = accuracy(at_levels(experiment, 1, 2, 3, 3), parts)
    assert block["global"]["last_exit"] == pytest.approx((0.9 + 0.91 + 0.92 + 0.93) / 4)
    assert block["local"]["last_exit"] == pytest.approx((0.1 + 0.6 + 0.92 + 0.93) / 4)
    assert block["worst"]["last_exit"] == pytest.approx(0.25)


def test_where_everyone_is_at_the_top_local_is_global(experiment: Experiment) -> None:
    parts = [counts(level, {c: [level * 7 + c, level * 9 - c] for c in range(5)}) for level in (1, 2, 3)]
    block = accuracy(at_levels(experiment, *[LEVELS] * 5), parts)
    assert block["local"] == block["global"]


def test_clients_weigh_the_same_whatever_they_hold(experiment: Experiment) -> None:
    parts = [Counts(1, (0, 1), np.array([[1], [90]]), np.array([2, 100]))]
    assert accuracy(at_levels(experiment, 1, 1), parts)["levels"][0]["last_exit"] == pytest.approx(0.7)


def test_without_samples_a_client_is_left_out(experiment: Experiment) -> None:
    some = [Counts(1, (0, 1), np.array([[0], [90]]), np.array([0, 100]))]
    assert accuracy(at_levels(experiment, 1, 1), some)["local"]["last_exit"] == pytest.approx(0.9)
    none = [Counts(1, (0, 1), np.zeros((2, 1), dtype=np.int64), np.zeros(2, dtype=np.int64))]
    block = accuracy(at_levels(experiment, 1, 1), none)
    nothing = {"last_exit": None, "exit_mean": None}
    rows = {"global": nothing, "local": nothing, "worst": nothing, "personal": None}
    assert block == rows | {"levels": [nothing] * LEVELS}


def test_order_of_the_parts_does_not_show(experiment: Experiment) -> None:
    parts = [counts(level, {c: [level * 7 + c]}) for level in (1, 2, 3) for c in range(7)]
    plan = at_levels(experiment, 1, 1, 2, 2, 3, 3, 3)
    assert accuracy(plan, parts) == accuracy(plan, parts[::-1])


def test_a_run_without_held_out_samples_says_so(tmp_path: Path) -> None:
    run_here(tiny(tmp_path, "data.held_out=0", "rounds=1"), tmp_path / "run")
    (record,) = lines(tmp_path / "run")
    assert record["accuracy"]["global"] == {"last_exit": None, "exit_mean": None}


def test_without_a_global_model(experiment: Experiment) -> None:
    """Decoupled levels: everything but the global row."""
    parts = [counts(level, {0: [10 * level], 1: [20 * level]}) for level in (1, 2, 3)]
    block = accuracy(at_levels(experiment, 1, 3, global_level=None), parts)
    assert block["global"] is None
    assert block["local"]["last_exit"] == pytest.approx((0.1 + 0.6) / 2)
    assert block["worst"]["last_exit"] == pytest.approx(0.15)
    assert len(block["levels"]) == 3


def test_where_only_clients_have_models(experiment: Experiment) -> None:
    plan = at_levels(experiment, 1, 3, 2, global_level=None, serves=False)
    block = accuracy(plan, [counts(PERSONAL, {0: [10, 20], 2: [30, 60]}), counts(PERSONAL, {1: [0, 100]})])
    assert block == {
        "global": None,
        "local": None,
        "worst": None,
        "personal": {"last_exit": pytest.approx(0.6), "exit_mean": pytest.approx((0.15 + 0.45 + 0.5) / 3)},
        "levels": [],
    }


def test_the_personal_row_stands_beside_the_others(experiment: Experiment) -> None:
    parts = [counts(3, {0: [50], 1: [70]}), counts(PERSONAL, {0: [90], 1: [100]})]
    block = accuracy(at_levels(experiment, 3, 3), parts)
    assert block["personal"]["last_exit"] == pytest.approx(0.95)
    assert block["global"]["last_exit"] == block["local"]["last_exit"] == pytest.approx(0.6)
    assert block["worst"]["last_exit"] == pytest.approx(0.6)


# Personal models.


class Answers(LocalProgram):
    """A client's model gives one class at each exit, whatever it sees: those that the client has kept."""

    personalises = True

    def __init__(self) -> None:
        self.seen: list[Context] = []

    def train(self, model: Layered, context: Context) -> Trained:
        raise AssertionError("nothing is trained here")

    def personal_level(self, own: int) -> int:
        return min(own + 1, LEVELS)

    def personalise(self, model: Layered, context: Context) -> Answer:
        self.seen.append(context)
        classes = [int(c) for c in context.personal["classes"]]
        return lambda inputs: [one_hot(torch.full((len(inputs),), c), 10).float() for c in classes]


class Same(LocalProgram):
    """A client's model is that of its level."""

    personalises = True

    def train(self, model: Layered, context: Context) -> Trained:
        raise AssertionError("nothing is trained here")


def personal_parts(
    experiment: Experiment,
    state: State,
    program: LocalProgram,
    statistics: dict[int, evaluation.Statistics],
    kept: dict[int, State] | None = None,
) -> list[Counts]:
    worker = worker_of(experiment)
    worker.program = program
    round = dataclasses.replace(
        round_of(experiment, state, number=2), personal=lambda client: (kept or {}).get(client, {})
    )
    everyone = np.arange(CLIENTS)
    tasks = personal_evaluations(round, program, served(experiment), everyone, "test", statistics)
    assert sorted(client for task in tasks for client in task.clients) == everyone.tolist()
    assert all(task.work > 0 for task in tasks)
    return [task.run(worker, state) for task in tasks]


def test_personal_models_are_made_of_what_clients_kept(
    experiment: Experiment, state: State, statistics: dict[int, evaluation.Statistics]
) -> None:
    program, plan = Answers(), experiment.plan
    kept = {client: {"classes": np.array([client, 9 - client])} for client in range(CLIENTS)}
    parts = personal_parts(experiment, state, program, statistics, kept)
    tests = [experiment.dataset.labels[rows] for rows in experiment.population.shares.test]
    shares = [[np.mean(labels == c), np.mean(labels == 9 - c)] for c, labels in enumerate(tests)]
    assert accuracy(plan, parts)["personal"] == {
        "last_exit": pytest.approx(np.mean([share[1] for share in shares])),
        "exit_mean": pytest.approx(np.mean(shares)),
    }
    for context in program.seen:
        level = min(int(plan.level_of[context.client]) + 1, LEVELS)
        assert (context.level, context.submodel) == (plan.level(level), plan.level(level).submodel)
        assert context.personal is kept[context.client]
        assert context.round == 2
        seed = torch_generator(experiment.config.seed, Purpose.EVALUATE, 2, context.client).initial_seed()
        assert context.generator.initial_seed() == seed
        received = plan.holding(level).gather(state)
        assert all(context.received[name].tobytes() == array.tobytes() for name, array in received.items())


def test_who_keeps_its_levels_model_answers_as_its_level(
    experiment: Experiment,
    worker: Worker,
    state: State,
    statistics: dict[int, evaluation.Statistics],
) -> None:
    parts = personal_parts(experiment, state, Same(), statistics)
    parts += [task.run(worker, state) for task in table(experiment, range(CLIENTS), "test", statistics)]
    block = accuracy(experiment.plan, parts)
    assert block["personal"] == block["local"]
    assert block["personal"] != block["global"]


def test_no_personal_models_no_tasks(experiment: Experiment) -> None:
    round = round_of(experiment)
    assert personal_evaluations(round, experiment.program, served(experiment), [0, 1], "test", {}) == []


# Static batch norm.


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Worker]:
    experiment = prepare(tiny(tmp_path_factory.mktemp("tiny"), "model.norm=static", "data.held_out=1100"))
    return experiment, worker_of(experiment)


def inputs_of_norms(model: nn.Module) -> dict[str, list[np.ndarray]]:
    """A list for each batch norm, by name, to which every forward adds what the norm was given."""
    seen: dict[str, list[np.ndarray]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            own = seen.setdefault(name, [])
            module.register_forward_pre_hook(
                lambda _, inputs, own=own: own.append(inputs[0].double().numpy())
            )
    return seen


def test_static_statistics_are_the_mean_over_all_batches(
    static: tuple[Experiment, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "BATCHES_PER_TASK", 4)
    experiment, worker = static
    state, size = experiment.initial_state(), 32
    config = dataclasses.replace(
        experiment.config, train=dataclasses.replace(experiment.config.train, batch_size=size)
    )
    round = dataclasses.replace(round_of(experiment, number=5), config=config)
    tasks = collections(round, served(experiment))
    found = combine([task.run(worker, state) for task in tasks])
    rows = np.concatenate(experiment.population.shares.train)
    rows = generator(0, Purpose.STATISTICS, 5).permutation(rows)
    assert len(rows) == 337  # ten batches of 32, and 17 more
    assert len(tasks) == LEVELS * 3

    for level in range(1, LEVELS + 1):
        model = worker.fresh(experiment.plan.level(level).submodel).train()
        load(model, experiment.plan.holding(level).gather(state))
        seen = inputs_of_norms(model)
        with torch.no_grad():
            for start in range(0, len(rows), size):
                model(worker.data.batch(rows[start : start + size])[0])
        assert {f"{n}.{leaf}" for n in seen for leaf in ("running_mean", "running_var")} == set(found[level])
        for name, batches in seen.items():
            assert len(batches) == 11
            means = np.mean([batch.mean(axis=(0, 2, 3)) for batch in batches], axis=0)
            variances = np.mean([batch.var(axis=(0, 2, 3), ddof=1) for batch in batches], axis=0)
            for leaf, expected in (("running_mean", means), ("running_var", variances)):
                array = found[level][f"{name}.{leaf}"]
                assert array.dtype == np.float32
                np.testing.assert_allclose(array, expected, rtol=2.0**-18, atol=2.0**-18)


def test_combine_is_a_mean_weighted_by_batches() -> None:
    parts = [
        (1, 3, {"a": np.array([1.0, 2.0])}),
        (2, 1, {"a": np.array([5.0])}),
        (1, 1, {"a": np.array([3.0, 6.0])}),
    ]
    found = combine(parts)
    assert {level: stats["a"].tolist() for level, stats in found.items()} == {1: [1.5, 3.0], 2: [5.0]}


def test_only_static_norm_collects(experiment: Experiment) -> None:
    tasks = collections(round_of(experiment), served(experiment))
    assert bool(tasks) == (experiment.plan.model.norm == "static")
    assert all(isinstance(task, Collect) and task.work > 0 for task in tasks)


def statistics_with(
    experiment: Experiment, state: State, program: LocalProgram | None = None
) -> dict[int, evaluation.Statistics]:
    worker = worker_of(experiment)
    worker.program = program or experiment.program
    return combine(
        [task.run(worker, state) for task in collections(round_of(experiment), served(experiment))]
    )


class Noisy(Same):
    """In train mode alone, the model sees nothing."""

    def deploy(self, model: Layered, level: Level) -> None:
        model.stem.register_forward_pre_hook(lambda stem, inputs: (0 * inputs[0],) if stem.training else None)


class Doubled(Same):
    """What answers is not what was loaded."""

    def deploy(self, model: Layered, level: Level) -> None:
        with torch.no_grad():
            model.get_parameter("stem.conv.weight").mul_(2)


def bits(statistics: dict[int, evaluation.Statistics]) -> dict[int, dict[str, bytes]]:
    return {level: {name: a.tobytes() for name, a in own.items()} for level, own in statistics.items()}


def test_statistics_are_those_of_evaluation(static: tuple[Experiment, Worker]) -> None:
    """Only norms are in train mode; and they are collected of the model that answers."""
    experiment, _ = static
    state = experiment.initial_state()
    plain = statistics_with(experiment, state)
    assert bits(statistics_with(experiment, state, Noisy())) == bits(plain)
    doubled = statistics_with(experiment, state, Doubled())
    for level in range(1, LEVELS + 1):
        expected = 2 * plain[level]["stem.bn.running_mean"]
        np.testing.assert_allclose(doubled[level]["stem.bn.running_mean"], expected, rtol=1e-6, atol=1e-7)


def test_a_scaler_does_not_show_in_statistics(static: tuple[Experiment, Worker]) -> None:
    """It divides in training alone (HeteroFL), though it sits inside a norm."""
    experiment, _ = static
    plan, found = experiment.plan, []
    for scale in (1.0, 0.5):
        levels = tuple(
            dataclasses.replace(level, submodel=dataclasses.replace(level.submodel, scale=scale))
            for level in plan.levels
        )
        model = dataclasses.replace(plan.model, scaler=True)
        made = dataclasses.replace(experiment, plan=dataclasses.replace(plan, model=model, levels=levels))
        found.append(bits(statistics_with(made, experiment.initial_state())))
    assert found[0] == found[1]

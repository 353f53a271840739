"""The step loop against one written out by hand, and what must leave every bit as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cluster_fl.config import Config, ModelConfig, PairConfig, TrainConfig
from cluster_fl.data.batching import Resident
from cluster_fl.experiment import Experiment, prepare
from cluster_fl.models.layered import Layered
from cluster_fl.nesting.extraction import extract, load, read
from cluster_fl.nesting.plan import State
from cluster_fl.seeding import Purpose, torch_generator
from cluster_fl.training.objectives import SelfDistillation
from cluster_fl.training.program import SGD, Context
from tests.tiny import LEVELS, tiny, worker_of

ROUND, ROUNDS, CLIENT = 2, 5, 3


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return prepare(tiny(tmp_path_factory.mktemp("tiny"), "clients.count=40"))


def seen_by(
    experiment: Experiment, level: int, rows: np.ndarray, round: int = 0, config: Config | None = None
) -> Context:
    """The round of a client that has these samples."""
    made = replace(experiment, config=config or experiment.config)
    shares = made.population.shares
    train = (*shares.train[:CLIENT], rows, *shares.train[CLIENT + 1 :])
    state, holding = made.initial_state(), made.plan.holding(level)
    return Context(
        worker=worker_of(made, replace(shares, train=train)),
        round=round,
        client=CLIENT,
        level=made.plan.level(level),
        submodel=made.plan.level(level).submodel,
        holding=holding,
        received=holding.gather(state),
        state=state,
        personal={},
        generator=generator(),
        epochs=made.config.train.epochs,
    )


def model_of(experiment: Experiment, level: int) -> Layered:
    """The level's module with the run's first weights."""
    plan = experiment.plan
    module = extract(plan.model.build(), plan.anatomy, plan.level(level).submodel).train()
    load(module, plan.holding(level).gather(experiment.initial_state()))
    return module.to(memory_format=torch.channels_last)


def generator() -> torch.Generator:
    return torch_generator(0, Purpose.TRAIN, ROUND, CLIENT)


def bits(module: Layered) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in read(module).items()}


def batches(sizes: list[int]) -> list[slice]:
    ends = np.cumsum(sizes)
    return [slice(int(end) - size, int(end)) for end, size in zip(ends, sizes, strict=True)]


def by_hand(
    model: Layered, data: Resident, rows: np.ndarray, train: TrainConfig, lr: float, sizes: list[int]
) -> tuple[float, int]:
    """Returns the mean loss of all samples seen and the number of steps; distillation weight 0.5, T = 2."""
    randomness, losses, steps = generator(), 0.0, 0
    optimiser = torch.optim.SGD(
        model.parameters(), lr, train.momentum, weight_decay=train.weight_decay, fused=True
    )
    for _ in range(train.epochs):
        images, labels = data.epoch(rows, randomness)
        for part in batches(sizes):
            exits = model(images[part])
            loss = torch.zeros(())
            for number, logits in enumerate(exits, start=1):
                term = F.cross_entropy(logits, labels[part])
                if logits is not exits[-1]:
                    teacher = (exits[-1].detach() / 2).softmax(dim=1)
                    divergence = F.kl_div((logits / 2).log_softmax(dim=1), teacher, reduction="sum")
                    term = term + 0.5 * (divergence / len(logits) * 4)
                loss = loss + number * term
            loss = loss * (2 / (len(exits) * (len(exits) + 1)))
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            if train.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(list(model.parameters()), train.clip_norm)
            optimiser.step()
            losses += float(loss.detach() * len(logits))
            steps += 1
    return losses / (len(rows) * train.epochs), steps


@pytest.mark.parametrize("level", range(1, LEVELS + 1))
@pytest.mark.parametrize(
    ("train", "lr"),
    [
        (TrainConfig(epochs=2, batch_size=16, lr=0.125), 0.125),
        (TrainConfig(epochs=1, batch_size=10, lr=0.5, momentum=0.0, weight_decay=0.01), 0.5),
        (TrainConfig(epochs=1, batch_size=16, lr=0.5, clip_norm=0.25), 0.5),
        (
            TrainConfig(epochs=1, batch_size=16, lr=1.0, schedule="step", milestones=[1, 2, 3], gamma=0.5),
            0.25,
        ),
    ],
    ids=["plain", "decay", "clipped", "step"],
)
def test_equals_the_loop_by_hand_bit_for_bit(
    experiment: Experiment, level: int, train: TrainConfig, lr: float
) -> None:
    rows = np.arange(100, 133)  # 33 = 16 + 17, since a batch of one cannot be normalised; 33 = 10 + 10 + 13
    sizes = {16: [16, 17], 10: [10, 10, 10, 3]}[train.batch_size]
    expected, found = model_of(experiment, level), model_of(experiment, level)
    context = seen_by(experiment, level, rows, ROUND, replace(experiment.config, train=train, rounds=ROUNDS))
    loss, steps = by_hand(expected, context.worker.data, rows, train, lr, sizes)
    objective = SelfDistillation(kd_weight=0.5, temperature=2.0)
    done = SGD(train, ROUNDS, objective, smallest_batch=2).train(found, context)
    assert bits(found) == bits(expected)
    assert (done.loss, done.steps) == (loss, steps)
    assert (done.also, done.coverage, done.extra, done.personal) == ({}, {}, {}, None)
    assert bits(found) != bits(model_of(experiment, level))


def test_momentum_is_that_of_the_textbook(experiment: Experiment) -> None:
    """v = 0.9 v + g + 0.01 w; w = w - lr v, in float64, to the accuracy of float32."""
    train = TrainConfig(epochs=1, batch_size=16, lr=0.125, momentum=0.9, weight_decay=0.01)
    rows = np.arange(64)
    found, model = model_of(experiment, 1), model_of(experiment, 1)
    context = seen_by(experiment, 1, rows, 0, replace(experiment.config, train=train))
    SGD(train, 1, SelfDistillation(kd_weight=0), 2).train(found, context)
    images, labels = context.worker.data.epoch(rows, generator())
    velocity = {name: np.zeros(p.shape) for name, p in model.named_parameters()}
    for part in batches([16] * 4):
        model.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(images[part])[-1], labels[part]))
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            weights, gradient = (t.detach().double().numpy() for t in (parameter, parameter.grad))
            velocity[name] = 0.9 * velocity[name] + gradient + 0.01 * weights
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(weights - 0.125 * velocity[name]))
    for name, array in read(model).items():
        np.testing.assert_allclose(read(found)[name], array, rtol=0, atol=2.0**-18)


def test_distillation_waits_for_its_share_of_the_rounds(experiment: Experiment) -> None:
    config = replace(experiment.config, rounds=4)

    def trained(round: int, weight: float) -> dict[str, bytes]:
        model = model_of(experiment, LEVELS)
        objective = SelfDistillation(kd_weight=weight, gate=0.5)
        program = SGD(TrainConfig(lr=0.125), 4, objective, 2)
        program.train(model, seen_by(experiment, LEVELS, np.arange(32), round, config))
        return bits(model)

    same = [trained(round, 1.0) == trained(round, 0.0) for round in range(4)]
    assert same == [True, True, True, False]


@pytest.mark.parametrize("samples", [0, 1])
def test_too_few_samples_for_a_batch_are_no_step(experiment: Experiment, samples: int) -> None:
    model = model_of(experiment, 2)
    done = experiment.program.train(model, seen_by(experiment, 2, np.arange(samples)))
    assert (done.steps, done.loss) == (0, 0.0)
    assert bits(model) == bits(model_of(experiment, 2))


def test_a_single_sample_is_a_step_where_nothing_is_normalised(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    config.model = ModelConfig("mlp", exit_head="linear")
    config.levels.pairs = [PairConfig(0.5, 1), PairConfig(1.0, 2)]
    experiment = prepare(config)
    model = model_of(experiment, 2)
    done = experiment.program.train(model, seen_by(experiment, 2, np.arange(1)))
    assert done.steps == 1
    assert bits(model) != bits(model_of(experiment, 2))


@pytest.mark.parametrize("override", ["train.epochs=0", "train.lr=0"])
def test_no_epoch_or_no_rate_keeps_every_bit(tmp_path: Path, experiment: Experiment, override: str) -> None:
    made = replace(experiment, config=tiny(tmp_path, override))
    model = model_of(made, LEVELS)
    done = made.program.train(model, seen_by(made, LEVELS, np.arange(40)))
    assert bits(model) == bits(model_of(made, LEVELS))
    assert done.steps == (0 if "epochs" in override else 3)


def test_the_momentum_buffer_starts_at_zero_each_time(experiment: Experiment) -> None:
    """Training twice from the same weights is the same training: a program remembers nothing."""

    def trained(model: Layered) -> dict[str, bytes]:
        experiment.program.train(model, seen_by(experiment, 2, np.arange(48)))
        return bits(model)

    model = model_of(experiment, 2)
    start: State = read(model)
    first = trained(model)
    load(model, start)
    assert trained(model) == first


def test_the_data_are_not_written(experiment: Experiment) -> None:
    before = experiment.dataset.inputs.tobytes(), experiment.dataset.labels.tobytes()
    experiment.program.train(model_of(experiment, 1), seen_by(experiment, 1, np.arange(64)))
    assert (experiment.dataset.inputs.tobytes(), experiment.dataset.labels.tobytes()) == before


def test_progress_is_the_share_of_the_rounds_behind(experiment: Experiment) -> None:
    config = replace(experiment.config, rounds=8)
    assert [seen_by(experiment, 1, np.arange(2), r, config).progress for r in (0, 2, 7)] == [0, 0.25, 0.875]


def test_coverage_is_what_the_trained_module_says(experiment: Experiment) -> None:
    """The function sees the module after the last step."""

    def first_layer_moved(context: Context, model: Layered) -> dict[str, np.ndarray]:
        name = "stem.conv.weight"
        return {name: (read(model)[name] != context.received[name]).astype(np.float32)}

    program = SGD(TrainConfig(), 1, SelfDistillation(), 2, coverage=first_layer_moved)
    done = program.train(model_of(experiment, 1), seen_by(experiment, 1, np.arange(32)))
    (mask,) = done.coverage.values()
    assert mask.all()

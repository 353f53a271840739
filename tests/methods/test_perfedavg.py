"""Per-FedAvg: its steps against FedAvg's and against exact Hessians, and what a personal model is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster_fl.compose import compose
from cluster_fl.config import Config, TrainConfig
from cluster_fl.experiment import Experiment, prepare
from cluster_fl.models.layered import Layered
from cluster_fl.nesting.extraction import load, read
from cluster_fl.seeding import Purpose, torch_generator
from cluster_fl.training.maml import Batch, Meta, grouped
from cluster_fl.training.objectives import CrossEntropy, Objective
from cluster_fl.training.program import SGD, Context
from cluster_fl.training.worker import Worker
from tests.tiny import outcome, run_here

CONFIG = """
method: perfedavg
rounds: 3
clients: {count: 6, per_round: 4}
levels: {count: 1}
model: {name: resnet8, options: {widths: [4, 8, 16]}}
data: {name: digits, held_out: 60, partition: {name: shards}}
train: {epochs: 1, batch_size: 16, lr: 0.1, cohort_size: 2}
evaluate: {every: 3}
"""


def composed(folder: Path, *overrides: str) -> Config:
    file = folder / "meta.yaml"
    file.write_text(CONFIG)
    return compose([file], overrides)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return prepare(composed(tmp_path_factory.mktemp("meta")))


@pytest.fixture(scope="module")
def worker(experiment: Experiment) -> Worker:
    return Worker(
        experiment.config,
        experiment.plan,
        experiment.program,
        experiment.dataset,
        experiment.population.shares,
        torch.device("cpu"),
    )


def context_of(worker: Worker, experiment: Experiment, client: int = 0) -> Context:
    level, state = experiment.plan.level(1), experiment.initial_state()
    holding = experiment.plan.holding(1)
    return Context(
        worker=worker,
        round=0,
        client=client,
        level=level,
        submodel=level.submodel,
        holding=holding,
        received=holding.gather(state),
        state=state,
        personal={},
        generator=torch_generator(0, Purpose.TRAIN, 0, client),
        epochs=worker.config.train.epochs,
    )


def begun(worker: Worker, experiment: Experiment) -> Layered:
    module = worker.fresh(experiment.plan.level(1).submodel).train()
    load(module, experiment.initial_state())
    return module


@dataclass(frozen=True)
class Chosen(Context):
    """A context that hands out every ``size``-th batch of an epoch alone."""

    size: int = 2

    def batches(self, smallest: int):  # type: ignore[no-untyped-def]
        groups = grouped(list(Context.batches(self, smallest)), self.size)
        yield from (group[1] for group in groups)


def meta(train: TrainConfig, order: str = "fo", **own: float) -> Meta:
    inner = SGD(train, 3, CrossEntropy(), smallest_batch=2)
    options = {"alpha": 0.01, "delta": 1e-3, **own}
    return Meta(inner, order, alpha=options["alpha"], delta=options["delta"], adapt_steps=1)


def bits(model: Layered) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in read(model).items()}


@pytest.mark.parametrize(("order", "size"), [("fo", 2), ("hf", 3)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_an_inner_step_it_is_plain_training(
    worker: Worker, experiment: Experiment, order: str, size: int, momentum: float
) -> None:
    """On the second batch of every step, bit for bit."""
    train = TrainConfig(epochs=2, batch_size=16, lr=0.125, momentum=momentum, clip_norm=2.0)
    context = context_of(worker, experiment)
    plain, found = begun(worker, experiment), begun(worker, experiment)
    chosen = Chosen(**vars(context), size=size)
    expected = SGD(train, 3, CrossEntropy(), smallest_batch=2).train(plain, chosen)
    context = context_of(worker, experiment)
    done = meta(train, order, alpha=0.0).train(found, context)
    assert bits(found) == bits(plain)
    assert (done.steps, done.loss) == (expected.steps, expected.loss)
    assert bits(found) != bits(begun(worker, experiment))


def test_a_first_order_step_by_hand(worker: Worker, experiment: Experiment) -> None:
    context = context_of(worker, experiment)
    batches = list(context.batches(2))[:2]
    model, found = begun(worker, experiment), begun(worker, experiment)
    start = [p.detach().clone() for p in model.parameters()]
    for (x, y), rate in zip(batches, (0.05, 0.0), strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(model(x)[-1], y), list(model.parameters()))
        if rate:
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter.sub_(rate * gradient)
    program = meta(TrainConfig(lr=1.0, momentum=0.0), alpha=0.05)
    program.descend(found, CrossEntropy(), batches, 0.0)
    for parameter, origin, gradient in zip(found.parameters(), start, gradients, strict=True):
        assert torch.equal(parameter.detach(), origin)
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


class Squares(Objective):
    """Half the squared distance to the one-hot label: quadratic in the weights of a linear model."""

    def __call__(self, logits: list[Tensor], labels: Tensor, progress: float) -> Tensor:
        return 0.5 * (logits[-1] - F.one_hot(labels, 10)).square().sum(1).mean()


def hand_made(activation: nn.Module) -> tuple[Layered, list[Batch]]:
    """A small model of 12 inputs, in float64, and three batches of 16."""
    torch.manual_seed(0)
    unit = nn.Sequential(nn.Linear(12, 8), activation)
    model = Layered(nn.Flatten(), [unit], nn.Linear(8, 10)).double()
    generator = torch.Generator().manual_seed(1)
    return model, [
        (
            torch.randn(16, 12, generator=generator, dtype=torch.float64),
            torch.randint(0, 10, (16,), generator=generator),
        )
        for _ in range(3)
    ]


def exact(model: Layered, objective: Objective, batches: Sequence[Batch], alpha: float) -> list[Tensor]:
    """(I - alpha H(w; B2)) grad f(w - alpha grad f(w; B0); B1), by autograd."""
    parameters = list(model.parameters())
    start = [p.detach().clone() for p in parameters]

    def loss(batch: Batch) -> Tensor:
        return objective(model(batch[0]), batch[1], 0.0)

    def place(values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)

    first = torch.autograd.grad(loss(batches[0]), parameters)
    place([s - alpha * g for s, g in zip(start, first, strict=True)])
    direction = torch.autograd.grad(loss(batches[1]), parameters)
    place(start)
    curved = torch.autograd.grad(loss(batches[2]), parameters, create_graph=True)
    along = sum((c * d).sum() for c, d in zip(curved, direction, strict=True))
    assert isinstance(along, Tensor)
    products = torch.autograd.grad(along, parameters)
    return [d - alpha * p for d, p in zip(direction, products, strict=True)]


@pytest.mark.parametrize(
    ("objective", "activation", "tolerance"),
    # A difference of gradients is exact for a quadratic; else its error is of order delta^2.
    [(Squares(), nn.Identity(), 1e-7), (CrossEntropy(), nn.Tanh(), 1e-5)],
    ids=["nearly quadratic", "curved"],
)
def test_the_hessian_s_product_is_exact_enough(
    objective: Objective, activation: nn.Module, tolerance: float
) -> None:
    model, batches = hand_made(activation)
    expected = exact(model, objective, batches, 0.3)
    plain = meta(TrainConfig(), "fo", alpha=0.3)
    found = meta(TrainConfig(), "hf", alpha=0.3, delta=1e-3)
    found.descend(model, objective, batches, 0.0)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    plain.descend(model, objective, batches, 0.0)
    for parameter, gradient, value in zip(model.parameters(), gradients, expected, strict=True):
        torch.testing.assert_close(gradient, value, rtol=0, atol=tolerance)
        assert parameter.grad is not None
        assert (parameter.grad - value).abs().max() > 100 * tolerance  # the first order alone is not


def test_a_quadratic_s_product_is_exact() -> None:
    """One linear layer and squares: only rounding is left, of float64 and of float32."""
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-4)):
        model = Layered(nn.Flatten(), [nn.Sequential(nn.Identity())], nn.Linear(12, 10)).to(dtype)
        batches = [(x.to(dtype), y) for x, y in hand_made(nn.Identity())[1]]
        expected = exact(model, Squares(), batches, 0.3)
        meta(TrainConfig(), "hf", alpha=0.3).descend(model, Squares(), batches, 0.0)
        for parameter, value in zip(model.parameters(), expected, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, value, rtol=0, atol=tolerance)


def test_an_epoch_s_batches_in_groups() -> None:
    batches = [(torch.tensor(n), torch.tensor(n)) for n in range(7)]

    def names(size: int, count: int) -> list[list[int]]:
        return [[int(x) for x, _ in group] for group in grouped(batches[:count], size)]

    assert names(2, 7) == [[0, 1], [2, 3], [4, 5]]
    assert names(3, 7) == [[0, 1, 2], [3, 4, 5]]
    assert names(3, 2) == [[0, 1, 0]]
    assert names(2, 1) == [[0, 0]]
    assert names(2, 0) == []


def test_personal_models_are_gradient_steps(worker: Worker, experiment: Experiment) -> None:
    for steps in (0, 1, 3):
        program = replace(meta(TrainConfig(batch_size=16), alpha=0.1), adapt_steps=steps)
        found, expected = begun(worker, experiment).eval(), begun(worker, experiment).eval()
        assert program.personalise(found, context_of(worker, experiment)) is found
        batches = list(context_of(worker, experiment).batches(2))[:steps]
        for x, y in batches:
            expected.zero_grad()
            F.cross_entropy(expected(x)[-1], y).backward()
            with torch.no_grad():
                for parameter in expected.parameters():
                    assert parameter.grad is not None
                    parameter.add_(parameter.grad, alpha=-0.1)
        for name, array in read(found).items():
            np.testing.assert_allclose(array, read(expected)[name], rtol=0, atol=1e-7)


def test_a_client_without_samples_answers_with_the_global_model(
    worker: Worker, experiment: Experiment
) -> None:
    shares = replace(worker.shares, train=(np.zeros(0, dtype=np.int64), *worker.shares.train[1:]))
    empty = Worker(
        worker.config, worker.plan, worker.program, experiment.dataset, shares, torch.device("cpu")
    )
    model = begun(empty, experiment).eval()
    meta(TrainConfig(batch_size=16)).personalise(model, context_of(empty, experiment))
    assert bits(model) == bits(begun(empty, experiment))


def test_passes_per_sample(worker: Worker, experiment: Experiment) -> None:
    """Gradients taken, counted, over the samples seen: 1 first order, 4/3 Hessian-free."""
    for order, size in (("fo", 2), ("hf", 3)):
        seen: list[int] = []

        def counting(logits: list[Tensor], labels: Tensor, progress: float, seen: list[int] = seen) -> Tensor:
            seen.append(len(labels))
            return F.cross_entropy(logits[-1], labels)

        program = meta(TrainConfig(batch_size=16), order)
        batches = list(context_of(worker, experiment).batches(2))[:size]
        objective: Callable[..., Tensor] = counting
        program.descend(begun(worker, experiment), objective, batches, 0.0)  # type: ignore[arg-type]
        level = experiment.plan.level(1)
        assert sum(seen) / (16 * size) == pytest.approx(program.effort(level).compute)


@pytest.mark.parametrize("order", ["fo", "hf"])
def test_own_steps_help_on_skewed_shares(tmp_path: Path, order: str) -> None:
    config = composed(
        tmp_path,
        f"options.order={order}",
        "options.alpha=0.1",
        "options.adapt_steps=3",
        "rounds=8",
        "train.epochs=2",
        "evaluate.every=8",
        "clients.per_round=6",
    )
    run_here(config, tmp_path / "run")
    accuracy = outcome(tmp_path / "run")[1]["accuracy"]
    assert accuracy["personal"]["last_exit"] >= accuracy["global"]["last_exit"]
    assert accuracy["personal"]["last_exit"] > 0.5

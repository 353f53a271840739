"""FjORD: which gradients and statistics a drawn width touches, and what it equals where nothing is drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cluster_fl.errors import UserError
from cluster_fl.experiment import Experiment, prepare
from cluster_fl.methods import fjord
from cluster_fl.methods.base import sgd
from cluster_fl.methods.fjord import Narrow, OrderedDropout
from cluster_fl.models.layered import Layered
from cluster_fl.nesting.extraction import load, read
from cluster_fl.nesting.plan import State
from cluster_fl.seeding import Purpose, torch_generator
from cluster_fl.training.objectives import CrossEntropy
from cluster_fl.training.program import Context
from cluster_fl.training.worker import Worker
from tests.tiny import outcome, run_here, tiny, worker_of

WIDTHS = "levels.pairs=[{width: 0.3}, {width: 0.5}, {}]"  # ceil: 2, 3, 5 of 4, 8, 16 at level 1
FJORD = ("method=fjord", WIDTHS)
CLIENT, LARGEST = 3, 3


def prepared(folder: Path, *overrides: str) -> Experiment:
    return prepare(tiny(folder, *FJORD, *overrides))


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return prepared(tmp_path_factory.mktemp("tiny"), "train.epochs=2")


@pytest.fixture(scope="module")
def worker(experiment: Experiment) -> Worker:
    return worker_of(experiment)


def client(worker: Worker, state: State, level: int) -> tuple[Layered, Context]:
    """A client of ``level`` before its first step."""
    own, holding = worker.plan.level(level), worker.plan.holding(level)
    received = holding.gather(state)
    model = worker.module(own.submodel).train()
    load(model, {name: received[name] for name in read(model)})
    generator = torch_generator(0, Purpose.TRAIN, 0, CLIENT)
    return model, Context(
        worker=worker,
        round=0,
        client=CLIENT,
        level=own,
        submodel=own.submodel,
        holding=holding,
        received=received,
        state=state,
        personal={},
        generator=generator,
        epochs=worker.config.train.epochs,
    )


def always(monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    """Every batch draws this level."""

    def drawn(lower: list[Narrow], generator: torch.Generator) -> Narrow | None:
        return lower[level - 1] if level <= len(lower) else None

    monkeypatch.setattr(fjord, "_drawn", drawn)


def program_of(worker: Worker) -> OrderedDropout:
    assert isinstance(worker.program, OrderedDropout)
    return worker.program


def test_a_level_holds_the_lower_levels_norms(experiment: Experiment) -> None:
    plan = experiment.plan
    assert [level.also for level in plan.levels] == [(), (1,), (1, 2)]
    foreign = [{key for key in plan.holding(n).keys if key.startswith("level.")} for n in (1, 2, 3)]
    norms = {f"level.1/{name}" for name in plan.level(1).owned}
    assert (len(foreign[0]), foreign[1], len(foreign[2])) == (0, norms, 2 * len(norms))
    assert plan.levels[0].submodel.channels == tuple(
        {4: 2, 8: 3, 16: 5, 1: 1, 10: 10}[group.size] for group in plan.anatomy.groups
    )
    assert experiment.config.aggregation.weights == "samples"


@pytest.mark.parametrize("overrides", [(), ("train.momentum=0", "train.clip_norm=0.5", "train.epochs=2")])
def test_without_a_choice_it_is_plain_sgd_bit_for_bit(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    made = prepared(tmp_path, *overrides)
    worker, state = worker_of(made), made.initial_state()
    model, context = client(worker, state, 1)
    found, bits = worker.program.train(model, context), read(model)
    model, context = client(worker, state, 1)
    expected = sgd(made.config, made.plan, CrossEntropy()).train(model, context)
    assert (found.loss, found.steps, found.also) == (expected.loss, expected.steps, {})
    assert {name: a.tobytes() for name, a in bits.items()} == {
        name: a.tobytes() for name, a in read(model).items()
    }
    assert found.steps > 1


@pytest.mark.parametrize("level", [1, 2])
def test_gradients_of_a_width_are_those_of_its_own_module(
    experiment: Experiment, worker: Worker, level: int
) -> None:
    state, plan = experiment.initial_state(), experiment.plan
    inputs, labels = worker.data.batch(np.arange(32))
    model, context = client(worker, state, LARGEST)
    model.zero_grad(set_to_none=True)
    narrow = Narrow(plan.level(level), model, context)
    F.cross_entropy(narrow(inputs)[-1], labels).backward()
    small = worker.fresh(plan.level(level).submodel).train()
    load(small, {n: a for n, a in plan.holding(level).gather(state).items() if n in dict(read(small))})
    F.cross_entropy(small(inputs)[-1], labels).backward()
    whole = dict(model.named_parameters())
    for name, parameter in small.named_parameters():
        assert parameter.grad is not None
        if name in plan.level(level).owned:
            own = narrow.own[name]
            assert own.grad is not None
            assert torch.equal(own.grad, parameter.grad)
            assert whole[name].grad is None
        else:
            gradient = whole[name].grad
            assert gradient is not None
            inside = tuple(slice(0, size) for size in parameter.shape)
            torch.testing.assert_close(gradient[inside], parameter.grad, rtol=1e-6, atol=1e-8)
            outside = gradient.clone()
            outside[inside] = 0
            assert not outside.any()
    assert any(p.grad is not None and (p.grad == 0).any() for p in whole.values())


@pytest.mark.parametrize("level", [1, 2])
def test_drawing_one_width_always_trains_that_level_alone(
    experiment: Experiment, worker: Worker, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without momentum or decay, the largest level's client then does what one of the drawn level does."""
    always(monkeypatch, level)
    state, plan = experiment.initial_state(), experiment.plan
    model, context = client(worker, state, LARGEST)
    done, after = worker.program.train(model, context), read(model)
    other = 3 - level
    assert done.also.keys() == {key for key in context.received if key.startswith("level.")}
    for key, array in done.also.items():
        drawn = not key.startswith(f"level.{other}/")
        assert (array.tobytes() != context.received[key].tobytes()) == drawn
    assert all(after[name].tobytes() == context.received[name].tobytes() for name in plan.level(3).owned)
    small, alone = client(worker, state, level)
    sgd(experiment.config, plan, CrossEntropy()).train(small, alone)
    for name, array in read(small).items():
        trained = done.also.get(f"level.{level}/{name}")
        part = after[name][tuple(slice(0, n) for n in array.shape)] if trained is None else trained
        np.testing.assert_allclose(part, array, rtol=2e-4, atol=1e-5)
    kernel, received = after["units.0.conv1.weight"], context.received["units.0.conv1.weight"]
    size = len(read(small)["units.0.conv1.weight"])
    assert kernel[size:].tobytes() == received[size:].tobytes()
    assert kernel[:size, size:].tobytes() == received[:size, size:].tobytes()


def test_widths_are_drawn_evenly_and_from_the_contexts_generator(
    experiment: Experiment, worker: Worker
) -> None:
    model, context = client(worker, experiment.initial_state(), LARGEST)
    lower = [Narrow(experiment.plan.level(n), model, context) for n in (1, 2)]
    draws = [fjord._drawn(lower, context.generator) for _ in range(3000)]
    for choice in (*lower, None):
        assert 900 < sum(draw is choice for draw in draws) < 1100
    again = [fjord._drawn(lower, torch_generator(0, Purpose.TRAIN, 0, CLIENT)) for _ in range(5)]
    assert all(draw is draws[0] for draw in again)
    before = context.generator.get_state()
    assert fjord._drawn([], context.generator) is None
    assert torch.equal(context.generator.get_state(), before)


def test_training_draws_every_width(
    experiment: Experiment, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Narrow | None] = []
    draw = fjord._drawn

    def watched(lower: list[Narrow], generator: torch.Generator) -> Narrow | None:
        seen.append(draw(lower, generator))
        return seen[-1]

    monkeypatch.setattr(fjord, "_drawn", watched)
    model, context = client(worker, experiment.initial_state(), LARGEST)
    done = worker.program.train(model, context)
    assert len(seen) == done.steps
    assert len(set(map(id, seen))) == 3
    changed = {key[:7] for key, array in done.also.items() if (array != context.received[key]).any()}
    assert changed == {"level.1", "level.2"}


def test_distillation_teaches_the_drawn_width_and_not_the_teacher(tmp_path: Path) -> None:
    made = prepared(tmp_path, "options.distil=true")
    worker, state = worker_of(made), made.initial_state()
    inputs, labels = worker.data.batch(np.arange(32))
    program = program_of(worker)
    model, context = client(worker, state, LARGEST)
    narrow = Narrow(made.plan.level(1), model, context)
    with torch.no_grad():
        wide, thin = model(inputs)[-1], narrow(inputs)[-1]
        expected = F.cross_entropy(wide, labels) - (wide.softmax(1) * thin.log_softmax(1)).sum(1).mean()
    model.zero_grad(set_to_none=True)
    loss = program._loss(model, narrow, inputs, labels)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    name = "units.2.conv2.weight"
    with_kd = dict(model.named_parameters())[name].grad
    assert with_kd is not None
    with_kd = with_kd.clone()
    model.zero_grad(set_to_none=True)
    plain = program._loss(model, None, inputs, labels)
    plain.backward()
    alone = dict(model.named_parameters())[name].grad
    assert alone is not None
    assert plain.item() == F.cross_entropy(model(inputs)[-1], labels).item()
    size = made.plan.holding(1).gather(state)[name].shape[0]
    # What the teacher alone has gets the labels' gradient, and nothing from the other term.
    torch.testing.assert_close(with_kd[size:], alone[size:], rtol=1e-5, atol=1e-8)
    assert (with_kd[:size, :size] - alone[:size, :size]).abs().max() > 1e-5


@pytest.mark.parametrize("distil", [False, True])
def test_effort_is_the_mean_over_the_draws(tmp_path: Path, distil: bool) -> None:
    made = prepared(tmp_path, f"options.distil={str(distil).lower()}")
    macs = [level.cost.macs for level in made.plan.levels]
    extra = 1 if distil else 0
    expected = [1.0, (macs[0] / macs[1] + extra + 1) / 2, (sum(macs) / macs[2] + 2 * extra) / 3]
    state = made.initial_state()
    for level, compute in zip(made.plan.levels, expected, strict=True):
        effort = made.program.effort(level)
        assert effort.compute == pytest.approx(compute)
        sent = sum(array.nbytes for array in made.plan.holding(level.number).gather(state).values())
        assert effort.down * level.cost.bytes == pytest.approx(sent)
        assert effort.up == effort.down


def test_without_draws_it_is_nefl_of_widths_with_fixed_steps(tmp_path: Path) -> None:
    common = (WIDTHS, "levels.order=rising", "levels.draw=fixed", "rounds=2", "aggregation.weights=samples")
    run_here(tiny(tmp_path, *common, "method=fjord", "options.draws=false"), tmp_path / "fjord")
    run_here(tiny(tmp_path, *common, "method=nefl", "options.steps=fixed"), tmp_path / "nefl")
    (found, summary), (expected, reference) = outcome(tmp_path / "fjord"), outcome(tmp_path / "nefl")
    assert found == expected
    assert summary == reference


def test_one_width_is_fedavg(tmp_path: Path) -> None:
    common = ("levels.pairs=[{}]", "model.norm=batch", "rounds=2", "clients.count=4", "clients.per_round=3")
    run_here(tiny(tmp_path, *common, "method=fjord"), tmp_path / "fjord")
    run_here(tiny(tmp_path, *common, "method=fedavg"), tmp_path / "fedavg")
    assert outcome(tmp_path / "fjord") == outcome(tmp_path / "fedavg")


def test_a_part_of_a_part_is_found_whatever_selects_it() -> None:
    whole = np.arange(60).reshape(10, 6)
    outer = np.ix_([0, 1, 2, 5, 6, 7], [0, 1, 3, 4])
    inner = np.ix_([0, 1, 5, 6], [0, 3])
    found = torch.from_numpy(whole[outer])[fjord._within(outer, inner)]
    assert found.tolist() == whole[inner].tolist()
    prefix = (slice(0, 4), slice(0, 2))
    assert fjord._within((slice(0, 6), slice(0, 4)), prefix) == prefix


def test_released_norms_share_their_weights(tmp_path: Path) -> None:
    config = tiny(tmp_path, *FJORD, "variant=released", "rounds=1")
    state = prepare(config).initial_state()
    owned = {key.rpartition(".")[2] for key in state if key.startswith("level.")}
    assert owned == {"running_mean", "running_var"}
    assert state["units.0.bn1.weight"].shape == (4,)
    run_here(config, tmp_path / "run")
    assert np.isfinite(outcome(tmp_path / "run")[0][0]["train_loss"])


def test_a_run_of_it_goes_through(tmp_path: Path) -> None:
    run_here(tiny(tmp_path, *FJORD, "rounds=1", "options.distil=true"), tmp_path / "run")
    records, summary = outcome(tmp_path / "run")
    assert np.isfinite(records[0]["train_loss"])
    assert len(summary["accuracy"]["levels"]) == 3


def test_variates_cannot_follow_the_draws(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        prepared(tmp_path, "train.correction.name=feddyn", "aggregation.weights=uniform")
    assert caught.value.key == "train.correction.name"
    assert prepared(tmp_path, "train.correction.name=proximal").program.keeps_state is False

"""Who is trained, from what and how far, once the clock has decided; and a client that goes over to a smaller level."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster_fl.aggregation.nested import aggregate
from cluster_fl.assignment import Planned
from cluster_fl.enlisting import enlist
from cluster_fl.experiment import Experiment, prepare
from cluster_fl.models.layered import Layered
from cluster_fl.nesting.extraction import extract, load, read
from cluster_fl.nesting.importance import numbers
from cluster_fl.nesting.plan import State
from cluster_fl.nesting.submodel import Submodel
from cluster_fl.rounds import Round, Start
from cluster_fl.seeding import Purpose, torch_generator
from cluster_fl.timing.attempts import Attempts, Ended, Fate
from cluster_fl.timing.dispatch import first_half
from cluster_fl.timing.policies import Standing, Step, Synchronous
from cluster_fl.training.cohort import Cohort
from cluster_fl.training.program import Context, Trained
from tests.methods.common import small
from tests.tiny import round_of, tiny, worker_of

CLIENTS, EPOCHS = 6, 3
SWITCH = (
    "model.name=resnet8",
    "levels.pairs=[{width: 0.25}, {width: 0.5}, {}]",
    f"train.epochs={EPOCHS}",
    "data.held_out=1317",
    "time.load.shares=[0,0.5]",
    "time.load.stay=0.2",
    "time.load.mid_round=true",
    "time.policy.switch=true",
    "options.deadline=1e9",
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return prepare(tiny(tmp_path_factory.mktemp("tiny"), "train.cohort_size=1"))


@pytest.fixture(scope="module")
def nest(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return prepare(small(tmp_path_factory.mktemp("small"), "nestfl", *SWITCH, "train.cohort_size=1"))


Row = dict[str, Any]


def step_of(rows: Sequence[Row], number: int = 0, scale: Sequence[float] | None = None) -> Step:
    """A round in which these attempts ended: client, level, and what is not as usual."""
    usual: Row = {"version": number, "epochs": EPOCHS, "fate": Fate.MERGED}
    rows = [usual | {"first": row["level"]} | row for row in rows]
    whole = {
        name: np.array([row[name] for row in rows])
        for name in ("client", "level", "version", "epochs", "first")
    }
    times = dict.fromkeys(("start", "downloaded", "computed", "finish", "lost"), np.zeros(len(rows)))
    attempts = Attempts(**whole, **times, down=whole["client"], up=whole["client"])
    ended = Ended.of(attempts, np.array([row["fate"] for row in rows]), 0.0)
    factors = np.ones(len(ended.merged)) if scale is None else np.array(scale)
    return Step(0.0, ended, factors, Standing(number + 1, 1.0))


def cohorts(made: Experiment, round: Round, step: Step) -> list[Cohort]:
    return enlist(round, step, made.rule, made.program, keep=True)


def test_those_who_count_are_trained_and_nobody_else(plain: Experiment) -> None:
    fates = [Fate.LATE, Fate.MERGED, Fate.LOST, Fate.MERGED, Fate.STALE, Fate.ABANDONED]
    rows = [{"client": client, "level": 1, "fate": fate} for client, fate in enumerate(fates)]
    found = cohorts(plain, round_of(plain), step_of(rows))
    assert [cohort.clients for cohort in found] == [(1,), (3,)]


@pytest.mark.parametrize("fate", [Fate.LATE, Fate.LOST, Fate.STALE, Fate.ABANDONED])
def test_a_round_in_which_nobody_counts_has_no_cohorts(plain: Experiment, fate: Fate) -> None:
    assert cohorts(plain, round_of(plain), step_of([{"client": 2, "level": 1, "fate": fate}])) == []
    nobody = Step(0.0, Ended.of(Attempts.none(), fate, 0.0), np.ones(0), Standing(1, 0.0))
    assert cohorts(plain, round_of(plain), nobody) == []


def test_each_is_trained_on_its_own_terms(plain: Experiment) -> None:
    """In client order; cohorts by the round that they started in."""
    state = plain.initial_state()
    round = dataclasses.replace(round_of(plain, number=7), starts={v: Start(state, {}) for v in (4, 6)})
    rows = [
        {"client": 1, "level": 3, "version": 6, "epochs": 2},
        {"client": 3, "level": 1, "version": 4, "fate": Fate.LOST},
        {"client": 3, "level": 2, "version": 7},
        {"client": 5, "level": 2, "version": 4, "epochs": 1},
        {"client": 6, "level": 1, "version": 7},
    ]
    found = cohorts(plain, round, step_of(rows, 7, scale=[0.5, 1.0, 0.25, 1.0]))
    assert [(c.round, c.merged, c.number, c.level, c.clients) for c in found] == [
        (4, 7, 0, 2, (5,)),
        (6, 7, 1, 3, (1,)),
        (7, 7, 2, 1, (6,)),
        (7, 7, 3, 2, (3,)),
    ]
    terms = [(m.scale, m.epochs, m.first) for c in found for m in c.members]
    assert terms == [(0.25, 1, None), (0.5, 2, None), (1.0, 3, None), (1.0, 3, None)]
    assert [c.home for c in found] == [(7, 0), (7, 1), (7, 2), (7, 3)]


class Told(Planned):
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, list[int], list[int]]] = []

    def submodels(self, round: Round, levels: np.ndarray) -> list[Submodel]:
        self.asked.append((round.number, round.participants.tolist(), levels.tolist()))
        return super().submodels(round, levels)


def test_a_rule_is_asked_once_for_all_who_started_together(plain: Experiment) -> None:
    """Those included who were lost or late, and the level that somebody began with."""
    rule, state = Told(), plain.initial_state()
    round = dataclasses.replace(round_of(plain, number=2), starts={1: Start(state, {})})
    rows = [
        {"client": 0, "level": 1, "version": 2, "first": 2},
        {"client": 2, "level": 3, "version": 1, "fate": Fate.LATE},
        {"client": 4, "level": 3, "version": 2, "fate": Fate.LOST},
        {"client": 5, "level": 2, "version": 1},
        {"client": 6, "level": 2, "version": 2, "first": 3, "fate": Fate.LOST},
    ]
    enlist(round, step_of(rows, 2), rule, plain.program, keep=False)
    assert rule.asked == [(1, [2, 5], [3, 2]), (2, [0, 4, 6, 0, 6], [1, 3, 2, 2, 3])]


def test_a_rule_sees_the_weights_that_a_client_started_from(nest: Experiment) -> None:
    """NestFL prunes by them."""
    now = nest.initial_state()
    before = {key: np.ascontiguousarray(array[::-1]) for key, array in now.items()}
    round = dataclasses.replace(
        round_of(nest, now, number=3), memory=nest.merge.initial(now), starts={1: Start(before, {})}
    )
    rows = [{"client": 0, "level": 2, "version": 1}, {"client": 1, "level": 2, "version": 3}]
    old, new = cohorts(nest, round, step_of(rows, 3))
    expected = [nest.rule.submodels(round_of(nest, state), np.array([2]))[0] for state in (before, now)]
    assert [old.members[0].submodel, new.members[0].submodel] == expected
    assert expected[0] != expected[1]


# A client that goes over to a smaller level in the middle of its training.


def within(inner: Submodel, outer: Submodel) -> bool:
    pairs = zip(inner.channels, outer.channels, strict=True)
    return all(set(numbers(few).tolist()) <= set(numbers(many).tolist()) for few, many in pairs)


@pytest.mark.parametrize("seed", range(5))
def test_both_submodels_are_of_one_nest(nest: Experiment, seed: int) -> None:
    """Also where nobody else trains the level that it began with."""
    rng = np.random.default_rng(seed)
    state = {k: rng.standard_normal(a.shape).astype(np.float32) for k, a in nest.initial_state().items()}
    rows = [
        {"client": 0, "level": 2, "first": 3},
        {"client": 1, "level": 1},
        {"client": 2, "level": 1, "first": 2},
    ]
    found = cohorts(nest, round_of(nest, state), step_of(rows))
    members = {member.client: member for cohort in found for member in cohort.members}
    begun = {client: member.first[0].submodel for client, member in members.items() if member.first}
    assert sorted(begun) == [0, 2]
    assert within(members[0].submodel, begun[0])
    assert begun[2] == members[0].submodel
    assert members[2].submodel == members[1].submodel
    assert within(members[1].submodel, members[0].submodel)
    alone = nest.rule.submodels(round_of(nest, state), np.array([3, 2, 1, 2]))
    assert [begun[0], members[0].submodel, members[1].submodel] == alone[:3]


def context(
    made: Experiment, client: int, level: int, submodel: Submodel, state: State, epochs: int, generator: Any
) -> Context:
    holding = made.plan.holding(level, submodel)
    return Context(
        worker=worker_of(made),
        round=0,
        client=client,
        level=made.plan.level(level),
        submodel=submodel,
        holding=holding,
        received=holding.gather(state),
        state=state,
        personal={},
        generator=generator,
        epochs=epochs,
    )


def trained(made: Experiment, context: Context) -> tuple[State, Trained]:
    """The weights of a module of its own, trained from the context's state, by the state's key."""
    model: Layered = extract(made.plan.model.build(), made.plan.anatomy, context.submodel)
    load(model, context.holding.gather(context.state))
    done = made.program.train(model.train(), context)
    return {context.holding.keys[name]: array for name, array in read(model).items()}, done


def by_hand(made: Experiment, member: Any, level: int, state: State) -> tuple[State, list[Trained]]:
    """What a client has after both stages, in the state's coordinates: one stream of random numbers."""
    assert member.first is not None
    begun, before = member.first
    generator = torch_generator(made.config.seed, Purpose.TRAIN, 0, member.client)
    now, done = {key: array.copy() for key, array in state.items()}, []
    for number, submodel, epochs in (
        (begun.level, begun.submodel, before),
        (level, member.submodel, member.epochs - before),
    ):
        own = context(made, member.client, number, submodel, now, epochs, generator)
        after, report = trained(made, own)
        done.append(report)
        for name, key in own.holding.keys.items():
            now[key][own.holding.where[name]] = after[key]
    return now, done


def switched(made: Experiment, scale: float = 1.0) -> tuple[Cohort, State]:
    """A client that begins with level 3 and ends with level 2."""
    state = made.initial_state()
    rows = [{"client": 0, "level": 2, "first": 3}]
    (cohort,) = cohorts(made, round_of(made, state), step_of(rows, scale=[scale]))
    return cohort, state


def test_a_switched_client_trains_both_and_sends_the_smaller(nest: Experiment) -> None:
    """Its update is counted from what the server sent: it has what both stages taught the smaller submodel."""
    cohort, state = switched(nest)
    (member,) = cohort.members
    assert cohort.level == 2
    assert member.first is not None
    assert (member.first[0].level, member.first[1]) == (3, first_half(EPOCHS)) == (3, 2)
    now, (first, second) = by_hand(nest, member, 2, state)
    worker = worker_of(nest)
    result = cohort.run(worker, state)
    (update,) = cohort.updates(worker, state)
    holding = nest.plan.holding(2, member.submodel)
    assert update.holding.keys == holding.keys
    for name, key in holding.keys.items():
        at = holding.where[name]
        expected = now[key][at].astype(np.float64) - state[key][at]
        assert update.deltas[name] == pytest.approx(expected, abs=1e-6)
        assert np.abs(expected).max() > 1e-3
    steps = first.steps + second.steps
    assert result.report.steps == (steps,)
    assert first.steps == 2 * second.steps > 0
    loss = (first.loss * first.steps + second.loss * second.steps) / steps
    assert result.report.losses == pytest.approx((loss,), rel=1e-5)


def test_only_the_smaller_submodel_moves(nest: Experiment) -> None:
    """What the client learnt of the rest in its first stage is lost."""
    cohort, state = switched(nest)
    (member,) = cohort.members
    after = aggregate(state, [cohort.run(worker_of(nest), state).partial])
    holding = nest.plan.holding(2, member.submodel)
    now, _ = by_hand(nest, member, 2, state)
    assert member.first is not None
    larger = nest.plan.holding(3, member.first[0].submodel)
    lost = 0
    for name, key in larger.keys.items():
        held = np.zeros(state[key].shape, dtype=bool)
        held[holding.where[name]] = True
        assert after[key][~held].tobytes() == state[key][~held].tobytes()
        assert after[key][held] == pytest.approx(now[key][held], abs=1e-6)
        lost += int(np.count_nonzero(now[key][~held] != state[key][~held]))
    assert lost > 100


@pytest.mark.parametrize("scale", [0.5, 0.1])
def test_an_old_update_of_a_switched_client_is_what_it_trained_times_its_factor(
    nest: Experiment, scale: float
) -> None:
    """How much it will count changes nothing of what the client does."""
    (cohort, state), (fresh, _) = switched(nest, scale), switched(nest)
    worker = worker_of(nest)
    (old,), (new,) = (one.updates(worker_of(nest), state) for one in (cohort, fresh))
    assert cohort.run(worker, state).report.losses == fresh.run(worker, state).report.losses
    for name, delta in new.deltas.items():
        assert old.deltas[name].tolist() == (delta * scale).tolist()


def near(made: Experiment, context: Context, anchor: State) -> State:
    """The weights after steps down the gradients of the loss and of mu/2 |w - anchor|^2, by the state's key."""
    model: Layered = extract(made.plan.model.build(), made.plan.anatomy, context.submodel)
    load(model, context.holding.gather(context.state))
    model.train()
    named, rate = dict(model.named_parameters()), made.config.train.lr
    centre = {name: torch.tensor(array) for name, array in context.holding.gather(anchor).items()}
    for _ in range(context.epochs):
        for x, y in context.batches(made.plan.smallest_batch):
            loss = torch.nn.functional.cross_entropy(model(x)[-1], y)
            slopes = torch.autograd.grad(loss, list(named.values()))
            with torch.no_grad():
                for (name, weight), slope in zip(named.items(), slopes, strict=True):
                    weight -= rate * (slope + made.config.train.correction.mu * (weight - centre[name]))
    return {context.holding.keys[name]: array for name, array in read(model).items()}


def test_a_switched_client_stays_near_what_the_server_sent(tmp_path: Path) -> None:
    """FedProx's term, in both stages."""
    made = prepare(
        small(tmp_path, "nestfl", *SWITCH, "train.correction.name=proximal", "train.correction.mu=5")
    )
    cohort, state = switched(made)
    (member,) = cohort.members
    assert member.first is not None
    (begun, before), generator = member.first, torch_generator(0, Purpose.TRAIN, 0, 0)
    now = {key: array.copy() for key, array in state.items()}
    for level, submodel, epochs in ((3, begun.submodel, before), (2, member.submodel, EPOCHS - before)):
        own = context(made, 0, level, submodel, now, epochs, generator)
        after = near(made, own, anchor=state)
        for name, key in own.holding.keys.items():
            now[key][own.holding.where[name]] = after[key]
    (update,) = cohort.updates(worker_of(made), state)
    for name, key in update.holding.keys.items():
        at = update.holding.where[name]
        assert update.deltas[name] == pytest.approx(
            now[key][at].astype(np.float64) - state[key][at], abs=1e-4
        )


def test_training_it_again_gives_the_same_bits(nest: Experiment) -> None:
    cohort, state = switched(nest)
    one, other = worker_of(nest), worker_of(nest)
    cohort.run(one, state)
    (kept,), (again,) = cohort.updates(one, state), cohort.updates(other, state)
    assert {n: a.tobytes() for n, a in kept.deltas.items()} == {
        n: a.tobytes() for n, a in again.deltas.items()
    }


def test_its_own_model_is_the_smaller_one(nest: Experiment) -> None:
    cohort, state = switched(nest)
    personal = cohort.run(worker_of(nest), state).personal[0]
    assert personal["level"].tolist() == [2]
    now, _ = by_hand(nest, cohort.members[0], 2, state)
    holding = nest.plan.holding(2, cohort.members[0].submodel)
    for name, key in holding.keys.items():
        assert personal[f"own/{name}"] == pytest.approx(now[key][holding.where[name]], abs=1e-6)


def test_the_clock_and_the_training_divide_the_epochs_alike(nest: Experiment) -> None:
    """From the load to the cohorts: who gets busier switches after the first half."""
    state, seen = nest.initial_state(), 0
    for number in range(4):
        round = dataclasses.replace(round_of(nest, state, number), memory=nest.merge.initial(state))
        step = Synchronous(CLIENTS, CLIENTS).step(Standing(number), nest.clock.dispatch(round))
        own = step.ended.attempts
        members = {m.client: (c.level, m) for c in cohorts(nest, round, step) for m in c.members}
        assert sorted(members) == own.client.tolist()
        for client, level, first in zip(own.client.tolist(), own.level, own.first, strict=True):
            assert members[client][0] == level
            begun = members[client][1].first
            assert (begun is None) == (level == first)
            assert begun is None or (begun[0].level, begun[1]) == (first, 2)
            seen += begun is not None
    assert seen


def test_a_run_with_switches_learns_and_serves(tmp_path: Path) -> None:
    """A run of the whole engine, in which somebody switches; the same bits whoever computes."""
    from functools import partial

    from tests.methods.common import UnrulyPools
    from tests.tiny import lines, outcome, run_here

    config = small(tmp_path, "nestfl", *SWITCH)
    run_here(config, tmp_path / "here")
    run_here(config, tmp_path / "unruly", partial(UnrulyPools, count=3))
    assert outcome(tmp_path / "unruly") == outcome(tmp_path / "here")
    switched = [one for line in lines(tmp_path / "here") for one in line["participants"] if "first" in one]
    assert switched
    assert all(one["level"] == one["first"] - 1 for one in switched)

"""NestFL: the chain, the parts between two sizes, the weights by angle, and what a client keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster_fl.aggregation.angles import angles, factors
from cluster_fl.compose import compose
from cluster_fl.errors import UserError
from cluster_fl.experiment import Experiment, prepare
from cluster_fl.merging import Merged, Phases
from cluster_fl.nesting.extraction import load
from cluster_fl.nesting.importance import numbers
from cluster_fl.nesting.plan import State
from cluster_fl.rounds import Round
from cluster_fl.timing import load as loads
from cluster_fl.timing.deadline import Affordable, level_seconds
from cluster_fl.training.cohort import Cohort, form
from cluster_fl.training.own import own_submodel, own_tensors
from cluster_fl.training.passes import innermost, spread
from cluster_fl.training.program import Context
from cluster_fl.training.worker import Worker
from cluster_fl.weighing import ANGLE, COUNT
from tests.methods.common import UnrulyPools
from tests.tiny import assigned, outcome, run_here, select, stopped_after, worker_of
from tests.tiny import results as run_phase

NEST = """
method: nestfl
rounds: 3
clients: {count: 6, per_round: 5}
levels: {count: 3, rounding: ceil}
model: {name: resnet8, options: {widths: [4, 8, 16]}}
data: {name: digits, held_out: 60, partition: {name: shards}}
train: {epochs: 1, batch_size: 32, lr: 0.1, momentum: 0.0, cohort_size: 2}
time: {devices: {gflops: [0.05, 0.1, 0.4]}}
evaluate: {every: 3}
"""
WHOLE = "levels.pairs=[{width: 1.0}]", "levels.order=rising", "time.devices.gflops=[1.0]"


def made(folder: Path, *overrides: str) -> Experiment:
    file = folder / "nest.yaml"
    file.write_text(NEST)
    return prepare(compose([file], overrides))


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return made(tmp_path_factory.mktemp("nest"))


def first_round(experiment: Experiment) -> Round:
    state = experiment.initial_state()
    memory = experiment.merge.initial(state)
    round = Round(
        0, experiment.config, experiment.plan, experiment.population, state, memory, lambda client: {}
    )
    return select(round)


def cohorts_of(experiment: Experiment, round: Round, levels: list[int] | None = None) -> list[Cohort]:
    """The round's cohorts, at given levels of the participants, or as the devices allow."""
    allocation = experiment.allocation if levels is None else lambda _: np.array(levels)
    return form(round, assigned(round, allocation, experiment.rule), experiment.program, keep=True)


def drive(phases: Phases, worker: Callable[[], Worker]) -> Merged:
    """Runs a merge; ``worker`` is asked before every phase."""
    try:
        phase = next(phases)
        while True:
            hosting = worker()
            phase = phases.send(run_phase(phase, hosting))
    except StopIteration as end:
        merged: Merged = end.value
        return merged


def bits(state: State) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in state.items()}


def test_the_default_sizes_are_fifths(tmp_path: Path) -> None:
    file = tmp_path / "plain.yaml"
    file.write_text("method: nestfl\nmodel: {name: heterofl_cnn}\nclients: {count: 5, per_round: 5}\n")
    plan = prepare(compose([file])).plan
    assert [level.width for level in plan.levels] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert [level.submodel.channels for level in plan.levels[:2]] == [(13, 26, 52, 103), (26, 52, 103, 205)]


def test_parts_are_disjoint_and_together_what_the_largest_holds(experiment: Experiment) -> None:
    round = first_round(experiment)
    submodels = experiment.rule.submodels(round, np.array([1, 2, 3]))
    for small, large in pairwise(submodels):
        for inner, outer in zip(small.channels, large.channels, strict=True):
            assert set(numbers(inner)) <= set(numbers(outer))
    for chosen in ([0, 1, 2], [0, 1], [1]):
        holdings = [experiment.plan.holding(n + 1, submodels[n]) for n in chosen]
        parts = innermost(holdings, round.state)
        for name, array in round.state.items():
            held = [np.zeros(array.shape, dtype=bool) for _ in chosen]
            for mask, holding in zip(held, holdings, strict=True):
                mask[holding.where[name]] = True
            for number, mask in enumerate(held):
                inner = held[number - 1] if number else np.zeros_like(mask)
                np.testing.assert_array_equal(parts[name] == number, mask & ~inner)
            np.testing.assert_array_equal(parts[name] >= 0, held[-1])


def test_one_size_without_angles_is_fedavg(tmp_path: Path) -> None:
    results = []
    for name, own in (("nestfl", ["options.alpha=0", *WHOLE]), ("fedavg", ["levels.count=1", WHOLE[2]])):
        config = made(tmp_path, f"method={name}", *own, "aggregation.weights=samples").config
        run_here(config, tmp_path / name)
        results.append(outcome(tmp_path / name)[1])
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
    assert results[0]["bytes"] == results[1]["bytes"]


def test_with_angles_it_is_something_else(tmp_path: Path) -> None:
    results = []
    for alpha in (0, 5):
        config = made(tmp_path, f"options.alpha={alpha}").config
        run_here(config, tmp_path / str(alpha))
        results.append(outcome(tmp_path / str(alpha))[1]["weights_sha256"])
    assert results[0] != results[1]


def expected(experiment: Experiment, round: Round, cohorts: list[Cohort], against: str) -> State:
    """The next weights, element by element in float64, from the formulas as they stand."""
    worker = worker_of(experiment)
    for cohort in cohorts:
        cohort.run(worker, round.state)
    updates = [(cohort, u) for cohort in cohorts for u in cohort.updates(worker, round.state)]
    levels = sorted({cohort.level for cohort in cohorts})
    holdings = [
        experiment.plan.holding(n, next(c for c in cohorts if c.level == n).members[0].submodel)
        for n in levels
    ]
    parts = innermost(holdings, round.state)
    full = {u.client: spread(u, round.state) for _, u in updates}
    level = {u.client: cohort.level for cohort, u in updates}
    samples = {u.client: len(experiment.population.shares.train[u.client]) for _, u in updates}
    result = {name: array.astype(np.float64) for name, array in round.state.items()}

    def vector(of: dict[str, np.ndarray], part: int) -> np.ndarray:
        return np.concatenate([of[name][parts[name] == part] for name in sorted(of)])

    def mean(who: list[int]) -> dict[str, np.ndarray]:
        total = sum(samples[k] for k in who)
        return {
            name: np.asarray(sum(samples[k] / total * full[k][name] for k in who)) for name in round.state
        }

    def angle(a: np.ndarray, b: np.ndarray) -> float:
        return float(angles(a @ b, a @ a, b @ b))

    for part, number in enumerate(levels):
        who = [k for k in full if level[k] >= number]
        where = 0 if against == "common" else part
        compared = [k for k in full if level[k] >= levels[where]]
        theta = []
        for k in who:
            own = vector(full[k], where)
            if against == "pairwise":
                theta.append(np.mean([angle(own, vector(full[m], where)) for m in who if m != k] or [0.0]))
            else:
                theta.append(angle(own, vector(mean(compared), where)))
        raw = np.array([samples[k] for k in who]) * factors(np.array(theta), 5.0 if len(who) > 1 else 0.0)
        for name, array in result.items():
            inside = parts[name] == part
            array[inside] += sum(
                share * full[k][name][inside] for k, share in zip(who, raw / raw.sum(), strict=True)
            )
    return result


@pytest.mark.parametrize("against", ["partition", "common", "pairwise"])
def test_each_part_moves_by_its_own_weights(tmp_path: Path, against: str) -> None:
    experiment = made(tmp_path, f"options.angle={against}")
    round = first_round(experiment)
    cohorts = cohorts_of(experiment, round, [1, 3, 2, 1, 2])  # the outermost part has a single client
    worker = worker_of(experiment)
    merged = drive(experiment.merge.phases(round, cohorts), lambda: worker)
    for name, array in expected(experiment, round, cohorts, against).items():
        np.testing.assert_allclose(merged.state[name], array, rtol=2e-7, atol=2e-8)
    counts = merged.memory[COUNT]
    assert counts[round.participants[1]].tolist() == [1, 1, 0]  # alone in the last part: no angle to remember
    assert counts[round.participants[0]].tolist() == [1, 0, 0]
    assert ((merged.memory[ANGLE] > 0) == (counts > 0)).all()


def test_updates_that_were_lost_are_made_again(experiment: Experiment) -> None:
    """A new worker in every phase, which has kept nothing."""
    round = first_round(experiment)
    cohorts = cohorts_of(experiment, round, [1, 3, 2, 1, 2])
    one = worker_of(experiment)
    kept = drive(experiment.merge.phases(round, cohorts), lambda: one)
    lost = drive(experiment.merge.phases(round, cohorts), lambda: worker_of(experiment))
    assert bits(kept.state) == bits(lost.state)
    assert bits(kept.memory) == bits(lost.memory)


def test_what_nobody_holds_keeps_its_bits(experiment: Experiment) -> None:
    round = first_round(experiment)
    cohorts = cohorts_of(experiment, round, [1, 2, 1, 1, 1])
    merged = drive(experiment.merge.phases(round, cohorts), partial(worker_of, experiment))
    submodel = next(c for c in cohorts if c.level == 2).members[0].submodel
    where = experiment.plan.holding(2, submodel).where
    for name, before in round.state.items():
        held = np.zeros(before.shape, dtype=bool)
        held[where[name]] = True
        assert merged.state[name][~held].tobytes() == before[~held].tobytes()
        assert (merged.state[name][held] != before[held]).any()


def test_a_client_without_a_step_has_no_say(tmp_path: Path) -> None:
    experiment = made(tmp_path, "train.epochs=0")
    round = first_round(experiment)
    merged = drive(
        experiment.merge.phases(round, cohorts_of(experiment, round)), partial(worker_of, experiment)
    )
    assert bits(merged.state) == bits(round.state)
    assert not merged.personal
    assert not merged.memory[COUNT].any()


def test_angles_are_averaged_over_participations(tmp_path: Path) -> None:
    experiment = made(tmp_path)
    round = first_round(experiment)
    round = replace(round, memory=round.memory | {ANGLE: np.full((6, 3), 0.5), COUNT: np.full((6, 3), 3.0)})
    cohorts = cohorts_of(experiment, round, [3] * 5)
    fresh = drive(experiment.merge.phases(first_round(experiment), cohorts), partial(worker_of, experiment))
    merged = drive(experiment.merge.phases(round, cohorts), partial(worker_of, experiment))
    who = round.participants
    # One size in use has one part, which is the level's own.
    np.testing.assert_allclose(
        merged.memory[ANGLE][who, 2], 0.75 * 0.5 + 0.25 * fresh.memory[ANGLE][who, 2], rtol=1e-12
    )
    assert merged.memory[COUNT][who].tolist() == [[3, 3, 4]] * 5


def test_a_device_takes_the_largest_size_that_it_has_time_for(tmp_path: Path) -> None:
    experiment = made(tmp_path, "time.load.shares=[0,0.5]", "clients.per_round=6")
    round = replace(first_round(experiment), number=4)
    for deadline in (1e-6, 0.2, 1.0, 5.0, 1e6):
        levels = Affordable(experiment.program, deadline)(round)
        for client, level in zip(round.participants, levels, strict=True):
            alone = replace(round, participants=np.array([client]))
            seconds = []
            for number in (1, 2, 3):
                clock = replace(experiment.clock, allocation=lambda _, number=number: np.array([number]))
                done = clock.dispatch(alone).attempts(4, alone.participants, 0.0, np.inf)
                seconds.append(float(done.finish[0]))
            assert level == max([n for n in (1, 2, 3) if seconds[n - 1] <= deadline] or [1])
    busy = loads.load(experiment.config.time.load, 0, np.arange(6), 4)
    assert busy.max() > 0


def test_the_default_deadline_is_the_median_device_s(tmp_path: Path) -> None:
    experiment = made(tmp_path, "time.load.shares=[0,0.5]")
    round = first_round(experiment)
    limit = Affordable(experiment.program).limit(round)
    unloaded = level_seconds(round, experiment.program, np.arange(6), np.zeros(6))
    assert limit == np.median(unloaded[:, 1])  # two thirds are nearest to 0.6


def test_a_lasting_chain_is_remembered(tmp_path: Path) -> None:
    chains = {}
    for every in (0, 1, 2):
        experiment = made(tmp_path, f"options.mask_refresh_every={every}", "clients.per_round=1")
        round = first_round(experiment)
        seen = []
        for number in range(4):
            round = replace(round, number=number)
            seen.append(experiment.rule.submodels(round, np.array([1, 2, 3])))
            merged = drive(
                experiment.merge.phases(round, cohorts_of(experiment, round)), partial(worker_of, experiment)
            )
            round = replace(round, state=merged.state, memory=merged.memory)
            if every != 1:
                assert experiment.rule.serve(round) == seen[-1]
        chains[every] = seen
    changes = {every: [a != b for a, b in pairwise(seen)] for every, seen in chains.items()}
    assert changes[0] == [False] * 3
    assert (changes[2][0], changes[2][2]) == (False, False)
    assert any(changes[1])


@pytest.mark.parametrize("own", ["mask_refresh_every=0", "angle=pairwise"])
def test_resumed_and_unruly_runs_have_the_same_bits(own: str, tmp_path: Path) -> None:
    config = made(tmp_path, f"options.{own}", "time.load.shares=[0,0.5]").config
    run_here(config, tmp_path / "here")
    run_here(config, tmp_path / "unruly", partial(UnrulyPools, count=2))
    stopped_after(config, tmp_path / "halted", 1)
    run_here(config, tmp_path / "halted", resume=True)
    assert outcome(tmp_path / "here") == outcome(tmp_path / "unruly") == outcome(tmp_path / "halted")


def test_a_client_s_model_is_what_it_trained(experiment: Experiment) -> None:
    round = first_round(experiment)
    cohorts = cohorts_of(experiment, round, [1, 3, 2, 1, 2])
    worker = worker_of(experiment)
    merged = drive(experiment.merge.phases(round, cohorts), lambda: worker)
    assert set(merged.personal) == {int(client) for client in round.participants}
    for cohort in cohorts:
        for update in cohort.updates(worker, round.state):
            kept = merged.personal[update.client]
            assert own_submodel(kept, experiment.plan) == cohort.members[0].submodel
            received = update.holding.gather(round.state)
            for name, delta in update.deltas.items():
                assert (
                    own_tensors(kept)[name].tobytes() == (received[name] + delta).astype(np.float32).tobytes()
                )


def test_a_client_answers_with_its_own_model_or_its_level_s(experiment: Experiment) -> None:
    round = first_round(experiment)
    cohorts = cohorts_of(experiment, round, [1, 3, 2, 1, 2])
    merged = drive(experiment.merge.phases(round, cohorts), partial(worker_of, experiment))
    worker, client = worker_of(experiment), int(round.participants[1])
    served = experiment.rule.serve(round)[0]
    holding = experiment.plan.holding(1, served)

    def answers(personal: State) -> Any:
        model = worker.module(served)
        load(model, holding.gather(round.state))
        context = Context(
            worker,
            1,
            client,
            experiment.plan.level(1),
            served,
            holding,
            {},
            {},
            personal,
            torch.Generator(),
            1,
        )
        answer = experiment.program.personalise(model.eval(), context)
        with torch.no_grad():
            return answer(worker.data.batch(np.arange(20))[0])[-1].numpy().copy()

    own = merged.personal[client]
    module = worker_of(experiment).module(experiment.plan.level(3).submodel)  # it was the full model
    load(module, own_tensors(own))
    with torch.no_grad():
        expected = module.eval()(worker.data.batch(np.arange(20))[0])[-1].numpy()
    np.testing.assert_array_equal(answers(own), expected)
    assert not np.array_equal(answers({}), expected)


def test_the_channels_numbers_are_sent_too(tmp_path: Path) -> None:
    bits_of = {}
    for every in (0, 1, 2):
        experiment = made(tmp_path, f"options.mask_refresh_every={every}")
        level = experiment.plan.level(1)
        bits_of[every] = (experiment.program.effort(level).down - 1) * level.cost.bytes * 8
        assert experiment.program.effort(experiment.plan.level(3)).down == 1
    channels = sum(group.size for group in experiment.plan.anatomy.groups)
    assert bits_of == pytest.approx({0: 0.0, 1: channels, 2: channels / 2}, abs=1e-6)


@pytest.mark.parametrize("norm", ["static", "per_level"])
def test_norms_that_cannot_follow_are_refused(tmp_path: Path, norm: str) -> None:
    with pytest.raises(UserError, match=r"model\.norm"):
        made(tmp_path, f"model.norm={norm}")

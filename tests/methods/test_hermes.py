"""Hermes: what is averaged, what stays a client's own, and how its model shrinks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster_fl.compose import compose
from cluster_fl.config import Config
from cluster_fl.errors import UserError
from cluster_fl.experiment import Experiment, prepare
from cluster_fl.merging import Merged
from cluster_fl.nesting.extraction import load
from cluster_fl.nesting.importance import chain, numbers
from cluster_fl.nesting.plan import State
from cluster_fl.nesting.submodel import Submodel, gather, index_map, prefix
from cluster_fl.rounds import Round
from cluster_fl.training.cohort import Cohort, form
from cluster_fl.training.own import own_model, own_submodel, own_tensors, pack
from cluster_fl.training.program import Context
from tests.tiny import assigned, attempts_of, lines, outcome, run_here, stopped_after, worker_of
from tests.tiny import results as run_phase

OWN = """
method: hermes
rounds: 4
clients: {count: 4, per_round: 3}
levels: {count: 1}
model: {name: resnet8, options: {widths: [4, 8, 16]}}
data: {name: digits, held_out: 60, partition: {name: shards}}
train: {epochs: 1, batch_size: 32, lr: 0.1, momentum: 0.0, cohort_size: 2}
evaluate: {every: 4}
"""


def composed(folder: Path, *overrides: str) -> Config:
    file = folder / "own.yaml"
    file.write_text(OWN)
    return compose([file], overrides)


def begun(experiment: Experiment, personal: Callable[[int], State]) -> Round:
    state = experiment.initial_state()
    memory = experiment.merge.initial(state)
    return Round(
        3, experiment.config, experiment.plan, experiment.population, state, memory, personal, np.arange(3)
    )


def merged(experiment: Experiment, round: Round) -> tuple[list[Cohort], Merged]:
    assignments = assigned(round, experiment.allocation, experiment.rule)
    cohorts = form(round, assignments, experiment.program, keep=False)
    phases, worker = experiment.merge.phases(round, cohorts), worker_of(experiment)
    try:
        phase = next(phases)
        while True:
            phase = phases.send(run_phase(phase, worker))
    except StopIteration as end:
        result: Merged = end.value
        return cohorts, result


def models(experiment: Experiment) -> dict[int, tuple[Submodel, State]]:
    """Three clients' own models: different weights, and different channels."""
    traced, made = experiment.plan.anatomy, {}
    for client, width in enumerate((0.5, 0.75, 1.0)):
        rng = np.random.default_rng(client)
        weights = {
            name: (0.3 * rng.normal(size=shape)).astype(np.float32) for name, shape in traced.shapes.items()
        }
        shape = prefix(traced, width, traced.depth, (traced.depth,), "ceil")
        (submodel,) = chain(traced, weights, [shape])
        made[client] = submodel, gather(weights, index_map(traced, submodel))
    return made


def packed(models: dict[int, tuple[Submodel, State]]) -> Callable[[int], State]:
    return lambda client: pack(1, *models[client]) if client in models else {}


def test_what_all_have_is_averaged_and_nothing_else(tmp_path: Path) -> None:
    experiment = prepare(composed(tmp_path, "options.threshold=1"))
    assert experiment.plan.global_level is None
    before = models(experiment)
    round = begun(experiment, packed(before))
    _, found = merged(experiment, round)
    own = trained(experiment, round, before)
    samples = [len(experiment.population.shares.train[client]) for client in range(3)]
    averaged = 0
    for name, start in round.state.items():
        where = {
            client: index_map(experiment.plan.anatomy, model[0])[name] for client, model in before.items()
        }
        full, held = np.zeros((3, *start.shape)), np.zeros((3, *start.shape), dtype=bool)
        for client in range(3):
            full[client][where[client]], held[client][where[client]] = own[client][name], True
        for position in np.ndindex(start.shape):
            if held[(slice(None), *position)].all():
                averaged += 1
                mean = np.average(full[(slice(None), *position)], weights=samples)
                full[(slice(None), *position)] = mean
                assert found.state[name][position] == pytest.approx(mean, rel=2e-6, abs=2e-7)
            else:
                assert found.state[name][position] == start[position]
        common = held.all(axis=0)
        for client in range(3):
            kept = own_tensors(found.personal[client])[name]
            np.testing.assert_allclose(kept, full[client][where[client]], rtol=2e-6, atol=2e-7)
            alone = ~common[where[client]]
            assert kept[alone].tobytes() == own[client][name][alone].tobytes()
            assert kept[~alone].tobytes() == found.state[name][where[client]][~alone].tobytes()
    total = sum(array.size for array in round.state.values())
    assert 0 < averaged < total


def trained(
    experiment: Experiment, round: Round, before: dict[int, tuple[Submodel, State]]
) -> dict[int, State]:
    """Each client's model after its training, before any average: as if it were alone."""
    result = {}
    for client in before:
        alone = replace(round, participants=np.array([client]))
        worker = worker_of(experiment)
        (cohort,) = form(
            alone, assigned(alone, experiment.allocation, experiment.rule), experiment.program, False
        )
        result[client] = own_tensors(cohort.run(worker, round.state).personal[client])
    return result


def test_a_client_trains_its_own_model(tmp_path: Path) -> None:
    experiment = prepare(composed(tmp_path, "options.threshold=1", "train.lr=0"))
    before = models(experiment)
    own = trained(experiment, begun(experiment, packed(before)), before)
    for client, (_, tensors) in before.items():
        assert {n: a.tobytes() for n, a in own[client].items()} == {
            n: a.tobytes() for n, a in tensors.items()
        }


def test_a_newcomer_starts_from_the_server_s_weights(tmp_path: Path) -> None:
    experiment = prepare(composed(tmp_path, "options.threshold=1", "train.lr=0"))
    round = begun(experiment, lambda client: {})
    _, found = merged(experiment, round)
    for client in range(3):
        for name, array in own_tensors(found.personal[client]).items():
            assert array.tobytes() == round.state[name].tobytes()


def least(size: int) -> int:
    """Channels that a target of 0.45 leaves."""
    return int(np.ceil(0.55 * size - 1e-9))


def test_a_client_prunes_by_steps_and_never_beyond_the_target(tmp_path: Path) -> None:
    config = composed(
        tmp_path, "options.threshold=0", "options.target=0.45", "rounds=5", "clients.per_round=4"
    )
    experiment = prepare(config)
    groups = experiment.plan.anatomy.groups
    states: dict[int, State] = {}
    round, sizes, costs = begun(experiment, lambda client: states.get(client, {})), [], []
    for number in range(5):
        round = replace(round, number=number, participants=np.arange(4))
        costs.append(attempts_of(experiment, round))
        _, found = merged(experiment, round)
        for client in range(4):
            old = own_submodel(states.get(client, {}), experiment.plan) or experiment.plan.level(1).submodel
            new = own_submodel(found.personal[client], experiment.plan)
            assert new is not None
            for group, wide, narrow in zip(groups, old.channels, new.channels, strict=True):
                before, after = set(numbers(wide)), set(numbers(narrow))
                assert after <= before
                assert len(after) >= 0.55 * group.size
                assert len(after) == max(len(before) - int(0.2 * len(before) + 0.5), least(group.size))
        states = dict(found.personal)
        round = replace(round, state=found.state, memory=found.memory)
        new = own_submodel(states[0], experiment.plan)
        assert new is not None
        sizes.append([len(numbers(own)) for own in new.channels])
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[-1] == [least(group.size) for group in groups]
    for one, other in pairwise(costs[:4]):
        assert (other.up < one.up).all()
        assert (other.finish < one.finish).all()
    assert costs[-1].up[0] < 0.5 * costs[0].up[0]


def test_what_a_client_prunes_leaves_the_average(tmp_path: Path) -> None:
    experiment = prepare(composed(tmp_path, "options.threshold=0"))
    round = begun(experiment, lambda client: {})
    _, found = merged(experiment, round)
    submodels = [own_submodel(found.personal[client], experiment.plan) for client in range(3)]
    for name, start in round.state.items():
        common = np.ones(start.shape, dtype=bool)
        for submodel in submodels:
            assert submodel is not None
            held = np.zeros(start.shape, dtype=bool)
            held[index_map(experiment.plan.anatomy, submodel)[name]] = True
            common &= held
        assert found.state[name][~common].tobytes() == start[~common].tobytes()
        assert not common.any() or (found.state[name][common] != start[common]).any()


def test_who_is_wrong_too_often_keeps_everything(tmp_path: Path) -> None:
    config = composed(tmp_path, "options.threshold=1", "rounds=2")
    run_here(config, tmp_path / "run")
    full = [record["bytes_up"] for record in lines(tmp_path / "run")]
    assert full[0] == full[1]


def test_the_training_part_judges_where_nothing_is_held_out(tmp_path: Path) -> None:
    experiment = prepare(composed(tmp_path, "data.held_out=0", "options.threshold=0"))
    _, found = merged(experiment, begun(experiment, lambda client: {}))
    pruned = [own_submodel(found.personal[client], experiment.plan) for client in range(3)]
    assert all(submodel != experiment.plan.level(1).submodel for submodel in pruned)


def test_a_resumed_run_finds_its_clients(tmp_path: Path) -> None:
    config = composed(tmp_path, "options.threshold=0", "train.correction.name=scaffold")
    run_here(config, tmp_path / "here")
    stopped_after(config, tmp_path / "halted", 2)
    run_here(config, tmp_path / "halted", resume=True)
    assert outcome(tmp_path / "halted") == outcome(tmp_path / "here")
    summary = outcome(tmp_path / "here")[1]
    assert summary["clients_sha256"] is not None
    assert summary["accuracy"]["global"] is None
    assert summary["accuracy"]["personal"]["last_exit"] > 0.3
    falling = [record["bytes_up"] for record in lines(tmp_path / "here")]
    assert falling[-1] < falling[0]


def test_an_own_model_answers_for_its_client(tmp_path: Path) -> None:
    experiment = prepare(composed(tmp_path))
    submodel, tensors = models(experiment)[0]
    worker = worker_of(experiment)
    module = worker_of(experiment).module(submodel)
    load(module, tensors)
    inputs = worker.data.batch(np.arange(12))[0]
    context = Context(
        worker,
        0,
        0,
        experiment.plan.level(1),
        submodel,
        experiment.plan.holding(1, submodel),
        {},
        {},
        pack(1, submodel, tensors),
        torch.Generator(),
        1,
    )
    model = own_model(context)
    assert model is not None
    with torch.no_grad():
        np.testing.assert_array_equal(model(inputs)[-1].numpy(), module.eval()(inputs)[-1].numpy())


@pytest.mark.parametrize("norm", ["static", "per_level"])
def test_norms_that_cannot_follow_are_refused(tmp_path: Path, norm: str) -> None:
    with pytest.raises(UserError, match=r"model\.norm"):
        prepare(composed(tmp_path, f"model.norm={norm}"))

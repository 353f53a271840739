"""FIARSE: exactly the largest elements, their gradient, who counts for what, and what is charged."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster_fl.errors import UserError
from cluster_fl.experiment import Experiment, prepare
from cluster_fl.nesting.extraction import load
from cluster_fl.nesting.plan import State
from cluster_fl.nesting.submodel import kept
from cluster_fl.training.cohort import Cohort, Update, form
from cluster_fl.training.masks import Through, largest, layers
from tests.tiny import attempts_of, outcome, planned, round_of, run_here, tiny, worker_of
from tests.tiny import results as run_phase

SHARES = (0.1, 0.4, 1.0)
FIARSE = ("method=fiarse", "levels.pairs=null", f"levels.ratios={list(SHARES)}")
CLIENTS = range(6)


def made(folder: Path, *overrides: str) -> Experiment:
    return prepare(tiny(folder, *FIARSE, *overrides))


def magnitudes(state: State, names: Iterable[str]) -> np.ndarray:
    return np.concatenate([np.abs(state[name]).ravel() for name in names])


def held(state: State, names: Iterable[str], share: float) -> dict[str, np.ndarray]:
    """The elements of the largest magnitude, of equal ones the first, by sorting them all."""
    names = list(names)
    flat = magnitudes(state, names)
    chosen = np.zeros(len(flat), dtype=bool)
    chosen[np.lexsort((np.arange(len(flat)), -flat))[: int(share * len(flat) + 1e-9) or 1]] = True
    ends = np.cumsum([state[name].size for name in names])
    parts = np.split(chosen, ends[:-1])
    return {name: part.reshape(state[name].shape) for name, part in zip(names, parts, strict=True)}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_masks_are_exact_and_nested_with_ties(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    seed, most = data.draw(st.integers(0, 99)), data.draw(st.integers(0, 4))
    rng = np.random.default_rng(seed)
    state = {
        str(i): rng.integers(-most, most + 1, (size, 2)).astype(np.float32) for i, size in enumerate(sizes)
    }
    tensors = {name: torch.tensor(array) for name, array in state.items()}
    shares = sorted(data.draw(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=4)))
    found = [largest(tensors, share) for share in shares]
    for share, masks in zip(shares, found, strict=True):
        expected = held(state, state, share)
        assert all(np.array_equal(masks[name].kept.numpy(), expected[name]) for name in state)
        assert sum(int(mask.kept.sum()) for mask in masks.values()) == kept(2 * sum(sizes), share)
        least = min(float(tensors[n].abs()[m.kept].min()) for n, m in masks.items() if m.kept.any())
        assert all(float(mask.threshold) == least for mask in masks.values())
    for smaller, larger in itertools.pairwise(found):
        assert all(bool((larger[name].kept | ~smaller[name].kept).all()) for name in state)


def test_the_gradient_is_the_written_formula() -> None:
    """Numerically: of w (1 + s(|w|) - s(|w0|)) around w0, where s(a) = 2a / (a + theta)."""
    theta = 0.5
    w = torch.tensor([-2.0, -0.7, -0.5, -0.3, 0.0, 0.2, 0.5, 0.6, 1.7, 40.0], dtype=torch.float64)
    chosen = torch.tensor([True] * 8 + [False, True])  # one that fell out of the ranking stays out
    g = torch.linspace(-1.5, 2.0, len(w), dtype=torch.float64)
    leaf = w.clone().requires_grad_()
    seen = Through.apply(leaf, chosen, torch.tensor(theta, dtype=torch.float64))
    seen.backward(g)
    open = chosen & (w.abs() >= theta)
    assert torch.equal(seen, torch.where(open, w, 0.0))

    def soft(v: torch.Tensor) -> torch.Tensor:
        return 2 * v.abs() / (v.abs() + theta)

    step = 1e-6
    above, below = ((w + d) * (1 + soft(w + d) - soft(w)) for d in (step, -step))
    numeric = torch.where(open, (above - below) / (2 * step) * g, 0.0)
    assert leaf.grad is not None
    assert torch.allclose(leaf.grad, numeric, rtol=1e-7, atol=1e-9)
    assert leaf.grad[2] == 1.5 * g[2]  # at the threshold


def test_a_zero_threshold_is_no_mask() -> None:
    leaf = torch.tensor([0.0, -0.5, 2.0], requires_grad=True)
    seen = Through.apply(leaf, torch.ones(3, dtype=torch.bool), torch.tensor(0.0))
    seen.sum().backward()
    assert torch.equal(seen, leaf)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.ones(3))


@pytest.mark.parametrize("levels", ["levels.ratios=[1.0]", "levels.shares=[0,0,1]"])
def test_everything_kept_is_fedavg(levels: str, tmp_path: Path) -> None:
    train = ("rounds=2", "train.weight_decay=0.001", "train.clip_norm=1")
    run_here(tiny(tmp_path, *FIARSE, levels, *train), tmp_path / "fiarse")
    plain = ("method=fedavg", "aggregation.weights=uniform", "levels.pairs=null", *train)
    run_here(tiny(tmp_path, *plain), tmp_path / "fedavg")
    hashes = [outcome(tmp_path / name)[1]["weights_sha256"] for name in ("fiarse", "fedavg")]
    assert hashes[0] == hashes[1]


def trained(experiment: Experiment, clients: Iterable[int]) -> tuple[State, list[Update]]:
    """The state before a round, and what each of its clients sends."""
    round, worker = round_of(experiment, clients=clients), worker_of(experiment)
    cohorts = form(round, planned(round), experiment.program, True)
    return round.state, [update for cohort in cohorts for update in cohort.updates(worker, round.state)]


@pytest.mark.parametrize("ranking", ["global", "layer"])
@pytest.mark.parametrize("largest_level", [2, 3])
def test_clients_train_what_they_hold_and_count_where_they_changed_it(
    ranking: str, largest_level: int, tmp_path: Path
) -> None:
    experiment = made(tmp_path, f"options.ranking={ranking}", "train.weight_decay=0.01")
    clients = np.flatnonzero(experiment.plan.level_of <= largest_level)
    state, updates = trained(experiment, clients)
    groups = layers(experiment.plan.anatomy)
    masked = [name for group in groups for name in group]
    ranked = groups if ranking == "layer" else [masked]
    for update in updates:
        share = SHARES[experiment.plan.level_of[update.client] - 1]
        parts = [held(state, group, share) for group in ranked]
        chosen = {name: mask for part in parts for name, mask in part.items()}
        assert all(not update.deltas[name][~chosen[name]].any() for name in masked)
        moved = sum(np.count_nonzero(update.deltas[name]) for name in masked)
        assert moved > 0.9 * sum(mask.sum() for mask in chosen.values())

    after, idle = next_state(experiment, clients), 0
    for name, before in state.items():
        deltas = np.array([update.deltas[name] for update in updates])
        voters = np.count_nonzero(deltas, axis=0) if name in masked else np.full(before.shape, len(updates))
        expected = before + deltas.sum(axis=0) / np.maximum(voters, 1)
        assert np.allclose(after[name], expected, rtol=0, atol=1e-6)
        assert np.array_equal(after[name][voters == 0], before[voters == 0])
        idle += int(np.count_nonzero(voters == 0))
    count = len(magnitudes(state, masked))
    assert (idle > 0.5 * count) if largest_level == 2 else (idle < 0.1 * count)


def next_state(experiment: Experiment, clients: Iterable[int] = CLIENTS) -> State:
    round, worker = round_of(experiment, clients=clients), worker_of(experiment)
    phases = experiment.merge.phases(round, form(round, planned(round), experiment.program, False))
    phase = next(phases)
    results = run_phase(phase, worker)
    with pytest.raises(StopIteration) as end:
        phases.send(results)
    state: State = end.value.value.state
    return state


def test_a_step_goes_by_the_masked_weights_gradient(tmp_path: Path) -> None:
    """One step of all of a client's samples, against the gradient of a model whose weights are really cut."""
    once = ("train.batch_size=400", "train.momentum=0", "train.lr=0.5")
    experiment = made(tmp_path, *once)
    client = int(np.flatnonzero(experiment.plan.level_of == 1)[0])
    state, (update,) = trained(experiment, [client])
    worker = worker_of(experiment)
    names = [name for group in layers(experiment.plan.anatomy) for name in group]
    chosen = held(state, names, SHARES[0])
    model = worker.fresh(experiment.plan.level(1).submodel).train()
    load(model, {name: np.where(chosen[name], a, 0) if name in chosen else a for name, a in state.items()})
    x, y = worker.data.batch(experiment.population.shares.train[client])
    torch.autograd.backward(F.cross_entropy(model(x)[-1], y))
    theta = min(np.abs(state[name][chosen[name]]).min(initial=np.inf) for name in names)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected, w = -0.5 * parameter.grad.numpy(), np.abs(state[name])
        if name in chosen:
            expected = np.where(chosen[name], (1 + 2 * theta * w / (w + theta) ** 2) * expected, 0)
        assert np.allclose(update.deltas[name], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("ranking", ["global", "layer"])
def test_a_level_is_served_by_its_largest_elements(ranking: str, tmp_path: Path) -> None:
    experiment = made(tmp_path, f"options.ranking={ranking}")
    state = next_state(experiment)
    groups = layers(experiment.plan.anatomy)
    ranked = groups if ranking == "layer" else [[name for group in groups for name in group]]
    for level, share in zip(experiment.plan.levels, SHARES, strict=True):
        model = worker_of(experiment).fresh(level.submodel)
        load(model, experiment.plan.holding(level.number).gather(state))
        experiment.program.deploy(model, level)
        masks = {name: mask for group in ranked for name, mask in held(state, group, share).items()}
        for name, parameter in model.named_parameters():
            expected = np.where(masks[name], state[name], 0) if name in masks else state[name]
            assert np.array_equal(parameter.detach().numpy(), expected)
        assert level.ratio == share
        assert level.budgeted == sum(mask.sum() for mask in masks.values())


def test_all_but_the_norms_is_masked(tmp_path: Path) -> None:
    traced = made(tmp_path).plan.anatomy
    masked = {name for group in layers(traced) for name in group}
    assert {name for name in traced.parameters - masked if "bn" not in name} == set()
    assert not any("bn" in name for name in masked)
    assert ("head.linear.weight", "head.linear.bias") in layers(traced)


def test_a_pools_module_stays_what_it_was(tmp_path: Path) -> None:
    experiment = made(tmp_path)
    worker, round = worker_of(experiment), round_of(experiment, clients=CLIENTS)
    module = worker.module(experiment.plan.level(1).submodel)
    before = {name: id(parameter) for name, parameter in module.named_parameters()}
    cohorts: list[Cohort] = form(round, planned(round), experiment.program, False)
    cohorts[0].run(worker, round.state)
    assert worker.module(experiment.plan.level(1).submodel) is module
    assert {name: id(parameter) for name, parameter in module.named_parameters()} == before


def test_kept_values_and_a_bit_an_element_travel(tmp_path: Path) -> None:
    experiment = made(tmp_path)
    round = round_of(experiment, clients=CLIENTS)
    cost = attempts_of(experiment, round)
    dense = experiment.plan.level(1).cost
    names = [name for group in layers(experiment.plan.anatomy) for name in group]
    count = len(magnitudes(round.state, names))
    for level, down, up in zip(cost.level, cost.down, cost.up, strict=True):
        values = dense.bytes - 4 * (count - kept(count, SHARES[level - 1]))
        expected = min(dense.bytes, values + -(-count // 8))
        assert abs(down - expected) <= 1  # whole bytes of a share
        assert up == down
    assert {level.cost for level in experiment.plan.levels} == {dense}


def test_levels_are_shares(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"levels\.pairs"):
        prepare(tiny(tmp_path, "method=fiarse"))

"""FedRolex: which channels its windows hold, and what it has in common with HeteroFL and FedAvg."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster_fl.aggregation.exact import weight_unit
from cluster_fl.aggregation.nested import PartialSum, aggregate
from cluster_fl.errors import UserError
from cluster_fl.experiment import Experiment, prepare
from cluster_fl.nesting.extraction import extract
from cluster_fl.nesting.plan import State
from cluster_fl.nesting.submodel import Channels, index_map, prefix
from cluster_fl.nesting.windows import leading, rolled
from cluster_fl.rounds import Round
from cluster_fl.selection import Rolling, leading_channels
from tests.nesting.test_submodels import MODELS, made, masked
from tests.tiny import outcome, run_here, select, tiny

WIDTHS = "levels.pairs=[{width: 0.3}, {width: 0.5}, {}]"


def experiment(folder: Path, *overrides: str) -> Experiment:
    return prepare(tiny(folder, "method=fedrolex", WIDTHS, *overrides))


def view(made: Experiment, state: State, number: int) -> Round:
    return select(Round(number, made.config, made.plan, made.population, state, {}, lambda client: {}))


def held(channels: Channels) -> list[int]:
    return list(range(channels)) if isinstance(channels, int) else list(channels)


# Windows.


def test_the_windows_of_eight_channels() -> None:
    """E10: the code's direction, and the paper's."""
    down = [held(leading(rolled(8, -j), 4)) for j in range(9)]
    assert [set(window) for window in down[:3]] == [{0, 1, 2, 3}, {7, 0, 1, 2}, {6, 7, 0, 1}]
    assert np.bincount(np.concatenate(down[:8])).tolist() == [4] * 8
    assert down[8] == down[0]
    assert [set(held(leading(rolled(8, j), 4))) for j in (1, 6)] == [{1, 2, 3, 4}, {6, 7, 0, 1}]


@given(size=st.integers(1, 40), data=st.data(), start=st.integers(0, 10**6), up=st.booleans())
def test_every_channel_comes_as_often_as_any_other(
    size: int, data: st.DataObject, start: int, up: bool
) -> None:
    count = data.draw(st.integers(1, size))
    windows = [leading(rolled(size, j if up else -j), count) for j in range(start, start + size)]
    assert all(held(w) == sorted(set(held(w))) and len(held(w)) == count for w in windows)
    assert np.bincount(np.concatenate([held(w) for w in windows]), minlength=size).tolist() == [count] * size
    # A prefix is a number, so that its index is slices.
    assert [w for w in windows if held(w) == list(range(count))] == [count] * (size if count == size else 1)


def test_a_round_has_one_shift(tmp_path: Path) -> None:
    """For all clients and groups, so that what an identity shortcut adds is aligned; smaller within larger."""
    rolling = experiment(tmp_path)
    traced = rolling.plan.anatomy
    for number in (0, 1, 5, 17):
        round = view(rolling, {}, number)
        levels = rolling.allocation(round)
        chosen = rolling.rule.submodels(round, levels)
        served = rolling.rule.serve(round) if number < rolling.config.rounds else None
        for level, submodel in zip(levels, chosen, strict=True):
            own = rolling.plan.level(int(level)).submodel
            assert submodel.shape == own
            assert served is None or served[level - 1] == submodel
            for group, channels in zip(traced.groups, submodel.channels, strict=True):
                count = len(held(channels))
                assert set(held(channels)) == {(i - number) % group.size for i in range(count)}
            where = index_map(traced, submodel)
            into, out = where["units.0.conv1.weight"], where["units.0.conv2.weight"]
            inputs, outputs = (np.arange(4)[index] for index in (into[1], out[0]))
            assert inputs.ravel().tolist() == outputs.ravel().tolist()
        if number == 0:
            assert all(isinstance(channels, int) for s in chosen for channels in s.channels)
        assert all(isinstance(channels, int) for channels in chosen[list(levels).index(3)].channels)


def test_the_final_test_serves_the_window_that_was_trained_last(tmp_path: Path) -> None:
    rolling = experiment(tmp_path, "rounds=3")
    assert rolling.rule.serve(view(rolling, {}, 3)) == rolling.rule.serve(view(rolling, {}, 2))
    assert rolling.rule.serve(view(rolling, {}, 2)) != rolling.rule.serve(view(rolling, {}, 1))


def test_the_papers_variant_moves_up_and_rounds_down(tmp_path: Path) -> None:
    paper, released = (experiment(tmp_path, f"variant={name}") for name in ("paper", "released"))
    assert (paper.rule, released.rule) == (Rolling(forward=True), Rolling(forward=False))
    sizes = [group.size for group in paper.plan.anatomy.groups]
    assert sorted(set(sizes)) == [4, 8, 16]
    kept = {4: (1, 2), 8: (2, 3), 16: (4, 5)}
    assert paper.plan.level(1).submodel.channels == tuple(kept[size][0] for size in sizes)
    assert released.plan.level(1).submodel.channels == tuple(kept[size][1] for size in sizes)
    window = paper.rule.submodels(view(paper, {}, 3), np.array([1]))[0]
    assert held(window.channels[sizes.index(16)]) == [3, 4, 5, 6]


def test_norms_of_a_levels_own_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.norm"):
        experiment(tmp_path, "model.norm=per_level", "options.scaler=false")


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=4, deadline=None)
@given(number=st.integers(1, 30), width=st.sampled_from([0.25, 0.4, 0.8]))
def test_a_window_is_the_global_model_without_the_rest(name: str, number: int, width: float) -> None:
    spec, model, traced = made(name)
    narrow = prefix(traced, width, traced.depth, (traced.depth,), "ceil")
    window = leading_channels(narrow, [rolled(group.size, -number) for group in traced.groups])
    x = torch.randn(3, *spec.input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    small, large = extract(model, traced, window).double(), masked(model, traced, window).double()
    with torch.no_grad():
        torch.testing.assert_close(small(x)[-1], large(x)[-1], rtol=1e-9, atol=1e-9)


# What it has in common with others.

COMMON = ("train.clip_norm=1.0", "levels.rounding=ceil", "evaluate.every=9")


def bits(folder: Path, *overrides: str) -> str:
    path = folder / str(abs(hash(overrides)))
    run_here(tiny(folder, *COMMON, *overrides), path)
    digest: str = outcome(path)[1]["weights_sha256"]
    return digest


def test_its_first_round_is_heterofls(tmp_path: Path) -> None:
    few = ("data.partition.name=classes", "data.partition.classes=[2]", "model.norm=static", WIDTHS)
    first = [bits(tmp_path, f"method={m}", "rounds=1", *few) for m in ("heterofl", "fedrolex")]
    second = [bits(tmp_path, f"method={m}", "rounds=2", *few) for m in ("heterofl", "fedrolex")]
    assert first[0] == first[1]
    assert second[0] != second[1]


def test_full_windows_are_fedavg_in_every_round(tmp_path: Path) -> None:
    fedavg = bits(tmp_path, "method=fedavg", "aggregation.weights=uniform", "levels.pairs=[{}]")
    for direction in ("down", "up"):
        whole = ("method=fedrolex", WIDTHS, "levels.shares=[0,0,1]", f"options.direction={direction}")
        assert bits(tmp_path, *whole) == fedavg


def test_the_servers_model_may_be_larger_than_any_clients(tmp_path: Path) -> None:
    rolling = experiment(tmp_path, "levels.shares=[0.5,0.5,0]", "rounds=16", "evaluate.every=16")
    assert rolling.plan.global_level == 3
    assert sorted(set(rolling.plan.level_of.tolist())) == [1, 2]
    run_here(rolling.config, tmp_path / "run")
    records, summary = outcome(tmp_path / "run")
    assert {p["level"] for record in records for p in record["participants"]} == {1, 2}
    assert summary["accuracy"]["global"]["last_exit"] > 0.3
    # A full turn of the largest group reaches every channel, which a prefix never would.
    reached = [set[int]() for _ in rolling.plan.anatomy.groups]
    for number in range(16):
        for submodel in rolling.rule.submodels(view(rolling, {}, number), np.array([1, 2])):
            for channels, found in zip(submodel.channels, reached, strict=True):
                found.update(held(channels))
    assert [len(found) for found in reached] == [group.size for group in rolling.plan.anatomy.groups]


def test_the_order_of_the_uploads_does_not_show(tmp_path: Path) -> None:
    """E14: clients that upload 1, 2, 3 and 4 make 2.5 of every element that all of them hold."""
    rolling = experiment(tmp_path)
    state = rolling.initial_state()
    (window,) = rolling.rule.submodels(view(rolling, state, 3), np.array([2]))
    holding, unit = rolling.plan.holding(2, window), weight_unit(4)
    received = holding.gather(state)
    results = []
    for order in ([1, 2, 3, 4], [4, 2, 1, 3]):
        parts = []
        for cohort in (order[:1], order[1:]):
            part = PartialSum.of(holding, state)
            for value in cohort:
                assert part.add(holding, {n: value - a.astype(np.float64) for n, a in received.items()}, unit)
            parts.append(part)
        results.append(aggregate(state, parts))
    for name, key in holding.keys.items():
        inside = np.zeros(state[key].shape, dtype=bool)
        inside[holding.where[name]] = True
        for after in results:
            assert (after[key][inside] == 2.5).all()
            assert np.array_equal(after[key][~inside], state[key][~inside])

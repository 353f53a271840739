"""Heads of early exits."""

from __future__ import annotations

import time

import pytest
import torch

from cluster_fl.errors import UserError
from cluster_fl.models import Layered, build
from cluster_fl.models.exits import attach_exits

CIFAR = (3, 32, 32)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def resnet110(*positions: int) -> Layered:
    with torch.device("meta"):
        model = build("resnet110", CIFAR, 10)
        attach_exits(model, positions, "conv3", CIFAR, 10)
    return model


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_published_exits_of_resnet110() -> None:
    model = resnet110(36, 42, 48)
    assert count(model) == 1_982_136
    assert [count(head) for head in model.exits.values()] == [28_170, 111_626, 111_626]


def test_released_exits_of_resnet110() -> None:
    assert [count(head) for head in resnet110(30, 38, 46).exits.values()] == [28_170, 111_626, 111_626]


@pytest.mark.parametrize(("side", "position"), [(8, 1), (4, 6), (1, 6), (2, 5)])
def test_separable_exits_fit_any_map(side: int, position: int) -> None:
    model = build("resnet20", (3, side, side), 7)
    attach_exits(model, [position], "sepconv", (3, side, side), 7)
    early, last = model(torch.randn(3, 3, side, side))
    assert early.shape == last.shape == (3, 7)
    early.square().sum().backward()
    assert all(p.grad is not None for p in model.exits.parameters())


def test_separable_exits_are_small() -> None:
    """Per channel two 3x3 filters, two norms, and twice a row of 1x1; less than a fifth of conv3's."""
    model = build("resnet20", CIFAR, 10)
    attach_exits(model, [6], "sepconv", CIFAR, 10)
    assert count(model.exits["6"]) == 2 * (32 * 9 + 32 * 32 + 2 * 32) + 32 * 10 + 10
    assert 5 * count(model.exits["6"]) < 3 * 32 * 32 * 9


def test_an_exit_at_a_stages_end_reads_that_stage() -> None:
    model, seen = resnet110(36, 42), []
    for head in model.exits.values():
        head.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    model(torch.empty(2, *CIFAR, device="meta"))
    assert seen == [(2, 32, 16, 16), (2, 64, 8, 8)]


def test_an_exit_everywhere_is_fast() -> None:
    start = time.perf_counter()
    model = resnet110(*range(1, 55))
    assert time.perf_counter() - start < 5
    assert list(model.exits) == [str(p) for p in range(1, 54)]
    assert len(model(torch.empty(2, *CIFAR, device="meta"))) == 54


def test_exits_are_in_rising_order_however_they_came() -> None:
    model = build("mlp", CIFAR, 10, {"hidden": [8] * 12})
    attach_exits(model, [10], "linear", CIFAR, 10)
    attach_exits(model, [11, 2, 2], "linear", CIFAR, 10)
    assert list(model.exits) == ["2", "10", "11"]


def test_a_heads_weights_depend_on_seed_and_position_alone() -> None:
    few, many, other = (build("resnet14", CIFAR, 10) for _ in range(3))
    torch.manual_seed(5)
    attach_exits(few, [4], "conv3", CIFAR, 10, seed=3)
    torch.manual_seed(6)
    attach_exits(many, [1, 3, 4, 5], "conv3", CIFAR, 10, seed=3)
    attach_exits(other, [4], "conv3", CIFAR, 10, seed=4)
    weights = [m.exits["4"].state_dict() for m in (few, many, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["conv1.weight"], weights[2]["conv1.weight"])
    assert not torch.equal(many.exits["4"].conv1.weight, many.exits["3"].conv1.weight)


def test_seeded_heads_leave_the_global_generator_alone() -> None:
    model = build("resnet14", CIFAR, 10)
    before = torch.get_rng_state()
    attach_exits(model, [1, 4], "conv3", CIFAR, 10, seed=3)
    assert torch.equal(before, torch.get_rng_state())


def test_attaching_changes_nothing_else() -> None:
    model = build("resnet14", CIFAR, 10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach_exits(model, [2], "linear", CIFAR, 10)
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in before)
    assert model.units["0"].training


def test_heads_follow_a_model_that_is_on_meta_already() -> None:
    with torch.device("meta"):
        model = build("resnet14", CIFAR, 10)
    attach_exits(model, [2], "linear", CIFAR, 10)
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("name", "position", "kind", "line"),
    [
        ("resnet14", 7, "conv3", "exits=7: must be between 1 and 6, the model's units."),
        ("resnet14", 0, "conv3", "exits=0: must be between 1 and 6, the model's units."),
        ("resnet14", 2, "conv", "model.exit_head=conv: must be one of conv3, linear, sepconv. Did you mean conv3?"),
        ("mlp", 1, "sepconv",
         "model.exit_head=sepconv: needs feature maps, but the features after 1 units are flat: use linear."),
        ("mlp", 1, "conv3",
         "model.exit_head=conv3: needs feature maps, but the features after 1 units are flat: use linear."),
    ],
)  # fmt: skip
def test_impossible_exits(name: str, position: int, kind: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        attach_exits(build(name, CIFAR, 10), [position], kind, CIFAR, 10)
    assert str(caught.value) == line

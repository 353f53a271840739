"""Parameter counts against the published ones, and layout against torchvision's."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from cluster_fl.errors import UserError
from cluster_fl.models import MODELS, build, names
from cluster_fl.models.layered import Layered
from cluster_fl.models.norm import apply_norm_policy

MNIST, CIFAR, HAR = (1, 28, 28), (3, 32, 32), (9, 1, 128)
LARGE = "wide_resnet101_2"  # 125 million parameters

# HeteroFL's levels a to e: widths halve.
LEVELS = [[64, 128, 256, 512], [32, 64, 128, 256], [16, 32, 64, 128], [8, 16, 32, 64], [4, 8, 16, 32]]
HETEROFL = {
    ("preact_1112", CIFAR, 10): (9_622_090, 2_408_746, 603_802, 151_762, 38_350),
    ("preact_2222", CIFAR, 10): (11_172_170, 2_796_714, 701_018, 176_178, 44_510),
    ("preact_2222", CIFAR, 100): (11_218_340, 2_819_844, 712_628, 182_028, 47_480),
    ("heterofl_cnn", MNIST, 10): (1_556_874, 391_370, 98_922, 25_274, 6_594),
}

# NeFL's width submodels of ResNet18: convolutions, norms and the linear layer.
NEFL = {
    (29, 58, 115, 229): 2_248_349,
    (41, 81, 162, 324): 4_480_350,
    (50, 100, 199, 397): 6_736_490,
    (58, 115, 229, 458): 8_951_340,
    (64, 128, 256, 512): 11_173_962,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def skeleton(name: str, shape: tuple[int, int, int], classes: int = 10, **options: object) -> Layered:
    with torch.device("meta"):
        return build(name, shape, classes, options)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "shape", "classes", "expected"),
    [
        ("resnet56", CIFAR, 10, 855_770),
        ("resnet110", CIFAR, 10, 1_730_714),
        ("resnet110", CIFAR, 100, 1_736_564),
        ("resnet34", CIFAR, 10, 21_282_122 + 7_680),  # NeFL's, and 7x7 instead of 3x3 in the stem
        ("wide_resnet101_2", CIFAR, 10, 124_858_186),
        ("wide_resnet101_2", (3, 224, 224), 1000, 126_886_696),
        ("fedavg_cnn", MNIST, 10, 1_663_370),
        ("mlp", MNIST, 10, 199_210),
    ],
)
def test_published_counts(name: str, shape: tuple[int, int, int], classes: int, expected: int) -> None:
    assert count(skeleton(name, shape, classes)) == expected


@pytest.mark.parametrize("case", HETEROFL, ids=str)
def test_heterofl_counts(case: tuple[str, tuple[int, int, int], int]) -> None:
    name, shape, classes = case
    counts = tuple(count(skeleton(name, shape, classes, widths=widths)) for widths in LEVELS)
    assert counts == HETEROFL[case]


@pytest.mark.parametrize("widths", NEFL, ids=str)
def test_nefl_counts(widths: tuple[int, ...]) -> None:
    assert count(skeleton("resnet18", CIFAR, stem="cifar", widths=widths)) == NEFL[widths]


def test_nefl_convolutions_of_resnet110() -> None:
    model = skeleton("resnet110", CIFAR)
    assert sum(count(m) for m in model.modules() if isinstance(m, nn.Conv2d)) == 1_721_776


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 53_862),
        ({"widths": [16, 32, 64], "kernel": 3}, 9 * 16 * 3 + 16 * 32 * 3 + 32 * 64 * 3 + 2 * 112 + 65 * 6),
    ],
    ids=str,
)
def test_har_cnn_counts(options: dict[str, object], expected: int) -> None:
    assert count(skeleton("har_cnn", HAR, 6, **options)) == expected


def test_har_cnn_reads_each_row_by_itself() -> None:
    model = build("har_cnn", HAR, 6, generator_seed=0)
    apply_norm_policy(model, "none")
    rows = torch.randn(2, 9, 3, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        each = [model(rows[:, :, [row]])[-1] for row in range(3)]
        torch.testing.assert_close(model(rows)[-1], sum(each) / 3)


@pytest.mark.parametrize(
    ("shape", "options", "line"),
    [
        (HAR, {"kernel": 4}, "model.options.kernel=4: must be an odd positive integer."),
        (HAR, {"kernel": 2.5}, "model.options.kernel=2.5: must be an odd positive integer."),
        (HAR, {"widths": [8, 8]}, "model.options.widths=[8, 8]: must be a list of 3 positive integers."),
        ((9, 1, 7), {}, "model.name=har_cnn: needs samples of at least 1x8, but these are 1x7."),
    ],
)
def test_har_cnn_that_cannot_be(shape: tuple[int, int, int], options: dict[str, object], line: str) -> None:
    with pytest.raises(UserError) as caught:
        build("har_cnn", shape, 6, options)
    assert str(caught.value) == line


DEPTHS = {
    "resnet14": 6,
    "resnet20": 9,
    "resnet110": 54,
    "resnet18": 8,
    "resnet34": 16,
    "wide_resnet101_2": 33,
    "preact_1112": 5,
    "har_cnn": 3,
    "mlp": 2,
}


@pytest.mark.parametrize(("name", "units"), DEPTHS.items())
def test_depth(name: str, units: int) -> None:
    model = skeleton(name, CIFAR)
    assert model.depth == len(model.units) == units


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_is_torchvisions(name: str) -> None:
    ours, theirs = build(name, (3, 64, 64), 10), getattr(torchvision.models, name)(num_classes=10)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        mine.data.copy_(other.data)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x)[-1], theirs(x))


@pytest.mark.parametrize("name", [*names(), "resnet14"])
@pytest.mark.parametrize("shape", [(1, 8, 8), MNIST, CIFAR], ids=str)
def test_runs_and_trains_everywhere(name: str, shape: tuple[int, int, int]) -> None:
    logits = skeleton(name, shape, 7)(torch.empty(2, *shape, device="meta"))
    assert [tuple(x.shape) for x in logits] == [(2, 7)]
    if shape[1] == 8 and name not in ("resnet34", "resnet110", LARGE):
        model = build(name, shape, 7)
        model(torch.randn(3, *shape))[-1].square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", [name for name in names() if name != LARGE])
def test_channels_last_gives_the_same(name: str) -> None:
    shape = (3, 16, 16)
    model = build(name, shape, 10, generator_seed=0).double()
    apply_norm_policy(model, "batch")
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        expected = model(x)[-1]
        logits = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))[-1]
    torch.testing.assert_close(logits, expected)


def test_only_residual_units_that_keep_their_shape_are_skippable() -> None:
    assert _skippable("resnet20") == {0, 1, 2, 4, 5, 7, 8}
    assert _skippable("resnet18") == {0, 1, 3, 5, 7}
    assert _skippable("preact_1112") == {0, 4}
    assert _skippable("mlp") == _skippable("heterofl_cnn") == _skippable("har_cnn") == set()


def _skippable(name: str) -> set[int]:
    units = skeleton(name, CIFAR).units.items()
    return {int(number) for number, unit in units if getattr(unit, "skippable", False)}


def test_every_recipe_is_a_function_of_this_package() -> None:
    assert all(recipe.function.startswith("cluster_fl.models.") for recipe in MODELS.values())

"""Names, options, seeds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cluster_fl.errors import UserError
from cluster_fl.models import build, names
from cluster_fl.models.spec import ModelSpec

SHAPE = (3, 8, 8)
LARGE = "wide_resnet101_2"  # 125 million parameters

OWN = """
from cluster_fl.models.cnn import mlp

def narrow(input_shape, classes, width, depth=1):
    return mlp(input_shape, classes, hidden=[width] * depth)

def anything(input_shape, classes, **options):
    return mlp(input_shape, classes, **options)

def wrong(input_shape, classes):
    return dict(a=1)

NUMBER = 3
"""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_models_of_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_models_of_test", raising=False)
    return "own_models_of_test"


@pytest.mark.parametrize("name", [n for n in names() if n not in ("resnet34", "resnet110", LARGE)])
def test_a_seed_gives_the_same_bits(name: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build(name, SHAPE, 10, generator_seed=7)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    again, other = (build(name, SHAPE, 10, generator_seed=seed) for seed in (7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_without_a_seed_the_global_generator_decides() -> None:
    torch.manual_seed(1)
    first, second = build("mlp", SHAPE, 10), build("mlp", SHAPE, 10)
    torch.manual_seed(1)
    again = build("mlp", SHAPE, 10)
    weights = [model.units["0"].linear.weight for model in (first, second, again)]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])


def test_building_a_skeleton_touches_nothing() -> None:
    before = torch.get_rng_state()
    skeleton = ModelSpec("resnet20", SHAPE, 10, seed=3, exits=(3, 6)).skeleton()
    assert torch.equal(before, torch.get_rng_state())
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}


def test_initial_weights_are_pytorchs_defaults() -> None:
    model = build("resnet14", SHAPE, 10, generator_seed=0)
    weight = model.units["1"].conv1.weight
    bound = (1 / (16 * 9)) ** 0.5
    assert bound * 0.99 < weight.abs().max() <= bound
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(bool((m.weight == 1).all()) and not m.bias.any() for m in norms)


def test_kaiming_weights() -> None:
    """Normal with variance 2 / fan-in, as NeFL draws its CIFAR networks; the rest as it was."""
    default, model = (
        build("resnet20", SHAPE, 10, {"init": i}, generator_seed=0) for i in ("default", "kaiming")
    )
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            expected = (2 / weight[0].numel()) ** 0.5
            assert abs(weight.std().item() / expected - 1) < 4 / weight.numel() ** 0.5, name
        elif name != "head.linear.bias":
            assert torch.equal(weight, default.get_parameter(name))
    assert model.units["8"].conv2.weight.abs().max() > 3.5 * expected_std(64 * 9)


def expected_std(fan_in: int) -> float:
    return (2 / fan_in) ** 0.5


def test_own_function(own: str) -> None:
    assert build(f"{own}:narrow", SHAPE, 10, {"width": 5, "depth": 3}).depth == 3
    assert build(f"{own}:anything", SHAPE, 10, {"hidden": [4]}).depth == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("wrong", "model.name={}: must return a cluster_fl.models.Layered, not a dict."),
        ("NUMBER", "model.name={}: must name a function."),
        ("none", "model.name={}: cannot be imported: module 'own_models_of_test' has no attribute 'none'."),
        ("narrow", "model.options.width=None: {} needs a value."),
    ],
)
def test_own_function_that_cannot_work(own: str, name: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        build(f"{own}:{name}", SHAPE, 10)
    assert str(caught.value) == line.format(f"{own}:{name}")


@pytest.mark.parametrize("name", ["no_such_package_here.x:y", ":f", "os:", ".a:b"])
def test_own_function_that_is_not_there(name: str) -> None:
    with pytest.raises(UserError, match="cannot be imported"):
        build(name, SHAPE, 10)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet111", "resnet110"),
        ("preact_1122", "preact_1112"),
        ("heterofl", "heterofl_cnn"),
        ("fedavg-cnn", "fedavg_cnn"),
    ],
)
def test_unknown_name(name: str, near: str) -> None:
    with pytest.raises(UserError) as caught:
        build(name, SHAPE, 10)
    assert str(caught.value).startswith(f"model.name={name}: must be one of resnet20, ")
    assert str(caught.value).endswith(f"Did you mean {near}?")


@pytest.mark.parametrize("name", ["resnet50", "resnet152", "resnet2", "resnet", "resnet020", "", "gpt"])
def test_no_model_by_that_name(name: str) -> None:
    with pytest.raises(UserError, match=r"model\.name="):
        build(name, SHAPE, 10)


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("resnet20", {"depth": 3}, "model.options.depth=3: is not an option of resnet20. Valid: widths, init."),
        ("resnet20", {"layers": 8}, "model.options.layers=8: is not an option of resnet20. Valid: widths, init."),
        ("fedavg_cnn", {"widths": [1]},
         "model.options.widths=[1]: is not an option of fedavg_cnn. It has none."),
        ("mlp", {"classes": 3}, "model.options.classes=3: is not an option of mlp. Valid: hidden."),
        ("mlp", {"hidden": []}, "model.options.hidden=[]: must be a list of one or more positive integers."),
        ("mlp", {"hidden": 200},
         "model.options.hidden=200: must be a list of one or more positive integers."),
        ("resnet20", {"widths": [16, 32]},
         "model.options.widths=[16, 32]: must be a list of 3 positive integers."),
        ("preact_1112", {"widths": [8, 8, 8, 0]},
         "model.options.widths=[8, 8, 8, 0]: must be a list of 4 positive integers."),
        ("resnet18", {"stem": "cifra"},
         "model.options.stem=cifra: must be one of imagenet, cifar, cifar_unpooled. Did you mean cifar?"),
        ("resnet20", {"init": "kaimin"},
         "model.options.init=kaimin: must be one of default, kaiming. Did you mean kaiming?"),
        ("resnet18", {"stem": 3}, "model.options.stem=3: must be one of imagenet, cifar, cifar_unpooled."),
    ],
)  # fmt: skip
def test_wrong_options(name: str, options: dict[str, object], line: str) -> None:
    with pytest.raises(UserError) as caught:
        build(name, SHAPE, 10, options)
    assert str(caught.value) == line


def test_samples_that_are_too_small() -> None:
    with pytest.raises(UserError, match="needs samples of at least 8x8, but these are 4x9"):
        build("heterofl_cnn", (1, 4, 9), 10)

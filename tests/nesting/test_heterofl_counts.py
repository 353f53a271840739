"""HeteroFL's published sizes: parameters of every level, and FLOPs as its authors count them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from cluster_fl.models.layered import Layered
from cluster_fl.models.spec import ModelSpec
from cluster_fl.nesting.anatomy import Anatomy
from cluster_fl.nesting.cost import cost, count
from cluster_fl.nesting.extraction import extract
from cluster_fl.nesting.submodel import Submodel, prefix
from cluster_fl.nesting.tracing import anatomy
from tests.conftest import ORACLES

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)
LEVELS = "abcde"
MODELS = {
    "mnist_conv": ("heterofl_cnn", MNIST, 10),
    "cifar10_published_[1,1,1,2]": ("preact_1112", CIFAR, 10),
    "cifar10_code_head_[2,2,2,2]": ("preact_2222", CIFAR, 10),
    "cifar100_code_head_[2,2,2,2]": ("preact_2222", CIFAR, 100),
}

# Parameters and double-counted FLOPs of levels a to e.
PUBLISHED = {
    "mnist_conv": [
        (1_556_874, 80_504_320),
        (391_370, 20_493_056),
        (98_922, 5_306_752),
        (25_274, 1_418_432),
        (6_594, 400_480),
    ],
    "cifar10_published_[1,1,1,2]": [
        (9_622_090, 330_246_144),
        (2_408_746, 83_334_144),
        (603_802, 21_219_840),
        (151_762, 5_498_112),
        (38_350, 1_471_104),
    ],
    "cifar10_code_head_[2,2,2,2]": [
        (11_172_170, 557_656_064),
        (2_796_714, 140_416_000),
        (701_018, 35_604_992),
        (176_178, 9_151_744),
        (44_510, 2_413_184),
    ],
    "cifar100_code_head_[2,2,2,2]": [
        (11_218_340, 557_748_224),
        (2_819_844, 140_462_080),
        (712_628, 35_628_032),
        (182_028, 9_163_264),
        (47_480, 2_418_944),
    ],
}
SINGLE = {
    "mnist_conv": [40_252_160, 10_246_528, 2_653_376, 709_216, 200_240],
    "cifar10_published_[1,1,1,2]": [329_585_664, 83_003_904, 21_054_720, 5_415_552, 1_429_824],
}


@cache
def traced(key: str) -> tuple[Layered, Anatomy]:
    name, shape, classes = MODELS[key]
    model = ModelSpec(name, shape, classes, seed=0, norm="static", scaler=True).skeleton()
    return model, anatomy(model, shape)


def submodel(key: str, level: int) -> Submodel:
    _, found = traced(key)
    share = 0.5**level
    return replace(prefix(found, share, found.depth, (found.depth,), "ceil"), scale=share)


def flops(key: str, level: int, *, double: bool) -> int:
    """What the authors' hooks add up: once for every tensor that a layer has, or once a layer."""
    model, found = traced(key)
    total = 0

    def add(module: nn.Module, inputs: object, out: torch.Tensor) -> None:
        nonlocal total
        total += _flops(module, out) * (len(list(module.parameters())) if double else 1)

    small = extract(model, found, submodel(key, level))
    for module in small.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            module.register_forward_hook(add)
    small(torch.empty(2, *MODELS[key][1], device="meta"))
    return total


def _flops(module: nn.Module, out: torch.Tensor) -> int:
    """Of one sample: a convolution's products and biases, two an element of a norm, a classifier's products."""
    if isinstance(module, nn.Conv2d):
        biases = 0 if module.bias is None else out[0].numel()
        return module.weight.numel() * out[0, 0].numel() + biases
    return 2 * out[0].numel() if isinstance(module, nn.BatchNorm2d) else module.weight.numel()


@pytest.mark.parametrize("key", PUBLISHED)
def test_parameters_and_the_authors_flops_of_every_level(key: str) -> None:
    _, found = traced(key)
    counted = [
        (cost(found, submodel(key, level)).params, flops(key, level, double=True)) for level in range(5)
    ]
    assert counted == PUBLISHED[key]


@pytest.mark.parametrize("key", SINGLE)
def test_flops_counted_once(key: str) -> None:
    assert [flops(key, level, double=False) for level in range(5)] == SINGLE[key]


@pytest.mark.parametrize("key", MODELS)
def test_our_macs_are_the_products_alone(key: str) -> None:
    """And fvcore's own count of the really extracted module."""
    model, found = traced(key)
    small = extract(model, found, submodel(key, 2))
    products = [m for m in small.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    macs: list[int] = []
    for module in products:
        module.register_forward_hook(
            lambda m, _, out: macs.append(m.weight.numel() * (out[0, 0].numel() if out.dim() == 4 else 1))
        )
    small(torch.empty(2, *MODELS[key][1], device="meta"))
    assert cost(found, submodel(key, 2)).macs == sum(macs)
    name, shape, classes = MODELS[key]
    real = extract(ModelSpec(name, shape, classes, seed=0, scaler=True).build(), found, submodel(key, 2))
    assert count(real, shape) == cost(found, submodel(key, 2))


def test_the_table_is_the_oracles() -> None:
    file = ORACLES / "nefl_heterofl_oracles.json"
    if not file.exists():
        pytest.skip(
            "needs the oracle files beside the checkout (shared/oracles): HeteroFL's published numbers"
        )
    oracles = json.loads(file.read_text())["heterofl"]
    for key, rows in PUBLISHED.items():
        assert [tuple(oracles[key][level]) for level in LEVELS] == rows

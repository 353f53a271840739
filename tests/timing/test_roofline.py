"""The roofline against the sum over layers that it stands for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cluster_fl.models.spec import ModelSpec
from cluster_fl.nesting.anatomy import Anatomy, Layer
from cluster_fl.nesting.cost import cost
from cluster_fl.nesting.submodel import Submodel, full, prefix
from cluster_fl.nesting.tracing import anatomy
from cluster_fl.timing.roofline import Roofline

SHAPE = (3, 16, 16)
BATCH = 8


def spec(**options: object) -> ModelSpec:
    return ModelSpec("resnet8", SHAPE, 10, 0, exits=(1,), exit_head="sepconv", options=options)


MODEL = anatomy(spec().build(), SHAPE)
HALF = prefix(MODEL, 0.5, 2, (1, 2))


def by_hand(*layers: Layer, fixed: dict[str, str] | None = None, **shapes: tuple[int, ...]) -> Anatomy:
    axes = {name: (None,) * len(shape) for name, shape in shapes.items()}
    return Anatomy(0, (), (), shapes, axes, frozenset(shapes), layers, fixed or {})


WHOLE = Submodel((), (), (0,))


def summed(roofline: Roofline, flops: float, bandwidth: float) -> float:
    """The definition, layer by layer."""
    work = -np.diff(roofline.flops_from)
    moved = np.diff(roofline.bytes_before)
    return sum(max(f / flops, b / bandwidth) for f, b in zip(work, moved, strict=True))


def test_two_layers_by_hand() -> None:
    """A 3x3 convolution 4 -> 8 on 16 positions: 2 x 16 x 288 operations, (288 / 8 + 16 x 12) x 4 bytes.

    A linear layer 8 -> 10: 160 operations, (80 / 8 + 18) x 4 bytes. They do 10.1 and 1.4 operations a byte.
    """
    made = by_hand(Layer("conv", 16, 0), Layer("linear", 1, 0), conv=(8, 4, 3, 3), linear=(10, 8))
    roofline = Roofline.of(made, WHOLE, BATCH)
    conv, linear = (9216.0, 912.0), (160.0, 112.0)
    flops, bandwidth = np.array([1e3, 1e3, 1e3]), np.array([np.inf, 500.0, 10.0])
    expected = [
        (conv[0] + linear[0]) / 1e3,  # nothing waits
        conv[0] / 1e3 + linear[1] / 500,  # 2 operations a byte: the linear layer waits
        (conv[1] + linear[1]) / 10,  # 100 operations a byte: both wait
    ]
    assert roofline.seconds(flops, bandwidth) == pytest.approx(expected, rel=1e-12)


def test_a_depthwise_convolution_reads_every_channel() -> None:
    made = by_hand(Layer("depth", 9, 0), fixed={"depth:1": "depthwise"}, depth=(16, 1, 3, 3))
    moved = 4 * (144 / BATCH + 9 * (16 + 16))
    assert Roofline.of(made, WHOLE, BATCH).seconds(np.array([1e30]), np.array([1.0])) == pytest.approx(
        [moved]
    )


def test_a_transposed_convolution_has_its_outputs_on_the_other_axis() -> None:
    made = by_hand(Layer("up", 9, 1), up=(16, 4, 2, 2))
    moved = 4 * (256 / BATCH + 9 * (16 + 4))
    assert Roofline.of(made, WHOLE, BATCH).seconds(np.array([1e30]), np.array([1.0])) == pytest.approx(
        [moved]
    )


@pytest.mark.parametrize("submodel", [full(MODEL), HALF], ids=["full", "half"])
@given(
    rates=st.lists(st.tuples(st.floats(1e6, 1e13), st.floats(1e6, 1e13)), min_size=1, max_size=20),
    batch=st.integers(1, 128),
)
def test_the_sum_over_layers(submodel: Submodel, rates: list[tuple[float, float]], batch: int) -> None:
    roofline = Roofline.of(MODEL, submodel, batch)
    found = roofline.seconds(*np.array(rates).T)
    assert found == pytest.approx([summed(roofline, *rate) for rate in rates], rel=1e-9)


@pytest.mark.parametrize("submodel", [full(MODEL), HALF], ids=["full", "half"])
@given(st.lists(st.floats(1e6, 1e13), min_size=1, max_size=20))
def test_with_endless_bandwidth_it_is_the_operations_alone(submodel: Submodel, speeds: list[float]) -> None:
    flops = np.array(speeds)
    found = Roofline.of(MODEL, submodel, BATCH).seconds(flops, np.full(len(flops), np.inf))
    assert found.tolist() == (2 * cost(MODEL, submodel).macs / flops).tolist()


@given(st.floats(1e6, 1e13), st.floats(1e6, 1e13), st.floats(1, 100))
def test_a_faster_device_is_not_slower(flops: float, bandwidth: float, factor: float) -> None:
    roofline = Roofline.of(MODEL, HALF, BATCH)
    found = roofline.seconds(
        flops * np.array([1, factor, 1, factor]), bandwidth * np.array([1, 1, factor, factor])
    )
    assert found[0] >= found[1:].max() * (1 - 1e-12)
    assert found[3] <= found[:3].min() * (1 + 1e-12)
    assert found[3] == pytest.approx(found[0] / factor, rel=1e-9)


def test_a_larger_batch_moves_the_weights_less_often() -> None:
    slow = np.array([1e12]), np.array([1e6])
    seconds = [float(Roofline.of(MODEL, full(MODEL), batch).seconds(*slow)[0]) for batch in (1, 2, 4)]
    weights = 4 * sum(int(np.prod(MODEL.shapes[layer.weight])) for layer in MODEL.layers)
    assert seconds[0] - seconds[1] == pytest.approx(weights / 2 / 1e6)
    assert seconds[1] - seconds[2] == pytest.approx(weights / 4 / 1e6)


def test_what_a_real_model_moves() -> None:
    """Weights, inputs and outputs of the layers that run, of a strided one's input as much as its stride leaves."""
    model, moved = spec().build(), 0.0

    def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal moved
        stride = module.stride[0] if isinstance(module, nn.Conv2d) else 1
        moved += 4 * (module.weight.numel() / BATCH + inputs[0].numel() / stride**2 + output.numel())

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model.eval()(torch.zeros(1, *SHAPE))
    found = Roofline.of(MODEL, full(MODEL), BATCH).seconds(np.array([1e30]), np.array([1.0]))
    assert found == pytest.approx([moved], rel=1e-12)


def test_no_layer() -> None:
    assert Roofline.of(by_hand(), WHOLE, 1).seconds(np.array([1.0]), np.array([1.0])).tolist() == [0.0]

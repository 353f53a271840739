"""Early exits: what hangs after a unit and answers there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
from torch import nn

from cluster_fl.config import choose
from cluster_fl.errors import UserError
from cluster_fl.models.blocks import conv3x3, pooled_linear
from cluster_fl.models.layered import Layered
from cluster_fl.models.meta import meta_twin
from cluster_fl.models.seeded import seeded

# Batch normalisation refuses a single value per channel.
BATCH = 2

Shape = tuple[int, ...]


def attach_exits(
    model: Layered,
    positions: Iterable[int],
    kind: str,
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    seed: int | None = None,
) -> None:
    """Hangs a head after each unit count in ``positions``, in place.

    Args:
        positions: units before the exit, 1 to depth; depth itself is the final head, which is there already.
        kind: ``conv3`` (ScaleFL, section 2.3), ``sepconv`` or ``linear``.
        input_shape: (C, H, W) of a sample.
        seed: a head's first weights depend on (seed, position) alone; None: torch's generator as it stands.

    Raises:
        UserError: no such kind or position, or the kind does not fit the features there.
    """
    choose("model.exit_head", kind, tuple(HEADS))
    wanted = sorted(set(positions) - {model.depth})
    for position in wanted:
        if not 0 < position < model.depth:
            raise UserError("exits", position, f"must be between 1 and {model.depth}, the model's units.")
    if not wanted:
        return
    shapes = _feature_shapes(model, input_shape)
    heads = dict(model.exits.items())
    for position in wanted:
        with seeded(seed, position):
            head = HEADS[kind](position, shapes[position], classes)
        heads[str(position)] = head.to(model.device()).train(model.training)
    model.exits = nn.ModuleDict({key: heads[key] for key in sorted(heads, key=int)})


def _feature_shapes(model: Layered, input_shape: tuple[int, int, int]) -> dict[int, Shape]:
    """Shape of one sample's features after p units, for every p: one forward on the meta device."""
    shapes: dict[int, Shape] = {}
    with meta_twin(model) as twin:
        x = twin.stem(torch.empty(BATCH, *input_shape, device="meta"))
        for number, unit in twin.units.items():
            x = unit(x)
            shapes[int(number) + 1] = tuple(x.shape[1:])
    return shapes


def _conv3(position: int, shape: Shape, classes: int) -> nn.Module:
    """Three times 3x3 convolution, BN and ReLU at constant width, then pool and linear."""
    channels = _map_channels("conv3", position, shape)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number in range(1, 4):
        layers[f"conv{number}"] = conv3x3(channels, channels)
        layers[f"bn{number}"] = nn.BatchNorm2d(channels)
        layers[f"relu{number}"] = nn.ReLU(inplace=True)
    return nn.Sequential(OrderedDict(**layers, **pooled_linear(channels, classes)))


def _sepconv(position: int, shape: Shape, classes: int) -> nn.Module:
    """The bottleneck of self-distillation, which DepthFL hangs at its exits, at constant width.

    Twice a depthwise 3x3 convolution, the first of stride 2, then 1x1 convolution, BN and ReLU; pool and linear.
    """
    channels = _map_channels("sepconv", position, shape)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, stride in ((1, 2), (2, 1)):
        layers[f"depthwise{number}"] = nn.Conv2d(
            channels, channels, 3, stride, padding=1, groups=channels, bias=False
        )
        layers[f"pointwise{number}"] = nn.Conv2d(channels, channels, 1, bias=False)
        layers[f"bn{number}"] = nn.BatchNorm2d(channels)
        layers[f"relu{number}"] = nn.ReLU(inplace=True)
    return nn.Sequential(OrderedDict(**layers, **pooled_linear(channels, classes)))


def _map_channels(kind: str, position: int, shape: Shape) -> int:
    if len(shape) != 3:
        right = f"needs feature maps, but the features after {position} units are flat: use linear."
        raise UserError("model.exit_head", kind, right)
    return shape[0]


def _linear(position: int, shape: Shape, classes: int) -> nn.Module:
    """A linear layer, behind a global average pool where the features are maps."""
    if len(shape) == 3:
        return nn.Sequential(pooled_linear(shape[0], classes))
    return nn.Sequential(OrderedDict(linear=nn.Linear(shape[0], classes)))


HEADS: dict[str, Callable[[int, Shape, int], nn.Module]] = {
    "conv3": _conv3,
    "linear": _linear,
    "sepconv": _sepconv,
}

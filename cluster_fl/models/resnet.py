"""CIFAR residual networks (He et al., 2015, section 4.2), as ScaleFL and NeFL use them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from cluster_fl.config import choose
from cluster_fl.models.blocks import (
    ResidualBlock,
    basic,
    check_widths,
    conv3x3,
    pooled_linear,
    shortcut,
    stages,
)
from cluster_fl.models.layered import Layered


def resnet(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    layers: int,
    widths: Sequence[int] = (16, 32, 64),
    init: str = "default",
) -> Layered:
    """Three stages of (layers - 2) / 6 blocks, post-activation, with projection shortcuts; a block is a unit.

    Args:
        input_shape: (C, H, W) of a sample.
        layers: 6n + 2, e.g. 110 for 3 x 18 blocks.
        widths: channels of the three stages; the stem has the first's.
        init: ``default``: PyTorch's; ``kaiming``: normal with variance 2 / fan-in for every convolution and
            linear weight (He et al., 2015b), as NeFL's.

    Raises:
        UserError: ``init`` is neither, or ``widths`` are not three positive integers.
    """
    check_widths("model.options.widths", widths, 3)
    choose("model.options.init", str(init), ("default", "kaiming"))
    first = widths[0]
    stem = OrderedDict(
        conv=conv3x3(input_shape[0], first), bn=nn.BatchNorm2d(first), relu=nn.ReLU(inplace=True)
    )
    units = stages(_block, first, widths, [(layers - 2) // 6] * 3)
    model = Layered(nn.Sequential(stem), units, nn.Sequential(pooled_linear(widths[-1], classes)))
    if init == "kaiming":
        _draw_kaiming(model)
    return model


def _block(inputs: int, outputs: int, stride: int) -> nn.Module:
    return ResidualBlock(basic(inputs, outputs, stride), shortcut(inputs, outputs, stride))


def _draw_kaiming(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)

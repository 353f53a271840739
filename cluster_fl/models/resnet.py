"""CIFAR residual networks (He et al., 2015, section 4.2), as ScaleFL and NeFL use them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from cluster_fl.models.blocks import ResidualBlock, check_widths, conv3x3, pooled_linear, stages
from cluster_fl.models.layered import Layered


def resnet(
    input_shape: tuple[int, int, int], classes: int, *, layers: int, widths: Sequence[int] = (16, 32, 64)
) -> Layered:
    """Three stages of (layers - 2) / 6 blocks, post-activation, with projection shortcuts; a block is a unit.

    Args:
        input_shape: (C, H, W) of a sample.
        layers: 6n + 2, e.g. 110 for 3 x 18 blocks.
        widths: channels of the three stages; the stem has the first's.

    Raises:
        UserError: ``widths`` are not three positive integers.
    """
    check_widths("model.options.widths", widths, 3)
    first = widths[0]
    stem = OrderedDict(
        conv=conv3x3(input_shape[0], first), bn=nn.BatchNorm2d(first), relu=nn.ReLU(inplace=True)
    )
    units = stages(ResidualBlock, first, widths, [(layers - 2) // 6] * 3)
    return Layered(nn.Sequential(stem), units, nn.Sequential(pooled_linear(widths[-1], classes)))

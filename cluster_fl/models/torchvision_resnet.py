"""torchvision's ResNet18 and ResNet34, laid out in units."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn
from torchvision.models.resnet import BasicBlock

from cluster_fl.config import choose
from cluster_fl.models.blocks import check_widths, conv3x3, pooled_linear, projection, stages
from cluster_fl.models.layered import Layered


def resnet(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    blocks: Sequence[int],
    widths: Sequence[int] = (64, 128, 256, 512),
    stem: str = "imagenet",
) -> Layered:
    """``blocks`` basic blocks a stage; a block is a unit.

    Args:
        input_shape: (C, H, W) of a sample.
        widths: channels of the four stages; the stem has the first's.
        stem: ``imagenet``: 7x7 convolution of stride 2, then 3x3 max pool of stride 2; ``cifar``: 3x3
            convolution of stride 1, then the same pool (NeFL's small-image variant).

    Raises:
        UserError: ``stem`` is neither, or ``widths`` are not four positive integers.
    """
    choose("model.options.stem", str(stem), ("imagenet", "cifar"))
    check_widths("model.options.widths", widths, 4)
    channels, first = input_shape[0], widths[0]
    large = nn.Conv2d(channels, first, 7, 2, padding=3, bias=False)
    layers = OrderedDict(
        conv=large if stem == "imagenet" else conv3x3(channels, first),
        bn=nn.BatchNorm2d(first),
        relu=nn.ReLU(inplace=True),
        pool=nn.MaxPool2d(3, 2, padding=1),
    )
    units = stages(_block, first, widths, blocks)
    return Layered(nn.Sequential(layers), units, nn.Sequential(pooled_linear(widths[-1], classes)))


def _block(inputs: int, outputs: int, stride: int) -> nn.Module:
    same = inputs == outputs and stride == 1
    block: nn.Module = BasicBlock(
        inputs, outputs, stride, None if same else projection(inputs, outputs, stride)
    )
    block.skippable = same  # type: ignore[assignment]
    return block

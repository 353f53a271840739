"""torchvision's residual networks for ImageNet, laid out in units; pre-trained where asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from cluster_fl.config import choose
from cluster_fl.errors import UserError
from cluster_fl.models.blocks import (
    ResidualBlock,
    basic,
    bottleneck,
    check_widths,
    conv3x3,
    pooled_linear,
    shortcut,
    stages,
)
from cluster_fl.models.layered import Layered
from cluster_fl.models.pretrained import load_pretrained

STEMS = ("imagenet", "cifar", "cifar_unpooled")


def resnet(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    source: str,
    blocks: Sequence[int],
    wide: bool,
    widths: Sequence[int] = (64, 128, 256, 512),
    stem: str = "imagenet",
    pretrained: bool = False,
) -> Layered:
    """``blocks`` blocks a stage; a block is a unit.

    Args:
        input_shape: (C, H, W) of a sample.
        source: torchvision's name of the model.
        wide: bottleneck blocks, whose 3x3 convolution has twice a stage's width and whose output has four
            times; otherwise basic blocks.
        widths: of the four stages; the stem has the first's.
        stem: ``imagenet``: 7x7 convolution of stride 2, then 3x3 max pool of stride 2; ``cifar``: 3x3
            convolution of stride 1, then the same pool (NeFL's small-image variant); ``cifar_unpooled``: without
            the pool.
        pretrained: starts from torchvision's ImageNet weights, all but those of a stem convolution or final
            linear layer of another shape. Not on the meta device, where there are no weights.

    Raises:
        UserError: ``stem`` is neither, ``pretrained`` is no boolean, ``widths`` are not four positive integers
            or not the pre-trained model's, or the weights cannot be had.
    """
    choose("model.options.stem", str(stem), STEMS)
    check_widths("model.options.widths", widths, 4)
    if not isinstance(pretrained, bool):
        raise UserError("model.options.pretrained", pretrained, "must be true or false.")
    channels, first = input_shape[0], widths[0]
    large = nn.Conv2d(channels, first, 7, 2, padding=3, bias=False)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=large if stem == "imagenet" else conv3x3(channels, first),
        bn=nn.BatchNorm2d(first),
        relu=nn.ReLU(inplace=True),
        pool=nn.Identity() if stem == "cifar_unpooled" else nn.MaxPool2d(3, 2, padding=1),
    )
    outputs = [4 * width for width in widths] if wide else widths
    units = stages(_wide_block if wide else _block, first, outputs, blocks)
    model = Layered(nn.Sequential(layers), units, nn.Sequential(pooled_linear(outputs[-1], classes)))
    if pretrained and model.device().type != "meta":
        load_pretrained(model, source, blocks)
    return model


# As in torchvision, a block's shortcut is drawn before its branch.
def _block(inputs: int, outputs: int, stride: int) -> nn.Module:
    way = shortcut(inputs, outputs, stride)
    return ResidualBlock(basic(inputs, outputs, stride), way)


def _wide_block(inputs: int, outputs: int, stride: int) -> nn.Module:
    way = shortcut(inputs, outputs, stride)
    return ResidualBlock(bottleneck(inputs, outputs // 2, outputs, stride), way)

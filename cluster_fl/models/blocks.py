"""Pieces that several models share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from cluster_fl.errors import UserError


class ResidualBlock(nn.Module):
    """The basic block of He et al. (2015): y = ReLU(F(x) + shortcut(x)), F = conv-BN-ReLU-conv-BN.

    (B, inputs, H, W) -> (B, outputs, H / stride, W / stride). The shortcut is a projection (1x1 convolution
    and BN, their option B) where the shape changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.skippable = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if self.skippable else projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)  # type: ignore[no-any-return]


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
    return nn.Sequential(OrderedDict(conv=convolution, bn=nn.BatchNorm2d(outputs)))


def pooled_linear(channels: int, classes: int) -> OrderedDict[str, nn.Module]:
    """The usual end of a head: (B, channels, H, W) -> (B, classes)."""
    return OrderedDict(
        pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(channels, classes)
    )


def stages(
    make: Callable[[int, int, int], nn.Module], inputs: int, widths: Sequence[int], blocks: Sequence[int]
) -> Iterator[nn.Module]:
    """The blocks ``make(inputs, outputs, stride)`` of a residual network.

    Every stage but the first halves the resolution with its first block.
    """
    for stage, (outputs, count) in enumerate(zip(widths, blocks, strict=True)):
        for block in range(count):
            yield make(inputs, outputs, 2 if stage > 0 and block == 0 else 1)
            inputs = outputs


def check_widths(key: str, widths: Sequence[int], count: int | None = None) -> None:
    """Raises UserError unless ``widths`` are ``count`` (at least one, if not given) positive integers."""
    is_list = isinstance(widths, list | tuple)
    good = is_list and len(widths) > 0 and all(type(n) is int and n > 0 for n in widths)
    if not good or (count is not None and len(widths) != count):
        raise UserError(key, widths, f"must be a list of {count or 'one or more'} positive integers.")

"""HeteroFL's pre-activation residual networks (Diao et al., ICLR 2021).

The published "ResNet18" of 9.6 M parameters has the blocks 1-1-1-2; the released code has 2-2-2-2 since.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from cluster_fl.models.blocks import check_widths, conv3x3, pooled_linear, stages, stepped
from cluster_fl.models.layered import Layered


class PreActivationBlock(nn.Module):
    """y = step * conv2(ReLU(bn2(conv1(a)))) + shortcut, with a = ReLU(bn1(x)).

    (B, inputs, H, W) -> (B, outputs, H / stride, W / stride). The shortcut is x itself, or where the shape
    changes a 1x1 convolution of a, without norm. ``step`` is as in :class:`ResidualBlock`.
    """

    step: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.register_parameter("step", None)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        # Not in place: where bn1 is no norm at all, that would change x.
        self.relu = nn.ReLU()
        self.skippable = inputs == outputs and stride == 1
        self.shortcut = None if self.skippable else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(a)
        y = stepped(self.conv2(self.relu(self.bn2(self.conv1(a)))), self.step)
        y += shortcut
        return y


def preact(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    blocks: Sequence[int],
    widths: Sequence[int] = (64, 128, 256, 512),
) -> Layered:
    """A bare 3x3 convolution, ``blocks`` blocks a stage, and a head that starts with norm and ReLU.

    Args:
        input_shape: (C, H, W) of a sample.
        widths: channels of the four stages; the stem has the first's.

    Raises:
        UserError: ``widths`` are not four positive integers.
    """
    check_widths("model.options.widths", widths, 4)
    units = stages(PreActivationBlock, widths[0], widths, blocks)
    end = pooled_linear(widths[-1], classes)
    head = OrderedDict(bn=nn.BatchNorm2d(widths[-1]), relu=nn.ReLU(), **end)
    return Layered(conv3x3(input_shape[0], widths[0]), units, nn.Sequential(head))

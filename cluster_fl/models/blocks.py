"""Pieces that several models share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from cluster_fl.errors import UserError


class ResidualBlock(nn.Module):
    """A post-activation residual unit (He et al., 2015): y = ReLU(step * F(x) + shortcut(x)).

    (B, inputs, H, W) -> (B, outputs, H / stride, W / stride). Its input must not be negative, as a ReLU's
    output is: then leaving out a unit whose shortcut is x itself is exactly a step of 0.

    Attributes:
        step: learnable step size of shape (1,) (NeFL); None for a fixed 1.
        shortcut: the identity, or a projection where the shape changes.
        skippable: leaving the unit out leaves nothing behind.
    """

    step: nn.Parameter | None

    def __init__(self, branch: Mapping[str, nn.Module], shortcut: nn.Module) -> None:
        super().__init__()
        self.register_parameter("step", None)
        for name, layer in branch.items():
            self.add_module(name, layer)
        self._branch = tuple(branch)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = shortcut
        self.skippable = isinstance(shortcut, nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for name in self._branch:
            y = getattr(self, name)(y)
        y = stepped(y, self.step)
        y += self.shortcut(x)
        return self.relu(y)  # type: ignore[no-any-return]

    def left_out(self) -> nn.Module:
        """What stays when the unit is left out, as if its step size were 0."""
        return ShortcutOnly(self.shortcut)


class ShortcutOnly(nn.Module):
    """What stays of a residual unit that is left out but changes the shape: y = ReLU(shortcut(x))."""

    def __init__(self, shortcut: nn.Module) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.shortcut(x))  # type: ignore[no-any-return]

    def left_out(self) -> nn.Module:
        return self


def stepped(y: Tensor, step: nn.Parameter | None) -> Tensor:
    """A residual branch's output times the unit's step size, if it has one."""
    return y if step is None else step * y


def basic(inputs: int, outputs: int, stride: int) -> OrderedDict[str, nn.Module]:
    """The branch of a basic block: conv-BN-ReLU-conv-BN."""
    return OrderedDict(
        conv1=conv3x3(inputs, outputs, stride),
        bn1=nn.BatchNorm2d(outputs),
        relu1=nn.ReLU(inplace=True),
        conv2=conv3x3(outputs, outputs),
        bn2=nn.BatchNorm2d(outputs),
    )


def bottleneck(inputs: int, inner: int, outputs: int, stride: int) -> OrderedDict[str, nn.Module]:
    """The branch of a bottleneck block, 1x1, 3x3 and 1x1; the 3x3 convolution has the stride."""
    return OrderedDict(
        conv1=nn.Conv2d(inputs, inner, 1, bias=False),
        bn1=nn.BatchNorm2d(inner),
        relu1=nn.ReLU(inplace=True),
        conv2=conv3x3(inner, inner, stride),
        bn2=nn.BatchNorm2d(inner),
        relu2=nn.ReLU(inplace=True),
        conv3=nn.Conv2d(inner, outputs, 1, bias=False),
        bn3=nn.BatchNorm2d(outputs),
    )


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """x itself, or where the shape changes a 1x1 convolution and BN (option B of He et al.)."""
    if inputs == outputs and stride == 1:
        return nn.Identity()
    convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
    return nn.Sequential(OrderedDict(conv=convolution, bn=nn.BatchNorm2d(outputs)))


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


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

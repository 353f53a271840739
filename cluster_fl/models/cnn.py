"""Small networks without residuals: HeteroFL's and FedAvg's for MNIST, one for signals, and the perceptron."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from cluster_fl.errors import UserError
from cluster_fl.models.blocks import check_widths, pooled_linear
from cluster_fl.models.layered import Layered


def heterofl_cnn(
    input_shape: tuple[int, int, int], classes: int, *, widths: Sequence[int] = (64, 128, 256, 512)
) -> Layered:
    """HeteroFL's MNIST network (Diao et al., ICLR 2021): four units of 3x3 convolution, norm and ReLU.

    Each unit but the last ends in a 2x2 max pool.

    Raises:
        UserError: ``widths`` are not four positive integers, or the samples are smaller than 8x8.
    """
    check_widths("model.options.widths", widths, 4)
    _check_size("heterofl_cnn", input_shape, (8, 8))
    channels = (input_shape[0], *widths)
    units = [
        _unit(
            conv=nn.Conv2d(inputs, outputs, 3, padding=1),
            bn=nn.BatchNorm2d(outputs),
            relu=nn.ReLU(inplace=True),
            pool=nn.MaxPool2d(2) if number < 3 else nn.Identity(),
        )
        for number, (inputs, outputs) in enumerate(pairwise(channels))
    ]
    return Layered(nn.Identity(), units, nn.Sequential(pooled_linear(widths[-1], classes)))


def fedavg_cnn(input_shape: tuple[int, int, int], classes: int) -> Layered:
    """FedAvg's MNIST network (McMahan et al., 2017): two 5x5 convolutions, each pooled, and 512 hidden units.

    Padding keeps the size, which gives the paper's 1,663,370 parameters at 1x28x28.

    Raises:
        UserError: the samples are smaller than 4x4.
    """
    _check_size("fedavg_cnn", input_shape, (4, 4))
    channels, height, width = input_shape
    flat = 64 * (height // 4) * (width // 4)
    units = [
        _unit(conv=nn.Conv2d(channels, 32, 5, padding=2), relu=nn.ReLU(inplace=True), pool=nn.MaxPool2d(2)),
        _unit(conv=nn.Conv2d(32, 64, 5, padding=2), relu=nn.ReLU(inplace=True), pool=nn.MaxPool2d(2)),
        _unit(flatten=nn.Flatten(), linear=nn.Linear(flat, 512), relu=nn.ReLU(inplace=True)),
    ]
    return Layered(nn.Identity(), units, _unit(linear=nn.Linear(512, classes)))


def har_cnn(
    input_shape: tuple[int, int, int], classes: int, *, widths: Sequence[int] = (32, 64, 128), kernel: int = 5
) -> Layered:
    """A network of our own for signals: three units of convolution along the time, norm, ReLU and pool.

    A sample is C signals of W values, as (C, 1, W); each unit halves W. 53,862 parameters at 9x1x128 with six
    classes. Samples of more than one row are taken row by row, and the rows' mean is classified.

    Args:
        input_shape: (C, H, W) of a sample.
        kernel: values that a convolution spans, odd.

    Raises:
        UserError: ``widths`` are not three positive integers, ``kernel`` is not odd, or W is below 8.
    """
    check_widths("model.options.widths", widths, 3)
    if type(kernel) is not int or kernel < 1 or kernel % 2 == 0:
        raise UserError("model.options.kernel", kernel, "must be an odd positive integer.")
    _check_size("har_cnn", input_shape, (1, 8))
    units = [
        _unit(
            conv=nn.Conv2d(inputs, outputs, (1, kernel), padding=(0, kernel // 2), bias=False),
            bn=nn.BatchNorm2d(outputs),
            relu=nn.ReLU(inplace=True),
            pool=nn.MaxPool2d((1, 2)),
        )
        for inputs, outputs in pairwise((input_shape[0], *widths))
    ]
    return Layered(nn.Identity(), units, nn.Sequential(pooled_linear(widths[-1], classes)))


def mlp(input_shape: tuple[int, int, int], classes: int, *, hidden: Sequence[int] = (200, 200)) -> Layered:
    """A perceptron on the flattened sample; each hidden layer is a unit. The default is FedAvg's 2NN.

    Raises:
        UserError: ``hidden`` is not a list of positive integers.
    """
    check_widths("model.options.hidden", hidden)
    units = [
        _unit(linear=nn.Linear(inputs, outputs), relu=nn.ReLU(inplace=True))
        for inputs, outputs in pairwise((math.prod(input_shape), *hidden))
    ]
    return Layered(nn.Flatten(), units, _unit(linear=nn.Linear(hidden[-1], classes)))


def _unit(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _check_size(name: str, input_shape: tuple[int, int, int], least: tuple[int, int]) -> None:
    height, width = input_shape[1:]
    if height < least[0] or width < least[1]:
        right = f"needs samples of at least {least[0]}x{least[1]}, but these are {height}x{width}."
        raise UserError("model.name", name, right)

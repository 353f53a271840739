"""What is known about a model before any submodel is chosen."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cluster_fl.models.layered import SHORTCUT
from cluster_fl.nesting.wires import Axis

UNIT = re.compile(rf"(units|exits)\.(\d+)\.({SHORTCUT}\.)?")


@dataclass(frozen=True)
class ChannelGroup:
    """Axes that must be cut together, named by the first of them (``tensor:axis``)."""

    name: str
    size: int


@dataclass(frozen=True)
class Layer:
    """One use of a convolution or linear weight.

    ``positions`` output positions per sample, each costing one multiply-accumulate per weight element.
    """

    weight: str
    positions: int
    out_axis: int


@dataclass(frozen=True)
class Place:
    """Where in ``stem -> units -> head`` a tensor lives.

    ``number`` is that of the unit or the exit; ``shortcut`` tells what stays of a unit that is left out.
    """

    part: str
    number: int = 0
    shortcut: bool = False


@dataclass(frozen=True)
class Anatomy:
    """The channel groups, depth and layers of a full model.

    Attributes:
        depth: units of the model.
        exits: early exits, each named by the number of units before it; the final head is not among them.
        groups: the channel groups; the ``wire`` of a :class:`Span` is a position in this tuple.
        shapes: shape of every state tensor (parameters, then floating point buffers).
        axes: which groups each axis of a state tensor carries; ``None`` where nothing may be cut.
        parameters: the names among ``shapes`` that are trained.
        layers: every convolution and matrix product with a weight, in order of execution.
        fixed: why an axis may not be cut, for axes that nothing but the model prevents.
    """

    depth: int
    exits: tuple[int, ...]
    groups: tuple[ChannelGroup, ...]
    shapes: dict[str, tuple[int, ...]]
    axes: dict[str, tuple[Axis, ...]]
    parameters: frozenset[str]
    layers: tuple[Layer, ...]
    fixed: dict[str, str]


def place(name: str) -> Place:
    """The part of a layered model that owns a state tensor."""
    match = UNIT.match(name)
    if match:
        return Place(match.group(1), int(match.group(2)), match.group(3) is not None)
    return Place("head" if name.startswith("head.") else "stem")

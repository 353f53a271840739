"""A submodel is an index: the channels kept in each group, the units kept, the exits kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cluster_fl.nesting.anatomy import Anatomy, place
from cluster_fl.nesting.wires import Axis

# The first n channels of a group, or exactly these.
Channels = int | tuple[int, ...]
# What selects a submodel's part of a tensor: slices (a view), or open index arrays (a copy).
Index = tuple[Any, ...]


@dataclass(frozen=True)
class Submodel:
    """One choice of channels, units and exits of an :class:`Anatomy`.

    Attributes:
        channels: one entry a channel group.
        units: numbers of the units kept, rising.
        exits: where the submodel answers, rising; ``anatomy.depth`` stands for the final head.
        scale: what a :class:`Scaler` divides by in training: the share of the global model's channels.
    """

    channels: tuple[Channels, ...]
    units: tuple[int, ...]
    exits: tuple[int, ...]
    scale: float = 1.0

    @property
    def shape(self) -> Submodel:
        """The submodel of as many channels from the front: equal for submodels whose modules are alike."""
        return replace(self, channels=tuple(c if isinstance(c, int) else len(c) for c in self.channels))


def full(anatomy: Anatomy) -> Submodel:
    """The whole model with all its exits."""
    sizes = tuple(group.size for group in anatomy.groups)
    return Submodel(sizes, tuple(range(anatomy.depth)), (*anatomy.exits, anatomy.depth))


def prefix(
    anatomy: Anatomy, width: float, depth: int, exits: Sequence[int], rounding: str = "floor"
) -> Submodel:
    """The first channels of every group and the first ``depth`` units, answering at ``exits``."""
    channels = tuple(kept(group.size, width, rounding) for group in anatomy.groups)
    return Submodel(channels, tuple(range(depth)), tuple(exits))


def kept(size: int, width: float, rounding: str = "floor") -> int:
    """Channels kept of ``size``: at least one; a width that is exact up to 1e-9 counts as exact."""
    exact = width * size
    return max(1, math.floor(exact + 1e-9) if rounding == "floor" else math.ceil(exact - 1e-9))


def present(anatomy: Anatomy, submodel: Submodel) -> Iterator[str]:
    """Names of the state tensors that the submodel has, in the full model's order.

    These are the names that ``Layered.truncate`` leaves: of a unit before the last exit that is not kept, the
    shortcut's, which only a unit that changes the shape has.
    """
    units, exits, last = frozenset(submodel.units), frozenset(submodel.exits), max(submodel.exits)
    for name in anatomy.shapes:
        spot = place(name)
        if (
            spot.part == "stem"
            or (spot.part == "units" and spot.number < last and (spot.shortcut or spot.number in units))
            or (spot.part == "exits" and spot.number in exits)
            or (spot.part == "head" and anatomy.depth in exits)
        ):
            yield name


def index_map(anatomy: Anatomy, submodel: Submodel) -> dict[str, Index]:
    """For every tensor of the submodel, the index of its elements in the full tensor.

    ``tensor[index]`` is a view where every axis keeps a prefix, a copy otherwise.
    """
    return {name: _index(anatomy, name, submodel.channels) for name in present(anatomy, submodel)}


def lengths(anatomy: Anatomy, submodel: Submodel) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the submodel."""
    counts = [c if isinstance(c, int) else len(c) for c in submodel.channels]
    return {
        name: tuple(
            size if axis is None else sum(counts[s.wire] * s.repeat for s in axis)
            for size, axis in zip(anatomy.shapes[name], anatomy.axes[name], strict=True)
        )
        for name in present(anatomy, submodel)
    }


def gather(state: Mapping[str, np.ndarray], index: Mapping[str, Index]) -> dict[str, np.ndarray]:
    """The submodel's part of a full state; views of it for prefix submodels: never write into them."""
    return {name: state[name][where] for name, where in index.items()}


def _index(anatomy: Anatomy, name: str, channels: Sequence[Channels]) -> Index:
    parts = [
        _select(anatomy, size, axis, channels)
        for size, axis in zip(anatomy.shapes[name], anatomy.axes[name], strict=True)
    ]
    if all(isinstance(part, slice) for part in parts):
        return tuple(parts)
    arrays = [
        np.arange(size)[part] if isinstance(part, slice) else part
        for part, size in zip(parts, anatomy.shapes[name], strict=True)
    ]
    return np.ix_(*arrays)


def _select(anatomy: Anatomy, size: int, axis: Axis, channels: Sequence[Channels]) -> slice | np.ndarray:
    if axis is None:
        return slice(0, size)
    if len(axis) == 1 and isinstance(count := channels[axis[0].wire], int):
        return slice(0, count * axis[0].repeat)
    pieces, start = [], 0
    for span in axis:
        choice = channels[span.wire]
        chosen = np.arange(choice) if isinstance(choice, int) else np.asarray(choice, dtype=np.int64)
        pieces.append(start + (chosen[:, None] * span.repeat + np.arange(span.repeat)).ravel())
        start += anatomy.groups[span.wire].size * span.repeat
    return np.concatenate(pieces)

"""How much a channel matters, judged by the weights alone, and submodels pruned by it.

A channel's score is the L1 norm of all that writes to it (Li et al., ICLR 2017): of its filter in every convolution,
of its row in every linear layer. Where several layers write to one channel group, as into a residual sum, their
norms add up. Only inputs that are still there count, so pruning one group changes the scores of those behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from cluster_fl.nesting.anatomy import Anatomy
from cluster_fl.nesting.submodel import Channels, Submodel, gather, index_map
from cluster_fl.nesting.windows import leading


def scores(anatomy: Anatomy, submodel: Submodel, weights: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """What each channel that ``submodel`` keeps is worth, float64 (kept,) a group.

    Args:
        weights: the submodel's own tensors, by name.
    """
    totals = [np.zeros(len(numbers(own))) for own in submodel.channels]
    for name, axis in sorted({(layer.weight, layer.out_axis) for layer in anatomy.layers}):
        spans = anatomy.axes[name][axis]
        if name not in weights or spans is None:
            continue
        # In one layout, since the bits of a sum depend on it.
        rows = np.ascontiguousarray(np.moveaxis(weights[name], axis, 0), dtype=np.float64)
        norms, start = np.abs(rows).reshape(len(rows), -1).sum(axis=1), 0
        for span in spans:
            own = totals[span.wire]
            own += norms[start : start + len(own) * span.repeat].reshape(-1, span.repeat).sum(axis=1)
            start += len(own) * span.repeat
    return totals


def prune(submodel: Submodel, worth: Sequence[np.ndarray], counts: Sequence[int]) -> Submodel:
    """The best ``counts`` channels of every group; of equal ones, the first.

    Args:
        worth: of each channel that the submodel keeps, (kept,) a group.
    """
    channels = [
        leading(numbers(own)[np.argsort(-value, kind="stable")], count)
        for own, value, count in zip(submodel.channels, worth, counts, strict=True)
    ]
    return replace(submodel, channels=tuple(channels))


def chain(anatomy: Anatomy, weights: Mapping[str, np.ndarray], shapes: Sequence[Submodel]) -> list[Submodel]:
    """Submodels of the given shapes, each pruned from the one before it, the first from the whole model.

    All groups of one step are judged on the model of the step before. A shape that takes nothing away keeps what
    is there.

    Args:
        weights: the full model's tensors, by name.
        shapes: of falling size, with the same units.
    """
    made: list[Submodel] = []
    channels: tuple[Channels, ...] = tuple(group.size for group in anatomy.groups)
    for shape in shapes:
        current = replace(shape, channels=channels)
        counts = [len(numbers(own)) for own in shape.channels]
        if counts != [len(numbers(own)) for own in channels]:
            part = gather(weights, index_map(anatomy, current))
            current = prune(current, scores(anatomy, current, part), counts)
        made.append(current)
        channels = current.channels
    return made


def numbers(own: Channels) -> np.ndarray:
    """The numbers of the kept channels, int64, rising."""
    return np.arange(own) if isinstance(own, int) else np.asarray(own, dtype=np.int64)

"""What a submodel costs: parameters, multiply-accumulates, activations, bytes.

One trace of the full model is enough: a layer's count is the product of its kept axes times its output
positions, and a submodel's cost is the sum over the layers it keeps. :func:`count` is fvcore's own count of
a real module; the tests hold the two together to the unit.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn

from cluster_fl.nesting.anatomy import Anatomy, place
from cluster_fl.nesting.submodel import Submodel, kept, lengths
from cluster_fl.nesting.tracing import BATCH, state_tensors
from cluster_fl.nesting.wires import Axis

with warnings.catch_warnings():
    # At its import fvcore scripts functions with torch.jit, which torch 2.15 warns about.
    warnings.simplefilter("ignore", FutureWarning)
    from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis

COUNTED = ("conv", "linear", "addmm", "matmul", "bmm", "einsum")


@dataclass(frozen=True)
class Cost:
    """Per sample, forward only: ``macs`` and ``activations`` of convolutions and linear layers.

    ``bytes`` is the float32 state that travels: parameters and floating point buffers.
    """

    params: int
    macs: int
    activations: int
    bytes: int


def cost(anatomy: Anatomy, submodel: Submodel) -> Cost:
    shapes = lengths(anatomy, submodel)
    layers = [layer for layer in anatomy.layers if layer.weight in shapes]
    return Cost(
        params=sum(prod(shape) for name, shape in shapes.items() if name in anatomy.parameters),
        macs=sum(layer.positions * prod(shapes[layer.weight]) for layer in layers),
        activations=sum(layer.positions * shapes[layer.weight][layer.out_axis] for layer in layers),
        bytes=4 * sum(prod(shape) for shape in shapes.values()),
    )


def count(module: nn.Module, input_shape: tuple[int, ...]) -> Cost:
    """The same figures as fvcore counts them on a real module, layer by executed layer."""
    # Two samples, since batch normalisation refuses one value per channel; every count is linear in them.
    training = module.training
    module.eval()
    sample = torch.zeros(BATCH, *input_shape, device=next(module.parameters()).device)
    flops = FlopCountAnalysis(module, sample)
    activations = ActivationCountAnalysis(module, sample)
    for analysis in (flops, activations):
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    by_operator = flops.by_operator()
    module.train(training)
    return Cost(
        params=sum(p.numel() for p in module.parameters()),
        macs=int(sum(by_operator.get(op, 0) for op in COUNTED)) // BATCH,
        activations=int(activations.total()) // BATCH,
        bytes=4 * sum(t.numel() for _, t in state_tensors(module)),
    )


@dataclass(frozen=True)
class CostTable:
    """Costs of every part of a layered model at every candidate width.

    Each array ends in the axis (widths,); ``units`` and ``exits`` begin with the unit's number and with the
    position in ``anatomy.exits``.
    """

    widths: np.ndarray
    stem: np.ndarray
    units: np.ndarray
    exits: np.ndarray
    head: np.ndarray

    def backbone(self) -> np.ndarray:
        """(depth + 1, widths): the stem and the first d units."""
        sums = np.zeros((len(self.units) + 1, len(self.widths)), dtype=np.int64)
        np.cumsum(self.units, axis=0, out=sums[1:])
        sums += self.stem
        return sums


def tables(anatomy: Anatomy, widths: np.ndarray, rounding: str) -> dict[str, CostTable]:
    """The cost table of each metric, ``params`` and ``macs``, for prefix submodels of the given widths."""
    channels = np.array([[kept(g.size, w, rounding) for w in widths] for g in anatomy.groups], dtype=np.int64)
    sizes = {name: _numel(anatomy, name, channels, len(widths)) for name in anatomy.shapes}
    params, macs = _empty(anatomy, widths), _empty(anatomy, widths)
    for name in anatomy.parameters:
        _at(params, anatomy, name)[...] += sizes[name]
    for layer in anatomy.layers:
        _at(macs, anatomy, layer.weight)[...] += layer.positions * sizes[layer.weight]
    return {"params": params, "macs": macs}


def _numel(anatomy: Anatomy, name: str, channels: np.ndarray, widths: int) -> np.ndarray:
    total = np.ones(widths, dtype=np.int64)
    for size, axis in zip(anatomy.shapes[name], anatomy.axes[name], strict=True):
        total *= size if axis is None else _kept(axis, channels)
    return total


def _kept(axis: Axis, channels: np.ndarray) -> Any:
    return sum(channels[span.wire] * span.repeat for span in axis or ())


def _empty(anatomy: Anatomy, widths: np.ndarray) -> CostTable:
    def zeros(*shape: int) -> np.ndarray:
        return np.zeros((*shape, len(widths)), dtype=np.int64)

    return CostTable(widths, zeros(), zeros(anatomy.depth), zeros(len(anatomy.exits)), zeros())


def _at(table: CostTable, anatomy: Anatomy, name: str) -> np.ndarray:
    spot = place(name)
    if spot.part in ("units", "exits"):
        row = spot.number if spot.part == "units" else anatomy.exits.index(spot.number)
        view: np.ndarray = (table.units if spot.part == "units" else table.exits)[row]
        return view
    return table.head if spot.part == "head" else table.stem

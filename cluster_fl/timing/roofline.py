"""How long a forward pass takes where layers may wait for memory (Williams, Waterman & Patterson, CACM 2009)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from cluster_fl.nesting.anatomy import Anatomy, Layer
from cluster_fl.nesting.submodel import Submodel, lengths

BYTES = 4
# A multiply-accumulate is two operations.
FLOPS_PER_MAC = 2


@dataclass(frozen=True)
class Roofline:
    """The layers of a submodel, those with the fewest operations a byte first.

    Arrays of shape (layers + 1,), float64.

    Attributes:
        intensity: operations a byte of each layer, rising; the last is infinite.
        bytes_before: bytes that the layers before each one move, for a sample.
        flops_from: operations of each layer and those after it, for a sample.
    """

    intensity: np.ndarray
    bytes_before: np.ndarray
    flops_from: np.ndarray

    @staticmethod
    def of(anatomy: Anatomy, submodel: Submodel, batch_size: int) -> Roofline:
        """By the convolutions and linear layers, as :func:`cluster_fl.nesting.cost.cost` counts them.

        A layer moves its weight once a batch, and for each sample what it reads and what it writes, 4 bytes a number.
        What it reads is counted at its output's positions: of a strided layer's input that is a part. Norms,
        activations, pooling and additions are left out, as if they were fused into the layers before them.
        """
        shapes = lengths(anatomy, submodel)
        layers = [layer for layer in anatomy.layers if layer.weight in shapes]
        flops = np.array(
            [FLOPS_PER_MAC * x.positions * prod(shapes[x.weight]) for x in layers], dtype=np.float64
        )
        moved = np.array([_moved(anatomy, layer, shapes[layer.weight], batch_size) for layer in layers])
        order = np.argsort(flops / moved, kind="stable")
        flops, moved = flops[order], moved[order]
        return Roofline(
            intensity=np.append(flops / moved, np.inf),
            bytes_before=np.append(0.0, np.cumsum(moved)),
            flops_from=np.append(np.cumsum(flops[::-1])[::-1], 0.0),
        )

    def seconds(self, flops: np.ndarray, bandwidth: np.ndarray) -> np.ndarray:
        """Forward pass of one sample: the sum over the layers of max(operations / flops, bytes / bandwidth).

        Args:
            flops: operations/s of each device, (n,).
            bandwidth: bytes/s to and from its memory, (n,); inf: no layer waits.

        Returns:
            (n,), in O(n log layers): a layer waits for memory where its intensity is below flops / bandwidth.
        """
        first = np.searchsorted(self.intensity, flops / bandwidth)  # the first layer that does not wait
        result: np.ndarray = self.bytes_before[first] / bandwidth + self.flops_from[first] / flops
        return result


def _moved(anatomy: Anatomy, layer: Layer, shape: tuple[int, ...], batch_size: int) -> float:
    """Bytes for one sample."""
    written = shape[layer.out_axis]
    depthwise = anatomy.fixed.get(f"{layer.weight}:1") == "depthwise"
    read = written if depthwise else shape[1 - layer.out_axis]
    return BYTES * (prod(shape) / batch_size + layer.positions * (read + written))

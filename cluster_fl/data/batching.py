"""Samples as normalised tensors: single batches, and whole local epochs made in one pass.

Images stay uint8 in memory; only what a client is about to use becomes float32. Signals are float32 already.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from cluster_fl.data.datasets import Dataset


def batch_sizes(samples: int, batch_size: int, smallest: int) -> list[int]:
    """The sizes of an epoch's batches, in order; they sum to ``samples`` or there are none.

    A leftover of fewer than ``smallest`` samples joins the batch before it; fewer than ``smallest`` samples
    altogether give no batch (batch norm cannot normalise a single value per channel).
    """
    if batch_size < smallest:
        raise ValueError(f"batches of {batch_size} cannot hold {smallest} samples")
    if samples < max(smallest, 1):
        return []
    whole, left = divmod(samples, batch_size)
    sizes = [batch_size] * whole
    if left >= smallest or not sizes:
        return sizes + [left] * (left > 0)
    return [*sizes[:-1], sizes[-1] + left]


class Resident:
    """A data set kept on one device for a pool's lifetime.

    On the CPU the data set's arrays are shared, not copied, and may be read-only (Ray's object store).
    """

    def __init__(self, dataset: Dataset, device: torch.device) -> None:
        self.device = device
        self._inputs = _shared(dataset.inputs, device)  # (N, H, W, C) uint8 or float32
        self._labels = _shared(dataset.labels, device)
        self._padding, self._flip = dataset.crop_padding, dataset.flip
        pixels = dataset.inputs.shape[1] * dataset.inputs.shape[2]
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (dataset.mean, dataset.std))
        # One value per element of an image: much faster than broadcasting over three channels.
        self._gain = (1 / (dataset.scale * std)).float().repeat(pixels).to(device)
        self._shift = (mean / std).float().repeat(pixels).to(device)

    def batch(self, rows: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """Samples as they are: normalised float32 (B, C, H, W) in channels_last memory, int64 labels (B,)."""
        index = self._index(rows)
        return self._normalised(self._inputs.index_select(0, index)), self._labels.index_select(0, index)

    def labels(self, rows: np.ndarray | Tensor) -> Tensor:
        """int64 (B,)."""
        return self._labels.index_select(0, self._index(rows))

    def epoch(self, rows: np.ndarray, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """All of ``rows`` shuffled, cropped and flipped as the data set says; otherwise like :meth:`batch`.

        Everything random comes from ``generator``, which may live on another device.
        """
        order = torch.randperm(len(rows), generator=generator, device=generator.device)
        index = self._index(rows)[order.to(self.device)]
        images = self._inputs.index_select(0, index)
        if self._padding or self._flip:
            images = augment(images, self._padding, self._flip, generator)
        return self._normalised(images), self._labels.index_select(0, index)

    def _index(self, rows: np.ndarray | Tensor) -> Tensor:
        return rows.to(self.device) if isinstance(rows, Tensor) else _shared(rows, self.device)

    def _normalised(self, images: Tensor) -> Tensor:
        # In place on ``images`` themselves where they are float32: they are a copy of the samples, never these.
        flat = images.flatten(1).float().mul_(self._gain).sub_(self._shift)
        return flat.view(images.shape).permute(0, 3, 1, 2)


def augment(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Each image (B, H, W, C) cropped at random from its zero-padded self, then mirrored with chance 1/2.

    Draws (2, B) offsets (down, right), then (B,) mirrorings, whether or not they are used.
    """
    count, height, width, channels = images.shape
    device, source = images.device, generator.device
    offsets = torch.randint(0, 2 * padding + 1, (2, count), generator=generator, device=source).to(device)
    mirrored = torch.randint(0, 2, (count,), generator=generator, device=source).to(device) == 1
    padded = torch.nn.functional.pad(images, (0, 0, padding, padding, padding, padding))
    rows = torch.arange(height, device=device) + offsets[0, :, None]
    columns = torch.arange(width, device=device).expand(count, width)
    if flip:
        columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
    columns = columns + offsets[1, :, None]
    # Numbers of pixels in the padded batch: one flat gather is four times faster than indexing by (b, y, x).
    first = torch.arange(count, device=device)[:, None] * padded.shape[1] + rows
    pixels = first[:, :, None] * padded.shape[2] + columns[:, None, :]
    return padded.view(-1, channels).index_select(0, pixels.flatten()).view(images.shape)


def _shared(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor, without a copy on the CPU."""
    with warnings.catch_warnings():
        # Read-only arrays are fine here: nothing in this module writes into what it was given.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array).to(device)

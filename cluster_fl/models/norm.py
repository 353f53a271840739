"""Which statistics batch normalisation uses, and how static ones are collected.

Static batch norm (HeteroFL's sBN; Diao et al., ICLR 2021): training normalises by the batch and tracks
nothing; afterwards the training samples pass once more, and evaluation uses the plain mean over batches of
the batch means and of the unbiased batch variances (not the variance of the pooled samples).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cluster_fl.config import choose

POLICIES = ("batch", "static", "per_level")
BUFFERS = ("running_mean", "running_var")


def apply_norm_policy(model: nn.Module, policy: str) -> None:
    """Sets every batch norm of ``model``, in place.

    ``batch`` and ``static``: the batch's statistics, in training and in evaluation; there are no buffers.
    ``per_level``: fresh running statistics with momentum 0.1, which evaluation uses.

    Raises:
        UserError: there is no such policy.
    """
    choose("model.norm", policy, POLICIES)
    for _, module in batch_norms(model):
        if policy == "per_level":
            _track(module, momentum=0.1)
        else:
            _untrack(module)


def start_collecting(model: nn.Module) -> None:
    """Makes forwards in train mode collect: each batch norm that has no buffers gets fresh ones.

    Without momentum they hold the mean of what all batches since had.
    """
    for _, module in batch_norms(model):
        if module.running_mean is None:
            _track(module, momentum=None)


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the running statistics, each (C,), by name (``units.0.bn1.running_mean``)."""
    return {
        f"{name}.{leaf}": buffer.clone()
        for name, module in batch_norms(model)
        for leaf in BUFFERS
        if (buffer := getattr(module, leaf)) is not None
    }


def set_statistics(model: nn.Module, stats: Mapping[str, Tensor]) -> None:
    """Makes evaluation normalise by ``stats``, which name every batch norm of ``model``."""
    start_collecting(model)
    for name, module in batch_norms(model):
        for leaf in BUFFERS:
            getattr(module, leaf).copy_(stats[f"{name}.{leaf}"])


def batch_norms(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """Every batch norm of ``model`` with its name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm))


def _track(module: _BatchNorm, momentum: float | None) -> None:
    device = None if module.weight is None else module.weight.device
    module.track_running_stats, module.momentum = True, momentum
    module.running_mean = torch.zeros(module.num_features, device=device)
    module.running_var = torch.ones(module.num_features, device=device)
    module.num_batches_tracked = torch.zeros((), dtype=torch.long, device=device)


def _untrack(module: _BatchNorm) -> None:
    module.track_running_stats = False
    module.running_mean = module.running_var = module.num_batches_tracked = None

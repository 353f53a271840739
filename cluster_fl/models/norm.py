"""What normalises: which statistics batch norms use, what replaces them, and how static ones are collected.

Static batch norm (HeteroFL's sBN; Diao et al., ICLR 2021): training normalises by the batch and tracks
nothing; afterwards the training samples pass once more, and evaluation uses the plain mean over batches of
the batch means and of the unbiased batch variances (not the variance of the pooled samples).

Every policy starts from a model with batch norms and keeps the names of its tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cluster_fl.config import choose
from cluster_fl.errors import UserError

POLICIES = ("batch", "static", "per_level", "group", "none")
BUFFERS = ("running_mean", "running_var")


class Scaler(nn.Module):
    """HeteroFL's Scaler: division by ``scale`` in training, nothing in evaluation.

    A submodel with a share ``scale`` of the channels so trains on activations of the global model's size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x / self.scale if self.training and self.scale != 1 else x

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"


def apply_norm_policy(model: nn.Module, policy: str, *, groups: int = 16, scaler: bool = False) -> None:
    """Sets or replaces every batch norm of ``model``, in place.

    ``batch`` and ``static``: the batch's statistics, in training and in evaluation; there are no buffers.
    ``per_level``: running statistics with momentum 0.1, which evaluation uses; those that the model has.
    ``group``: a group norm with the batch norm's weight and bias (DepthFL).
    ``none``: nothing.

    Args:
        groups: of every group norm.
        scaler: puts a :class:`Scaler` before every norm, or where it was.

    Raises:
        UserError: there is no such policy, the groups do not divide a layer's channels, or there are both a
            Scaler and running statistics.
    """
    choose("model.norm", policy, POLICIES)
    if scaler and policy == "per_level":
        right = "cannot go with a Scaler: evaluation scales nothing, but its statistics would be of scaled inputs."
        raise UserError("model.norm", policy, right)
    for name, module in list(batch_norms(model)):
        norm = _made(name, module, policy, groups)
        if norm is not module:
            model.set_submodule(name, norm)
        if scaler:
            _scale_before(norm)


def check_groups(name: str, channels: int, groups: int) -> None:
    """Raises UserError unless a group norm ``name`` can have so many groups."""
    if channels % groups:
        raise UserError("model.norm_groups", groups, f"must divide the {channels} channels of {name}.")


def start_collecting(model: nn.Module) -> None:
    """Makes forwards in train mode collect: each batch norm that has no buffers gets fresh ones.

    Without momentum they hold the mean of what all batches since had. A Scaler does nothing any more, since
    evaluation, for which the statistics are, has none.
    """
    for scaler in model.modules():
        if isinstance(scaler, Scaler):
            scaler.scale = 1.0
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


def _made(name: str, module: _BatchNorm, policy: str, groups: int) -> nn.Module:
    """What stands in a batch norm's place."""
    if policy == "none":
        return nn.Identity()
    if policy == "group":
        return _group_norm(name, module, groups)
    if policy != "per_level":
        _untrack(module)
    elif module.running_mean is None:
        _track(module, momentum=0.1)
    else:
        module.momentum = 0.1
    return module


def _group_norm(name: str, module: _BatchNorm, groups: int) -> nn.GroupNorm:
    check_groups(name, module.num_features, groups)
    norm = nn.GroupNorm(groups, module.num_features, module.eps, module.affine)
    norm.weight, norm.bias = module.weight, module.bias
    return norm


def _scale_before(norm: nn.Module) -> None:
    # A hook, and not a layer around the norm: the names of its tensors stay as they are.
    norm.add_module("scaler", Scaler())
    norm.register_forward_pre_hook(_scaled)


def _scaled(norm: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (norm.get_submodule("scaler")(inputs[0]),)


def _track(module: _BatchNorm, momentum: float | None) -> None:
    device = None if module.weight is None else module.weight.device
    module.track_running_stats, module.momentum = True, momentum
    module.running_mean = torch.zeros(module.num_features, device=device)
    module.running_var = torch.ones(module.num_features, device=device)
    module.num_batches_tracked = torch.zeros((), dtype=torch.long, device=device)


def _untrack(module: _BatchNorm) -> None:
    module.track_running_stats = False
    module.running_mean = module.running_var = module.num_batches_tracked = None

"""From the full model to a really smaller module, and the weights in and out of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from cluster_fl.models.norm import Scaler, check_groups
from cluster_fl.nesting.anatomy import Anatomy
from cluster_fl.nesting.submodel import Index, Submodel, index_map
from cluster_fl.nesting.tracing import state_tensors

Module = TypeVar("Module", bound=nn.Module)


def extract(model: Module, anatomy: Anatomy, submodel: Submodel) -> Module:
    """A copy of ``model`` that holds only the submodel's tensors; what lies behind its last exit is gone.

    The copy is independent of ``model``. Names of its tensors are those of the full model.

    Raises:
        UserError: a unit cannot be left out, or a group norm's groups do not divide its kept channels.
    """
    small = copy.deepcopy(model)
    truncate = getattr(small, "truncate", None)
    if truncate is not None:
        truncate(submodel.units, submodel.exits)
    for name, where in index_map(anatomy, submodel).items():
        _cut(small, name, where)
    for name, module in small.named_modules():
        _describe(name, module)
        if isinstance(module, Scaler):
            module.scale = submodel.scale
    return small


def load(module: nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Copies ``weights`` (a submodel's part, by name) into the module's own tensors."""
    with torch.no_grad():
        for name, tensor in state_tensors(module):
            # torch.tensor copies: arrays out of the object store are read-only and shared by every pool.
            tensor.copy_(torch.tensor(weights[name]))


def read(module: nn.Module) -> dict[str, np.ndarray]:
    """The module's state as float32 arrays of their own."""
    return {
        name: t.detach().to("cpu", torch.float32).numpy().copy(order="C") for name, t in state_tensors(module)
    }


def _cut(root: nn.Module, name: str, where: Index) -> None:
    path, _, leaf = name.rpartition(".")
    owner = root.get_submodule(path)
    tensor = getattr(owner, leaf)
    selector = tuple(torch.from_numpy(w) if isinstance(w, np.ndarray) else w for w in where)
    part = tensor.detach()[selector].clone()
    if isinstance(tensor, nn.Parameter):
        owner._parameters[leaf] = nn.Parameter(part, requires_grad=tensor.requires_grad)
    else:
        owner._buffers[leaf] = part


def _describe(name: str, module: nn.Module) -> None:
    """Makes a layer's own account of its sizes true again."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        if module.groups == module.in_channels == module.out_channels:
            module.groups = module.weight.shape[0]
        module.out_channels = module.weight.shape[0]
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
        module.num_features = module.weight.shape[0]
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        module.num_channels = module.weight.shape[0]
        check_groups(name, module.num_channels, module.num_groups)

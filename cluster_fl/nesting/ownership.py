"""What a model's batch norms mean for its state: which tensors exist once a level instead of being shared."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cluster_fl.nesting.tracing import state_tensors


def has_batch_norms(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def owned_tensors(model: nn.Module, norm: str) -> frozenset[str]:
    """Under ``per_level`` norms, every tensor of a batch norm (NeFL's inconsistent parameters); else none."""
    if norm != "per_level":
        return frozenset()
    norms = {name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    return frozenset(name for name, _ in state_tensors(model) if name.rpartition(".")[0] in norms)

"""What a model's batch norms mean for its state: which tensors exist once a level instead of being shared."""

from __future__ import annotations

from torch import nn

from cluster_fl.models.norm import batch_norms
from cluster_fl.nesting.tracing import state_tensors


def has_batch_norms(model: nn.Module) -> bool:
    return any(True for _ in batch_norms(model))


def owned_tensors(model: nn.Module, norm: str) -> frozenset[str]:
    """Under ``per_level`` norms, every tensor of a batch norm (NeFL's inconsistent parameters); else none."""
    if norm != "per_level":
        return frozenset()
    norms = {name for name, _ in batch_norms(model)}
    return frozenset(name for name, _ in state_tensors(model) if name.rpartition(".")[0] in norms)

"""NeFL's learnable step sizes."""

from __future__ import annotations

import torch
from torch import nn

from cluster_fl.errors import UserError
from cluster_fl.models.layered import Layered


def add_step_sizes(model: Layered, name: str) -> None:
    """Gives every residual unit a learnable scalar ``step``, initially 1, in place (NeFL, section IV).

    A residual unit is one with an attribute ``step``, by which it multiplies its residual branch unless None.

    Args:
        name: the model's, for the error.

    Raises:
        UserError: the model has no residual units.
    """
    units = [unit for unit in model.units.values() if hasattr(unit, "step")]
    if not units:
        raise UserError("model.name", name, "has no residual units, whose branches step sizes would scale.")
    for unit in units:
        unit.step = nn.Parameter(torch.ones(1, device=model.device()))

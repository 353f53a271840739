"""Everything that a model's structure and first weights follow from, small enough to send anywhere."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cluster_fl.models import build
from cluster_fl.models.exits import attach_exits
from cluster_fl.models.layered import Layered
from cluster_fl.models.norm import apply_norm_policy
from cluster_fl.models.steps import add_step_sizes


@dataclass(frozen=True)
class ModelSpec:
    """Builds the same model, bit for bit, wherever it is called.

    Attributes:
        name, options: as :func:`cluster_fl.models.build` takes them.
        input_shape: (C, H, W) of a sample.
        norm, norm_groups, scaler: as :func:`apply_norm_policy` takes them.
        exits, exit_head: where early exits hang, and what hangs there.
        steps: every residual unit has a learnable step size.
    """

    name: str
    input_shape: tuple[int, int, int]
    classes: int
    seed: int
    norm: str = "batch"
    exits: tuple[int, ...] = ()
    exit_head: str = "conv3"
    options: dict[str, Any] = field(default_factory=dict)
    norm_groups: int = 16
    scaler: bool = False
    steps: bool = False

    def build(self) -> Layered:
        """Raises UserError for an unknown name, wrong options, an impossible exit, norm or step size."""
        model = build(self.name, self.input_shape, self.classes, self.options, generator_seed=self.seed)
        attach_exits(model, self.exits, self.exit_head, self.input_shape, self.classes, seed=self.seed)
        if self.steps:
            add_step_sizes(model, self.name)
        apply_norm_policy(model, self.norm, groups=self.norm_groups, scaler=self.scaler)
        return model

    def untrained(self) -> ModelSpec:
        """The same structure without pre-trained weights: for those who overwrite them anyway."""
        return replace(self, options={k: v for k, v in self.options.items() if k != "pretrained"})

    def skeleton(self) -> Layered:
        """The same structure on the meta device: no memory, no weights."""
        with torch.device("meta"):
            return self.build()

    def with_exits(self, exits: tuple[int, ...]) -> ModelSpec:
        return replace(self, exits=exits)

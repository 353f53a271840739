"""Everything that a model's structure and first weights follow from, small enough to send anywhere."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cluster_fl.models import build
from cluster_fl.models.exits import attach_exits
from cluster_fl.models.layered import Layered
from cluster_fl.models.norm import apply_norm_policy


@dataclass(frozen=True)
class ModelSpec:
    """Builds the same model, bit for bit, wherever it is called."""

    name: str
    input_shape: tuple[int, int, int]
    classes: int
    seed: int
    norm: str = "batch"
    exits: tuple[int, ...] = ()
    exit_head: str = "conv3"
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Layered:
        """Raises UserError for an unknown name, wrong options or an impossible exit."""
        model = build(self.name, self.input_shape, self.classes, self.options, generator_seed=self.seed)
        attach_exits(model, self.exits, self.exit_head, self.input_shape, self.classes, seed=self.seed)
        apply_norm_policy(model, self.norm)
        return model

    def skeleton(self) -> Layered:
        """The same structure on the meta device: no memory, no weights."""
        with torch.device("meta"):
            return self.build()

    def with_exits(self, exits: tuple[int, ...]) -> ModelSpec:
        return replace(self, exits=exits)

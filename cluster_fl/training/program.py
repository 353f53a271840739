"""What a client does with its submodel: the step loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from cluster_fl.config import TrainConfig
from cluster_fl.data.batching import Resident, batch_sizes
from cluster_fl.training.objectives import Objective
from cluster_fl.training.schedule import learning_rate


@dataclass(frozen=True)
class Trained:
    """What one client's training left besides its weights. ``loss`` is the mean over samples seen."""

    loss: float
    steps: int


class LocalProgram(Protocol):
    """Trains ``model`` in place on one client's rows; everything random comes from ``generator``."""

    def __call__(
        self, model: nn.Module, data: Resident, rows: np.ndarray, round: int, generator: torch.Generator
    ) -> Trained: ...


@dataclass(frozen=True)
class SGD:
    """Epochs of SGD on shuffled batches; the momentum buffer starts at zero in each round.

    ``smallest_batch`` is the fewest samples a batch may have (2 where batches are normalised).
    """

    train: TrainConfig
    rounds: int
    objective: Objective
    smallest_batch: int = 1

    def __call__(
        self, model: nn.Module, data: Resident, rows: np.ndarray, round: int, generator: torch.Generator
    ) -> Trained:
        sizes = batch_sizes(len(rows), self.train.batch_size, self.smallest_batch)
        optimiser = self._optimiser(model, round)
        total = torch.zeros((), dtype=torch.float64, device=data.device)
        for _ in range(self.train.epochs if sizes else 0):
            inputs, labels = data.epoch(rows, generator)
            for x, y in zip(inputs.split(sizes), labels.split(sizes), strict=True):
                loss = self.objective(model(x), y, round / self.rounds)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                if self.train.clip_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), self.train.clip_norm)
                optimiser.step()
                total += loss.detach() * len(y)
        seen = len(rows) * self.train.epochs if sizes else 0
        return Trained(float(total) / seen if seen else 0.0, len(sizes) * self.train.epochs)

    def _optimiser(self, model: nn.Module, round: int) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            model.parameters(),
            lr=learning_rate(self.train, round, self.rounds),
            momentum=self.train.momentum,
            weight_decay=self.train.weight_decay,
            fused=True,
        )

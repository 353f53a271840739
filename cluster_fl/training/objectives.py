"""Losses of multi-exit models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Objective(Protocol):
    """Loss of one batch.

    Args:
        logits: of every exit, (B, classes) each, the deepest last.
        labels: (B,) class numbers.
        progress: share of the rounds that lie behind, in [0, 1).
    """

    def __call__(self, logits: list[Tensor], labels: Tensor, progress: float) -> Tensor: ...


@dataclass(frozen=True)
class SelfDistillation:
    """Weighted cross-entropy of all exits, and distillation from the last one (ScaleFL, Eq. 5).

        L = norm * sum_i i * (CE_i + kd_weight * T^2 * KL(last || i))

    The last exit is its own teacher and has no KL term.

    Attributes:
        kd_weight: beta of Eq. 5; 0 turns distillation off.
        temperature: T.
        reduction: ``batch``: KL summed over classes and averaged over samples (the paper);
            ``element``: averaged over classes too, 1/C of it (the released code).
        gate: share of the rounds without distillation; it acts in rounds after gate * rounds.
        detach_teacher: no gradient flows into the last exit through the KL terms.
        unit_weights: weights i are divided by their sum (the released code), not by l(l+1) (Eq. 5).
    """

    kd_weight: float = 0.1
    temperature: float = 3.0
    reduction: str = "batch"
    gate: float = 0.0
    detach_teacher: bool = True
    unit_weights: bool = True

    def __call__(self, logits: list[Tensor], labels: Tensor, progress: float) -> Tensor:
        levels = len(logits)
        distil = self.kd_weight > 0 and (progress > self.gate or self.gate == 0)
        total = torch.zeros((), device=labels.device)
        for i, exit_logits in enumerate(logits, start=1):
            loss = F.cross_entropy(exit_logits, labels)
            if distil and i < levels:
                loss = loss + self.kd_weight * self._divergence(exit_logits, logits[-1])
            total = total + i * loss
        norm = levels * (levels + 1)
        return total * (2 / norm if self.unit_weights else 1 / norm)

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.detach_teacher:
            teacher = teacher.detach()
        target = F.softmax(teacher / self.temperature, dim=1)
        log_student = F.log_softmax(student / self.temperature, dim=1)
        samples, classes = student.shape
        terms = samples if self.reduction == "batch" else samples * classes
        return F.kl_div(log_student, target, reduction="sum") / terms * self.temperature**2

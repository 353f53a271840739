"""Losses of models with one or several exits."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from cluster_fl.training.program import Context


class Objective(ABC):
    """Loss of one batch."""

    @abstractmethod
    def __call__(self, logits: list[Tensor], labels: Tensor, progress: float) -> Tensor:
        """A scalar.

        Args:
            logits: of every exit, (B, classes) each, the deepest last.
            labels: (B,) class numbers.
            progress: share of the rounds that lie behind, in [0, 1).
        """

    def of(self, context: Context) -> Objective:
        """The objective of one client, for those that differ between clients."""
        return self


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Of the last exit."""

    def __call__(self, logits: list[Tensor], labels: Tensor, progress: float) -> Tensor:
        return F.cross_entropy(logits[-1], labels)


@dataclass(frozen=True)
class MaskedCrossEntropy(Objective):
    """Of the last exit, with a logit of 0 for every class that the client has no training sample of (HeteroFL).

    0, not minus infinity: such a class keeps its part exp(0) of the softmax, and its logit gets no gradient.

    Attributes:
        has_class: of which classes the client has samples, bool (classes,); None stands for all.
    """

    has_class: Tensor | None = None

    def of(self, context: Context) -> MaskedCrossEntropy:
        return replace(self, has_class=context.has_class)

    def __call__(self, logits: list[Tensor], labels: Tensor, progress: float) -> Tensor:
        return F.cross_entropy(self.masked(logits[-1]), labels)

    def masked(self, logits: Tensor) -> Tensor:
        """The client's answer, (B, classes)."""
        return logits if self.has_class is None else logits.masked_fill(~self.has_class, 0)


@dataclass(frozen=True)
class SelfDistillation(Objective):
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


@dataclass(frozen=True)
class MutualDistillation(Objective):
    """Cross-entropy of all exits, each distilled from all the others (DepthFL, Kim et al., ICLR 2023).

        L = sum_i CE_i + lambda_t / (M - 1) * sum_i sum_{j != i} KL(j || i)

    for M exits, at temperature 1; the teacher j gets no gradient. In round t, from 0,
    lambda_t = exp(-5 (1 - min(t, T) / T)^2).

    Attributes:
        ramp: T as a share of the run's rounds; 0: lambda is always 1.
        distil: the KL terms are there at all.
    """

    ramp: float
    distil: bool = True

    def __call__(self, logits: list[Tensor], labels: Tensor, progress: float) -> Tensor:
        total = sum((F.cross_entropy(own, labels) for own in logits[1:]), F.cross_entropy(logits[0], labels))
        if not self.distil or len(logits) == 1:
            return total
        logs = [F.log_softmax(own, dim=1) for own in logits]
        divergence = sum(
            F.kl_div(student, teacher.detach(), reduction="batchmean", log_target=True)
            for student, teacher in itertools.permutations(logs, 2)
        )
        return total + self.weight(progress) / (len(logits) - 1) * divergence

    def weight(self, progress: float) -> float:
        """lambda_t; ``progress`` is the share of the rounds that lie behind."""
        done = min(progress / self.ramp, 1.0) if self.ramp else 1.0
        return math.exp(-5 * (1 - done) ** 2)

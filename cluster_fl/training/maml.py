"""Meta-learning on clients: weights that are good one gradient step later (Per-FedAvg)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from cluster_fl.models.layered import Layered
from cluster_fl.nesting.plan import Level
from cluster_fl.training.objectives import Objective
from cluster_fl.training.program import SGD, Answer, Context, Effort, LocalProgram, Trained

Batch = tuple[Tensor, Tensor]
# A gradient by parameter; None where the loss does not depend on one.
Gradient = list[Tensor | None]
# From a batch to the loss at the weights as they are, and its gradient.
Slope = Callable[[Batch], tuple[Tensor, Gradient]]

FIRST_ORDER, HESSIAN_FREE = "fo", "hf"


@dataclass(frozen=True)
class Meta(LocalProgram):
    """Steps down f(w - alpha grad f(w)), each from 2 (first order) or 3 (Hessian-free) batches of their own.

    With u = w - alpha grad f(w; B0) and g = grad f(u; B1), a step goes down g; or, Hessian-free, down
    g - alpha (grad f(w + delta g; B2) - grad f(w - delta g; B2)) / (2 delta), which stands for (I - alpha H) g.

    An epoch's batches are taken two or three at a time, in their order; what is left over is not used. If there are
    too few for one step, they are used again from the first on, and are not independent then.

    Attributes:
        inner: the step that is made of a direction: its rate (beta), momentum, decay, clipping and correction.
        order: ``fo`` or ``hf``.
        alpha: rate of the inner step, and of the steps to a personal model.
        adapt_steps: steps from the model to a personal one, each on a batch of the client's training samples.
    """

    inner: SGD
    order: str
    alpha: float
    delta: float
    adapt_steps: int

    @property
    def keeps_state(self) -> bool:
        return self.inner.keeps_state

    @property
    def personalises(self) -> bool:
        return True

    def effort(self, level: Level) -> Effort:
        # B2 passes twice.
        compute = 1.0 if self.order == FIRST_ORDER else 4 / 3
        return replace(self.inner.effort(level), compute=compute)

    def train(self, model: Layered, context: Context) -> Trained:
        inner = self.inner
        objective, descent = inner.objective.of(context), inner.descent(model, context)
        for _ in range(context.epochs):
            batches = list(context.batches(inner.smallest_batch))
            for group in grouped(batches, 2 if self.order == FIRST_ORDER else 3):
                descent.step(self.descend(model, objective, group, context.progress), len(group[1][1]))
        return descent.end(inner.coverage(context, model))

    def descend(
        self, model: Layered, objective: Objective, group: Sequence[Batch], progress: float
    ) -> Tensor:
        """Makes the step's direction the parameters' gradients; the loss at u on B1."""
        slope = sloping(model, objective, progress)
        parameters = list(model.parameters())
        start = [p.detach().clone() for p in parameters]
        _, first = slope(group[0])
        move(parameters, start, first, -self.alpha)
        loss, direction = slope(group[1])
        if self.order == HESSIAN_FREE:
            ends = []
            for distance in (self.delta, -self.delta):
                move(parameters, start, direction, distance)
                ends.append(slope(group[2])[1])
            direction = [
                g if g is None or a is None or b is None else g - (a - b) * (self.alpha / (2 * self.delta))
                for g, a, b in zip(direction, *ends, strict=True)
            ]
        move(parameters, start, direction, 0.0)
        for parameter, gradient in zip(parameters, direction, strict=True):
            parameter.grad = gradient
        return loss

    def personalise(self, model: Layered, context: Context) -> Answer:
        slope = sloping(model, self.inner.objective.of(context), context.progress)
        parameters = list(model.parameters())
        for batch in islice(_endless(context, self.inner.smallest_batch), self.adapt_steps):
            start = [p.detach().clone() for p in parameters]
            move(parameters, start, slope(batch)[1], -self.alpha)
        model.zero_grad(set_to_none=True)
        return model


def grouped(batches: Sequence[Batch], size: int) -> list[list[Batch]]:
    """Batches of one step each: consecutive ones, without the rest; all over again where there are too few."""
    if not batches:
        return []
    if len(batches) < size:
        return [[batches[i % len(batches)] for i in range(size)]]
    return [list(batches[i : i + size]) for i in range(0, len(batches) - size + 1, size)]


def sloping(model: Layered, objective: Objective, progress: float) -> Slope:
    """The loss and its gradient, as the optimiser of plain training would see it; leaves no gradient behind."""
    parameters = list(model.parameters())

    def slope(batch: Batch) -> tuple[Tensor, Gradient]:
        loss = objective(model(batch[0]), batch[1], progress)
        model.zero_grad(set_to_none=True)
        loss.backward()
        gradient = [p.grad for p in parameters]
        model.zero_grad(set_to_none=True)
        return loss, gradient

    return slope


@torch.no_grad()
def move(parameters: Sequence[Tensor], start: Sequence[Tensor], direction: Gradient, distance: float) -> None:
    """Puts the parameters at ``start`` + ``distance`` x ``direction``, in place."""
    for parameter, origin, own in zip(parameters, start, direction, strict=True):
        parameter.copy_(origin if own is None else torch.add(origin, own, alpha=distance))


def _endless(context: Context, smallest: int) -> Iterator[Batch]:
    """Batches of epoch after epoch; none if the client has too few samples."""
    while batches := list(context.batches(smallest)):
        yield from batches

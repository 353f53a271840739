"""Masks by magnitude: which single elements a share of a model keeps, and training through them.

Nothing here asks what a module is made of: masked weights are handed to it in place of its own for one forward,
and it stays as it was found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cluster_fl.nesting.anatomy import Anatomy
from cluster_fl.nesting.submodel import kept
from cluster_fl.training.program import Answer


@dataclass(frozen=True)
class Mask:
    """What is kept of one tensor.

    Attributes:
        kept: bool, of the tensor's shape.
        threshold: the least magnitude kept of all that was ranked together, a scalar.
    """

    kept: Tensor
    threshold: Tensor


def layers(anatomy: Anatomy) -> tuple[tuple[str, ...], ...]:
    """Weight and bias of every convolution and linear layer, in order of execution."""
    weights = dict.fromkeys(layer.weight for layer in anatomy.layers)
    pairs = ((name, name.removesuffix("weight") + "bias") for name in weights)
    return tuple((name, bias) if bias in anatomy.parameters else (name,) for name, bias in pairs)


def largest(tensors: Mapping[str, Tensor], share: float) -> dict[str, Mask]:
    """Masks of the share of elements with the largest magnitudes among all of ``tensors`` together.

    Exactly ``kept(n, share)`` of n elements are kept, of equal ones the first: those of a smaller share are always
    among those of a larger one.
    """
    sizes = [tensor.numel() for tensor in tensors.values()]
    magnitudes = torch.cat([tensor.detach().abs().flatten() for tensor in tensors.values()])
    count = kept(len(magnitudes), share)
    threshold = magnitudes.kthvalue(len(magnitudes) - count + 1).values
    chosen, equal = magnitudes > threshold, magnitudes == threshold
    chosen |= equal & (equal.cumsum(0) <= count - chosen.sum())
    parts = zip(tensors.items(), chosen.split(sizes), strict=True)
    return {name: Mask(_like(tensor, part), threshold) for (name, tensor), part in parts}


def _like(tensor: Tensor, part: Tensor) -> Tensor:
    """``part`` in the tensor's shape and memory layout, since operations on two layouts are slower."""
    return torch.empty_like(tensor, dtype=part.dtype).copy_(part.view(tensor.shape))


def masks(model: nn.Module, groups: Iterable[Iterable[str]], share: float) -> dict[str, Mask]:
    """The masks of a model's parameters, each group of names ranked for itself; none where all is kept."""
    if share >= 1:
        return {}
    own = dict(model.named_parameters())
    found: dict[str, Mask] = {}
    for group in groups:
        found |= largest({name: own[name] for name in group}, share)
    return found


class Through(torch.autograd.Function):
    """w -> w m, with m = 1 for kept elements of magnitude at least theta, else 0.

    The backward pass treats m as a function of |w| with the derivative 2 theta / (|w| + theta)^2 where m = 1, as if it
    were 2 |w| / (|w| + theta), which is 1 at the threshold. So the gradient g of w m becomes

        m (1 + 2 theta |w| / (|w| + theta)^2) g,

    between 1 (far above the threshold) and 3/2 (at it) times g for what the forward lets through, and 0 for the rest.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, chosen: Tensor, threshold: Tensor) -> Tensor:
        magnitude = weight.abs()
        open = chosen & (magnitude >= threshold)
        ctx.save_for_backward(magnitude, open, threshold)
        return weight * open

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        magnitude, open, threshold = ctx.saved_tensors
        # 2 theta |w| / (|w| + theta)^2 = 2 r (1 - r) = 1/2 - 2 (r - 1/2)^2 with r = theta / (|w| + theta); in place,
        # since a step touches every weight of the model.
        factor = magnitude.add(threshold).reciprocal_().mul_(threshold)
        factor.sub_(0.5).square_().mul_(-2).add_(1.5)
        # 0 / 0: an element that is zero where the threshold is zero.
        factor.nan_to_num_(nan=1.0)
        return factor.mul_(gradients[0]).mul_(open), None, None


def through(model: nn.Module, found: Mapping[str, Mask]) -> Answer:
    """What ``model`` answers with masked weights; gradients reach its own parameters as :class:`Through` says."""
    if not found:
        return model
    own = dict(model.named_parameters())

    def answer(x: Tensor) -> list[Tensor]:
        seen = {name: Through.apply(own[name], mask.kept, mask.threshold) for name, mask in found.items()}
        logits: list[Tensor] = functional_call(model, seen, (x,))
        return logits

    return answer


@torch.no_grad()
def cut(model: nn.Module, found: Mapping[str, Mask]) -> None:
    """Sets to zero, in place, whatever the masks do not keep."""
    for name, mask in found.items():
        model.get_parameter(name).mul_(mask.kept)

"""Corrections of the gradient against client drift: FedProx, SCAFFOLD and FedDyn.

Each adds ``mu (w - received) + offset`` to the gradient of every step, and some keep a variate a client.
Variates have the full tensors' shapes and the state's keys, so that they survive a change of the submodel;
the elements that a client does not hold stay as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from cluster_fl.aggregation.server import CONTROL
from cluster_fl.config import CorrectionConfig
from cluster_fl.nesting.plan import State

if TYPE_CHECKING:
    from cluster_fl.training.program import Context


@dataclass(frozen=True)
class Ended:
    """What a client's correction leaves: sent to the server, by tensor name; and kept (None: as it was)."""

    extra: State = field(default_factory=dict)
    personal: State | None = None


# From the trained module, the distance of its steps, and what the client speaks for, by tensor name.
End = Callable[[nn.Module, float, Mapping[str, np.ndarray]], Ended]


def nothing(model: nn.Module, distance: float, coverage: Mapping[str, np.ndarray]) -> Ended:
    return Ended()


class Drift:
    """The correction of one client's round.

    ``offsets`` are arrays by tensor name; so are the weights ``near`` which ``mu`` holds the model, which are its
    present ones where it does not say.
    """

    def __init__(
        self,
        model: nn.Module,
        mu: float = 0.0,
        offsets: Mapping[str, np.ndarray] = {},
        end: End = nothing,
        near: Mapping[str, np.ndarray] = {},
    ) -> None:
        self._model, self._mu, self._end = model, mu, end
        self._starts = [
            (p, torch.tensor(near[name], device=p.device) if name in near else p.detach().clone())
            for name, p in model.named_parameters()
            if mu
        ]
        self._offsets = [
            (p, torch.tensor(offsets[name], device=p.device))
            for name, p in model.named_parameters()
            if name in offsets
        ]

    @torch.no_grad()
    def correct(self) -> None:
        """Adds the correction to the gradients; a tensor without a gradient has no part in the step."""
        for parameter, start in self._starts:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=self._mu)
        for parameter, offset in self._offsets:
            if parameter.grad is not None:
                parameter.grad.add_(offset)

    def end(self, distance: float, coverage: Mapping[str, np.ndarray]) -> Ended:
        """After training.

        Args:
            distance: number of steps times the learning rate; 0 if there was none.
            coverage: as in :class:`Trained`; a variate changes only where the client speaks for the element, as
                the server's does.
        """
        return self._end(self._model, distance, coverage)


class Correction(ABC):
    """One way of correcting. ``sends``: further copies of the submodel that travel each way."""

    keeps_state = False
    sends = 0.0

    @abstractmethod
    def begin(self, model: nn.Module, context: Context) -> Drift:
        """``model`` holds what the client received."""


class Uncorrected(Correction):
    def begin(self, model: nn.Module, context: Context) -> Drift:
        return Drift(model)


@dataclass(frozen=True)
class Proximal(Correction):
    """FedProx (Li et al., MLSys 2020): the gradient of mu/2 |w - received|^2."""

    mu: float

    def begin(self, model: nn.Module, context: Context) -> Drift:
        return Drift(model, self.mu, near=context.received)


class Scaffold(Correction):
    """SCAFFOLD, option II (Karimireddy et al., ICML 2020).

    The gradient is corrected by c - c_k. After K steps of rate eta, c_k changes by
    (received - trained) / (K eta) - c, which is what the client sends besides its update.
    """

    keeps_state = True
    sends = 1.0

    def begin(self, model: nn.Module, context: Context) -> Drift:
        held, own = context.holding, _held_variate(model, context)
        control = {name: context.state[CONTROL + held.keys[name]][held.where[name]] for name in own}

        def end(trained: nn.Module, distance: float, coverage: Mapping[str, np.ndarray]) -> Ended:
            if not distance:
                return Ended()
            moved = _moved(trained, context)
            change = {
                name: _spoken(-moved[name] / np.float32(distance) - control[name], name, coverage)
                for name in own
            }
            return Ended(change, _kept_variate(context, change))

        return Drift(model, offsets={name: control[name] - own[name] for name in own}, end=end)


@dataclass(frozen=True)
class DynamicRegularisation(Correction):
    """FedDyn (Acar et al., ICLR 2021): the gradient of alpha/2 |w - received|^2 - <h_k, w>.

    Afterwards h_k falls by alpha (trained - received). The server's part is
    :class:`cluster_fl.aggregation.server.FedDyn`.
    """

    alpha: float
    keeps_state = True

    def begin(self, model: nn.Module, context: Context) -> Drift:
        own = _held_variate(model, context)

        def end(trained: nn.Module, distance: float, coverage: Mapping[str, np.ndarray]) -> Ended:
            change = {
                name: _spoken(np.float32(-self.alpha) * moved, name, coverage)
                for name, moved in _moved(trained, context).items()
            }
            return Ended(personal=_kept_variate(context, change))

        return Drift(model, self.alpha, {name: -value for name, value in own.items()}, end)


def correction(config: CorrectionConfig) -> Correction:
    """The correction that ``train.correction`` names."""
    return {
        "none": Uncorrected(),
        "proximal": Proximal(config.mu),
        "scaffold": Scaffold(),
        "feddyn": DynamicRegularisation(config.alpha),
    }[config.name]


def _spoken(change: np.ndarray, name: str, coverage: Mapping[str, np.ndarray]) -> np.ndarray:
    return change * coverage[name].astype(np.float32) if name in coverage else change


def _held_variate(model: nn.Module, context: Context) -> State:
    """The held part of the client's variate, by tensor name; zero at first."""
    held = context.holding
    return {
        name: context.personal[held.keys[name]][held.where[name]]
        if held.keys[name] in context.personal
        else np.zeros_like(context.received[name])
        for name, _ in model.named_parameters()
    }


def _kept_variate(context: Context, change: Mapping[str, np.ndarray]) -> State:
    """The whole variate after ``change`` of its held part."""
    kept = dict(context.personal)
    for name, delta in change.items():
        key = context.holding.keys[name]
        full = kept[key].copy() if key in kept else np.zeros_like(context.state[key])
        full[context.holding.where[name]] += delta
        kept[key] = full
    return kept


def _moved(trained: nn.Module, context: Context) -> dict[str, np.ndarray]:
    """Trained minus received, by parameter name."""
    return {
        name: parameter.detach().cpu().numpy() - context.received[name]
        for name, parameter in trained.named_parameters()
    }

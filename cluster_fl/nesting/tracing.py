"""Runs a model once on the meta device and watches which axes meet and what each layer costs.

Nothing is computed and no graph is built: every ATen operation of one forward passes through
:class:`Tracer`, which labels its outputs by the operation's rule. Works for any module that runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cluster_fl.models.meta import meta_twin
from cluster_fl.nesting.anatomy import Anatomy, ChannelGroup, Layer
from cluster_fl.nesting.rules import RULES, Axes, pointwise, unknown
from cluster_fl.nesting.wires import FIXED, Axis, Span, Wires

# Batch normalisation refuses a single value per channel, so the trace runs on two samples.
BATCH = 2


def anatomy(model: nn.Module, input_shape: tuple[int, ...]) -> Anatomy:
    """Discovers the channel groups and the cost of every layer of ``model``.

    Args:
        model: any module; it is not changed. ``depth`` and ``exits`` are read where it is ``Layered``.
        input_shape: shape of one sample, e.g. (C, H, W).
    """
    with meta_twin(model) as twin:
        tracer = Tracer(dict(state_tensors(twin)))
        with tracer:
            outputs = twin(torch.empty(BATCH, *input_shape, device="meta"))
    for output in outputs if isinstance(outputs, list | tuple) else [outputs]:
        for axis in tracer.axes(output):
            tracer.wires.fix(axis, "output")
    exits = tuple(sorted(int(p) for p in getattr(twin, "exits", ())))
    return tracer.result(getattr(twin, "depth", 0), exits)


def state_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Everything a client receives and returns: parameters, then floating point buffers, by name."""
    yield from module.named_parameters()
    yield from ((name, b) for name, b in module.named_buffers() if b.is_floating_point())


class Tracer(TorchDispatchMode):
    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.wires = Wires()
        self._state = state
        self._names = {id(tensor): name for name, tensor in state.items()}
        self._labels: dict[int, Axes] = {}
        self._alive: list[Tensor] = []  # ids are only unique among living objects
        self._layers: list[Layer] = []
        for tensor in state.values():
            self.label(tensor, tuple(self.wires.fresh(n) for n in tensor.shape))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        rule = RULES.get(name) or (pointwise if torch.Tag.pointwise in func.tags else unknown)
        if any(True for _ in self.tensors(args)):
            rule(self, name, args, out)
        return out

    def axes(self, tensor: Tensor) -> Axes:
        return self._labels.get(id(tensor), (FIXED,) * tensor.dim())

    def label(self, tensor: Tensor, axes: Axes) -> None:
        self._alive.append(tensor)
        self._labels[id(tensor)] = axes

    def alias(self, view: Tensor, tensor: Tensor) -> None:
        """A view of a weight still names the weight."""
        if id(tensor) in self._names:
            self._names[id(view)] = self._names[id(tensor)]

    def layer(self, weight: Tensor, positions: int, out_axis: int) -> None:
        if id(weight) in self._names:
            self._layers.append(Layer(self._names[id(weight)], positions // BATCH, out_axis))

    def tensors(self, args: Iterable[Any]) -> Iterator[Tensor]:
        for arg in args:
            if isinstance(arg, Tensor):
                yield arg
            elif isinstance(arg, list | tuple):
                yield from self.tensors(arg)

    def result(self, depth: int, exits: tuple[int, ...]) -> Anatomy:
        numbers: dict[int, int] = {}
        groups: list[ChannelGroup] = []
        axes: dict[str, Axes] = {}
        for name, tensor in self._state.items():
            resolved = [self.wires.resolve(axis) for axis in self._labels[id(tensor)]]
            for position, axis in enumerate(resolved):
                for span in axis or ():
                    if span.wire not in numbers:
                        numbers[span.wire] = len(groups)
                        groups.append(ChannelGroup(f"{name}:{position}", self.wires.sizes[span.wire]))
            axes[name] = tuple(_renumber(axis, numbers) for axis in resolved)
        shapes = {name: tuple(tensor.shape) for name, tensor in self._state.items()}
        parameters = frozenset(n for n, t in self._state.items() if isinstance(t, nn.Parameter))
        return Anatomy(
            depth, exits, tuple(groups), shapes, axes, parameters, tuple(self._layers), self._reasons()
        )

    def _reasons(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, tensor in self._state.items():
            for position, axis in enumerate(self._labels[id(tensor)]):
                reason = self._reason(axis)
                if reason and reason != "kernel":
                    found[f"{name}:{position}"] = reason
        return found

    def _reason(self, axis: Axis) -> str | None:
        for span in axis or ():
            if span.wire in self.wires.reasons:
                return self.wires.reasons[span.wire]
            if span.wire in self.wires.definitions:
                return self._reason(self.wires.definitions[span.wire])
        return None


def _renumber(axis: Axis, numbers: dict[int, int]) -> Axis:
    return None if axis is None else tuple(Span(numbers[s.wire], s.repeat) for s in axis)

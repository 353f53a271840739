"""How each operation relates the axes of its inputs and outputs.

One function an operation, looked up by its ATen name. An operation without a rule fixes every axis it
reads: a model using it is never cut wrongly, only less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cluster_fl.nesting.wires import FIXED, Axis, Span

if TYPE_CHECKING:
    from cluster_fl.nesting.tracing import Tracer

Axes = tuple[Axis, ...]
Rule = Callable[["Tracer", str, Sequence[Any], Any], None]
MAX_TILES = 64


def convolution(t: Tracer, op: str, args: Sequence[Any], out: Tensor) -> None:
    x, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
    wx, ww = t.axes(x), t.axes(weight)
    source, target = (ww[0], ww[1]) if transposed else (ww[1], ww[0])
    for kernel in ww[2:]:
        t.wires.fix(kernel, "kernel")
    if groups == 1:
        t.wires.unify(wx[1], source, op)
    elif groups == x.shape[1] == weight.shape[0]:
        t.wires.unify(wx[1], target, op)
        t.wires.fix(source, "depthwise")
    else:
        for axis in (wx[1], source, target):
            t.wires.fix(axis, "grouped convolution")
    if bias is not None:
        t.wires.unify(t.axes(bias)[0], target, op)
    t.label(out, (FIXED, target, *[FIXED] * (out.dim() - 2)))
    t.layer(weight, positions=out[:, 0].numel(), out_axis=1 if transposed else 0)


def matrix_product(t: Tracer, op: str, args: Sequence[Any], out: Tensor) -> None:
    bias, x, weight = args if len(args) == 3 else (None, *args)
    wx, ww = t.axes(x), t.axes(weight)
    t.wires.unify(wx[1], ww[0], op)
    if bias is not None:
        t.wires.unify(t.axes(bias)[-1], ww[1], op)
    t.label(out, (wx[0], ww[1]))
    t.layer(weight, positions=x.shape[0], out_axis=0)


def norm(t: Tracer, op: str, args: Sequence[Any], out: Sequence[Tensor]) -> None:
    """Batch and group norm: whatever they have a channel of. Group norm forms its groups anew from what is kept."""
    x = args[0]
    channels = t.axes(x)[1]
    for tensor in args[1:5]:
        if isinstance(tensor, Tensor):
            t.wires.unify(t.axes(tensor)[0], channels, op)
    t.label(out[0], t.axes(x))


def same(t: Tracer, op: str, args: Sequence[Any], out: Any) -> None:
    """Operations that leave every channel where it is (pooling, copies)."""
    first = out if isinstance(out, Tensor) else out[0]
    t.label(first, t.axes(args[0]))


def pointwise(t: Tracer, op: str, args: Sequence[Any], out: Tensor) -> None:
    result: list[Axis] = [FIXED] * out.dim()
    claimed = [False] * out.dim()
    for tensor in (a for a in args if isinstance(a, Tensor)):
        offset = out.dim() - tensor.dim()
        for position, axis in enumerate(t.axes(tensor)):
            at = position + offset
            if tensor.shape[position] == 1 and out.shape[at] != 1:
                t.wires.fix(axis, "broadcast")
            elif claimed[at]:
                t.wires.unify(result[at], axis, op)
            else:
                result[at], claimed[at] = axis, True
    t.label(out, tuple(result))


def transpose(t: Tracer, op: str, args: Sequence[Any], out: Tensor) -> None:
    x = args[0]
    order = list(range(x.dim()))
    if op == "permute":
        order = [d % x.dim() for d in args[1]]
    elif x.dim() > 1:
        a, b = (args[1], args[2]) if op == "transpose" else (0, 1)
        order[a], order[b] = order[b], order[a]
    axes = t.axes(x)
    t.label(out, tuple(axes[d] for d in order))
    t.alias(out, x)


def reduction(t: Tracer, op: str, args: Sequence[Any], out: Tensor) -> None:
    x = args[0]
    dims = args[1] if len(args) > 1 and args[1] else range(x.dim())
    gone = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)}
    keep = out.dim() == x.dim()
    axes = enumerate(t.axes(x))
    t.label(out, tuple(FIXED if d in gone else axis for d, axis in axes if keep or d not in gone))


def concatenate(t: Tracer, op: str, args: Sequence[Any], out: Tensor) -> None:
    tensors, dim = args[0], (args[1] if len(args) > 1 else 0) % out.dim()
    labels = [t.axes(x) for x in tensors]
    result = list(labels[0])
    for other in labels[1:]:
        for position in set(range(out.dim())) - {dim}:
            t.wires.unify(result[position], other[position], op)
    parts = [axes[dim] for axes in labels]
    if any(part is None for part in parts):
        for part in parts:
            t.wires.fix(part, "concatenated with a fixed axis")
        result[dim] = FIXED
    else:
        result[dim] = tuple(span for part in parts for span in part or ())
    t.label(out, tuple(result))


def reshape(t: Tracer, op: str, args: Sequence[Any], out: Tensor) -> None:
    x = args[0]
    axes, result = t.axes(x), []
    for sources, targets in _blocks(x.shape, out.shape):
        result += _reshape_block(t, [(x.shape[d], axes[d]) for d in sources], [out.shape[d] for d in targets])
    t.label(out, tuple(result))


def unknown(t: Tracer, op: str, args: Sequence[Any], out: Any) -> None:
    for tensor in t.tensors(args):
        for axis in t.axes(tensor):
            t.wires.fix(axis, f"read by {op}, which has no rule")


def _reshape_block(t: Tracer, sources: list[tuple[int, Axis]], targets: list[int]) -> list[Axis]:
    """Axes of a run of dimensions whose sizes multiply to the same number before and after."""
    labelled = [d for d, (_, axis) in enumerate(sources) if t.wires.resolve(axis) is not None]
    if not labelled:
        return [FIXED] * len(targets)
    at = labelled[0]
    size, axis = sources[at]
    before = math.prod(n for n, _ in sources[:at])
    after = math.prod(n for n, _ in sources[at + 1 :])
    spans = t.wires.resolve(axis) or ()
    if (
        len(labelled) == 1
        and before == 1
        and size in targets
        and after == math.prod(targets[targets.index(size) + 1 :])
    ):
        return [axis if d == targets.index(size) else FIXED for d in range(len(targets))]
    if len(labelled) == 1 and len(targets) == 1 and before <= MAX_TILES:
        return [tuple(Span(s.wire, s.repeat * after) for s in spans) * before]
    if len(sources) == 1 and len(spans) == 1 and len(targets) > 1:
        wire, repeat = spans[0].wire, spans[0].repeat
        if targets[0] == t.wires.sizes[wire] and repeat == math.prod(targets[1:]):
            return [(Span(wire),), *[FIXED] * (len(targets) - 1)]
    for _, tied in sources:
        t.wires.fix(tied, "reshaped across channels")
    return [FIXED] * len(targets)


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pairs the dimensions of two shapes into the shortest runs with equal products."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [i] if i < len(old) else [], [j] if j < len(new) else []
        i, j = i + len(left), j + len(right)
        a, b = math.prod(old[d] for d in left), math.prod(new[d] for d in right)
        while a != b:
            if a < b:
                left.append(i)
                a, i = a * old[i], i + 1
            else:
                right.append(j)
                b, j = b * new[j], j + 1
        blocks.append((left, right))
    return blocks


RULES: dict[str, Rule] = {
    **dict.fromkeys(["convolution", "conv2d", "_convolution"], convolution),
    **dict.fromkeys(["addmm", "mm"], matrix_product),
    **dict.fromkeys(
        ["native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_batch_norm_with_update",
         "_batch_norm_no_update", "cudnn_batch_norm", "native_group_norm"],
        norm,
    ),
    **dict.fromkeys(
        ["max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "clone", "_to_copy", "alias", "detach",
         "hardswish", "hardsigmoid", "hardtanh", "elu", "leaky_relu", "native_dropout"],
        same,
    ),
    **dict.fromkeys(["t", "transpose", "permute"], transpose),
    **dict.fromkeys(["mean", "sum", "amax", "amin"], reduction),
    **dict.fromkeys(["view", "_unsafe_view", "reshape", "unsqueeze", "squeeze"], reshape),
    "cat": concatenate,
}  # fmt: skip

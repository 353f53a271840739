"""Which axes are tied: a small equation solver over tensor axes.

Every axis of every tensor is labelled with the channels it carries. A *wire* is a bundle of channels that
must be cut together; an axis is a sequence of :class:`Span`, one a wire, or ``FIXED`` when it carries none
(batch, space, classes). Two axes that must agree are unified, which defines one wire by the other; what is
left undefined at the end are the channel groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Span:
    """The channels of one wire, each standing for ``repeat`` neighbouring elements of the axis."""

    wire: int
    repeat: int = 1


Axis = tuple[Span, ...] | None
FIXED: Axis = None


@dataclass
class Wires:
    sizes: list[int] = field(default_factory=list)
    definitions: dict[int, Axis] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)

    def fresh(self, size: int) -> Axis:
        self.sizes.append(size)
        return (Span(len(self.sizes) - 1),)

    def resolve(self, axis: Axis) -> Axis:
        """The axis in terms of undefined wires; ``FIXED`` as soon as one of its wires is."""
        if axis is None:
            return FIXED
        spans: list[Span] = []
        for span in axis:
            if span.wire not in self.definitions:
                spans.append(span)
                continue
            inner = self.resolve(self.definitions[span.wire])
            if inner is None:
                return FIXED
            self.definitions[span.wire] = inner
            spans += [Span(s.wire, s.repeat * span.repeat) for s in inner]
        return tuple(spans)

    def unify(self, a: Axis, b: Axis, reason: str) -> None:
        """Makes two axes carry the same channels; fixes both, for ``reason``, where that is impossible."""
        a, b = self.resolve(a), self.resolve(b)
        if a == b:
            return
        if a is None or b is None:
            self.fix(a, reason)
            self.fix(b, reason)
        elif _is_wire(a):
            self._define(a[0].wire, b, reason)
        elif _is_wire(b):
            self._define(b[0].wire, a, reason)
        elif [(s.repeat, self.sizes[s.wire]) for s in a] == [(s.repeat, self.sizes[s.wire]) for s in b]:
            for left, right in zip(a, b, strict=True):
                self.unify((Span(left.wire),), (Span(right.wire),), reason)
        else:
            self.fix(a, reason)
            self.fix(b, reason)

    def fix(self, axis: Axis, reason: str) -> None:
        """No submodel may cut this axis."""
        for span in self.resolve(axis) or ():
            self.definitions[span.wire] = FIXED
            self.reasons[span.wire] = reason

    def _define(self, wire: int, axis: tuple[Span, ...], reason: str) -> None:
        if any(span.wire == wire for span in axis):
            self.fix(axis, reason)
        else:
            self.definitions[wire] = axis


def _is_wire(axis: tuple[Span, ...]) -> bool:
    return len(axis) == 1 and axis[0].repeat == 1

"""Depth as a list of units: the one shape that every model has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from cluster_fl.errors import UserError

# The part of a unit that stays when the unit is left out but changes its input's shape.
SHORTCUT = "shortcut"


@runtime_checkable
class LeavesShortcut(Protocol):
    """A unit that may be left out though it changes its input's shape."""

    def left_out(self) -> nn.Module:
        """What takes its place: has no tensors but the unit's own below the name ``shortcut``."""
        ...


class Layered(nn.Module):
    """stem -> units -> head, with an early exit after each unit count in ``exits``.

    Names survive truncation, since keys are numbers of the full model: ``stem.*``, ``units.12.conv1.weight``,
    ``exits.36.*``, ``head.*``.

    A unit that may be left out says so: by an attribute ``skippable`` if nothing stays of it, since it adds to
    its input and keeps the shape; otherwise it is a :class:`LeavesShortcut`.

    Attributes:
        stem: what comes before the first unit.
        units: keys "0", "1", ...: the unit's number.
        exits: key "36": the head of the exit after 36 units, which reads what unit 35 puts out.
        head: the final head; None once truncated at an exit.
        depth: units of the full model.
    """

    def __init__(self, stem: nn.Module, units: Iterable[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.units = nn.ModuleDict({str(number): unit for number, unit in enumerate(units)})
        self.exits = nn.ModuleDict()
        self.head: nn.Module | None = head
        self.depth = len(self.units)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, ...) -> logits (B, classes) of each exit in rising depth, the final head's last."""
        x = self.stem(x)
        logits: list[Tensor] = []
        waiting = sorted(self.exits, key=int)
        for number, unit in self.units.items():
            # With units left out, an exit still comes behind all kept units before it.
            while waiting and int(waiting[0]) <= int(number):
                logits.append(self.exits[waiting.pop(0)](x))
            x = unit(x)
        logits += [self.exits[position](x) for position in waiting]
        if self.head is not None:
            logits.append(self.head(x))
        return logits

    def truncate(self, units: Sequence[int], exits: Sequence[int]) -> None:
        """Keeps only these units and exits, in place; whatever lies behind the last exit is removed.

        Of a unit before the last exit that is left out but changes the shape, the shortcut stays.

        Args:
            units: numbers of the units to keep.
            exits: exits to keep; ``depth`` stands for the final head.

        Raises:
            UserError: an exit or unit does not exist, or a unit before the last exit cannot be left out.
        """
        self._check_exits(exits)
        last = max(exits)
        kept = sorted({number for number in units if number < last})
        self._check_units(kept, last)
        self.units = nn.ModuleDict(self._remaining(kept, last))
        early = sorted({position for position in exits if position != self.depth})
        self.exits = nn.ModuleDict({str(position): self.exits[str(position)] for position in early})
        if last != self.depth:
            self.head = None

    def device(self) -> torch.device:
        return next(self.parameters()).device

    def _remaining(self, kept: Sequence[int], last: int) -> dict[str, nn.Module]:
        remaining: dict[str, nn.Module] = {}
        for key, unit in self.units.items():
            if int(key) in kept:
                remaining[key] = unit
            elif int(key) < last and not _skippable(unit):
                assert isinstance(unit, LeavesShortcut)
                remaining[key] = unit.left_out()
        return remaining

    def _check_exits(self, exits: Sequence[int]) -> None:
        present = [int(key) for key in self.exits] + ([] if self.head is None else [self.depth])
        if not exits:
            raise UserError("exits", list(exits), "a model needs at least one exit.")
        for position in exits:
            if position not in present:
                raise UserError("exits", position, f"the model answers only after {_listed(present)} units.")

    def _check_units(self, kept: Sequence[int], last: int) -> None:
        for number in kept:
            if str(number) not in self.units:
                present = _listed([int(key) for key in self.units])
                raise UserError("units", number, f"the model has only {present}.")
        for key, unit in self.units.items():
            may_go = _skippable(unit) or isinstance(unit, LeavesShortcut)
            if int(key) < last and int(key) not in kept and not may_go:
                right = "cannot be left out: it is no residual unit that keeps its input's shape."
                raise UserError("units", int(key), right)


def _skippable(unit: nn.Module) -> bool:
    return bool(getattr(unit, "skippable", False))


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))

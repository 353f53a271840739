"""The search space: which settings a sweep tries, and how they are drawn.

A point gives each dimension a number: of a list, which of its values. So whatever proposes points (chance, Optuna,
population based training) needs to know about numbers alone, and what a point means is said here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from cluster_fl.errors import UserError

Point = dict[str, float]
Settings = dict[str, Any]

LISTS, RANGES = ("grid", "choice"), ("uniform", "log", "int")
KINDS = "grid or choice: [values], uniform, log or int: [low, high]"
# What is the same for all trials.
SHARED = ("run", "cluster", "checkpoint", "tracking", "data.root", "data.download", "compare", "sweep")
DIGITS = 4  # of a drawn fraction: nobody can read more


@dataclass(frozen=True)
class OneOf:
    """A list of values. ``crossed``: each of them is tried with every other setting, instead of one being drawn."""

    name: str
    values: tuple[Any, ...]
    crossed: bool

    def draw(self, rng: np.random.Generator) -> float:
        return int(rng.integers(len(self.values)))

    def value(self, number: float) -> Any:
        return self.values[int(number)]


@dataclass(frozen=True)
class Between:
    """Numbers from ``low`` to ``high``, both included; evenly, or with ``log`` evenly over orders of magnitude."""

    name: str
    low: float
    high: float
    log: bool = False
    whole: bool = False
    crossed = False

    def draw(self, rng: np.random.Generator) -> float:
        if self.whole:
            return int(rng.integers(int(self.low), int(self.high) + 1))
        if self.log:
            return float(np.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return float(rng.uniform(self.low, self.high))

    def value(self, number: float) -> float:
        """Within the bounds, also where a mutation went beyond them."""
        near = round(number) if self.whole else float(f"{number:.{DIGITS}g}")
        kind = int if self.whole else float
        return kind(min(max(near, self.low), self.high))


Dimension = OneOf | Between


@dataclass(frozen=True)
class Space:
    """``template``: by dotted key a dimension, or a list with dimensions in it."""

    template: Mapping[str, Any]

    @property
    def keys(self) -> tuple[str, ...]:
        """The settings that it decides."""
        return tuple(self.template)

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        return tuple(found for node in self.template.values() for found in _dimensions(node))

    @property
    def drawn(self) -> tuple[Dimension, ...]:
        """Those that are not crossed."""
        return tuple(one for one in self.dimensions if not one.crossed)

    def settings(self, point: Mapping[str, float]) -> Settings:
        """What a point means, by dotted key."""
        return {key: _filled(node, point) for key, node in self.template.items()}

    def draw(self, rng: np.random.Generator) -> Point:
        """One value for every dimension, crossed or not."""
        return {one.name: one.draw(rng) for one in self.dimensions}

    def points(self, draws: int, seed: int) -> list[Point]:
        """So many draws with every combination of what is crossed.

        The draws are the same for each combination, and the first ones the same however many there are.
        """
        crossed = [one for one in self.dimensions if isinstance(one, OneOf) and one.crossed]
        found: list[Point] = []
        for number in range(draws):
            rng = np.random.default_rng((seed, number))
            drawn = {one.name: one.draw(rng) for one in self.drawn}
            found += [drawn | combination for combination in _combinations(crossed)]
        return found

    def combinations(self, most: int) -> list[Point] | None:
        """Every point that there is; None: there are more than ``most``."""
        lists = [one for one in self.dimensions if isinstance(one, OneOf)]
        few = math.prod(len(one.values) for one in lists) <= most
        return list(_combinations(lists)) if few and len(lists) == len(self.dimensions) else None


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key as a configuration has them."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, leaf = key.split(".")
        node = result
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return result


def parse(content: Mapping[str, Any]) -> Space:
    """The space that ``sweep.space`` describes.

    Raises:
        UserError: a key that belongs to all trials, or is given twice; no domain, or one that is wrong.
    """
    template: dict[str, Any] = {}
    for key, node in _flat(content):
        where = f"sweep.space.{key}"
        if any(_within(key, shared) for shared in SHARED):
            raise UserError(where, node, "is the same for all trials: set it outside of sweep.")
        for other in template:
            if _within(key, other) or _within(other, key):
                raise UserError(where, node, f"is decided by sweep.space.{other} too; give one of them.")
        template[key] = _parse(where, key, node)
        if not list(_dimensions(template[key])):
            raise UserError(where, node, f"must say what to try: {KINDS}.")
    if not template:
        raise UserError(
            "sweep.space", {}, "must hold at least one setting, e.g. {train.lr: {log: [0.01, 1.0]}}."
        )
    return Space(template)


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Sections become dotted keys, down to what is tried."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value and not _is_domain(value):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_domain(node: Any) -> bool:
    return isinstance(node, Mapping) and len(node) == 1 and next(iter(node)) in (*LISTS, *RANGES)


def _parse(where: str, name: str, node: Any) -> Any:
    if isinstance(node, Sequence) and not isinstance(node, str):
        return [_parse(f"{where}[{at}]", f"{name}[{at}]", item) for at, item in enumerate(node)]
    if not _is_domain(node):
        return node
    ((kind, content),) = node.items()
    if kind in LISTS:
        if not isinstance(content, list) or not content:
            raise UserError(f"{where}.{kind}", content, "must be a list of values, e.g. [1, 2].")
        if any(value in content[:at] for at, value in enumerate(content)):
            raise UserError(f"{where}.{kind}", content, "must be different values.")
        return OneOf(name, tuple(content), kind == "grid")
    return _range(f"{where}.{kind}", name, kind, content)


def _range(where: str, name: str, kind: str, content: Any) -> Between:
    numbers = isinstance(content, list) and all(
        isinstance(end, int | float) and not isinstance(end, bool) and math.isfinite(end) for end in content
    )
    if not numbers or len(content) != 2 or content[0] >= content[1]:
        raise UserError(where, content, "must be [low, high], the lower one first.")
    low, high = content
    if kind == "log" and low <= 0:
        raise UserError(where, content, "must be above 0.")
    if kind == "int" and not (isinstance(low, int) and isinstance(high, int)):
        raise UserError(where, content, "must be whole numbers.")
    return Between(name, low, high, log=kind == "log", whole=kind == "int")


def _dimensions(node: Any) -> Iterator[Dimension]:
    if isinstance(node, OneOf | Between):
        yield node
    elif isinstance(node, list):
        for item in node:
            yield from _dimensions(item)


def _filled(node: Any, point: Mapping[str, float]) -> Any:
    if isinstance(node, OneOf | Between):
        return node.value(point[node.name])
    return [_filled(item, point) for item in node] if isinstance(node, list) else node


def _combinations(lists: Sequence[OneOf]) -> Iterator[Point]:
    for numbers in product(*(range(len(one.values)) for one in lists)):
        yield dict(zip((one.name for one in lists), numbers, strict=True))


def _within(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")

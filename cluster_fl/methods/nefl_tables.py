"""The submodels that NeFL published (IEEE TMC 2025), Tables XII to XVII, as its code reads them.

``gamma_W`` is a share of the parameters; a submodel keeps ceil(C sqrt(gamma_W)) channels of C. Where a width
stands for the share of the channels itself (ResNet110 W04, ResNet18 WD3), it is written without the root.

Modes: ``W``, ``D`` and ``WD`` for budgets .2, .4, .6, .8, 1 (wide_resnet101_2: .5, .75, 1); a suffix ``04`` for
.04, .16, .36, .64, 1; ``3`` and ``4`` for ResNet18 with as many submodels, which only the code has.

Where code and tables differ, the code and the averages of Table V decide; the printed ones are besides, under a
mode that ends in ``_printed``:

- ResNet18 D, submodel 2: 11 11 00 10; Table XII prints 10 00 10 10, which does not give Table V's averages.
- ResNet110 WD keeps the first k blocks of a stage; Table XVI prints the first k - 1 and the last, which costs
  the same.
- ResNet110 WD04, the two smallest: Table XVI prints gamma_W .26 with k = 3 and .42 with k = 7.

Of wide_resnet101_2 D only the numbers are known ("9 of 23", "2 of 3"); here they are the first ones, whose
parameters are the published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import sqrt


@dataclass(frozen=True)
class Split:
    """One submodel.

    Attributes:
        width: share of the channels kept, rounded up.
        keep: numbers of the units kept, counted over the whole model.
    """

    width: float
    keep: tuple[int, ...]


def _kept(vector: str) -> tuple[int, ...]:
    """From a 1 for every block that is kept, e.g. ``11 00 11 00``."""
    return tuple(number for number, bit in enumerate(vector.replace(" ", "")) if bit == "1")


def _first(blocks: Sequence[int], counts: Sequence[int]) -> tuple[int, ...]:
    """The first blocks of each stage."""
    starts = (0, *accumulate(blocks))
    return tuple(start + n for start, count in zip(starts, counts, strict=False) for n in range(count))


def _widths(blocks: Sequence[int], *shares: float) -> tuple[Split, ...]:
    """Every block at each share of the channels, then at all."""
    return tuple(Split(share, _first(blocks, blocks)) for share in (*shares, 1.0))


def _vectors(*vectors: str) -> tuple[Split, ...]:
    """These blocks at full width, then all of them."""
    every = "1" * len(vectors[0].replace(" ", ""))
    return tuple(Split(1.0, _kept(vector)) for vector in (*vectors, every))


def _counts(blocks: Sequence[int], *counts: Sequence[int]) -> tuple[Split, ...]:
    """The first blocks of each stage at full width, then all of them."""
    return tuple(Split(1.0, _first(blocks, count)) for count in (*counts, blocks))


def _scaled(blocks: Sequence[int], *pairs: tuple[float, int]) -> tuple[Split, ...]:
    """Pairs of gamma_W and the number of first blocks of every stage, then the full model."""
    smaller = [Split(sqrt(gamma), _first(blocks, [count] * len(blocks))) for gamma, count in pairs]
    return (*smaller, *_widths(blocks))


def _with_last(blocks: int, *pairs: tuple[float, int]) -> tuple[Split, ...]:
    """Pairs of gamma_W and k: the first k - 1 and the last of the ``blocks`` of each of three stages."""
    stages = ["1" * (k - 1) + "0" * (blocks - k) + "1" for _, k in pairs]
    smaller = [Split(sqrt(gamma), _kept(3 * stage)) for (gamma, _), stage in zip(pairs, stages, strict=True)]
    return (*smaller, *_widths([blocks] * 3))


_R18, _R34, _WR101 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 23, 3)
_R56, _R110 = (9, 9, 9), (18, 18, 18)
_FIFTHS = tuple(sqrt(gamma) for gamma in (0.2, 0.4, 0.6, 0.8))

SPLITS: dict[tuple[str, str], tuple[Split, ...]] = {
    ("resnet18", "W"): _widths(_R18, *_FIFTHS),
    ("resnet18", "D"): _vectors("11 00 11 00", "11 11 00 10", "11 11 11 10", "10 11 00 11"),
    ("resnet18", "D_printed"): _vectors("11 00 11 00", "10 00 10 10", "11 11 11 10", "10 11 00 11"),
    ("resnet18", "WD"): (
        Split(sqrt(0.34), _kept("11 11 11 10")),
        *_widths(_R18, *_FIFTHS[1:]),
    ),
    ("resnet18", "W3"): _widths(_R18, sqrt(0.25), sqrt(0.5)),
    ("resnet18", "D3"): _vectors("11 11 00 10", "11 11 10 10"),
    ("resnet18", "WD3"): (
        Split(0.504408, _kept("11 11 01 10")),
        Split(0.653411, _kept("11 00 00 11")),
        *_widths(_R18),
    ),
    ("resnet18", "D4"): _vectors("11 11 10 00", "11 11 11 00", "11 11 11 10"),
    ("resnet34", "W"): _widths(_R34, *_FIFTHS),
    ("resnet34", "D"): _vectors(
        "100 1000 100000 100",
        "111 1111 110001 100",
        "111 1111 110001 101",
        "111 1001 110001 111",
    ),
    ("resnet34", "WD"): (
        Split(sqrt(0.378296187), _kept("111 1001 100001 101")),
        Split(sqrt(0.625390289), _kept("111 1001 111001 101")),
        Split(sqrt(0.770943105), _kept("111 1111 111101 101")),
        Split(sqrt(0.899800797), _kept("111 1111 111001 111")),
        *_widths(_R34),
    ),
    ("resnet56", "W"): _widths(_R56, *_FIFTHS),
    ("resnet56", "D"): _counts(_R56, (2, 2, 2), (3, 3, 4), (4, 4, 6), (9, 8, 7)),
    ("resnet56", "WD"): _scaled(_R56, (0.464938491, 4), (0.607811604, 6), (0.777135864, 7), (0.902901024, 8)),
    ("resnet110", "W"): _widths(_R110, *_FIFTHS),
    ("resnet110", "D"): _counts(_R110, (16, 4, 3), (14, 7, 7), (17, 13, 10), (16, 16, 14)),
    ("resnet110", "WD"): _scaled(
        _R110, (0.457252561, 8), (0.603830987, 12), (0.774235493, 14), (0.901429773, 16)
    ),
    ("resnet110", "WD_printed"): _with_last(
        18, (0.457252561, 8), (0.603830987, 12), (0.774235493, 14), (0.901429773, 16)
    ),
    ("resnet110", "W04"): _widths(_R110, 0.2, 0.4, 0.6, 0.8),
    ("resnet110", "D04"): _counts(_R110, (1, 1, 1), (5, 3, 3), (6, 6, 7), (11, 11, 12)),
    ("resnet110", "WD04"): _scaled(
        _R110, (0.188365555, 4), (0.365802049, 8), (0.59388641, 11), (0.769953979, 15)
    ),
    ("resnet110", "WD04_printed"): _scaled(_R110, (0.26, 3), (0.42, 7), (0.59388641, 11), (0.769953979, 15)),
    ("wide_resnet101_2", "W"): _widths(_WR101, sqrt(0.5), sqrt(0.75)),
    ("wide_resnet101_2", "D"): _counts(_WR101, (3, 4, 9, 2), (3, 4, 14, 3)),
}

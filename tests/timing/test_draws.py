"""Numbers by hash: as good as a generator's, and each client's its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cluster_fl.seeding import Purpose
from cluster_fl.timing import draws

MANY = np.arange(100_000)
# A seed decides once and for all whether a test is met; of 1,000 good generators one would fail it.
LIKELY = 1e-3
PURPOSES = st.sampled_from(list(Purpose))
DRAWS: dict[str, tuple[Callable[..., np.ndarray], stats.rv_continuous]] = {
    "uniforms": (draws.uniforms, stats.uniform),
    "normals": (draws.normals, stats.norm),
    "exponentials": (draws.exponentials, stats.expon),
}


def is_independent(one: np.ndarray, other: np.ndarray) -> bool:
    """Pairs of uniform numbers fall evenly into the 100 cells of a square (correlations of any shape show)."""
    cells = np.bincount((one * 10).astype(int) * 10 + (other * 10).astype(int), minlength=100)
    return bool(stats.chisquare(cells).pvalue > LIKELY and stats.pearsonr(one, other).pvalue > LIKELY)


def test_the_mixer_is_splitmix64() -> None:
    """Its published sequence from the state 1234567."""
    with np.errstate(over="ignore"):
        states = np.arange(1, 6, dtype=np.uint64) * draws.STEP + np.uint64(1234567)
    assert draws._mixed(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_numbers_stay_what_they_are() -> None:
    """They are part of every run's bits."""
    first = draws.uniforms(0, Purpose.STRAGGLE, 0, np.arange(3))
    other = draws.uniforms(7, Purpose.LOAD, 12, np.array([10**9]), draw=2)
    assert [float(value).hex() for value in [*first, *other]] == [
        "0x1.958fd8bdaf20cp-3",
        "0x1.1bf619bc58e45p-1",
        "0x1.959b0ed8a994bp-1",
        "0x1.c5ef492990934p-3",
    ]


@given(st.integers(0, 2**63), PURPOSES, st.integers(0, 10**6), st.lists(st.integers(0, 2**62), max_size=9))
def test_uniforms_lie_between_0_and_1(seed: int, purpose: Purpose, round: int, clients: list[int]) -> None:
    """Neither end is reached: normals and exponentials are finite."""
    who = np.array(clients, dtype=np.int64)
    found = draws.uniforms(seed, purpose, round, who)
    assert found.shape == who.shape
    assert found.dtype == np.float64
    assert ((found > 0) & (found < 1)).all()
    assert np.isfinite(draws.normals(seed, purpose, round, who)).all()
    exponentials = draws.exponentials(seed, purpose, round, who)
    assert ((exponentials > 0) & (exponentials < 37)).all()


@pytest.mark.parametrize(("bits", "expected"), [(0, 2.0**-53), (2**64 - 1, 1 - 2.0**-53)])
def test_the_extreme_numbers_are_inside(bits: int, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "_mixed", lambda state: np.full(state.shape, bits, dtype=np.uint64))
    assert draws.uniforms(0, Purpose.LEVELS, 0, np.arange(2)).tolist() == [expected] * 2
    assert 0 < draws.exponentials(0, Purpose.LEVELS, 0, np.arange(1))[0] < 37
    assert abs(draws.normals(0, Purpose.LEVELS, 0, np.arange(1))[0]) < 9


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("start", [0, 10**9])
def test_each_has_its_distribution(name: str, seed: int, start: int) -> None:
    draw, law = DRAWS[name]
    assert stats.kstest(draw(seed, Purpose.LOAD, 5, start + MANY), law.cdf).pvalue > LIKELY


@pytest.mark.parametrize("step", [1, 2, 3, 64, 1000])
def test_neighbours_are_independent(step: int) -> None:
    found = draws.uniforms(0, Purpose.LOAD, 0, MANY)
    assert is_independent(found[step:], found[:-step])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, Purpose.LOAD, 0, 0), (0, Purpose.LOAD, 1, 0)),
        ((0, Purpose.LOAD, 0, 0), (0, Purpose.LOAD, 0, 1)),
        ((0, Purpose.LOAD, 1, 0), (0, Purpose.LOAD, 0, 1)),
        ((0, Purpose.LOAD, 0, 0), (0, Purpose.LOSS, 0, 0)),
        ((0, Purpose.LOAD, 0, 0), (1, Purpose.LOAD, 0, 0)),
    ],
    ids=["rounds", "draws", "round and draw", "purposes", "seeds"],
)
def test_streams_are_independent(
    one: tuple[int, Purpose, int, int], other: tuple[int, Purpose, int, int]
) -> None:
    """Also between neighbours: one stream is not the other moved on by a client."""
    first, second = (
        draws.uniforms(seed, purpose, round, MANY, draw) for seed, purpose, round, draw in (one, other)
    )
    assert is_independent(first, second)
    assert is_independent(first[1:], second[:-1])
    assert is_independent(first[:-1], second[1:])


def test_a_clients_rounds_are_uniform_and_independent() -> None:
    """Over rounds as over clients."""
    found = np.stack([draws.uniforms(3, Purpose.STRAGGLE, round, np.arange(50)) for round in range(400)])
    assert stats.kstest(found.ravel(), stats.uniform.cdf).pvalue > LIKELY
    assert is_independent(found[1:].ravel(), found[:-1].ravel())


def test_every_bit_is_balanced() -> None:
    """Of the 52 that a number has: each is 1 half of the time, within 5 standard errors."""
    bits = (draws.uniforms(0, Purpose.LOAD, 0, MANY) * 2.0**52).astype(np.uint64)
    ones = np.array([np.mean(bits >> np.uint64(k) & np.uint64(1)) for k in range(52)])
    assert np.abs(ones - 0.5).max() < 5 * 0.5 / np.sqrt(len(MANY))


@pytest.mark.parametrize("name", DRAWS)
@given(st.data(), st.integers(0, 2**40), PURPOSES, st.integers(0, 10**4), st.integers(0, 3))
def test_a_clients_number_does_not_depend_on_who_else_is_asked_for(
    name: str, data: st.DataObject, seed: int, purpose: Purpose, round: int, number: int
) -> None:
    draw, _ = DRAWS[name]
    clients = np.array(data.draw(st.lists(st.integers(0, 10**12), min_size=1, max_size=20)))
    some = np.array(data.draw(st.lists(st.integers(0, len(clients) - 1), max_size=20)), dtype=np.int64)
    found = draw(seed, purpose, round, clients, number)
    assert draw(seed, purpose, round, clients[some], number).tobytes() == found[some].tobytes()
    alone = [draw(seed, purpose, round, clients[k : k + 1], number)[0] for k in range(len(clients))]
    assert found.tolist() == alone

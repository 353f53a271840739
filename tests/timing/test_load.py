"""The devices' other work: a Markov chain that is a function of the seed and the round."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster_fl.timing.load import loads
from cluster_fl.timing.schema import LoadConfig

SHARES = [0.0, 0.25, 0.5, 0.75]
CLIENTS = 4000


def chain(stay: float, rounds: int, seed: int = 0) -> np.ndarray:
    """(rounds, clients)."""
    config = LoadConfig(shares=SHARES, stay=stay)
    return np.stack([loads(config, seed, CLIENTS, round) for round in range(rounds)])


def six_sigma(probability: float, draws: int) -> float:
    """Of the frequency of an event in independent draws; a fixed seed decides whether it is met."""
    return 6 * float(np.sqrt(probability * (1 - probability) / draws))


@given(st.integers(0, 10**6), st.integers(0, 30), st.integers(1, 20))
def test_by_default_nothing_else_runs(seed: int, round: int, clients: int) -> None:
    assert loads(LoadConfig(), seed, clients, round).tolist() == [0.0] * clients
    assert loads(LoadConfig(shares=[0.5]), seed, clients, round).tolist() == [0.5] * clients


@given(st.integers(0, 10**6), st.integers(0, 30), st.floats(0, 1))
def test_values_are_those_given_and_the_same_again(seed: int, round: int, stay: float) -> None:
    """Asking for other rounds before changes nothing: a resumed run finds the loads as they were."""
    config = LoadConfig(shares=[0.5, 0.0, 0.125], stay=stay)
    found = loads(config, seed, 12, round)
    assert set(found.tolist()) <= {0.5, 0.0, 0.125}
    loads(config, seed, 12, round + 1)
    assert loads(dataclasses.replace(config), seed, 12, round).tobytes() == found.tobytes()


def test_seeds_and_rounds_differ() -> None:
    one, other = chain(0.5, 3), chain(0.5, 3, seed=1)
    assert all((one[round] != other[round]).any() for round in range(3))
    assert all((one[round] != one[round + 1]).any() for round in range(2))


@pytest.mark.parametrize("seed", [0, 1])
def test_who_always_stays_never_changes(seed: int) -> None:
    found = chain(1.0, 8, seed)
    assert (found == found[0]).all()
    assert set(found[0].tolist()) == set(SHARES)


@pytest.mark.parametrize("stay", [0.0, 0.7])
def test_loads_are_uniform_and_change_by_their_chance(stay: float) -> None:
    """A move goes to any of the four shares, the same one too: 3/4 of the moves can be seen."""
    found = chain(stay, 6)
    for row in found:
        frequencies = np.array([np.mean(row == share) for share in SHARES])
        assert np.abs(frequencies - 0.25).max() < six_sigma(0.25, CLIENTS)
    changed, chance = np.mean(found[1:] != found[:-1]), 0.75 * (1 - stay)
    assert abs(changed - chance) < six_sigma(chance, 5 * CLIENTS)

"""The devices' other work: a Markov chain that is a function of the seed, the client and the round."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster_fl.seeding import Purpose
from cluster_fl.timing import draws
from cluster_fl.timing.load import load
from cluster_fl.timing.schema import LoadConfig

SHARES = [0.0, 0.25, 0.5, 0.75]
CLIENTS = np.arange(4000)


def chain(stay: float, rounds: int, seed: int = 0, first: int = 0) -> np.ndarray:
    """(rounds, clients)."""
    config = LoadConfig(shares=SHARES, stay=stay)
    return np.stack([load(config, seed, CLIENTS, first + round) for round in range(rounds)])


def replayed(config: LoadConfig, seed: int, client: int, steps: int) -> float:
    """One client's load after so many steps, gone through forwards."""
    at = -1
    for step in range(steps + 1):
        (chance,) = draws.uniforms(seed, Purpose.LOAD, step, np.array([client]))
        stay = config.stay if step else 0.0
        if chance >= stay:
            at = int((chance - stay) / (1 - stay) * len(config.shares))
    return config.shares[at]


def six_sigma(probability: float, draws: int) -> float:
    """Of the frequency of an event in independent draws; a fixed seed decides whether it is met."""
    return 6 * float(np.sqrt(probability * (1 - probability) / draws))


@given(st.integers(0, 10**6), st.integers(0, 30), st.integers(0, 20), st.booleans())
def test_by_default_nothing_else_runs(seed: int, round: int, clients: int, mid_round: bool) -> None:
    who = np.arange(clients)
    assert load(LoadConfig(mid_round=mid_round), seed, who, round).tolist() == [0.0] * clients
    assert load(LoadConfig(shares=[0.5]), seed, who, round, half=1).tolist() == [0.5] * clients


@given(
    st.integers(0, 10**6),
    st.integers(0, 12),
    st.sampled_from([0.0, 0.25, 0.7, 0.95, 1.0]),
    st.booleans(),
    st.integers(0, 1),
    st.lists(st.integers(0, 10**9), max_size=8),
)
def test_it_is_the_chain_gone_through_forwards(
    seed: int, round: int, stay: float, mid_round: bool, half: int, clients: list[int]
) -> None:
    """For any clients in any order: who else is asked for, and what was asked before, changes nothing."""
    config = LoadConfig(shares=[0.5, 0.0, 0.125], stay=stay, mid_round=mid_round)
    steps = 2 * round + half if mid_round else round
    found = load(config, seed, np.array(clients, dtype=np.int64), round, half)
    assert found.tolist() == [replayed(config, seed, client, steps) for client in clients]


def test_seeds_and_rounds_differ() -> None:
    one, other = chain(0.5, 3), chain(0.5, 3, seed=1)
    assert all((one[round] != other[round]).any() for round in range(3))
    assert all((one[round] != one[round + 1]).any() for round in range(2))


@pytest.mark.parametrize("seed", [0, 1])
def test_who_always_stays_never_changes(seed: int) -> None:
    found = chain(1.0, 8, seed)
    assert (found == found[0]).all()
    assert set(found[0].tolist()) == set(SHARES)


@pytest.mark.parametrize("stay", [0.0, 0.7, 0.99])
@pytest.mark.parametrize("first", [0, 5000])
def test_loads_are_uniform_and_change_by_their_chance(stay: float, first: int) -> None:
    """A move goes to any of the four shares, the same one too: 3/4 of the moves can be seen."""
    found = chain(stay, 6, first=first)
    for row in found:
        frequencies = np.array([np.mean(row == share) for share in SHARES])
        assert np.abs(frequencies - 0.25).max() < six_sigma(0.25, len(CLIENTS))
    changed, chance = np.mean(found[1:] != found[:-1]), 0.75 * (1 - stay)
    assert abs(changed - chance) < six_sigma(chance, 5 * len(CLIENTS))


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_it_forgets_at_the_rate_of_the_chain(rounds: int) -> None:
    """The chance of the same load so many rounds later is stay^rounds, and 1/4 of the rest."""
    found = chain(0.8, rounds + 1, first=20)
    same = 0.8**rounds + (1 - 0.8**rounds) / 4
    assert abs(np.mean(found[0] == found[-1]) - same) < six_sigma(same, len(CLIENTS))


def test_in_mid_round_it_takes_a_step_of_the_same_chain() -> None:
    """A second half follows its round's first, and the next round's first follows it."""
    config = LoadConfig(shares=SHARES, stay=0.7, mid_round=True)
    halves = np.stack([load(config, 0, CLIENTS, round, half) for round in range(4) for half in (0, 1)])
    assert (halves == chain(0.7, 8)).all()


def test_without_it_both_halves_are_one() -> None:
    config = LoadConfig(shares=SHARES)
    assert (load(config, 0, CLIENTS, 6, half=1) == load(config, 0, CLIENTS, 6)).all()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For how many clients each number was drawn."""
    counts: list[int] = []
    uniforms = draws.uniforms

    def counting(seed: int, purpose: Purpose, round: int, clients: np.ndarray, draw: int = 0) -> np.ndarray:
        counts.append(len(clients))
        return uniforms(seed, purpose, round, clients, draw)

    monkeypatch.setattr(draws, "uniforms", counting)
    return counts


@pytest.mark.parametrize("round", [200, 10**6])
@pytest.mark.parametrize("stay", [0.0, 0.7, 0.9])
def test_what_it_costs_depends_on_the_clients_and_not_on_the_round(
    round: int, stay: float, drawn: list[int]
) -> None:
    """As many numbers as rounds since a client's last move: geometric, 1/(1-stay) on average."""
    load(LoadConfig(shares=SHARES, stay=stay), 0, CLIENTS, round)
    error = np.sqrt(stay * len(CLIENTS)) / (1 - stay)
    assert abs(sum(drawn) - len(CLIENTS) / (1 - stay)) <= 6 * error


def test_who_never_moves_is_looked_up_at_once(drawn: list[int]) -> None:
    load(LoadConfig(shares=SHARES, stay=1.0), 0, CLIENTS, 10**6)
    assert drawn == [len(CLIENTS)]

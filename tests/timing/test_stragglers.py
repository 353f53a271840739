"""Straggler factors against the closed forms of their distributions.

Every statistical tolerance is four standard errors, known in closed form too; a fixed seed decides once and for all.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cluster_fl.timing.schema import StragglersConfig
from cluster_fl.timing.stragglers import DISTRIBUTIONS, slowdown

MANY = np.arange(100_000)
ERRORS = 4
LAWS = {
    "shifted_exponential": (StragglersConfig("shifted_exponential", rate=2.5), stats.expon(1, 1 / 2.5)),
    "lognormal": (StragglersConfig("lognormal", sigma=0.6), stats.lognorm(0.6)),
    "pareto": (StragglersConfig("pareto", shape=5.0), stats.pareto(5.0)),
}


def harmonic(n: int, power: int = 1) -> float:
    return float(np.sum(1.0 / np.arange(1, n + 1) ** power))


def excesses(n: int, rounds: int, rate: float) -> np.ndarray:
    """What n clients take above the least in so many rounds, rising in each, (rounds, n)."""
    config, clients = StragglersConfig("shifted_exponential", rate=rate), np.arange(n)
    return np.sort([slowdown(config, 0, round, clients) - 1 for round in range(rounds)], axis=1)


@pytest.mark.parametrize("name", LAWS)
def test_mean_and_distribution(name: str) -> None:
    config, law = LAWS[name]
    found = slowdown(config, 0, 7, MANY)
    assert abs(found.mean() - law.mean()) < ERRORS * law.std() / np.sqrt(len(MANY))
    assert stats.kstest(found, law.cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95, 0.99])
def test_quantiles(name: str, share: float) -> None:
    """The standard error of a quantile is sqrt(p (1-p) / n) over the density there."""
    config, law = LAWS[name]
    expected = law.ppf(share)
    error = np.sqrt(share * (1 - share) / len(MANY)) / law.pdf(expected)
    assert abs(np.quantile(slowdown(config, 0, 7, MANY), share) - expected) < ERRORS * error


def test_lognormal_tail_over_its_median() -> None:
    """FedScale's sigma of 0.6: the slowest of a hundred takes four times as long as the median."""
    config = StragglersConfig("lognormal")
    median, p95, p99 = np.quantile(slowdown(config, 1, 0, np.arange(10**6)), [0.5, 0.95, 0.99])
    assert p95 / median == pytest.approx(np.exp(1.6449 * 0.6), rel=0.01)
    assert p99 / median == pytest.approx(4.04, rel=0.01)


@pytest.mark.parametrize(("shares", "factor"), [(0.1, 8.0), (0.3, 2.0), (0.0, 5.0), (1.0, 5.0)])
def test_bimodal_has_so_many_slow_ones(shares: float, factor: float) -> None:
    found = slowdown(StragglersConfig("bimodal", slow_share=shares, slow_factor=factor), 0, 0, MANY)
    slow = found == factor
    assert (found[~slow] == 1).all()
    assert abs(slow.mean() - shares) <= ERRORS * np.sqrt(shares * (1 - shares) / len(MANY))


@pytest.mark.parametrize("rate", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("n", [1, 5, 50])
def test_expected_slowest_of_coded_computation(n: int, rate: float) -> None:
    """E[max of n] = 1 + H_n / rate, with a variance of sum 1/k^2 / rate^2."""
    slowest = 1 + excesses(n, 2_000, rate)[:, -1]
    error = np.sqrt(harmonic(n, 2) / len(slowest)) / rate
    assert abs(slowest.mean() - (1 + harmonic(n) / rate)) < ERRORS * error


@pytest.mark.parametrize(("n", "published"), [(5, 1.64), (10, 1.96), (50, 2.75), (100, 3.09)])
def test_the_slowest_against_a_single_one(n: int, published: float) -> None:
    """(1 + H_n) / 2 by default: what waiting for all costs."""
    config = StragglersConfig("shifted_exponential")
    assert round((1 + harmonic(n)) / 2, 2) == published
    slowest = [slowdown(config, 0, round, np.arange(n)).max() for round in range(2_000)]
    error = np.sqrt(harmonic(n, 2) / len(slowest)) / 2
    assert abs(np.mean(slowest) / 2 - (1 + harmonic(n)) / 2) < ERRORS * error


@pytest.mark.parametrize(
    ("k", "n", "published"), [(10, 10, 2.93), (10, 13, 1.35), (100, 100, 5.19), (100, 130, 1.45)]
)
def test_over_selection_waits_for_an_order_statistic(k: int, n: int, published: float) -> None:
    """E[k-th of n] = (H_n - H_(n-k)) / rate, with a variance of the like sum of 1/j^2 over rate^2."""
    rate = 2.0
    expected = harmonic(n) - harmonic(n - k)
    assert round(expected, 2) == published
    found = excesses(n, 2_000, rate)[:, k - 1]
    error = np.sqrt((harmonic(n, 2) - harmonic(n - k, 2)) / len(found)) / rate
    assert abs(found.mean() - expected / rate) < ERRORS * error


def test_by_default_exponential_and_pareto_have_the_same_mean() -> None:
    config = StragglersConfig()
    assert 1 + 1 / config.rate == config.shape / (config.shape - 1) == 2


@given(st.integers(0, 10**6), st.integers(0, 100), st.integers(0, 20))
def test_without_stragglers_every_factor_is_one(seed: int, round: int, clients: int) -> None:
    assert slowdown(StragglersConfig(), seed, round, np.arange(clients)).tolist() == [1.0] * clients


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=9, unique=True), st.integers(0, 99), st.data())
def test_a_clients_factor_does_not_depend_on_who_else_takes_part(
    name: str, clients: list[int], round: int, data: st.DataObject
) -> None:
    config, who = StragglersConfig(name), np.array(clients)
    found = slowdown(config, 5, round, who)
    some = np.array(data.draw(st.lists(st.sampled_from(range(len(clients))), max_size=9)), dtype=np.int64)
    assert slowdown(dataclasses.replace(config), 5, round, who[some]).tobytes() == found[some].tobytes()
    assert found.shape == who.shape
    assert (found > 0).all()
    assert name == "lognormal" or (found >= 1).all()


@pytest.mark.parametrize("name", sorted(set(DISTRIBUTIONS) - {"none"}))
def test_every_round_and_seed_draws_anew(name: str) -> None:
    config, clients = StragglersConfig(name), np.arange(1000)
    found = [slowdown(config, seed, round, clients) for seed, round in [(0, 0), (0, 1), (1, 0)]]
    assert abs(np.corrcoef(found)[np.triu_indices(3, 1)]).max() < 5 / np.sqrt(len(clients))
    assert (found[0] != found[1]).any()
    assert (found[0] != found[2]).any()


def test_the_configured_names_are_those_that_are_drawn() -> None:
    (spec,) = (spec for spec in dataclasses.fields(StragglersConfig) if spec.name == "name")
    assert set(spec.metadata["choices"]) == set(DISTRIBUTIONS)

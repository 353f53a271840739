"""FedAdp's weights against worked numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster_fl.aggregation.angles import angles, factors, gompertz, on_weight_grid, smoothed
from cluster_fl.aggregation.exact import weight_unit

ALPHA = 5.0


def weights(theta: np.ndarray, samples: list[int]) -> np.ndarray:
    """psi, normalised."""
    raw = np.array(samples) * factors(theta, ALPHA)
    result: np.ndarray = raw / raw.sum()
    return result


@pytest.mark.parametrize(
    ("angle", "value"),
    [
        (0.0, 5.0),
        (0.25, 5.0),
        (0.5, 4.999974),
        (0.75, 4.847548),
        (1.0, 3.160603),
        (1.25, 1.245583),
        (math.pi / 2, 0.279931),
        (2.0, 0.033576),
        (math.pi, 0.000112),
    ],
)
def test_the_gompertz_function(angle: float, value: float) -> None:
    assert gompertz(np.array(angle), ALPHA) == pytest.approx(value, abs=5e-7)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([1] * 5, [0.4131, 0.4118, 0.1579, 0.0130, 0.0041]),
        ([100, 200, 300, 200, 200], [0.2368, 0.4721, 0.2716, 0.0149, 0.0047]),
    ],
)
def test_weights_of_given_angles(samples: list[int], expected: list[float]) -> None:
    found = weights(np.array([0.4, 0.6, 0.9, 1.2, 1.5]), samples)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


def test_from_gradients_to_the_update() -> None:
    gradients = np.array([[1.0, 0, 0], [1, 1, 0], [1, 0, 2], [-1, 1, 0]])
    samples = [10, 20, 30, 40]
    mean = np.average(gradients, axis=0, weights=samples)
    np.testing.assert_allclose(mean, [0.2, 0.6, 0.6], atol=1e-15)
    theta = angles(gradients @ mean, (gradients**2).sum(1), np.array(mean @ mean))
    np.testing.assert_allclose(theta, [1.339319, 0.864677, 0.769606, 1.240374], atol=5e-7)
    psi = weights(theta, samples)
    np.testing.assert_allclose(psi, [0.004401, 0.281004, 0.686685, 0.027910], atol=5e-7)
    np.testing.assert_allclose(psi @ gradients, [0.944179, 0.308914, 1.373370], atol=5e-7)


def test_neither_sign_nor_length_of_the_gradients_shows() -> None:
    """Updates are gradients times minus the learning rate."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 7))
    found = [
        angles(np.array(x @ y), np.array(x @ x), np.array(y @ y)) for x, y in [(a, b), (-0.01 * a, -0.01 * b)]
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-14)


def test_what_has_no_direction_has_no_angle() -> None:
    found = angles(np.array([0.0, 1.0, 0.0]), np.array([0.0, 1.0, 4.0]), np.array([1.0, 1.0, 0.0]))
    assert np.isnan(found[[0, 2]]).all()
    assert found[1] == 0


def test_rounding_cannot_leave_the_range_of_the_cosine() -> None:
    assert angles(np.array(1 + 1e-15), np.array(1.0), np.array(1.0)) == 0
    assert angles(np.array(-1 - 1e-15), np.array(1.0), np.array(1.0)) == math.pi


@given(st.lists(st.floats(0, math.pi), min_size=1, max_size=20))
def test_smoothing_is_the_running_mean(theta: list[float]) -> None:
    mean = np.zeros(())
    for count, angle in enumerate(theta):
        mean = smoothed(mean, np.array(count), np.array(angle))
    assert mean == pytest.approx(np.mean(theta), abs=1e-12)
    assert smoothed(np.zeros(()), np.zeros(()), np.array(theta[0])) == theta[0]


def test_without_alpha_all_factors_are_exactly_one() -> None:
    assert (factors(np.linspace(0, math.pi, 9), 0.0) == 1).all()


@given(
    st.lists(st.integers(1, 10**6), min_size=1, max_size=50),
    st.lists(st.floats(0, 1), min_size=1, max_size=9),
)
def test_products_with_the_weight_are_on_the_grid(samples: list[int], given_factors: list[float]) -> None:
    weight = samples[0] * weight_unit(sum(samples))
    found = on_weight_grid(np.array([1.0, *given_factors]), weight)
    assert found[0] == 1
    np.testing.assert_allclose(found[1:], given_factors, rtol=0, atol=sum(samples) * 2.0**-40)
    products = found * weight * 2.0**40
    assert (products == np.round(products)).all()

from __future__ import annotations

import pytest

from cluster_fl.config import TrainConfig
from cluster_fl.training.schedule import learning_rate


@pytest.mark.parametrize(
    ("round_number", "rate"), [(0, 0.1), (99, 0.1), (100, 0.01), (199, 0.01), (200, 0.001), (399, 0.001)]
)
def test_step_schedule_of_the_paper(round_number: int, rate: float) -> None:
    train = TrainConfig(lr=0.1, schedule="step", milestones=[100, 200], gamma=0.1)
    assert learning_rate(train, round_number, 400) == pytest.approx(rate, rel=1e-12)


def test_cosine_starts_at_lr_and_halves_in_the_middle() -> None:
    train = TrainConfig(lr=0.2, schedule="cosine")
    rates = [learning_rate(train, r, 10) for r in range(10)]
    assert rates[0] == 0.2
    assert rates[5] == pytest.approx(0.1)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0


def test_exponential_falls_after_every_round() -> None:
    train = TrainConfig(lr=0.1, schedule="exponential", gamma=0.998)
    assert learning_rate(train, 0, 1000) == 0.1
    assert learning_rate(train, 999, 1000) == pytest.approx(0.1 * 0.998**999)


def test_constant() -> None:
    assert learning_rate(TrainConfig(lr=0.3), 7, 9) == 0.3

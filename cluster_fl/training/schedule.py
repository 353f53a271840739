"""The learning rate as a function of the round alone."""

from __future__ import annotations

import math

from cluster_fl.config import TrainConfig


def learning_rate(train: TrainConfig, round: int, rounds: int) -> float:
    """Rate of ``round`` (from 0) of ``rounds``.

    step: multiplied by gamma from each milestone on. exponential: multiplied by gamma after every round.
    cosine: from lr at round 0 towards 0 after the last.
    """
    if train.schedule == "step":
        return train.lr * train.gamma ** sum(round >= milestone for milestone in train.milestones)
    if train.schedule == "exponential":
        return train.lr * train.gamma**round
    if train.schedule == "cosine":
        return train.lr * 0.5 * (1 + math.cos(math.pi * round / rounds))
    return train.lr

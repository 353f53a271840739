"""Eq. 5 and the released code's deviations, against the values and gradients of the oracle file."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cluster_fl.training.objectives import SelfDistillation

# Losses on three exits, batch 2, three classes, T = 3, beta = 0.1 (scalefl.md, 3.1).
LOGITS = [
    [[1.0, 0.0, -1.0], [0.5, 0.5, 2.0]],
    [[2.0, -1.0, 0.0], [0.0, 1.0, 1.5]],
    [[3.0, 0.0, -2.0], [-1.0, 0.0, 2.5]],
]
LABELS = torch.tensor([0, 2])
FORMS = {
    "reference_code_kd_on": (
        SelfDistillation(reduction="element", detach_teacher=False),
        0.24311256408691406,
    ),
    "reference_code_kd_off": (SelfDistillation(kd_weight=0.0), 0.23406155407428741),
    "eq5_literal_norm_1_over_l(l+1)_batchmean_teacher_detached": (
        SelfDistillation(unit_weights=False),
        0.13060729205608368,
    ),
    "normalised_weights(2_over_l(l+1))_batchmean_teacher_detached": (SelfDistillation(), 0.26121458411216736),
    "normalised_weights_batchmean_teacher_NOT_detached": (
        SelfDistillation(detach_teacher=False),
        0.26121458411216736,
    ),
}


def logits() -> list[torch.Tensor]:
    return [torch.tensor(values, requires_grad=True) for values in LOGITS]


@pytest.mark.parametrize("form", FORMS)
def test_loss_values(form: str) -> None:
    objective, expected = FORMS[form]
    assert objective(logits(), LABELS, 0.9).item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form: str, scalefl_oracles: dict[str, Any]) -> None:
    objective, _ = FORMS[form]
    exits = logits()
    objective(exits, LABELS, 0.9).backward()
    expected = torch.tensor(scalefl_oracles["loss"][form]["grads"])
    torch.testing.assert_close(
        torch.stack([e.grad for e in exits if e.grad is not None]), expected, atol=1e-7, rtol=0
    )


def test_teacher_gets_only_its_own_gradient_when_detached() -> None:
    with_kd, without = logits(), logits()
    SelfDistillation()(with_kd, LABELS, 0.9).backward()
    SelfDistillation(kd_weight=0.0)(without, LABELS, 0.9).backward()
    assert with_kd[-1].grad is not None
    assert without[-1].grad is not None
    assert torch.equal(with_kd[-1].grad, without[-1].grad)


@pytest.mark.parametrize(("rounds", "first"), [(400, 101), (100, 26), (90, 23)])
def test_gate_opens_in_the_published_round(rounds: int, first: int) -> None:
    gated, off = SelfDistillation(gate=0.25), SelfDistillation(kd_weight=0.0)
    plain = off(logits(), LABELS, 0.0).item()
    active = [r for r in range(rounds) if gated(logits(), LABELS, r / rounds).item() != plain]
    assert active[0] == first
    assert len(active) == rounds - first


def test_one_exit_is_cross_entropy() -> None:
    only = [logits()[0]]
    assert SelfDistillation()(only, LABELS, 0.5).item() == pytest.approx(
        torch.nn.functional.cross_entropy(only[0], LABELS).item()
    )

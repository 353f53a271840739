"""HeteroFL's Scaler, and the norms that are no batch norms."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cluster_fl.errors import UserError
from cluster_fl.models import Layered
from cluster_fl.models.norm import Scaler, start_collecting, statistics
from cluster_fl.models.spec import ModelSpec
from cluster_fl.nesting.ownership import has_batch_norms

SHAPE = (3, 16, 16)
PLAIN = ModelSpec("preact_1112", SHAPE, 10, seed=0, exits=(2,), options={"widths": [8, 16, 32, 64]})


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def made(norm: str, scale: float | None = None, *, groups: int = 4) -> Layered:
    model = replace(PLAIN, norm=norm, norm_groups=groups, scaler=scale is not None).build()
    for module in model.modules():
        if isinstance(module, Scaler):
            module.scale = scale
    return model


def batch(size: int = 8) -> Tensor:
    return torch.randn(size, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm", ["batch", "static", "group", "none"])
def test_a_scaler_stands_before_every_norm_and_changes_no_name(norm: str) -> None:
    plain, scaled = made(norm), made(norm, 0.5)
    assert sum(isinstance(m, Scaler) for m in scaled.modules()) == 5 * 2 + 1 + 3
    assert list(scaled.state_dict()) == list(plain.state_dict())
    names = {"units.0.bn1.weight", "head.bn.bias", "exits.2.bn3.weight"}
    assert names <= set(plain.state_dict()) or norm == "none"


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_nothing_happens_in_evaluation_or_at_scale_one(norm: str) -> None:
    plain = made(norm)
    for logits, expected in zip(made(norm, 1 / 16).eval()(batch()), plain.eval()(batch()), strict=True):
        assert torch.equal(logits, expected)
    for logits, expected in zip(made(norm, 1).train()(batch()), plain.train()(batch()), strict=True):
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_norm_undoes_the_scaler(norm: str) -> None:
    """Up to the norm's epsilon (spec A2: at most 1e-4 at a scale of 1/16)."""
    for logits, expected in zip(made(norm, 1 / 16)(batch()), made(norm)(batch()), strict=True):
        assert 0 < (logits - expected).abs().max() < 1e-4


def test_without_norm_the_division_is_exact() -> None:
    model, x = made("none", 0.25).units["0"], torch.randn(2, 8, 4, 4)
    hidden = nn.functional.relu(x / 0.25)
    expected = model.conv2(nn.functional.relu(model.conv1(hidden) / 0.25)) + x
    assert torch.equal(model(x), expected)
    assert torch.equal(
        model.eval()(x), model.conv2(nn.functional.relu(model.conv1(nn.functional.relu(x)))) + x
    )


def test_gradients_flow_without_norm() -> None:
    """Nothing is changed in place that somebody else still reads."""
    for scale in (None, 0.5):
        model = made("none", scale)
        torch.stack([logits.square().sum() for logits in model(batch())]).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_statistics_are_those_of_evaluation() -> None:
    plain, scaled = made("static"), made("static", 1 / 16)
    for model in (plain, scaled):
        start_collecting(model)
        model.train()(batch())
    expected = statistics(plain)
    assert all(torch.equal(value, expected[name]) for name, value in statistics(scaled).items())


def test_running_statistics_of_scaled_inputs_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"^model\.norm=per_level: cannot go with a Scaler: evaluation scales nothing"
    ):
        made("per_level", 0.5)


def test_a_copy_has_a_scaler_of_its_own() -> None:
    model = made("none", 0.5)
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, Scaler):
            module.scale = 1.0
    assert torch.equal(twin(batch())[-1], made("none")(batch())[-1])
    assert not torch.equal(model(batch())[-1], twin(batch())[-1])


@pytest.mark.parametrize("norm", ["group", "none"])
def test_one_sample_is_enough_without_batch_norms(norm: str) -> None:
    model = made(norm)
    assert not has_batch_norms(model)
    alone, together = model.train()(batch()[:1]), model.train()(batch())
    for one, all_ in zip(alone, together, strict=True):
        torch.testing.assert_close(one, all_[:1])
    assert not list(model.buffers())


def test_group_norms() -> None:
    names = [n for n, m in made("group").named_modules() if isinstance(m, nn.GroupNorm)]
    assert names == [n for n, m in made("batch").named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.num_groups for m in made("group").modules() if isinstance(m, nn.GroupNorm)} == {4}
    assert list(made("group").state_dict()) == list(made("batch").state_dict())


def test_groups_that_do_not_divide_a_layers_channels() -> None:
    with pytest.raises(UserError) as caught:
        made("group", groups=6)
    assert str(caught.value) == "model.norm_groups=6: must divide the 8 channels of units.0.bn1."

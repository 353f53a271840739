"""Norms that are no batch norms, in submodels: scaled, in groups, or missing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from cluster_fl.errors import UserError
from cluster_fl.models.norm import Scaler
from cluster_fl.models.spec import ModelSpec
from cluster_fl.nesting.cost import cost, count
from cluster_fl.nesting.extraction import extract
from cluster_fl.nesting.submodel import full, prefix
from cluster_fl.nesting.tracing import anatomy

SHAPE = (3, 16, 16)
SPEC = ModelSpec("resnet14", SHAPE, 10, seed=0, exits=(4,), norm_groups=4)


@pytest.mark.parametrize("norm", ["batch", "static", "group", "none"])
def test_a_scaler_changes_neither_the_trace_nor_the_cost(norm: str) -> None:
    plain, scaled = (replace(SPEC, norm=norm, scaler=scaler) for scaler in (False, True))
    traced = anatomy(scaled.skeleton(), SHAPE)
    assert traced == anatomy(plain.skeleton(), SHAPE)
    assert anatomy(scaled.build().train(), SHAPE) == traced
    half = replace(prefix(traced, 0.5, 6, (4, 6)), scale=0.5)
    assert cost(traced, half) == count(extract(scaled.build(), traced, half), SHAPE)


def test_extraction_sets_the_scale() -> None:
    spec = replace(SPEC, norm="none", scaler=True)
    model = spec.build()
    traced = anatomy(model, SHAPE)
    half = prefix(traced, 0.5, 6, (4, 6))
    assert half.scale == full(traced).scale == 1
    assert replace(half, scale=0.5).shape != half.shape
    for scale in (1.0, 0.5):
        small = extract(model, traced, replace(half, scale=scale))
        assert {m.scale for m in small.modules() if isinstance(m, Scaler)} == {scale}
    assert {m.scale for m in model.modules() if isinstance(m, Scaler)} == {1}


@pytest.mark.parametrize("norm", ["group", "none"])
@pytest.mark.parametrize("name", ["resnet14", "resnet18", "preact_1112", "heterofl_cnn"])
def test_channels_can_be_cut(norm: str, name: str) -> None:
    spec = ModelSpec(name, SHAPE, 10, seed=0, norm=norm, norm_groups=4, exits=(2,))
    model = spec.build()
    traced = anatomy(model, SHAPE)
    batched = anatomy(replace(spec, norm="batch").skeleton(), SHAPE)
    assert sorted(g.size for g in traced.groups) == sorted(g.size for g in batched.groups)
    half = prefix(traced, 0.5, model.depth, (2, model.depth))
    small = extract(model, traced, half)
    assert cost(traced, half) == count(small, SHAPE)
    torch.stack([logits.square().sum() for logits in small(torch.randn(1, *SHAPE))]).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_a_cut_group_norm_forms_its_groups_anew() -> None:
    model = replace(SPEC, norm="group").build()
    traced = anatomy(model, SHAPE)
    norm = extract(model, traced, prefix(traced, 0.5, 6, (6,))).stem.bn
    assert isinstance(norm, nn.GroupNorm)
    assert (norm.num_groups, norm.num_channels) == (4, 8)


def test_groups_that_do_not_divide_the_kept_channels() -> None:
    model = replace(SPEC, norm="group").build()
    traced = anatomy(model, SHAPE)
    with pytest.raises(UserError) as caught:
        extract(model, traced, prefix(traced, 0.7, 6, (6,)))
    assert str(caught.value) == "model.norm_groups=4: must divide the 11 channels of stem.bn."


def test_separable_heads_can_be_cut() -> None:
    spec = replace(SPEC, exits=(2, 4), exit_head="sepconv")
    model = spec.build()
    traced = anatomy(model, SHAPE)
    third = prefix(traced, 0.3, 4, (2, 4))
    small = extract(model, traced, third)
    assert small.exits["2"].depthwise1.groups == 4
    assert cost(traced, third) == count(small, SHAPE)

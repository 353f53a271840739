"""torchvision's weights under our names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import Tensor

from cluster_fl.errors import UserError
from cluster_fl.models import pretrained
from cluster_fl.models.pretrained import RELEASE, assign, from_torchvision
from cluster_fl.models.spec import ModelSpec

SHAPE = (3, 32, 32)
BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "wide_resnet101_2": (3, 4, 23, 3)}
OWN = {"stem.conv.weight", "head.linear.weight", "head.linear.bias"}

Weights = dict[str, Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def theirs(name: str) -> torch.nn.Module:
    """torchvision's model with random weights and running statistics."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def weights() -> Weights:
    return theirs("resnet18").state_dict()


@pytest.fixture
def download(monkeypatch: pytest.MonkeyPatch, weights: Weights) -> None:
    """What torchvision would have downloaded."""

    class Given:
        def get_state_dict(self, **options: Any) -> Weights:
            assert options == {"progress": False, "check_hash": True, "weights_only": True}
            return weights

    monkeypatch.setattr(pretrained, "get_model_weights", lambda name: {RELEASE: Given()})


@pytest.mark.parametrize("name", BLOCKS)
def test_answers_as_torchvisions(name: str) -> None:
    other, x = theirs(name), torch.randn(2, 3, 64, 64)
    model = ModelSpec(name, (3, 64, 64), 1000, seed=1, norm="per_level").build().eval()
    named = from_torchvision(other.state_dict(), BLOCKS[name])
    assert set(named) == set(model.state_dict())
    assign(model, named, name)
    with torch.no_grad():
        assert torch.equal(model(x)[-1], other(x))


@pytest.mark.usefixtures("download")
@pytest.mark.parametrize("norm", ["per_level", "batch", "group"])
def test_all_that_fits_is_copied(norm: str, weights: Weights) -> None:
    spec = ModelSpec("resnet18", SHAPE, 10, seed=1, norm=norm, options={"stem": "cifar"})
    plain, model = spec.build(), replace(spec, options={"stem": "cifar", "pretrained": True}).build()
    named = from_torchvision(weights, BLOCKS["resnet18"])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name] if name in OWN else named[name]), name
    running = {n for n in named if n.endswith(("running_mean", "running_var"))}
    assert running <= set(model.state_dict()) or norm != "per_level"


@pytest.mark.usefixtures("download")
def test_the_large_stem_and_the_same_classes_are_copied_too(weights: Weights) -> None:
    model = ModelSpec("resnet18", (3, 64, 64), 1000, seed=1, options={"pretrained": True}).build()
    assert torch.equal(model.stem.conv.weight, weights["conv1.weight"])
    assert torch.equal(model.head.linear.bias, weights["fc.bias"])
    grey = ModelSpec("resnet18", (1, 64, 64), 1000, seed=1, options={"pretrained": True}).build()
    assert torch.equal(grey.head.linear.bias, weights["fc.bias"])


@pytest.mark.usefixtures("download")
def test_other_widths_have_no_weights() -> None:
    with pytest.raises(UserError) as caught:
        ModelSpec(
            "resnet18", SHAPE, 10, 1, options={"pretrained": True, "widths": [32, 64, 128, 256]}
        ).build()
    right = "needs the widths of torchvision's resnet18: leave out widths."
    assert str(caught.value) == f"model.options.pretrained=True: {right}"


@pytest.mark.parametrize("error", [URLError("timed out"), RuntimeError("invalid hash value\n(expected 1)")])
def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    class Failing:
        def get_state_dict(self, **options: Any) -> Weights:
            raise error

    monkeypatch.setattr(pretrained, "get_model_weights", lambda name: {RELEASE: Failing()})
    with pytest.raises(UserError) as caught:
        ModelSpec("resnet34", SHAPE, 10, seed=1, options={"pretrained": True}).build()
    start = "model.options.pretrained=True: torchvision's weights of resnet34 cannot be had: "
    assert str(caught.value).startswith(start)
    assert str(caught.value).endswith(("timed out>.", "invalid hash value."))
    assert "\n" not in str(caught.value)


def test_a_skeleton_downloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "get_model_weights", None)
    ModelSpec("wide_resnet101_2", SHAPE, 10, seed=1, options={"pretrained": True}).skeleton()


@pytest.mark.parametrize("name", BLOCKS)
def test_there_are_such_weights(name: str) -> None:
    assert RELEASE in pretrained.get_model_weights(name).__members__


def test_pretrained_is_yes_or_no() -> None:
    with pytest.raises(UserError, match=r"^model\.options\.pretrained=no: must be true or false\.$"):
        ModelSpec("resnet18", SHAPE, 10, seed=1, options={"pretrained": "no"}).build()

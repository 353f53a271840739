"""NeFL's learnable step sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cluster_fl.errors import UserError
from cluster_fl.models.layered import Layered
from cluster_fl.models.spec import ModelSpec

SHAPE = (3, 16, 16)
NAMES = ["resnet20", "resnet18", "preact_1112"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def model(name: str, *, steps: bool = True) -> Layered:
    return ModelSpec(name, SHAPE, 10, seed=0, steps=steps).build()


def batch() -> Tensor:
    return torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))


def gradients(net: Layered) -> dict[str, Tensor]:
    net(batch())[-1].square().sum().backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "more"),
    [("resnet18", 8), ("resnet34", 16), ("resnet56", 27), ("resnet110", 54), ("preact_2222", 8)],
)
def test_one_number_a_residual_unit(name: str, more: int) -> None:
    plain, stepped = (ModelSpec(name, SHAPE, 10, seed=0, steps=steps).skeleton() for steps in (False, True))
    names = set(stepped.state_dict()) - set(plain.state_dict())
    assert names == {f"units.{number}.step" for number in range(more)}
    assert all(stepped.get_parameter(name).shape == (1,) for name in names)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_one_changes_no_bit(name: str) -> None:
    plain, net = model(name, steps=False), model(name)
    assert all(torch.equal(p, net.get_parameter(n)) for n, p in plain.named_parameters())
    assert all(torch.equal(p, torch.ones(1)) for n, p in net.named_parameters() if n.endswith(".step"))
    assert torch.equal(plain(batch())[-1], net(batch())[-1])
    expected, found = gradients(plain), gradients(net)
    assert all(torch.equal(grad, found[n]) for n, grad in expected.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_zero_skips_the_branch(name: str) -> None:
    net, small = model(name), model(name)
    torch.nn.init.zeros_(net.units["0"].step)
    small.truncate(range(1, small.depth), [small.depth])
    assert torch.equal(net(batch())[-1], small(batch())[-1])
    own = {n: grad for n, grad in gradients(net).items() if n.startswith("units.0.")}
    assert own.pop("units.0.step").item() != 0
    assert all(not grad.any() for grad in own.values())


def test_a_step_of_zero_leaves_the_projection() -> None:
    net, small = model("resnet20"), model("resnet20")
    torch.nn.init.zeros_(net.units["3"].step)
    small.truncate([n for n in range(9) if n != 3], [9])
    assert torch.equal(net(batch())[-1], small(batch())[-1])
    assert "units.3.step" not in small.state_dict()


def test_steps_scale_the_branch_alone() -> None:
    net = model("resnet20")
    unit, x = net.units["0"], batch().repeat(1, 6, 1, 1)[:, :16].relu()
    branch = unit.bn2(unit.conv2(unit.bn1(unit.conv1(x)).relu()))
    torch.nn.init.constant_(unit.step, 8)
    torch.testing.assert_close(unit(x), (8 * branch + x).relu())


@pytest.mark.parametrize("name", ["mlp", "heterofl_cnn"])
def test_a_model_without_residual_units(name: str) -> None:
    with pytest.raises(UserError) as caught:
        ModelSpec(name, SHAPE, 10, seed=0, steps=True).build()
    right = "has no residual units, whose branches step sizes would scale."
    assert str(caught.value) == f"model.name={name}: {right}"

"""Norm policies and static statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cluster_fl.errors import UserError
from cluster_fl.models import Layered, build, norm

SHAPE = (3, 8, 8)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def model(policy: str) -> Layered:
    built = build("resnet14", SHAPE, 10, generator_seed=0)
    norm.apply_norm_policy(built, policy)
    return built


def batches(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [2 * torch.randn(size, *SHAPE, generator=generator) + 1 for size in sizes]


@pytest.mark.parametrize("policy", ["batch", "static"])
def test_batch_statistics_in_training_and_evaluation(policy: str) -> None:
    net, (x,) = model(policy), batches(6)
    assert not list(net.buffers())
    assert torch.equal(net.train()(x)[0], net.eval()(x)[0])


def test_per_level_tracks() -> None:
    net, (x,) = model("per_level"), batches(6)
    stem = net.stem.bn
    assert stem.momentum == 0.1
    net.train()(x)
    mean = net.stem.conv(x).mean((0, 2, 3))
    torch.testing.assert_close(stem.running_mean, 0.1 * mean)
    alone, together = net.eval()(x[:1])[0], net(x)[0][:1]
    torch.testing.assert_close(alone, together)


def test_policies_undo_each_other() -> None:
    net = model("static")
    norm.apply_norm_policy(net, "per_level")
    fresh = build("resnet14", SHAPE, 10, generator_seed=0).state_dict()
    assert all(torch.equal(fresh[name], tensor) for name, tensor in net.state_dict().items())
    assert set(fresh) == set(net.state_dict())


def test_static_statistics_are_means_over_batches() -> None:
    net, data = model("static"), batches(4, 7, 2)
    inputs = _inputs_of(net, "units.2.bn1", data)  # what training feeds it: batch statistics everywhere
    expected_mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    expected_var = torch.stack([x.transpose(0, 1).flatten(1).var(1, unbiased=True) for x in inputs]).mean(0)
    norm.start_collecting(net)
    with torch.no_grad():
        for x in data:
            net.train()(x)
    found = norm.statistics(net)
    torch.testing.assert_close(found["units.2.bn1.running_mean"], expected_mean)
    torch.testing.assert_close(found["units.2.bn1.running_var"], expected_var)
    norms = [name for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert set(found) == {f"{name}.{leaf}" for name in norms for leaf in norm.BUFFERS}


def test_collecting_forgets_what_was_before() -> None:
    net, (old, new) = model("static"), batches(5, 5)
    norm.start_collecting(net)
    net.train()(old)
    norm.apply_norm_policy(net, "static")
    norm.start_collecting(net)
    net.train()(new)
    torch.testing.assert_close(
        norm.statistics(net)["stem.bn.running_mean"], net.stem.conv(new).mean((0, 2, 3))
    )


def test_set_statistics_decide_evaluation() -> None:
    net, data = model("static"), batches(4, 6)
    other = model("static")
    norm.start_collecting(net)
    for x in data:
        net.train()(x)
    norm.set_statistics(other, norm.statistics(net))
    assert torch.equal(other.eval()(data[0])[0], net.eval()(data[0])[0])
    torch.testing.assert_close(other(data[0][:1])[0], other(data[0])[0][:1])


def test_statistics_are_copies() -> None:
    net = model("per_level")
    norm.statistics(net)["stem.bn.running_mean"].add_(1)
    assert not net.stem.bn.running_mean.any()


def test_unknown_policy() -> None:
    with pytest.raises(UserError, match=r"model.norm=statik: must be one of .* Did you mean static\?"):
        norm.apply_norm_policy(build("mlp", SHAPE, 10), "statik")


def _inputs_of(net: nn.Module, name: str, data: list[Tensor]) -> list[Tensor]:
    seen: list[Tensor] = []
    hook = net.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for x in data:
        net(x)
    hook.remove()
    return seen

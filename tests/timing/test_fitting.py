"""Which levels fit into a device's memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster_fl.errors import UserError
from cluster_fl.models.spec import ModelSpec
from cluster_fl.nesting.cost import Cost, count
from cluster_fl.nesting.plan import Level, Plan
from cluster_fl.nesting.submodel import Submodel
from cluster_fl.timing.devices import Devices
from cluster_fl.timing.fitting import memory_limits, training_bytes


def cost(params: int = 0, activations: int = 0, buffers: int = 0) -> Cost:
    return Cost(params, 0, activations, 4 * (params + buffers))


def plan_of(*costs: Cost) -> Plan:
    submodel = Submodel((), (), (0,))
    levels = tuple(Level(n, 1.0, 1, 0, 1.0, each, submodel) for n, each in enumerate(costs, start=1))
    return Plan(None, None, levels, np.ones(1, dtype=int), False, None)  # type: ignore[arg-type]


def devices_of(memory: np.ndarray) -> Devices:
    one = np.ones(len(memory))
    return Devices(one, one, one, one, memory, one)


def test_by_hand() -> None:
    """100 parameters and 3 buffers; 16 samples of 50 activations, each kept twice."""
    each = cost(params=100, activations=50, buffers=3)
    assert training_bytes(each, 16, momentum=False) == 4 * (103 + 100 + 2 * 16 * 50)
    assert training_bytes(each, 16, momentum=True) == 4 * (103 + 100 + 100 + 2 * 16 * 50)


@pytest.mark.parametrize(
    ("name", "low", "high"), [("resnet20", 0.97, 1.03), ("resnet56", 0.97, 1.03), ("preact_1112", 0.8, 1.0)]
)
def test_activations_are_about_what_autograd_keeps(name: str, low: float, high: float) -> None:
    batch, shape = 2, (3, 32, 32)
    model = ModelSpec(name, shape, classes=10, seed=0).build()
    resident = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in resident:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        answer = model(torch.randn(batch, *shape))[-1].sum()
    measured = sum(storage.nbytes() for storage in kept.values())
    assert answer.requires_grad
    counted = count(model, shape)
    states = counted.bytes + 4 * counted.params
    assert low < measured / (training_bytes(counted, batch, momentum=False) - states) < high


def test_the_largest_level_that_fits() -> None:
    """Levels of 8, 16 and 32 bytes; a device with exactly as much can train it."""
    plan = plan_of(cost(params=1), cost(params=2), cost(params=4))
    memory = np.array([8.0, 15.9, 16.0, 31.0, 32.0, np.inf])
    found = memory_limits(plan, devices_of(memory), 1, momentum=False)
    assert found.tolist() == [1, 1, 2, 2, 3, 3]
    assert found.dtype == np.int64


def test_a_level_counts_only_with_all_below_it() -> None:
    """Levels of 24, 80 and 48 bytes: with 50 the third fits but not the second, which the client might draw."""
    plan = plan_of(cost(params=3), cost(params=2, activations=8), cost(params=6))
    assert memory_limits(plan, devices_of(np.array([24.0, 50.0, 90.0])), 1, False).tolist() == [1, 1, 3]


def test_a_client_that_cannot_train_anything() -> None:
    plan = plan_of(cost(params=1_000_000), cost(params=2_000_000), cost(params=4_000_000))
    memory = np.array([7.9e6, 1e6, 8e6])
    with pytest.raises(UserError) as caught:
        memory_limits(plan, devices_of(memory), 16, momentum=False)
    assert caught.value.key == "time.devices.memory_mb"
    assert str(caught.value) == (
        "time.devices.memory_mb=1: 2 of 3 clients cannot train any level: level 1 takes 8 MB with train.batch_size=16."
    )


def test_without_limits_everybody_trains_the_largest() -> None:
    endless = devices_of(np.broadcast_to(np.inf, 10**6))
    assert (memory_limits(plan_of(cost(9), cost(99)), endless, 16, True) == 2).all()


@given(
    needs=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    memory=st.lists(st.integers(1, 200), min_size=1, max_size=20),
)
def test_against_the_loop(needs: list[int], memory: list[int]) -> None:
    fitting = [
        [n for n in range(1, len(needs) + 1) if all(8 * need <= limit for need in needs[:n])]
        for limit in memory
    ]
    plan, devices = plan_of(*map(cost, needs)), devices_of(np.array(memory, dtype=float))
    if all(fitting):
        assert memory_limits(plan, devices, 4, False).tolist() == [max(each) for each in fitting]
    else:
        with pytest.raises(UserError, match=f"{fitting.count([])} of {len(memory)} clients"):
            memory_limits(plan, devices, 4, False)

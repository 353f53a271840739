"""Which levels a device's memory can train."""

from __future__ import annotations

import numpy as np

from cluster_fl.errors import UserError
from cluster_fl.nesting.cost import Cost
from cluster_fl.nesting.plan import Plan
from cluster_fl.timing.devices import Devices

BYTES = 4
# A convolution's output is kept for its norm, and what the norm and the ReLU make of it for the next convolution.
KEPT_PER_ACTIVATION = 2


def training_bytes(cost: Cost, batch_size: int, momentum: bool) -> int:
    """Bytes that training a submodel takes, in float32: its state, the gradients, SGD's momentum buffer if it has
    one, and what the forward pass of a batch keeps for the backward one (the parts that Sohoni et al., "Low-memory
    neural network training", 2019, tell apart).

    What is kept is twice ``cost.activations``, the outputs of convolutions and linear layers. What autograd really
    keeps of this package's models is 1.7 to 2.3 times that for residual networks (1.95 to 1.99 for ResNet20 to 56),
    about 1 where they have no norms, and up to 3.5 for the small ones with pooling, whose layers are small.

    Left out are the batch itself, workspaces of convolutions, gradients of activations while they pass, what the
    allocator and the framework take (tens to hundreds of MB), and what a method keeps besides, such as the received
    weights for FedProx or control variates.
    """
    copies = 2 if momentum else 1  # the gradients, and the buffer
    return cost.bytes + BYTES * (copies * cost.params + KEPT_PER_ACTIVATION * batch_size * cost.activations)


def memory_limits(plan: Plan, devices: Devices, batch_size: int, momentum: bool) -> np.ndarray:
    """The largest level for each client such that it and all smaller ones fit into its memory, (clients,), from 1.

    A larger level need not take more: a narrow and deep one may keep more activations than its wider successor.

    Raises:
        UserError: some clients cannot train the smallest level.
    """
    needs = [training_bytes(level.cost, batch_size, momentum) for level in plan.levels]
    # How many levels take no more than what a device has, from the first on.
    largest = np.searchsorted(np.maximum.accumulate(needs), devices.memory, side="right")
    without = np.count_nonzero(largest == 0)
    if without:
        right = (
            f"{without} of {len(largest)} clients cannot train any level: level 1 takes {needs[0] / 1e6:.3g} MB with "
            f"train.batch_size={batch_size}."
        )
        raise UserError("time.devices.memory_mb", f"{devices.memory.min() / 1e6:.3g}", right)
    return largest.astype(np.int64)

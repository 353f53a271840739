"""What a round asks of a device, from the submodel's own operations and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster_fl.config import Config
from cluster_fl.nesting.cost import cost
from cluster_fl.nesting.plan import Level, Plan
from cluster_fl.nesting.submodel import Submodel
from cluster_fl.timing.devices import Devices
from cluster_fl.timing.roofline import FLOPS_PER_MAC, Roofline
from cluster_fl.training.program import LocalProgram

# A backward pass costs two forwards.
FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Charge:
    """A client's round on one submodel.

    Attributes:
        forwards: what a sample costs in an epoch, in forward passes, the backward ones and the program's own included.
        flops: of one forward pass of one sample.
        down, up: bytes.
        roofline: how long a forward pass takes where memory is slow; None: ``flops`` alone count.
    """

    forwards: float
    flops: float
    down: int
    up: int
    roofline: Roofline | None = None

    @staticmethod
    def of(
        plan: Plan,
        program: LocalProgram,
        level: Level,
        submodel: Submodel | None = None,
        batch: int | None = None,
    ) -> Charge:
        """``submodel``: of another shape than the level's. ``batch``: samples in a step, for the roofline."""
        own = submodel or level.submodel
        spent = level.cost if own.shape == level.submodel.shape else cost(plan.anatomy, own)
        effort = program.effort(level)
        return Charge(
            forwards=FORWARD_AND_BACKWARD * effort.compute,
            flops=float(FLOPS_PER_MAC * spent.macs),
            down=int(spent.bytes * effort.down),
            up=int(spent.bytes * effort.up),
            roofline=None if batch is None else Roofline.of(plan.anatomy, own, batch),
        )

    def compute(self, devices: Devices, clients: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Seconds of training on so many samples, on a device that does nothing else, (clients,)."""
        speed = devices.flops[clients]
        if self.roofline is None:
            forward = self.flops / speed
        else:
            forward = self.roofline.seconds(speed, devices.memory_bandwidth[clients])
        seconds: np.ndarray = samples * (self.forwards * forward)
        return seconds


def roofline_batch(config: Config, devices: Devices) -> int | None:
    """Samples in a step, where some device's memory is slow enough to matter."""
    return config.train.batch_size if np.isfinite(devices.memory_bandwidth).any() else None


@dataclass(frozen=True)
class Work:
    """What clients have to do: arrays (clients,); seconds on undisturbed devices, and bytes."""

    download: np.ndarray
    compute: np.ndarray
    upload: np.ndarray
    down: np.ndarray
    up: np.ndarray

    @staticmethod
    def of(
        charges: Sequence[Charge],
        which: np.ndarray,
        devices: Devices,
        clients: np.ndarray,
        samples: np.ndarray,
    ) -> Work:
        """``which``: the number of each client's charge. ``samples``: that it trains on, epochs counted."""
        down = np.array([charge.down for charge in charges], dtype=np.int64)[which]
        up = np.array([charge.up for charge in charges], dtype=np.int64)[which]
        compute = np.zeros(len(clients))
        for number, charge in enumerate(charges):
            rows = which == number
            compute[rows] = charge.compute(devices, clients[rows], samples[rows])
        half = devices.latency[clients] / 2
        return Work(
            download=half + down * 8.0 / devices.down[clients],
            compute=compute,
            upload=half + up * 8.0 / devices.up[clients],
            down=down,
            up=up,
        )

    @property
    def seconds(self) -> np.ndarray:
        total: np.ndarray = self.download + self.compute + self.upload
        return total

"""Initial weights that follow from a seed alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from cluster_fl.seeding import Purpose, sequence


@contextmanager
def seeded(seed: int | None, position: int = 0) -> Iterator[None]:
    """Inside, torch's CPU generator starts from (seed, position); afterwards it is as it was before.

    ``None`` leaves the generator alone. Position 0 is the model, p the exit after p units.
    """
    if seed is None:
        yield
        return
    # fork_rng and torch.manual_seed together would still reseed the accelerators.
    with torch.random.fork_rng(devices=[]):
        state = sequence(seed, Purpose.INIT, position).generate_state(1, np.uint32)
        torch.default_generator.manual_seed(int(state[0]))
        yield

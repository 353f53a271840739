"""Running a model for its shapes alone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


@contextmanager
def meta_twin(model: Module) -> Iterator[Module]:
    """The model on the meta device, in evaluation mode and without gradients, for the length of a ``with``.

    A model that lies there already is not copied: copying a hundred layers costs more than running them.
    """
    there = all(tensor.is_meta for tensor in itertools.chain(model.parameters(), model.buffers()))
    twin = model if there else copy.deepcopy(model).to("meta")
    training = twin.training
    twin.eval()
    try:
        with torch.no_grad():
            yield twin
    finally:
        twin.train(training)

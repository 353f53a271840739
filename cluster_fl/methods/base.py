"""A method is a composition; one published method is one file beside this one.

    submodel rule x local program x aggregation

The engine and the driver only ever see these parts: nothing outside ``methods/`` asks for a method's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster_fl.config import Config
from cluster_fl.models.spec import ModelSpec
from cluster_fl.nesting.plan import Plan
from cluster_fl.training.program import LocalProgram


@dataclass(frozen=True)
class Setting:
    """What a method plans from: the configuration, the model without exits, and each client's level."""

    config: Config
    model: ModelSpec
    level_of: np.ndarray  # (clients,), from 1


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        title: name and source, for tables and help.
        options: dataclass of the method's own options (``options.*`` in a configuration).
        plan: the submodel rule; the levels, their submodels, and which tensors a level owns.
        program: the local program of a configuration, given the plan.
        variants: what ``variant: paper`` and ``variant: released`` change, as nested keys; user settings win.
    """

    title: str
    options: type
    plan: Callable[[Setting], Plan]
    program: Callable[[Config, Plan], LocalProgram]
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

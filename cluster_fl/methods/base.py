"""A method is a composition; one published method is one file beside this one.

    plan x allocation x submodel rule x local program x merge

The engine and the driver only ever see these parts: nothing outside ``methods/`` asks for a method's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster_fl.assignment import Allocation, SubmodelRule, allocation, planned
from cluster_fl.config import Config
from cluster_fl.errors import UserError
from cluster_fl.merging import Merge, streaming
from cluster_fl.models.spec import ModelSpec
from cluster_fl.nesting.plan import Plan
from cluster_fl.training.corrections import correction
from cluster_fl.training.objectives import Objective
from cluster_fl.training.program import SGD, Coverage, LocalProgram, full_coverage

VARIANTS = ("default", "paper", "released")


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
        plan: the levels, their submodels, and which tensors a level owns.
        program: what a client does with what it received, and what it keeps.
        allocation: which level each participant of a round trains.
        rule: which channels and units of that level it trains.
        merge: how the clients' updates become the next weights.
        variants: what ``variant: default``, ``paper`` and ``released`` change of the schema's defaults, as nested
            keys; user settings win.
    """

    title: str
    options: type
    plan: Callable[[Setting], Plan]
    program: Callable[[Config, Plan], LocalProgram]
    allocation: Callable[[Config, Plan], Allocation] = allocation
    rule: Callable[[Config, Plan], SubmodelRule] = planned
    merge: Callable[[Config, Plan], Merge] = streaming
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def always(**preset: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The same preset for every variant: for methods whose paper and code do not differ in it."""
    return dict.fromkeys(VARIANTS, preset)


def check_correction(config: Config, allowed: Sequence[str], why: str) -> None:
    """Raises UserError unless ``train.correction.name`` is one of ``allowed``."""
    name = config.train.correction.name
    if name not in allowed:
        raise UserError("train.correction.name", name, f"must be one of {', '.join(allowed)}: {why}")


def sgd(config: Config, plan: Plan, objective: Objective, coverage: Coverage = full_coverage) -> SGD:
    """The local program of most methods: SGD as ``train`` configures it."""
    return SGD(
        train_config=config.train,
        rounds=config.rounds,
        objective=objective,
        smallest_batch=plan.smallest_batch,
        correction=correction(config.train.correction),
        coverage=coverage,
    )

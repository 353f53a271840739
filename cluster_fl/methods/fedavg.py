"""FedAvg (McMahan et al., AISTATS 2017): one model, trained by everybody.

Clients count by their samples, as in the paper. ScaleFL's tables call FedAvg what ``options.model=smallest`` is:
the level-1 model, split by width, on all clients, whatever they could afford.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cluster_fl.config import Config
from cluster_fl.methods.base import Method, Setting, always, sgd
from cluster_fl.nesting.plan import Plan
from cluster_fl.nesting.splitting import WIDTH, keep_units, plan_of, split
from cluster_fl.nesting.tracing import anatomy
from cluster_fl.option import option
from cluster_fl.training.objectives import CrossEntropy
from cluster_fl.training.program import LocalProgram


@dataclass
class Options:
    model: str = option(
        "full", "full: the whole model; smallest: the one that level 1 affords", choices=("full", "smallest")
    )


def plan(setting: Setting) -> Plan:
    options: Options = setting.config.options
    everyone = np.ones_like(setting.level_of)
    if options.model == "full":
        return full_plan(setting)
    nested = split(setting.model, setting.config.levels, setting.level_of, WIDTH)
    return replace(nested, levels=nested.levels[:1], level_of=everyone, global_level=1, candidates=())


def full_plan(setting: Setting) -> Plan:
    """The whole model as the only level."""
    model = setting.model.with_exits(())
    traced = anatomy(model.skeleton(), model.input_shape)
    whole = keep_units(traced, [(1.0, range(traced.depth))], setting.config.levels)
    return plan_of(model, traced, whole, np.ones_like(setting.level_of))


def program(config: Config, plan: Plan) -> LocalProgram:
    return sgd(config, plan, CrossEntropy())


METHOD = Method(
    title="FedAvg (McMahan et al., AISTATS 2017)",
    options=Options,
    plan=plan,
    program=program,
    variants=always(aggregation={"weights": "samples"}),
)

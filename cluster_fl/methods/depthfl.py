"""DepthFL (Kim et al., ICLR 2023): depth prefixes whose exits all learn, from the labels and from each other.

Every level keeps the first units and answers at its own exit and at all before it; exits are shared. Clients
count alike, and local training is FedDyn's with alpha 0.1. The released code is the authors' baseline in Flower.

- Rounds count from 0 in lambda_t, which is e^-5 in the first round and 1 from round ``options.ramp_rounds`` on.
- An exit's head is one separable bottleneck at constant width (``model.exit_head: sepconv``); the code gates the
  features by attention, and widens them to the last stage's channels with a bottleneck a stage.
- Group norms have 16 groups, as in the code.
- A level also answers by its exits' ensemble, the mean of their logits, as in the code; it stands beside the
  last exit's accuracy.
- The code adds 1e-7 to a teacher's probabilities before it takes their logarithms; these are taken of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cluster_fl.config import Config
from cluster_fl.methods.base import Method, Setting, always, sgd
from cluster_fl.nesting.plan import Plan
from cluster_fl.nesting.splitting import DEPTH, split
from cluster_fl.option import option
from cluster_fl.training.objectives import MutualDistillation
from cluster_fl.training.program import LocalProgram


@dataclass
class Options:
    distil: bool = option(True, "exits learn from each other")
    ramp_rounds: int = option(300, "rounds until distillation has its full weight; 0: from the first", low=0)
    ensemble: bool = option(True, "a level also answers by the mean of its exits' logits")


def plan(setting: Setting) -> Plan:
    return split(setting.model, setting.config.levels, setting.level_of, DEPTH)


def mean_logits(logits: list[Tensor]) -> Tensor:
    """The ensemble of exits, (B, classes) each."""
    return torch.stack(logits).mean(dim=0)


def program(config: Config, plan: Plan) -> LocalProgram:
    options: Options = config.options
    objective = MutualDistillation(options.ramp_rounds / config.rounds, options.distil)
    return replace(sgd(config, plan, objective), ensemble=mean_logits if options.ensemble else None)


METHOD = Method(
    title="DepthFL (Kim et al., ICLR 2023)",
    options=Options,
    plan=plan,
    program=program,
    variants=always(
        model={"norm": "group", "norm_groups": 16, "exit_head": "sepconv"},
        train={"momentum": 0.0, "correction": {"name": "feddyn", "alpha": 0.1}},
    ),
)

"""ScaleFL: resource-adaptive federated learning with two-dimensional splits (Ilhan et al., CVPR 2023).

Decisions where the paper and its released code differ. ``variant: paper`` and ``variant: released`` change what
is said of them below; ``configs/scalefl_cifar10_released.yaml`` has the released code's exits and hold-out too.

- Loss weights i sum to 1, as in the code; Eq. 5's 1/(l(l+1)) halves them. ``paper``: Eq. 5.
- KL is summed over classes and acts from round 0, as in Eq. 5. ``released``: averaged over classes too, and
  only after a quarter of the rounds.
- The teacher gets no gradient from the KL terms. ``released``: it does.
- KL has weight 0.1, as the paper says for vision; the code's default is 0 (``options.kd_weight=0``).
- No Scaler (the code divides by the width after each convolution): before a norm by the batch it changes
  nothing but the norm's epsilon.
- Layers behind a level's exit are not sent (the code sends a full-depth model).
- Exits follow Eq. 1 (36/42/48 for ResNet110, which gives Table 1); the code's 30/38/46 do not meet it.
- A level keeps the first channels of every layer, as in both. The paper allows any subset:
  ``options.channels``, one order of a group's channels for the whole run, so that levels stay nested.
- A level's accuracy is that of its last exit; the exit mean, which the code reports, stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cluster_fl.config import Config
from cluster_fl.methods.base import Method, Setting, sgd
from cluster_fl.nesting.plan import Plan
from cluster_fl.nesting.splitting import split
from cluster_fl.nesting.windows import outward, reverse
from cluster_fl.option import option
from cluster_fl.seeding import Purpose, generator
from cluster_fl.selection import reordered
from cluster_fl.training.objectives import SelfDistillation
from cluster_fl.training.program import LocalProgram


@dataclass
class Options:
    kd_weight: float = option(0.1, "beta of Eq. 5: weight of distillation from the last exit", low=0)
    kd_temperature: float = option(3.0, "tau of Eq. 5", above=0)
    kd_reduction: str = option("batch", "KL summed over classes, or averaged", choices=("batch", "element"))
    kd_gate: float = option(0.0, "share of the rounds before distillation starts", low=0, high=1)
    kd_detach: bool = option(True, "no gradient into the teacher")
    channels: str = option(
        "first", "which channels a level keeps", choices=("first", "last", "middle", "random")
    )
    unit_weights: bool = option(True, "exit weights sum to 1; false: 1/(l(l+1)) of Eq. 5")


def plan(setting: Setting) -> Plan:
    nested = split(setting.model, setting.config.levels, setting.level_of)
    rng = generator(setting.config.seed, Purpose.CHANNELS)
    orders: dict[str, Callable[[int], np.ndarray]] = {
        "first": np.arange,
        "last": reverse,
        "middle": outward,
        "random": rng.permutation,
    }
    return reordered(nested, orders[setting.config.options.channels])


def program(config: Config, plan: Plan) -> LocalProgram:
    options: Options = config.options
    objective = SelfDistillation(
        kd_weight=options.kd_weight,
        temperature=options.kd_temperature,
        reduction=options.kd_reduction,
        gate=options.kd_gate,
        detach_teacher=options.kd_detach,
        unit_weights=options.unit_weights,
    )
    return sgd(config, plan, objective)


METHOD = Method(
    title="ScaleFL (Ilhan et al., CVPR 2023)",
    options=Options,
    plan=plan,
    program=program,
    variants={
        "paper": {"options": {"unit_weights": False}},
        "released": {"options": {"kd_reduction": "element", "kd_gate": 0.25, "kd_detach": False}},
    },
)

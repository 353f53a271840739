"""FedDrop: random channels, as many as a device's present state leaves time for (Wen et al., 2022).

The paper gives each device a dropout rate of its own, so that a round stays within a latency budget given its
compute and channel state. There is no released code, so the variants are alike.

- The rate is the largest level that the device trains and sends within ``options.deadline`` under its present load;
  the paper's is continuous.
- Channels are drawn anew for each device and round, together for layers of a channel group.
- A device with time for none trains the smallest level.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster_fl.assignment import Allocation
from cluster_fl.config import Config
from cluster_fl.methods import fedavg, feddropout
from cluster_fl.methods.base import Method, Setting, always
from cluster_fl.nesting.plan import Plan
from cluster_fl.nesting.splitting import WIDTH, split
from cluster_fl.option import option
from cluster_fl.selection import check_shared_norms
from cluster_fl.timing.deadline import Affordable


@dataclass
class Options:
    deadline: float | None = option(
        None,
        "seconds that a device has; what the median one takes for 0.6 of the channels when not given",
        above=0,
    )


def plan(setting: Setting) -> Plan:
    made = split(setting.model, setting.config.levels, setting.level_of, WIDTH)
    check_shared_norms(made)
    return made


def allocation(config: Config, plan: Plan) -> Allocation:
    return Affordable(fedavg.program(config, plan), config.options.deadline)


METHOD = Method(
    title="FedDrop (Wen et al., 2022)",
    options=Options,
    plan=plan,
    program=fedavg.program,
    allocation=allocation,
    rule=feddropout.rule,
    variants=always(levels={"rounding": "ceil"}),
)

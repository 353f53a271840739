"""Decoupled, as ScaleFL's tables define it: one model a level, split by width, trained by that level's clients alone.

There is no global model. Clients count alike, as in ScaleFL.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster_fl.methods import fedavg
from cluster_fl.methods.base import Method, Setting
from cluster_fl.nesting.plan import Plan
from cluster_fl.nesting.splitting import WIDTH, split
from cluster_fl.nesting.submodel import present


@dataclass
class Options:
    pass


def plan(setting: Setting) -> Plan:
    nested = split(setting.model, setting.config.levels, setting.level_of, WIDTH, own=present)
    return replace(nested, global_level=None)


METHOD = Method(
    title="Decoupled (baseline of Ilhan et al., CVPR 2023)",
    options=Options,
    plan=plan,
    program=fedavg.program,
)

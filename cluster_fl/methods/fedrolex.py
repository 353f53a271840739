"""FedRolex: HeteroFL's widths as windows that roll over the channels (Alam et al., NeurIPS 2022).

In round j a level that keeps c of a group's K channels keeps those at (i - j) mod K, i < c. So every channel is
trained by clients that afford no full model, and the server's model may be larger than any client's
(``levels.shares`` with 0 for the last level).

- Windows move down a channel a round, as in the code. ``paper``: up, and c is rounded down instead of up.
- Clients count alike, as in the code. The paper's weights p_n are ``aggregation.weights=samples`` where they are
  shares of the data.
- The code weights norms and linear layers by a counter that grows while it is read, so that the order of the
  uploads shows; and never updates its transformer. Both are bugs.
- Norms go by the batch's statistics, in evaluation too: per client, so that its mix of classes shows in "Local".
- Mask, classifier rows and Scaler are HeteroFL's, as in the code.
- Paper and code test the server's model alone. A smaller level answers with the window that was trained last; a
  rate that falls to nothing leaves that one untrained, since each round brings every window new channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster_fl.assignment import SubmodelRule
from cluster_fl.config import Config
from cluster_fl.methods import heterofl
from cluster_fl.methods.base import Method, Setting
from cluster_fl.nesting.plan import Plan
from cluster_fl.option import option
from cluster_fl.selection import Rolling, check_shared_norms


@dataclass
class Options(heterofl.Options):
    direction: str = option("down", "where windows move", choices=("down", "up"))


def plan(setting: Setting) -> Plan:
    made = heterofl.plan(setting)
    check_shared_norms(made)
    return made


def rule(config: Config, plan: Plan) -> SubmodelRule:
    options: Options = config.options
    return Rolling(forward=options.direction == "up")


PRESET = {"levels": {"rounding": "ceil"}, "train": {"clip_norm": 1.0}}

METHOD = Method(
    title="FedRolex (Alam et al., NeurIPS 2022)",
    options=Options,
    plan=plan,
    program=heterofl.program,
    rule=rule,
    variants={
        "default": PRESET,
        "paper": {**PRESET, "levels": {"rounding": "floor"}, "options": {"direction": "up"}},
        "released": PRESET,
    },
)

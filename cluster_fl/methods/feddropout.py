"""Federated Dropout: each client trains channels drawn at random, anew in each round (Caldas et al., 2018).

A level fixes how many channels of each layer. The paper has one level for all clients (``levels.shares``); the
code meant below is the baseline of that name in FedRolex's.

- Plain cross-entropy. ``released``: HeteroFL's mask and classifier rows, and gradients clipped to 1.
- Layers of a channel group draw together; the code draws for each, so that identity shortcuts add channels that
  are not the same (a bug).
- Training divides what is normalised by the level's width, as in the code (``options.scaler``).
- A smaller level is served with the first channels, which nobody has trained as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster_fl.assignment import SubmodelRule
from cluster_fl.config import Config
from cluster_fl.methods import heterofl
from cluster_fl.methods.base import Method
from cluster_fl.methods.fedrolex import plan
from cluster_fl.nesting.plan import Plan
from cluster_fl.option import option
from cluster_fl.selection import Drawn


@dataclass
class Options(heterofl.Options):
    mask: bool = option(False, "logits of classes that a client does not have are 0")
    label_rows: bool = option(False, "a client's classifier rows of such classes do not count")


def rule(config: Config, plan: Plan) -> SubmodelRule:
    return Drawn()


PRESET = {"levels": {"rounding": "ceil"}}

METHOD = Method(
    title="Federated Dropout (Caldas et al., 2018)",
    options=Options,
    plan=plan,
    program=heterofl.program,
    rule=rule,
    variants={
        "default": PRESET,
        "paper": PRESET,
        "released": {
            **PRESET,
            "options": {"mask": True, "label_rows": True},
            "train": {"clip_norm": 1.0},
        },
    },
)

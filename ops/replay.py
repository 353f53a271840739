"""``cluster-fl replay``: what another round policy would have made of a recorded run's draws."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cluster_fl import experiment
from cluster_fl.data import datasets
from cluster_fl.nesting.plan import Plan
from cluster_fl.records import RunFolder
from cluster_fl.replay import UNKNOWN, prepare
from cluster_fl.timing.policies import Step
from cluster_fl.timing.totals import Totals
from ops.clock_tables import show_replay

# What is known of both. Pauses are within the time that they were recorded in.
TOLD = (
    "rounds",
    "sim_time_s",
    "sim_time_hours",
    "round_s",
    "attempts",
    "fates",
    "waste",
    "bytes_down",
    "bytes_up",
)
OF_LEVEL = ("level", "clients", "attempts", "fates", "waste", "bytes_down", "bytes_up", "region")


def replay(args: argparse.Namespace) -> int:
    """The command. Nothing is written."""
    path, *overrides = args.words
    made = prepare(RunFolder(Path(path).resolve()), overrides)
    plan = experiment.make_plan(made.config, datasets.describe(made.config.data))
    content = {
        "recorded": _measure(plan, made.recorded.time.policy.name, made.steps),
        "replayed": _measure(plan, made.config.time.policy.name, made.replayed()),
        "notes": made.notes,
        "unknown": UNKNOWN,
    }
    if args.json:
        print(json.dumps(content, indent=2))
    elif not args.quiet:
        show_replay(content)
    return 0


def _measure(plan: Plan, policy: str, steps: Iterable[Step]) -> dict[str, Any]:
    totals = Totals(plan, len(plan.level_of))
    for step in steps:
        totals.add(step, np.zeros((3, len(step.ended.attempts))))
    found = totals.as_json(asynchronous=False)
    levels = [{key: level[key] for key in OF_LEVEL} for level in found["levels"]]
    return {"policy": policy, **{key: found[key] for key in TOLD}, "levels": levels}

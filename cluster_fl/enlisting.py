"""From what the clock decided to cohorts: those whose update will count, and nobody else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cluster_fl.assignment import SubmodelRule, assign
from cluster_fl.nesting.plan import Assignment
from cluster_fl.rounds import Round
from cluster_fl.timing.attempts import Fate
from cluster_fl.timing.dispatch import first_half
from cluster_fl.timing.policies import Step
from cluster_fl.training.cohort import Cohort, Terms, form
from cluster_fl.training.program import LocalProgram


def enlist(round: Round, step: Step, rule: SubmodelRule, program: LocalProgram, keep: bool) -> list[Cohort]:
    """The cohorts of a round. Submodels are those of the round that a client started in."""
    ended, scale = step.ended, np.zeros(len(step.ended.attempts))
    scale[ended.merged] = step.scale
    chosen: list[tuple[Assignment, Terms]] = []
    for version in np.unique(ended.attempts.version):
        # A rule may be joint, so it is asked for everybody who is known to have started then.
        rows = np.flatnonzero(ended.attempts.version == version)
        own = ended.attempts.at(rows)
        # Who went over to a smaller level has two submodels, of one nest.
        moved = np.flatnonzero(own.first != own.level)
        who, levels = np.append(own.client, own.client[moved]), np.append(own.level, own.first[moved])
        made = assign(replace(round.seen_at(int(version)), participants=who), levels, rule)
        first = dict(zip(moved.tolist(), made[len(own) :], strict=True))
        for at, row in enumerate(rows.tolist()):
            if ended.fate[row] == Fate.MERGED:
                epochs = int(own.epochs[at])
                before = (first[at], first_half(epochs)) if at in first else None
                chosen.append((made[at], Terms(int(version), float(scale[row]), epochs, before)))
    chosen.sort(key=lambda one: (one[0].client, one[1].version))
    assignments, terms = [one for one, _ in chosen], [own for _, own in chosen]
    return form(round, assignments, program, keep, terms)

"""FedDF: ensemble distillation for model fusion (Lin et al., NeurIPS 2020): all clients' models teach the server's.

Clients of one architecture, which are those of one level (split by width, as ScaleFL's comparison has it), are
averaged as in Decoupled. Each average then learns from the mean logits of all clients of the round, whatever
their level, on the server's unlabelled samples (``data.public``, ``data.public_name``). The largest level's model is
the global one.

Decisions where the paper and its released code differ:

- The mean of a level weighs clients by samples. ``variant: released``: it does not.
- Teachers are averaged by logits (AVGLOGITS), T = 1, as its scripts have it; the code's default averages losses.
- At most 10,000 steps, 1,000 without a gain, as its scripts have it; the code's default is 2,000.
- A level's average is no candidate for the best student. ``options.count_start``: it is, as the code can.
- ``options.drop_worst`` leaves out teachers below 1.2 times chance on the held-out part, as in the code; but the code
  leaves them out of the average too, and finds outliers where nobody is that bad.

And where we go our own way:

- Public samples are not cropped and mirrored: so teachers answer once a round, not once a batch.
- Teachers with ``model.norm: batch`` answer by the statistics of fixed batches; the code's have running ones
  (``model.norm: per_level``).
- A level without a client in the round keeps its model, as in the code.
- The server's work takes no simulated time; without ``data.held_out`` every student learns to the end.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cluster_fl.aggregation.server import server_step
from cluster_fl.config import Config
from cluster_fl.errors import UserError
from cluster_fl.merging import Merge, Phase, Phases, Streaming, refusing, sent
from cluster_fl.methods import decoupled, fedavg
from cluster_fl.methods.base import Method, Setting
from cluster_fl.nesting.plan import Plan
from cluster_fl.option import option
from cluster_fl.rounds import Round
from cluster_fl.training.cohort import Cohort
from cluster_fl.training.distillation import TEACHERS, Distil, Distillation, Taught, Teach

# A teacher has to be better than chance by this factor.
ABOVE_CHANCE = 1.2


@dataclass
class Options(Distillation):
    drop_worst: bool = option(False, "clients that hardly beat chance on the held-out part do not teach")


def plan(setting: Setting) -> Plan:
    options, data = setting.config.options, setting.config.data
    if options.steps and data.public < 2:
        right = "must be at least 2: FedDF distils on samples of the server's, e.g. data.public=500."
        raise UserError("data.public", data.public, right)
    if options.drop_worst and not data.held_out:
        raise UserError("options.drop_worst", True, "needs a held-out part to judge by (data.held_out).")
    apart = decoupled.plan(setting)
    return replace(apart, global_level=len(apart.levels))


@dataclass(frozen=True)
class Fusion(Streaming):
    """The mean of each level, and its distillation from all clients.

    Attributes:
        least: the accuracy on the held-out part below which a client does not teach.
    """

    settings: Distillation
    least: float
    keeps_updates = True
    asynchronous = False

    def phases(self, round: Round, cohorts: Sequence[Cohort]) -> Phases:
        merged = yield from super().phases(round, cohorts)
        if not self.settings.steps:
            return merged
        logits, refused = yield from self._taught(round, cohorts)
        merged = replace(merged, reports=refusing(round, merged.reports, refused))
        if logits is None:
            return merged
        present = sorted({cohort.level for cohort in cohorts})
        students = [self._student(round, level) for level in present]
        trained = yield Phase("distil", students, merged.state | {TEACHERS: logits})
        state = dict(merged.state)
        for level, weights in zip(present, trained, strict=True):
            state |= {round.plan.key(level, name): array for name, array in weights.items()}
        return replace(merged, state=state)

    def _taught(
        self, round: Round, cohorts: Sequence[Cohort]
    ) -> Generator[Phase, list[Any], tuple[np.ndarray | None, list[int]]]:
        """Mean logits of all teachers, float32 (public, classes), None if there is none; and who was refused."""
        size, public = self.settings.batch_size, len(round.population.shares.public)
        tasks = []
        for cohort in cohorts:
            work = public * len(cohort.members) * round.plan.level(cohort.level).cost.macs / 3
            tasks.append(Teach(cohort, size, self.least, work))
        total, count = np.zeros((public, round.plan.model.classes)), 0

        def take(taught: Taught) -> tuple[int, ...]:
            nonlocal total, count
            total, count = total + taught.logits, count + taught.teachers
            return taught.refused

        refused = yield Phase("teach", tasks, sent(round, cohorts, self.step), take)
        unit = cohorts[0].extra_weight if cohorts else 1.0
        mean = (total / (count * unit)).astype(np.float32) if count else None
        return mean, [client for some in refused for client in some]

    def _student(self, round: Round, level: int) -> Distil:
        own = round.plan.level(level)
        work = float(self.settings.steps * self.settings.batch_size * own.cost.macs)
        return Distil(round.number, level, own.submodel, self.settings, work)


def merge(config: Config, plan: Plan) -> Merge:
    options: Options = config.options
    least = ABOVE_CHANCE / plan.model.classes if options.drop_worst else 0.0
    return Fusion(server_step(config, plan), options, least)


METHOD = Method(
    title="FedDF (Lin et al., NeurIPS 2020)",
    options=Options,
    plan=plan,
    program=fedavg.program,
    merge=merge,
    variants={
        "default": {"aggregation": {"weights": "samples"}},
        "paper": {"aggregation": {"weights": "samples"}},
        "released": {"aggregation": {"weights": "uniform"}},
    },
)

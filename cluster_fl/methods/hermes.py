"""Hermes: personalised subnetworks of structured sparsity (Li et al., MobiCom 2021).

Every client has a model of its own and prunes it by itself; clients share what all of a round's participants still
have. There is no official code; what the paper's text leaves open is decided as in Plato's implementation, or said.

- After training, a client that is right often enough (``options.threshold``, on its held-out part, or on its training
  part if it has none) prunes ``options.step`` of the channels that each group has left, to the nearest number, by the
  L1 norm of what writes to them, until ``options.target`` of a group is gone; never more. Groups, not layers, since
  what meets in a residual sum must stay aligned.
- It then sends what is left. An element is averaged, by samples, where every participant of the round still has it;
  all other elements stay the client's own. What one client alone trained in a round is its own anyway.
- There is no global model. The server's weights are the last averages, beside the first weights where there was none;
  a client starts from them, unpruned, in its first round, and answers with them before that.
- A client that does not take part keeps its model as it was, averages included.
- Bytes and operations are those of the submodel that the round began with: a pruning saves from the next round on. The
  look at the held-out part is free. Which channels are left costs nothing: the client knows.
- ``train.momentum`` and all else of a client's training is as in FedAvg; Plato's example sets no other.
- Norms use the batch's statistics, or groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster_fl.aggregation.nested import Mean
from cluster_fl.aggregation.server import ServerStep, server_step
from cluster_fl.assignment import Planned
from cluster_fl.config import Config
from cluster_fl.errors import UserError
from cluster_fl.evaluation import right_answers
from cluster_fl.merging import Merge, Merged, Phases, collect, sent
from cluster_fl.methods.base import Method, Setting, always, check_correction, sgd
from cluster_fl.methods.fedavg import full_plan
from cluster_fl.models.layered import Layered
from cluster_fl.nesting.extraction import load, read
from cluster_fl.nesting.importance import numbers, prune, scores
from cluster_fl.nesting.plan import Plan, State
from cluster_fl.nesting.submodel import Submodel, kept, lengths
from cluster_fl.option import option
from cluster_fl.rounds import Round
from cluster_fl.selection import check_shared_norms
from cluster_fl.training.cohort import Cohort
from cluster_fl.training.objectives import CrossEntropy
from cluster_fl.training.own import (
    KeepsOwn,
    check_own_norms,
    own_submodel,
    own_tensors,
    pack,
    put_own,
    within,
)
from cluster_fl.training.program import Context, LocalProgram, Trained

CORRECTIONS = ("none", "proximal", "scaffold")


@dataclass
class Options:
    threshold: float = option(0.5, "accuracy from which a client prunes", low=0, high=1)
    target: float = option(0.5, "share of a group's channels that may be pruned altogether", low=0, high=1)
    step: float = option(0.2, "share of a group's remaining channels that is pruned at a time", low=0, high=1)


def plan(setting: Setting) -> Plan:
    check_correction(setting.config, CORRECTIONS, "FedDyn's server expects the sum of all updates.")
    if setting.model.norm == "group":
        right = "must be another policy: what is left of a group's channels need not fall into its groups."
        raise UserError("model.norm", setting.model.norm, right)
    whole = full_plan(setting)
    check_shared_norms(whole)
    check_own_norms(whole.model.norm)
    return replace(whole, global_level=None, serves=False)


class Own(Planned):
    """What is left of each participant's own model."""

    resizes = True

    def submodels(self, round: Round, levels: np.ndarray) -> list[Submodel]:
        owns = (own_submodel(round.personal(int(client)), round.plan) for client in round.participants)
        whole = super().submodels(round, levels)
        return [first if own is None else own for own, first in zip(owns, whole, strict=True)]


@dataclass(frozen=True)
class Client(KeepsOwn):
    """Trains the client's own model, and then prunes it."""

    threshold: float
    target: float
    step: float

    @property
    def keeps_state(self) -> bool:
        return True

    def train(self, model: Layered, context: Context) -> Trained:
        own = own_tensors(context.personal)
        if own:
            load(model, own)
            context = replace(context, received=own)
        done = super().train(model, context)
        pruned = self._pruned(model, context) if done.steps else context.submodel
        if pruned == context.submodel:
            return done
        left, shapes = within(context, pruned), lengths(context.worker.plan.anatomy, pruned)
        tensors = {name: array[left[name]].reshape(shapes[name]) for name, array in read(model).items()}
        return replace(
            done,
            coverage={name: mask.astype(np.float64) for name, mask in left.items()},
            personal=(done.personal or {}) | pack(context.level.number, pruned, tensors),
        )

    def _pruned(self, model: Layered, context: Context) -> Submodel:
        """The submodel that stays: the same one if the client prunes nothing."""
        shares, submodel = context.worker.shares, context.submodel
        judged = shares.held_out[context.client]
        right = right_answers(model.eval(), context.worker, judged if len(judged) else context.rows)
        if not len(right) or right[:, -1].mean() < self.threshold:
            return submodel
        anatomy = context.worker.plan.anatomy
        counts = [
            self._count(len(numbers(own)), group.size)
            for own, group in zip(submodel.channels, anatomy.groups, strict=True)
        ]
        return prune(submodel, scores(anatomy, submodel, read(model)), counts)

    def _count(self, left: int, size: int) -> int:
        """Channels that stay of those left of a group; the step is rounded to the nearest number."""
        least = kept(size, 1 - self.target, "ceil")
        return min(left, max(left - math.floor(self.step * left + 0.5), least))


def program(config: Config, plan: Plan) -> LocalProgram:
    options: Options = config.options
    return Client(sgd(config, plan, CrossEntropy()), options.threshold, options.target, options.step)


@dataclass(frozen=True)
class Intersection(Merge):
    """Averages what all participants have, and gives the averages to all of them."""

    step: ServerStep
    asynchronous = False

    def initial(self, state: State) -> State:
        return self.step.initial(state)

    def phases(self, round: Round, cohorts: Sequence[Cohort]) -> Phases:
        collected = yield from collect(round, cohorts, sent(round, cohorts, self.step))
        agreed = {key: total == collected.mean.total for key, total in collected.mean.weights.items()}
        mean = _only(collected.mean, agreed)
        state, memory = self.step.apply(round.state, mean, collected.extra, round.memory)
        personal = {
            client: put_own(own, round.plan, state, agreed) for client, own in collected.personal.items()
        }
        return Merged(state, memory, collected.reports, personal)


def _only(mean: Mean, agreed: dict[str, np.ndarray]) -> Mean:
    """The mean where ``agreed``; as if nobody spoke for anything else."""
    updates = {key: np.where(agreed[key], update, 0.0) for key, update in mean.updates.items()}
    weights = {key: np.where(agreed[key], weight, 0.0) for key, weight in mean.weights.items()}
    return replace(mean, updates=updates, weights=weights)


METHOD = Method(
    title="Hermes (Li et al., MobiCom 2021)",
    options=Options,
    plan=plan,
    program=program,
    rule=lambda config, plan: Own(),
    merge=lambda config, plan: Intersection(server_step(config, plan)),
    variants=always(aggregation={"weights": "samples"}),
)

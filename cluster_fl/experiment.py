"""Everything that a configuration determines before the first round."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cluster_fl import assignment, methods
from cluster_fl.assignment import Allocation, SubmodelRule
from cluster_fl.config import Config, level_count
from cluster_fl.data import datasets
from cluster_fl.data.datasets import Dataset
from cluster_fl.data.partition import Shares, partition
from cluster_fl.errors import RunError, UserError
from cluster_fl.merging import Merge
from cluster_fl.methods import Setting
from cluster_fl.models.spec import ModelSpec
from cluster_fl.nesting import levels
from cluster_fl.nesting.cost import count
from cluster_fl.nesting.extraction import extract, read
from cluster_fl.nesting.plan import Plan, State
from cluster_fl.population import Population
from cluster_fl.seeding import Purpose, generator, sequence
from cluster_fl.timing import availability, devices, policies
from cluster_fl.timing.deadline import Affordable
from cluster_fl.timing.dispatch import Clock
from cluster_fl.timing.fitting import memory_limits
from cluster_fl.timing.policies import Policy
from cluster_fl.training.program import LocalProgram


@dataclass(frozen=True)
class Experiment:
    config: Config
    dataset: Dataset
    plan: Plan
    population: Population

    @cached_property
    def program(self) -> LocalProgram:
        """What every client runs."""
        return methods.get(self.config.method).program(self.config, self.plan)

    @cached_property
    def allocation(self) -> Allocation:
        """Which level each participant trains."""
        levels, method = self.config.levels, methods.get(self.config.method)
        if levels.draw != "fixed" and method.allocation is not assignment.allocation:
            right = f"must be fixed: {self.config.method} decides by itself which level a participant trains."
            raise UserError("levels.draw", levels.draw, right)
        if levels.draw == "deadline":
            return Affordable(self.program, levels.deadline_s)
        return method.allocation(self.config, self.plan)

    @cached_property
    def rule(self) -> SubmodelRule:
        """Which submodel of its level each participant trains."""
        return methods.get(self.config.method).rule(self.config, self.plan)

    @cached_property
    def merge(self) -> Merge:
        """How the clients' updates become the next weights."""
        return methods.get(self.config.method).merge(self.config, self.plan)

    @cached_property
    def clock(self) -> Clock:
        """What a round takes its clients."""
        return Clock(self.config, self.plan, self.population, self.program, self.allocation, self.rule)

    @cached_property
    def policy(self) -> Policy:
        """When a round ends, and whose update counts."""
        return policies.make(self.config.time.policy, self.config.clients.per_round)

    def sha256(self) -> str:
        """Hash of the plan, every client's level and every client's rows.

        A resumed run makes them again; they must come out as they were, whatever libraries it finds.
        """
        digest = hashlib.sha256(json.dumps(self.plan.as_json(), sort_keys=True).encode())
        digest.update(np.ascontiguousarray(self.plan.level_of).tobytes())
        digest.update(np.ascontiguousarray(self.population.tier_of).tobytes())
        shares = self.population.shares
        for rows in (*shares.train, *shares.held_out, *shares.test):
            digest.update(np.ascontiguousarray(rows).tobytes() + b"|")
        if len(shares.public):
            digest.update(np.ascontiguousarray(shares.public).tobytes() + b"|public")
        return digest.hexdigest()

    def initial_state(self) -> State:
        """The first global weights, float32, by name."""
        return self.plan.initial_state(read(self.plan.model.build()))


def prepare(config: Config) -> Experiment:
    """Loads the data, plans the split and spreads the data over the clients.

    Raises:
        UserError: the data is missing, the split is impossible, a level has no client, ...
    """
    plan = make_plan(config, datasets.describe(config.data))
    dataset = datasets.load(config.data, config.seed)
    shares = partition(dataset, config.data, config.clients.count, config.seed)
    return checked(Experiment(config, dataset, plan, populate(config, plan, shares)))


def checked(made: Experiment) -> Experiment:
    """The same; what cannot be combined is told before anything is written.

    Raises:
        UserError: the method refuses an option, or does not go with the round policy.
    """
    for part in ("program", "allocation", "rule", "merge", "clock", "policy"):
        getattr(made, part)
    _check_policy(made)
    return made


def populate(config: Config, plan: Plan, shares: Shares, samples: np.ndarray | None = None) -> Population:
    """The clients with their devices.

    Args:
        samples: how many each client trains on, (clients,), where nobody's rows are known.

    Raises:
        UserError: a device has not the memory for the smallest level, a table cannot be read, ...
    """
    count, tier_of = config.clients.count, tiers(config)
    made = devices.make(config.time.devices, config.seed, count, tier_of, level_count(config.levels))
    return Population(
        shares=shares,
        samples=np.array([len(rows) for rows in shares.train]) if samples is None else samples,
        tier_of=tier_of,
        largest=memory_limits(plan, made, config.train.batch_size, config.train.momentum > 0),
        devices=made,
        availability=availability.make(config.time.availability, config.seed, count),
    )


def _check_policy(made: Experiment) -> None:
    policy, name = made.config.time.policy, made.config.method
    if policy.name == "deadline" and policy.deadline_s is not None:
        fastest = made.clock.fastest()
        if fastest > policy.deadline_s:
            right = f"is met by nobody: the fastest client needs {fastest:.3g} s."
            raise UserError("time.policy.deadline_s", policy.deadline_s, right)
    if policy.asynchronous and not made.merge.asynchronous:
        right = (
            f"must be a synchronous one: {name} needs all clients of a round to start from the same weights."
        )
        raise UserError("time.policy.name", policy.name, right)
    correction = made.config.train.correction.name
    if policy.switch and not made.rule.nests:
        right = f"must be false: a level of {name} does not contain the next smaller one."
        raise UserError("time.policy.switch", True, right)
    if policy.switch and correction not in ("none", "proximal"):
        right = f"must be false with train.correction.name={correction}, whose variates are those of one submodel."
        raise UserError("time.policy.switch", True, right)


def tiers(config: Config) -> np.ndarray:
    """Each client's device class, (clients,), from 1: the level that its budget affords."""
    speed = None
    if config.levels.order == "speed":
        speed = devices.make(config.time.devices, config.seed, config.clients.count, None, 0).flops
    return levels.assign(config.levels, config.clients.count, generator(config.seed, Purpose.LEVELS), speed)


def make_plan(config: Config, shape: tuple[tuple[int, int, int], int]) -> Plan:
    """The split configuration alone; needs the samples' shape and the number of classes, not the data."""
    plan = methods.get(config.method).plan(Setting(config, model_spec(config, *shape), tiers(config)))
    _check_batches(config, plan)
    _verify(plan)
    return plan


def _check_batches(config: Config, plan: Plan) -> None:
    # Batch normalisation has nothing to normalise in a single sample.
    right = f"must be at least 2: {plan.model.name} normalises by the batch."
    if plan.batch_norms and config.train.batch_size < 2:
        raise UserError("train.batch_size", config.train.batch_size, right)
    if plan.evaluates_batches and config.evaluate.batch_size < 2:
        raise UserError("evaluate.batch_size", config.evaluate.batch_size, right)


def model_spec(config: Config, input_shape: tuple[int, int, int], classes: int) -> ModelSpec:
    """The configured model for samples (C, H, W), without exits."""
    return ModelSpec(
        name=config.model.name,
        input_shape=input_shape,
        classes=classes,
        seed=int(sequence(config.seed, Purpose.INIT).generate_state(1, np.uint32)[0]),
        norm=config.model.norm,
        norm_groups=config.model.norm_groups,
        exit_head=config.model.exit_head,
        options=dict(config.model.options),
    )


def _verify(plan: Plan) -> None:
    """The costs that the search added up must be what fvcore counts on each level's real module."""
    model = plan.model.build()
    for level in plan.levels:
        counted = count(extract(model, plan.anatomy, level.submodel), plan.model.input_shape)
        if counted != level.cost:
            raise RunError(f"level {level.number}: planned {level.cost}, but fvcore counts {counted}.")

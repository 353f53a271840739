"""The clock without training: what a run's rounds would take and who would count, from the configuration alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from cluster_fl import experiment
from cluster_fl.assignment import Planned
from cluster_fl.config import Config
from cluster_fl.data import datasets
from cluster_fl.data.datasets import Dataset
from cluster_fl.data.partition import Shares, partition
from cluster_fl.errors import UserError
from cluster_fl.experiment import Experiment
from cluster_fl.nesting.plan import Plan, State
from cluster_fl.rounds import Round
from cluster_fl.timing.policies import Standing, Step

# Training samples of the data sets, for planning where their files are not.
TRAINING_SAMPLES = {
    "digits": 1437,
    "mnist": 60_000,
    "fashion_mnist": 60_000,
    "cifar10": 50_000,
    "cifar100": 50_000,
    "har": 7352,
}


def prepare(config: Config) -> tuple[Experiment, list[str]]:
    """A run's plan and population without its data, and in a line each what is only assumed of them.

    Raises:
        UserError: as for a real run; or what the clock charges follows from weights, which are not there.
    """
    return populated(config, experiment.make_plan(config, datasets.describe(config.data)))


def populated(config: Config, plan: Plan) -> tuple[Experiment, list[str]]:
    """As :func:`prepare`, for a plan that there is already."""
    samples, notes = _samples(config)
    shape, classes = datasets.describe(config.data)
    empty = Shares((), (), ())
    population = experiment.populate(config, plan, empty, samples)
    nothing = np.zeros((0, *shape[1:], shape[0]), dtype=np.uint8)
    labels = np.zeros(0, dtype=np.int64)
    data = Dataset(config.data.name, nothing, labels, 0, classes, 1.0, (), (), 0, False)
    made = experiment.checked(Experiment(config, data, plan, population))
    if made.rule.resizes:
        right = "must be another: how large its submodels are follows from the weights, which simulate does not have."
        raise UserError("method", config.method, right)
    if type(made.rule) is not Planned:
        notes.append(
            f"which channels a client of {config.method} holds varies; the coverage is that of the levels' sizes, "
            "as if each level always held the plan's own"
        )
    return made, notes


def steps(made: Experiment) -> Iterator[Step]:
    """The rounds of a run, as its driver would see them: ``config.rounds`` steps of its policy."""
    now = Standing()
    for number in range(made.config.rounds):
        step = made.policy.step(now, made.clock.dispatch(view(made, number)))
        yield step
        now = step.after


def view(made: Experiment, number: int) -> Round:
    """A round as the clock sees it: without weights."""
    unknown = Unknown(made.config.method)
    return Round(
        number=number,
        config=made.config,
        plan=made.plan,
        population=made.population,
        state=unknown,
        memory=unknown,
        personal=lambda client: unknown,
    )


def under(made: Experiment, config: Config) -> Experiment:
    """The same plan and population with another ``time.policy``."""
    return experiment.checked(replace(made, config=config))


class Unknown(State):
    """Weights that nobody has; whoever reads one is told so."""

    def __init__(self, method: str) -> None:
        self._method = method

    def __missing__(self, key: str) -> np.ndarray:
        right = f"must be another: the clock would need its weights ({key}), which simulate does not have."
        raise UserError("method", self._method, right)


def _samples(config: Config) -> tuple[np.ndarray, list[str]]:
    """Training samples of each client, int64 (clients,), and what is only assumed."""
    count, data = config.clients.count, config.data
    if config.clients.samples is not None:
        return np.broadcast_to(np.int64(config.clients.samples), (count,)), []
    there = TRAINING_SAMPLES[data.name] - data.held_out - (data.public if data.public_name is None else 0)
    if count > there:
        right = f"must be given, e.g. 100: {data.name} has {there} training samples for {count} clients."
        raise UserError("clients.samples", None, right)
    try:
        dataset = datasets.load(replace(data, download=False), config.seed)
    except UserError as error:
        if error.key != "data.root":
            raise
        even = np.full(count, there // count, dtype=np.int64)
        even[: there % count] += 1
        return even, [f"{data.name} is not in {data.root}: its {there} training samples are spread evenly"]
    shares = partition(dataset, data, count, config.seed)
    return np.array([len(rows) for rows in shares.train]), []

"""What the server makes of a round's mean update: the next weights, and its own memory.

An element for which nobody spoke in the round keeps its bits, and so do its moments and variates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from cluster_fl.aggregation.nested import Mean, moved
from cluster_fl.config import Config, ServerConfig
from cluster_fl.nesting.plan import Plan, State

# In the memory, before a tensor's key. The variate is the one that is published.
FIRST, SECOND, DYNAMIC, CONTROL = "first/", "second/", "dynamic/", "control/"


class ServerStep(ABC):
    def initial(self, state: State) -> State:
        """The memory before round 0."""
        return {}

    def published(self, memory: State) -> State:
        """The part of the memory that clients need besides the weights."""
        return {}

    def sent(self, state: State, memory: State) -> State:
        """What clients start from; the weights themselves where they need nothing besides."""
        published = self.published(memory)
        return state | published if published else state

    @abstractmethod
    def apply(
        self, state: State, mean: Mean, extra: Mapping[str, np.ndarray], memory: State
    ) -> tuple[State, State]:
        """The next weights and memory.

        Args:
            extra: sum over the round's clients of what they sent besides their updates, by the state's key.
        """


@dataclass(frozen=True)
class Move(ServerStep):
    """w + lr * mean update; FedAvg with lr 1."""

    lr: float = 1.0

    def apply(
        self, state: State, mean: Mean, extra: Mapping[str, np.ndarray], memory: State
    ) -> tuple[State, State]:
        return moved(state, {key: self.lr * update for key, update in mean.updates.items()}), memory


@dataclass(frozen=True)
class Adaptive(ServerStep):
    """FedAdagrad, FedAdam and FedYogi (Reddi et al., ICLR 2021, Algorithm 2).

    m = beta1 m + (1 - beta1) D;  v by the optimizer;  w + lr m / (sqrt(v) + tau), with v = tau^2 at first.
    """

    config: ServerConfig

    def initial(self, state: State) -> State:
        first = {FIRST + key: np.zeros(array.shape) for key, array in state.items()}
        return first | {SECOND + key: np.full(a.shape, self.config.tau**2) for key, a in state.items()}

    def apply(
        self, state: State, mean: Mean, extra: Mapping[str, np.ndarray], memory: State
    ) -> tuple[State, State]:
        config, next_memory, steps = self.config, dict(memory), {}
        for key, update in mean.updates.items():
            spoken = mean.weights[key] > 0
            m, v = memory[FIRST + key], memory[SECOND + key]
            m = np.where(spoken, config.beta1 * m + (1 - config.beta1) * update, m)
            v = np.where(spoken, self._second(v, update**2), v)
            next_memory |= {FIRST + key: m, SECOND + key: v}
            steps[key] = np.where(spoken, config.lr * m / (np.sqrt(v) + config.tau), 0.0)
        return moved(state, steps), next_memory

    def _second(self, v: np.ndarray, square: np.ndarray) -> np.ndarray:
        rest = 1 - self.config.beta2
        changes = {
            "adagrad": square,
            "adam": rest * (square - v),
            "yogi": -rest * square * np.sign(v - square),
        }
        result: np.ndarray = v + changes[self.config.optimizer]
        return result


@dataclass(frozen=True)
class FedDyn(ServerStep):
    """The server of FedDyn (Acar et al., ICLR 2021): h falls by alpha/N sum of updates; w = mean - h/alpha.

    The clients' part is :class:`cluster_fl.training.corrections.DynamicRegularisation`. ``clients`` is N; with
    equal weights, the sum of updates is the mean times the number of clients that spoke.
    """

    alpha: float
    clients: int

    def initial(self, state: State) -> State:
        return {DYNAMIC + key: np.zeros(array.shape) for key, array in state.items()}

    def apply(
        self, state: State, mean: Mean, extra: Mapping[str, np.ndarray], memory: State
    ) -> tuple[State, State]:
        next_memory, steps = dict(memory), {}
        for key, update in mean.updates.items():
            spoken = mean.weights[key] > 0
            count = mean.count * mean.weights[key] / mean.total if mean.count else 0.0
            h = memory[DYNAMIC + key] - self.alpha / self.clients * count * update
            next_memory[DYNAMIC + key] = h
            steps[key] = np.where(spoken, update - h / self.alpha, 0.0)
        return moved(state, steps), next_memory


@dataclass(frozen=True)
class Controlled(ServerStep):
    """Any step, and SCAFFOLD's server variate: c grows by 1/N of the clients' changes, coordinate by coordinate."""

    inner: ServerStep
    clients: int

    def initial(self, state: State) -> State:
        zeros = {CONTROL + key: np.zeros(array.shape, np.float32) for key, array in state.items()}
        return self.inner.initial(state) | zeros

    def published(self, memory: State) -> State:
        return {key: value for key, value in memory.items() if key.startswith(CONTROL)}

    def apply(
        self, state: State, mean: Mean, extra: Mapping[str, np.ndarray], memory: State
    ) -> tuple[State, State]:
        state, rest = self.inner.apply(state, mean, extra, memory)
        controls = {
            key: (value + extra[key.removeprefix(CONTROL)] / self.clients).astype(np.float32)
            if key.removeprefix(CONTROL) in extra
            else value
            for key, value in self.published(memory).items()
        }
        return state, rest | controls


@dataclass(frozen=True)
class OnParameters(ServerStep):
    """A step for what is trained; what is measured (running statistics) becomes its plain mean.

    ``measured``: keys of the latter.
    """

    inner: ServerStep
    measured: frozenset[str]

    def initial(self, state: State) -> State:
        return self.inner.initial({key: a for key, a in state.items() if key not in self.measured})

    def published(self, memory: State) -> State:
        return self.inner.published(memory)

    def apply(
        self, state: State, mean: Mean, extra: Mapping[str, np.ndarray], memory: State
    ) -> tuple[State, State]:
        trained = {key: update for key, update in mean.updates.items() if key not in self.measured}
        rest = {key: update for key, update in mean.updates.items() if key in self.measured}
        after, memory = self.inner.apply(state, replace(mean, updates=trained), extra, memory)
        return moved(after, rest), memory


def server_step(config: Config, plan: Plan) -> ServerStep:
    """The step that ``server`` and ``train.correction`` name."""
    name, step = config.train.correction.name, _step(config)
    if name == "scaffold":
        step = Controlled(step, config.clients.count)
    return OnParameters(step, plan.measured) if plan.measured else step


def _step(config: Config) -> ServerStep:
    if config.train.correction.name == "feddyn":
        return FedDyn(config.train.correction.alpha, config.clients.count)
    return Move(config.server.lr) if config.server.optimizer == "none" else Adaptive(config.server)

"""A client's own model among what it keeps between rounds: its tensors, and the channels that they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from cluster_fl.errors import UserError
from cluster_fl.models.layered import Layered
from cluster_fl.nesting.extraction import load, read
from cluster_fl.nesting.importance import numbers
from cluster_fl.nesting.plan import Level, Plan, State
from cluster_fl.nesting.submodel import Submodel
from cluster_fl.nesting.windows import leading
from cluster_fl.training.program import Answer, Context, Effort, LocalProgram, Trained

# Keys: a tensor's name behind the first, a channel group's number behind the second.
TENSOR, CHANNELS, LEVEL = "own/", "channels/", "level"


def pack(level: int, submodel: Submodel, tensors: Mapping[str, np.ndarray]) -> State:
    """A model as a client keeps it; ``tensors`` are in the submodel's coordinates, by name."""
    channels = {f"{CHANNELS}{group}": numbers(own) for group, own in enumerate(submodel.channels)}
    return {LEVEL: np.array([level])} | channels | {TENSOR + name: array for name, array in tensors.items()}


def own_submodel(personal: Mapping[str, np.ndarray], plan: Plan) -> Submodel | None:
    """Which submodel the client's own model is; None if it has none yet."""
    if LEVEL not in personal:
        return None
    submodel = plan.level(int(personal[LEVEL][0])).submodel
    orders = [personal[f"{CHANNELS}{group}"] for group in range(len(submodel.channels))]
    return replace(submodel, channels=tuple(leading(order, len(order)) for order in orders))


def own_tensors(personal: Mapping[str, np.ndarray]) -> State:
    """The tensors of the client's own model, by name; none if it has none yet."""
    return {key.removeprefix(TENSOR): array for key, array in personal.items() if key.startswith(TENSOR)}


def own_model(context: Context) -> Layered | None:
    """The client's own model in evaluation mode; None if it has none yet."""
    submodel = own_submodel(context.personal, context.worker.plan)
    if submodel is None:
        return None
    model = context.worker.module(submodel)
    load(model, own_tensors(context.personal))
    return model.eval()


def put_own(
    personal: State, plan: Plan, state: Mapping[str, np.ndarray], chosen: Mapping[str, np.ndarray]
) -> State:
    """What the client keeps, its own model taking the state's values where ``chosen`` (bool, by the state's key)."""
    submodel = own_submodel(personal, plan)
    if submodel is None:
        return personal
    holding, taken = plan.holding(int(personal[LEVEL][0]), submodel), dict(personal)
    for name, key in holding.keys.items():
        where = holding.where[name]
        taken[TENSOR + name] = np.where(chosen[key][where], state[key][where], personal[TENSOR + name])
    return taken


def within(context: Context, submodel: Submodel) -> dict[str, np.ndarray]:
    """Which elements of the context's submodel a smaller one has, bool by tensor name."""
    inner = context.worker.plan.holding(context.level.number, submodel).where
    found = {}
    for name, key in context.holding.keys.items():
        chosen = np.zeros(context.state[key].shape, dtype=bool)
        chosen[inner[name]] = True
        found[name] = chosen[context.holding.where[name]]
    return found


def check_own_norms(norm: str) -> None:
    """Raises UserError if a client's own model would lack what its norms need to answer."""
    if norm == "static":
        right = "must be another policy: nobody collects statistics for the clients' own models."
        raise UserError("model.norm", norm, right)


@dataclass(frozen=True)
class KeepsOwn(LocalProgram):
    """What a client has trained, before anything is merged, is its personal model.

    A client that has never taken part answers with the model of its level.
    """

    inner: LocalProgram

    @property
    def keeps_state(self) -> bool:
        return self.inner.keeps_state

    @property
    def personalises(self) -> bool:
        return True

    def effort(self, level: Level) -> Effort:
        return self.inner.effort(level)

    def train(self, model: Layered, context: Context) -> Trained:
        done = self.inner.train(model, context)
        if not done.steps:
            return done
        kept = context.personal if done.personal is None else done.personal
        own = pack(context.level.number, context.submodel, read(model))
        return replace(done, personal=kept | own)

    def personalise(self, model: Layered, context: Context) -> Answer:
        own = own_model(context)
        return model if own is None else own

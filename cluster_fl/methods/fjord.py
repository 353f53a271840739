"""FjORD: ordered dropout (Horvath et al., NeurIPS 2021): every batch trains a width drawn up to the client's own.

A level is a width p, the first ceil(p C) channels of every layer, and norms of its own. A client has all
levels up to its own; each element, and each level's norms, moves by the data-weighted mean of those who have it.
The released code is the authors' baseline in Flower.

- Every level has norms of its own. ``released``: statistics of its own, but weights and biases are prefixes of
  the full model's (``options.shared_affine``).
- A width that a client did not draw in a round still counts, as unchanged, in the mean of its norms.
- ``options.distil``: CE at the own width, and soft CE of the drawn one towards it, detached. Where both are the
  same, the code adds a term without a gradient (and tracks the statistics twice); it is left out.
- ``options.draws=false``: a client trains its own width only. That is FjORD in NeFL's tables: NeFL-W whose step
  sizes are fixed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from cluster_fl.config import Config, TrainConfig
from cluster_fl.errors import UserError
from cluster_fl.methods.base import Method, Setting
from cluster_fl.models.layered import Layered
from cluster_fl.nesting.plan import Level, Plan, State
from cluster_fl.nesting.splitting import WIDTH, split
from cluster_fl.nesting.submodel import Index, lengths
from cluster_fl.nesting.tracing import state_tensors
from cluster_fl.option import option
from cluster_fl.training.corrections import Correction, Uncorrected, correction
from cluster_fl.training.program import Context, Descent, Effort, LocalProgram, Trained

# Those without variates, which are made from a tensor's way over all steps: a draw leaves tensors out of some.
CORRECTIONS = ("none", "proximal")


@dataclass
class Options:
    distil: bool = option(False, "the own width teaches the drawn one")
    draws: bool = option(True, "a width is drawn for every batch; false: always the own one")
    shared_affine: bool = option(False, "only a norm's statistics are a level's own (per_level norms)")


def plan(setting: Setting) -> Plan:
    options: Options = setting.config.options
    nested = split(setting.model, setting.config.levels, setting.level_of, WIDTH)
    shared = nested.anatomy.parameters if options.shared_affine else frozenset()
    levels = tuple(
        replace(
            level,
            owned=level.owned - shared,
            also=tuple(range(1, level.number)) if options.draws else (),
        )
        for level in nested.levels
    )
    return replace(nested, levels=levels)


class Narrow:
    """A lower level's model, made of prefixes of a client's own tensors and of that level's own tensors.

    Gradients and statistics go to where the tensors come from.

    Attributes:
        own: the level's own tensors as the client received them, by their names in the model.
    """

    def __init__(self, level: Level, model: Layered, context: Context) -> None:
        plan, full = context.worker.plan, dict(state_tensors(model))
        outer, inner = context.holding.where, plan.holding(level.number).where
        self._level = level
        self._module = context.worker.module(level.submodel).train()
        self.own: dict[str, Tensor] = {}
        self._prefixes: dict[str, tuple[Tensor, Index]] = {}
        for name, tensor in state_tensors(self._module):
            if name in level.owned:
                received = context.received[plan.key(level.number, name)]
                value = torch.tensor(received, device=tensor.device)
                self.own[name] = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value
            else:
                self._prefixes[name] = full[name], _within(outer[name], inner[name])

    def __call__(self, x: Tensor) -> list[Tensor]:
        """(B, ...) -> logits (B, classes), as the level's own module would give."""
        prefixes = {name: tensor[where] for name, (tensor, where) in self._prefixes.items()}
        logits: list[Tensor] = functional_call(self._module, self.own | prefixes, (x,))
        return logits

    def parameters(self) -> list[nn.Parameter]:
        return [tensor for tensor in self.own.values() if isinstance(tensor, nn.Parameter)]

    def read(self, plan: Plan) -> State:
        """The level's own tensors, float32, by the state's keys."""
        return {
            plan.key(self._level.number, name): tensor.detach().cpu().numpy().copy()
            for name, tensor in self.own.items()
        }


def _within(outer: Index, inner: Index) -> Index:
    """Where the elements of ``inner`` are in what ``outer`` selects of the same tensor."""
    if all(isinstance(part, slice) for part in inner):
        return inner
    places = [np.searchsorted(o.ravel(), i.ravel()) for o, i in zip(outer, inner, strict=True)]
    return tuple(torch.from_numpy(part) for part in np.ix_(*places))


@dataclass(frozen=True)
class OrderedDropout(LocalProgram):
    """SGD whose every batch trains one of the client's widths, each as likely.

    One optimiser has the client's parameters and the lower levels' own; a step leaves out a tensor that the
    drawn width does not have at all.

    Attributes:
        efforts: of every level.
        distil: the client's own width teaches the drawn one.
        smallest_batch: the fewest samples a batch may have (2 where batches are normalised).
        correction: what is added to the gradients; keeps nothing.
    """

    train_config: TrainConfig
    rounds: int
    efforts: tuple[Effort, ...]
    distil: bool = False
    smallest_batch: int = 1
    correction: Correction = field(default_factory=Uncorrected)

    def effort(self, level: Level) -> Effort:
        return self.efforts[level.number - 1]

    def train(self, model: Layered, context: Context) -> Trained:
        config, plan = self.train_config, context.worker.plan
        lower = [Narrow(plan.level(number), model, context) for number in context.level.also]
        extra = nn.ParameterList(parameter for narrow in lower for parameter in narrow.parameters())
        everything = nn.ModuleList([model, extra])
        descent = Descent(everything, config, self.rounds, self.correction, context)
        # torch's fused SGD cannot begin some momentum buffers later than others.
        for parameter in everything.parameters() if config.momentum else ():
            descent.optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        for _ in range(context.epochs):
            for x, y in context.batches(self.smallest_batch):
                descent.down(self._loss(model, _drawn(lower, context.generator), x, y), len(y))
        also = {key: array for narrow in lower for key, array in narrow.read(plan).items()}
        return replace(descent.end({}), also=also)

    def _loss(self, model: Layered, narrow: Narrow | None, x: Tensor, y: Tensor) -> Tensor:
        """``narrow``: the drawn width; None: the client's own."""
        if narrow is None:
            return F.cross_entropy(model(x)[-1], y)
        if not self.distil:
            return F.cross_entropy(narrow(x)[-1], y)
        teacher = model(x)[-1]
        target = teacher.detach().softmax(dim=1)
        return F.cross_entropy(teacher, y) + F.cross_entropy(narrow(x)[-1], target)


def _drawn(lower: list[Narrow], generator: torch.Generator) -> Narrow | None:
    """One of the lower widths, or None for the client's own; nothing is drawn where there is no choice."""
    if not lower:
        return None
    number = int(torch.randint(len(lower) + 1, (), generator=generator, device=generator.device))
    return lower[number] if number < len(lower) else None


def _effort(plan: Plan, level: Level, distil: bool) -> Effort:
    """The mean over the widths that a batch may draw, and the lower levels' own tensors on the way."""
    lower = [plan.level(number) for number in level.also]
    passes = 1.0 + sum(narrow.cost.macs / level.cost.macs + distil for narrow in lower)
    copies = 1.0 + sum(_owned_bytes(plan, narrow) for narrow in lower) / level.cost.bytes
    return Effort(passes / (len(lower) + 1), copies, copies)


def _owned_bytes(plan: Plan, level: Level) -> int:
    """Bytes of the tensors that a level has a copy of, float32."""
    shapes = lengths(plan.anatomy, level.submodel)
    return 4 * sum(prod(shape) for name, shape in shapes.items() if name in level.owned)


def program(config: Config, plan: Plan) -> LocalProgram:
    """Raises UserError for a correction that keeps variates."""
    options, name = config.options, config.train.correction.name
    if name not in CORRECTIONS:
        right = f"must be one of {', '.join(CORRECTIONS)}: not every batch trains every tensor of a client."
        raise UserError("train.correction.name", name, right)
    return OrderedDropout(
        train_config=config.train,
        rounds=config.rounds,
        efforts=tuple(_effort(plan, level, options.distil) for level in plan.levels),
        distil=options.distil,
        smallest_batch=plan.smallest_batch,
        correction=correction(config.train.correction),
    )


PRESET = {
    "levels": {"rounding": "ceil"},
    "model": {"norm": "per_level"},
    "aggregation": {"weights": "samples"},
}

METHOD = Method(
    title="FjORD (Horvath et al., NeurIPS 2021)",
    options=Options,
    plan=plan,
    program=program,
    variants={
        "default": PRESET,
        "paper": PRESET,
        "released": {**PRESET, "options": {"shared_affine": True}},
    },
)

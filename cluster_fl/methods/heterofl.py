"""HeteroFL: widths nested from the front, for clients that miss classes (Diao et al., ICLR 2021).

A level of width p keeps the first ceil(p C) channels of every layer. A Scaler divides by p before each norm in
training, batch norms are static, and what a client has no sample of, it neither asks nor answers for.

- Paper and code agree but for the network: ``preact_1112`` gives the published tables, ``preact_2222`` is the
  code's now. So the variants are alike.
- ``options.mask``: logits of absent classes are 0 in training and in the "Local" test, as in the code.
- ``options.label_rows``: a client does not speak for the classifier's rows of its absent classes. The code does so
  with or without the mask; here it is a choice of its own.
- "Local" (``personal`` in a record) is the global model on a client's own part, masked; a mean over clients, which
  the code weights by samples. ``local`` stays the client's own level's model.
- Static statistics are of the training samples as they are, in batches of ``train.batch_size``, at every evaluation.
  The paper takes them once; the code in every round, of augmented samples.
- Collecting them costs no simulated time; paper and code do not count it either.
- The code's results are of the round that was best on the test part; here of the last.
- Levels: fixed by client number (the code's ``fix``) is ``levels.order=falling``, anew in each round (``dynamic``, the
  paper's tables) is ``levels.draw=dynamic``; both by ``levels.shares``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from cluster_fl.config import Config
from cluster_fl.methods.base import Method, Setting, always, sgd
from cluster_fl.models.layered import Layered
from cluster_fl.nesting.anatomy import Anatomy
from cluster_fl.nesting.plan import Plan
from cluster_fl.nesting.splitting import WIDTH, split
from cluster_fl.option import option
from cluster_fl.training.objectives import CrossEntropy, MaskedCrossEntropy
from cluster_fl.training.program import SGD, Answer, Context, LocalProgram, full_coverage


@dataclass
class Options:
    mask: bool = option(True, "logits of classes that a client does not have are 0")
    label_rows: bool = option(True, "a client's classifier rows of such classes do not count")
    scaler: bool = option(True, "training divides what is normalised by the level's width")


def plan(setting: Setting) -> Plan:
    options: Options = setting.config.options
    model = replace(setting.model, scaler=options.scaler)
    nested = split(model, setting.config.levels, setting.level_of, WIDTH)
    levels = tuple(
        replace(level, submodel=replace(level.submodel, scale=level.width if options.scaler else 1.0))
        for level in nested.levels
    )
    return replace(nested, levels=levels)


def program(config: Config, plan: Plan) -> LocalProgram:
    options: Options = config.options
    coverage = own_rows if options.label_rows else full_coverage
    if not options.mask:
        return sgd(config, plan, CrossEntropy(), coverage)
    return Masked(**vars(sgd(config, plan, MaskedCrossEntropy(), coverage)), tested=len(plan.levels))


@dataclass(frozen=True)
class Masked(SGD):
    """SGD, and as a client's personal model the one of level ``tested``, with the client's masked logits."""

    tested: int = 1

    @property
    def personalises(self) -> bool:
        return True

    def personal_level(self, own: int) -> int:
        return self.tested

    def personalise(self, model: Layered, context: Context) -> Answer:
        objective = MaskedCrossEntropy().of(context)
        return lambda inputs: [objective.masked(logits) for logits in model(inputs)]


def own_rows(context: Context, model: Layered) -> Mapping[str, np.ndarray]:
    """A client does not speak for what stands for a class that it does not have."""
    mine = context.has_class.cpu().numpy().astype(np.float64)
    if mine.all():
        return {}
    traced = context.worker.plan.anatomy
    return {
        name: mine.reshape([-1 if at == axis else 1 for at in range(len(traced.shapes[name]))])
        for name, axis in _class_axes(traced)
    }


def _class_axes(traced: Anatomy) -> Iterator[tuple[str, int]]:
    """The tensors with one entry a class along an axis: those whose axis goes into the model's answer."""
    for place, reason in traced.fixed.items():
        if reason == "output":
            name, _, axis = place.rpartition(":")
            yield name, int(axis)


METHOD = Method(
    title="HeteroFL (Diao et al., ICLR 2021)",
    options=Options,
    plan=plan,
    program=program,
    variants=always(model={"norm": "static"}, levels={"rounding": "ceil"}, train={"clip_norm": 1.0}),
)

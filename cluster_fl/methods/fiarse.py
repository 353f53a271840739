"""FIARSE: submodels of the most important weights (Wu et al., NeurIPS 2024): a client trains the largest ones.

Level l keeps the share rho_l (``levels.ratios``) of the elements, those of the largest magnitude in the current
global model, wherever they are. All levels have the full model's shape and differ by their masks alone.

Decisions; where nothing else is said the released code does the same, and it has no ``paper`` of its own.

- Weights and biases of all convolutions and linear layers are ranked and masked, stem and head too; norms are not.
- ``options.ranking=layer`` ranks every layer for itself; the code's layer-wise program does so stage by stage.
- Exactly floor(rho n) elements are kept, the first of equal ones; the code keeps all that equal the threshold.
- What falls below the received model's threshold in training is masked from then on; nothing else is let in.
- The mask has the derivative 2 theta / (|w| + theta)^2 in |w|, so that w's gradient is (1 + 2 theta |w| / (|w| +
  theta)^2) times the masked weight's where the mask is 1, and 0 elsewhere.
- rho = 1 masks nothing and is FedAvg's client; the code's has the smallest magnitude of all as its threshold.
- A masked tensor's element moves by the sum of updates over the number of clients that changed it; the code counts
  so in norms too, where here everybody counts.
- The code has plain SGD. With ``train.momentum`` an element may come back above the threshold; what a client
  does not hold keeps its value, whatever ``train.weight_decay`` is.
- No weighting by samples. Norms use the batch's statistics, in evaluation too (``model.norm: batch``).
- Such masks save nothing in dense kernels: a client is charged the full model's operations. It sends and receives
  the kept values and a bit an element, or the dense model where that is less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch

from cluster_fl.config import Config
from cluster_fl.errors import UserError
from cluster_fl.methods.base import Method, Setting, check_correction, sgd
from cluster_fl.models.layered import Layered
from cluster_fl.nesting.anatomy import Anatomy
from cluster_fl.nesting.levels import ratios
from cluster_fl.nesting.plan import Level, Plan
from cluster_fl.nesting.splitting import keep_units, plan_of
from cluster_fl.nesting.submodel import kept
from cluster_fl.nesting.tracing import anatomy
from cluster_fl.option import option
from cluster_fl.training.masks import Mask, cut, layers, masks, through
from cluster_fl.training.objectives import CrossEntropy
from cluster_fl.training.program import SGD, Context, Effort, LocalProgram, Trained

Groups = tuple[tuple[str, ...], ...]


@dataclass
class Options:
    ranking: str = option(
        "global", "magnitudes are ranked in the whole model, or layer by layer", choices=("global", "layer")
    )


@dataclass(frozen=True)
class Masked(LocalProgram):
    """SGD on the elements of largest magnitude.

    Attributes:
        groups: names of the tensors that are ranked together.
        sizes: elements of each group.
    """

    inner: SGD
    groups: Groups
    sizes: tuple[int, ...]

    @property
    def keeps_state(self) -> bool:
        return self.inner.keeps_state

    def effort(self, level: Level) -> Effort:
        plain, whole = self.inner.effort(level), level.cost.bytes
        dropped = sum(size - kept(size, level.ratio) for size in self.sizes)
        sparse = whole - 4 * dropped + -(-sum(self.sizes) // 8)
        share = min(1.0, sparse / whole)
        return replace(plain, down=plain.down * share, up=plain.up * share)

    def train(self, model: Layered, context: Context) -> Trained:
        found = masks(model, self.groups, context.level.ratio)
        received = {name: model.get_parameter(name).detach().clone() for name in found}
        done = self.inner.fit(model, through(model, found), context)
        return replace(done, coverage=_restored(model, found, received))

    def deploy(self, model: Layered, level: Level) -> None:
        cut(model, masks(model, self.groups, level.ratio))


@torch.no_grad()
def _restored(
    model: Layered, found: Mapping[str, Mask], received: Mapping[str, torch.Tensor]
) -> dict[str, np.ndarray]:
    """Gives elements that were never held their values back; which elements changed, 1 or 0, by name."""
    changed = {}
    for name, mask in found.items():
        parameter = model.get_parameter(name)
        parameter.copy_(torch.where(mask.kept, parameter, received[name]))
        changed[name] = (parameter != received[name]).cpu().numpy().astype(np.float64)
    return changed


def plan(setting: Setting) -> Plan:
    check_correction(setting.config, ("none", "proximal"), "a variate would not follow the masks.")
    config, model = setting.config.levels, setting.model.with_exits(())
    if config.pairs is not None:
        right = "must be left out: a level is a share of the elements here (levels.ratios)."
        raise UserError("levels.pairs", f"{len(config.pairs)} pairs", right)
    traced, shares = anatomy(model.skeleton(), model.input_shape), ratios(config)
    whole = keep_units(traced, [(1.0, range(traced.depth))] * len(shares), config)
    sizes = _sizes(traced, _groups(traced, setting.config))
    levels = [
        replace(level, ratio=share, budgeted=sum(kept(size, share) for size in sizes))
        for level, share in zip(whole, shares, strict=True)
    ]
    return plan_of(model, traced, levels, setting.level_of)


def program(config: Config, plan: Plan) -> LocalProgram:
    groups = _groups(plan.anatomy, config)
    return Masked(sgd(config, plan, CrossEntropy()), groups, _sizes(plan.anatomy, groups))


def _groups(traced: Anatomy, config: Config) -> Groups:
    """The tensors that are ranked together, by name."""
    own = layers(traced)
    return own if config.options.ranking == "layer" else (tuple(name for layer in own for name in layer),)


def _sizes(traced: Anatomy, groups: Groups) -> tuple[int, ...]:
    return tuple(sum(prod(traced.shapes[name]) for name in group) for group in groups)


METHOD = Method(
    title="FIARSE (Wu et al., NeurIPS 2024)",
    options=Options,
    plan=plan,
    program=program,
)

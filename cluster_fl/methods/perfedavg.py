"""Per-FedAvg: personalised federated learning by meta-learning (Fallah et al., NeurIPS 2020).

All clients train the whole model for what it is worth to each of them after a gradient step of its own.
There is no official code; open points are decided as in FL-bench, or said.

- ``options.order``: ``fo`` leaves out the Hessian, ``hf`` takes a difference of gradients for its product (section 4
  of the paper); the exact product is not offered.
- alpha = 0.01, beta = 0.001 (``train.lr``), delta = 0.001, batches of 40, four epochs.
- A step takes two (``hf``: three) of an epoch's batches; a rest is dropped, and too few are used again. So an epoch
  has half (a third) of FedAvg's steps.
- Clients count alike.
- The global model is what clients start from; a client's personal model is ``options.adapt_steps`` steps of rate alpha
  further, on batches of its training samples, normalised as in evaluation.
- A step's four gradients (``hf``) of three batches cost 4/3 of plain training; ``fo`` costs the same, two of two. The
  clock charges this for every sample: too much for a rest that is dropped, too little where batches are reused.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster_fl.config import Config
from cluster_fl.methods.base import Method, always, sgd
from cluster_fl.methods.fedavg import full_plan
from cluster_fl.nesting.plan import Plan
from cluster_fl.option import option
from cluster_fl.training.maml import FIRST_ORDER, HESSIAN_FREE, Meta
from cluster_fl.training.objectives import CrossEntropy
from cluster_fl.training.program import LocalProgram


@dataclass
class Options:
    order: str = option(
        FIRST_ORDER, "fo: first order; hf: Hessian-free, by differences", choices=(FIRST_ORDER, HESSIAN_FREE)
    )
    alpha: float = option(0.01, "rate of the inner step and of the personal ones", low=0)
    delta: float = option(1e-3, "hf: how far apart the difference is taken, in gradients", above=0)
    adapt_steps: int = option(1, "steps that make a personal model", low=0)


def program(config: Config, plan: Plan) -> LocalProgram:
    options: Options = config.options
    plain = sgd(config, plan, CrossEntropy())
    return Meta(plain, options.order, options.alpha, options.delta, options.adapt_steps)


METHOD = Method(
    title="Per-FedAvg (Fallah et al., NeurIPS 2020)",
    options=Options,
    plan=full_plan,
    program=program,
    variants=always(train={"lr": 0.001, "momentum": 0.0, "batch_size": 40, "epochs": 4}),
)

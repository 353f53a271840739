"""FedOpt (Reddi et al., ICLR 2021): FedAvg whose server steps with Adam, Yogi or Adagrad.

Any method takes such a step with ``server.optimizer``; with submodels, moments change only where somebody spoke.
The default rate is what the authors found best for FedAdam on CIFAR-100.
"""

from __future__ import annotations

from cluster_fl.methods import fedavg
from cluster_fl.methods.base import Method, always

METHOD = Method(
    title="FedOpt (Reddi et al., ICLR 2021)",
    options=fedavg.Options,
    plan=fedavg.plan,
    program=fedavg.program,
    variants=always(aggregation={"weights": "samples"}, server={"optimizer": "adam", "lr": 0.01}),
)

"""FedProx (Li et al., MLSys 2020): FedAvg whose clients are held near the weights that they received.

``train.correction.mu`` is the paper's mu (its grid: 0.001, 0.01, 0.1, 0.5, 1). The paper's partial work of slow
clients is a matter of the round policy, not of the method.
"""

from __future__ import annotations

from cluster_fl.methods import fedavg
from cluster_fl.methods.base import Method, always

METHOD = Method(
    title="FedProx (Li et al., MLSys 2020)",
    options=fedavg.Options,
    plan=fedavg.plan,
    program=fedavg.program,
    variants=always(aggregation={"weights": "samples"}, train={"correction": {"name": "proximal"}}),
)

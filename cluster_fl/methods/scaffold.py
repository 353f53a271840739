"""SCAFFOLD (Karimireddy et al., ICML 2020): FedAvg with control variates on the server and on every client.

Any method takes them with ``train.correction.name=scaffold``; with submodels, variates live in the full
coordinates and change only where a client holds them. The local steps are plain SGD, as option II assumes.
"""

from __future__ import annotations

from cluster_fl.methods import fedavg
from cluster_fl.methods.base import Method, always

METHOD = Method(
    title="SCAFFOLD (Karimireddy et al., ICML 2020)",
    options=fedavg.Options,
    plan=fedavg.plan,
    program=fedavg.program,
    variants=always(train={"momentum": 0.0, "correction": {"name": "scaffold"}}),
)

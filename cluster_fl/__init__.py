"""Heterogeneous federated learning with nested submodels: the library, without Ray.

Build a model, find its channel groups, search a plan, extract a submodel, aggregate.
"""

from cluster_fl.aggregation.nested import PartialSum, aggregate
from cluster_fl.compose import compose
from cluster_fl.config import Config
from cluster_fl.errors import ClusterFLError, RunError, UserError
from cluster_fl.experiment import Experiment, make_plan, prepare
from cluster_fl.models.layered import Layered
from cluster_fl.models.spec import ModelSpec
from cluster_fl.nesting.anatomy import Anatomy
from cluster_fl.nesting.cost import Cost, cost, count
from cluster_fl.nesting.extraction import extract, load, read
from cluster_fl.nesting.plan import Level, Plan
from cluster_fl.nesting.submodel import Submodel, full, gather, index_map, prefix
from cluster_fl.nesting.tracing import anatomy

__all__ = [
    "Anatomy",
    "ClusterFLError",
    "Config",
    "Cost",
    "Experiment",
    "Layered",
    "Level",
    "ModelSpec",
    "PartialSum",
    "Plan",
    "RunError",
    "Submodel",
    "UserError",
    "aggregate",
    "anatomy",
    "compose",
    "cost",
    "count",
    "extract",
    "full",
    "gather",
    "index_map",
    "load",
    "make_plan",
    "prefix",
    "prepare",
    "read",
]

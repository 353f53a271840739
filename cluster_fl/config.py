"""The schema of a run: every option with its default, its unit and its check.

A YAML file names only what it changes. :mod:`cluster_fl.compose` merges files and ``key=value`` overrides
onto this schema; whatever passes :func:`check` is what a run writes back as ``config.yaml``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, fields, is_dataclass
from typing import Any

from cluster_fl.errors import UserError
from cluster_fl.option import option
from cluster_fl.timing.schema import TimeConfig, check_time


@dataclass
class ClientsConfig:
    count: int = option(100, "clients in the population", low=1, high=100_000_000)
    per_round: int = option(10, "clients drawn for each round, without replacement", low=1)
    samples: int | None = option(
        None, "simulate: training samples of each client; those of the partition when not given", low=1
    )


@dataclass
class PairConfig:
    """One level's split, given instead of searched."""

    width: float = option(1.0, "share of the channels kept", above=0, high=1)
    depth: int | None = option(None, "units kept from the front; all when not given", low=1)
    keep: list[int] | None = option(None, "numbers of the units kept, instead of a depth (NeFL)", low=0)


@dataclass
class GridConfig:
    depth_step: int = option(1, "units between two candidate depths", low=1)
    width_step: float = option(0.05, "step between two candidate widths", above=0, high=1)


@dataclass
class LevelsConfig:
    """Which submodel sizes exist and who gets which (ScaleFL, section 3.1)."""

    count: int = option(4, "levels, when neither ratios nor pairs are given", low=1)
    ratios: list[float] | None = option(
        None, "budget of each level as a share of the full model, rising to 1"
    )
    budgets: list[float] | None = option(
        None, "budget of each client as a share of the full model; clustered"
    )
    pairs: list[PairConfig] | None = option(None, "the split of each level; no search")
    shares: list[float] | None = option(None, "share of the clients at each level; equal when not given")
    order: str = option(
        "shuffled",
        "who is at which level: at random; by client number, the smallest level first (rising) or last; or by the "
        "speed of their devices, the slowest at the smallest level",
        choices=("shuffled", "rising", "falling", "speed"),
    )
    draw: str = option(
        "fixed",
        "which level a participant trains: its own; any, by shares (dynamic); one near its own (window); the largest "
        "that its device finishes in deadline_s",
        choices=("fixed", "dynamic", "window", "deadline"),
    )
    deadline_s: float | None = option(None, "deadline: seconds that a participant has", above=0)
    window: int = option(2, "window: how far from its own level a participant's may be", low=0)
    tolerance: float = option(0.1, "how far a level's cost may be from its budget, relative", low=0)
    metric: str = option("params", "what a budget counts", choices=("params", "macs", "both"))
    rounding: str = option("floor", "channels kept = rounding(width x channels)", choices=("floor", "ceil"))
    tie_break: list[str] = option(
        ["ratio", "wider", "deeper"],
        "order of preference among equal imbalances",
        choices=("ratio", "wider", "deeper"),
    )
    grid: GridConfig = option(GridConfig, "candidates of the search")


@dataclass
class ModelConfig:
    name: str = option("resnet20", "a model of `cluster_fl.models`")
    norm: str = option(
        "batch",
        "batch: batch statistics, always; static: collected after training; per_level: one copy a level; "
        "group: group norm; none: no norm",
        choices=("batch", "static", "per_level", "group", "none"),
    )
    norm_groups: int = option(16, "group: groups of every norm", low=1)
    exit_head: str = option("conv3", "what hangs at an exit", choices=("conv3", "linear", "sepconv"))
    options: dict[str, Any] = option({}, "arguments of the model's constructor")


@dataclass
class PartitionConfig:
    name: str = option(
        "iid",
        "how samples are spread over clients; natural: as the data set's own groups, e.g. HAR's subjects",
        choices=("iid", "dirichlet", "shards", "classes", "natural"),
    )
    alpha: float = option(1.0, "dirichlet: concentration; small is skewed", above=0)
    shards_per_client: int = option(2, "shards: pieces of one class each client gets", low=1)
    classes: list[int] = option(
        [2],
        "classes: how many classes a client has, for all or one value per client; 0 is an IID share",
        low=0,
    )
    seed: int | None = option(None, "seed of the partition alone; the run's seed when not given", low=0)


DATA_SETS = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "har")


@dataclass
class DataConfig:
    name: str = option("digits", "data set", choices=DATA_SETS)
    root: str = option("data", "folder that holds, or is to hold, the data sets")
    download: bool = option(True, "download what is missing")
    held_out: int = option(
        0, "training samples set aside for evaluation during a run; 0: rounds have no accuracy", low=0
    )
    public: int = option(
        0, "training samples set aside for the server, in no client's part; nobody reads their labels", low=0
    )
    public_name: str | None = option(
        None,
        "the data set to take them from, its samples of the same shape; data.name itself when not given",
        choices=DATA_SETS,
    )
    augment: bool = option(True, "random crop and flip where the data set has them")
    partition: PartitionConfig = option(PartitionConfig, "")


@dataclass
class CorrectionConfig:
    """What local steps add to the gradient against the drift of clients."""

    name: str = option(
        "none",
        "proximal (FedProx), scaffold (control variates) or feddyn (dynamic regularisation)",
        choices=("none", "proximal", "scaffold", "feddyn"),
    )
    mu: float = option(0.01, "proximal: weight of the squared distance to the received weights", low=0)
    alpha: float = option(0.1, "feddyn: weight of the regularisation", above=0)


@dataclass
class TrainConfig:
    epochs: int = option(1, "local epochs", low=0)
    batch_size: int = option(16, "samples in a step", low=1)
    lr: float = option(0.1, "learning rate of round 0", low=0)
    momentum: float = option(0.9, "SGD momentum; its buffer starts at zero in each round", low=0, high=1)
    weight_decay: float = option(0.0, "SGD weight decay", low=0)
    schedule: str = option(
        "constant", "learning rate over rounds", choices=("constant", "step", "exponential", "cosine")
    )
    milestones: list[int] = option([], "step: rounds from which the rate is multiplied by gamma")
    gamma: float = option(0.1, "step: the factor; exponential: the factor of every round", above=0, high=1)
    clip_norm: float | None = option(None, "largest norm of a step's gradient", above=0)
    correction: CorrectionConfig = option(CorrectionConfig, "")
    cohort_size: int = option(4, "clients in one task of a pool", low=1)
    on_nan: str = option(
        "refuse",
        "a client whose loss or update is not finite, or changed by over 2048: leave it out and count it, or stop",
        choices=("refuse", "stop"),
    )


@dataclass
class AggregationConfig:
    weights: str = option("uniform", "weight of a client in the mean", choices=("uniform", "samples"))


@dataclass
class ServerConfig:
    """What the server makes of the mean update (FedOpt, Reddi et al., ICLR 2021)."""

    optimizer: str = option(
        "none", "none: add the mean update times lr", choices=("none", "adagrad", "adam", "yogi")
    )
    lr: float = option(1.0, "server learning rate", above=0)
    beta1: float = option(0.9, "decay of the first moment", low=0, high=1)
    beta2: float = option(0.99, "adam, yogi: decay of the second moment", low=0, high=1)
    tau: float = option(1e-3, "adaptivity: what is added to the root of the second moment", above=0)


@dataclass
class EvaluateConfig:
    every: int = option(1, "rounds between evaluations; the last round is always evaluated", low=1)
    clients: int | None = option(None, "clients in a round's evaluation; all when not given", low=1)
    batch_size: int = option(100, "samples of one client in a batch", low=1)


@dataclass
class ClusterConfig:
    address: str | None = option(None, "an existing Ray cluster; RAY_ADDRESS, else one of our own")
    pools: int | str = option("auto", "client pools; auto: as many as the cluster has room for")
    gpus_per_pool: float = option(0.0, "GPUs of a pool; a fraction shares one", low=0)
    cpus_per_pool: float = option(1.0, "CPU cores of a pool", low=0)
    retries: int = option(3, "times that a cohort is sent again after its pool died", low=0)


@dataclass
class TrackingConfig:
    """Where a run is shown besides its folder, which stays the source of truth."""

    name: str = option(
        "none", "none; Weights & Biases; or TensorBoard", choices=("none", "wandb", "tensorboard")
    )
    mode: str = option(
        "online",
        "wandb: send while the run goes on; only write, for `wandb sync`; or neither",
        choices=("online", "offline", "disabled"),
    )
    project: str = option("cluster-fl", "wandb: project")
    entity: str | None = option(None, "wandb: user or team; your own when not given")
    group: str | None = option(None, "wandb: group; a comparison's or a sweep's name when not given")
    tags: list[str] = option([], "wandb: tags")
    artifacts: bool = option(False, "wandb: keep each checkpoint as an artifact")


@dataclass
class CheckpointConfig:
    every: int = option(1, "rounds between checkpoints; the last round always has one", low=1)
    keep: int = option(2, "newest checkpoints kept", low=1)


@dataclass
class RunConfig:
    root: str = option("runs", "folder of run folders")
    name: str | None = option(
        None, "name of the run folder; made from the YAML's name, the seed and the time"
    )


@dataclass
class Config:
    method: str = option("scalefl", "a method of `cluster_fl.methods`")
    variant: str = option(
        "default", "where a paper and its code differ", choices=("default", "paper", "released")
    )
    seed: int = option(0, "everything random follows from it", low=0)
    rounds: int = option(10, "communication rounds", low=1)
    options: Any = option({}, "the method's own options")
    clients: ClientsConfig = option(ClientsConfig, "")
    levels: LevelsConfig = option(LevelsConfig, "")
    model: ModelConfig = option(ModelConfig, "")
    data: DataConfig = option(DataConfig, "")
    train: TrainConfig = option(TrainConfig, "")
    aggregation: AggregationConfig = option(AggregationConfig, "")
    server: ServerConfig = option(ServerConfig, "")
    evaluate: EvaluateConfig = option(EvaluateConfig, "")
    cluster: ClusterConfig = option(ClusterConfig, "")
    time: TimeConfig = option(TimeConfig, "")
    checkpoint: CheckpointConfig = option(CheckpointConfig, "")
    tracking: TrackingConfig = option(TrackingConfig, "")
    run: RunConfig = option(RunConfig, "")


def check(config: Config) -> None:
    """Every value against its own range, then what several values say together.

    Raises:
        UserError: naming the first key that is wrong.
    """
    check_values(config)
    _check_together(config)


def check_values(node: Any, prefix: str = "") -> None:
    """Every value of a schema's object against its own range. ``prefix`` goes before its keys in messages.

    Raises:
        UserError: naming the first key that is wrong.
    """
    for key, spec, value in _walk(node, prefix):
        _check_value(key, spec, value)


def choose(key: str, value: str, choices: Sequence[str]) -> None:
    """Raises :class:`UserError` with the nearest valid name unless ``value`` is one of ``choices``."""
    if value in choices:
        return
    near = difflib.get_close_matches(value, choices, 1, 0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(key, value, f"must be one of {', '.join(choices)}.{hint}")


def _walk(node: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    for spec in fields(node):
        value, key = getattr(node, spec.name), prefix + spec.name
        if is_dataclass(value):
            yield from _walk(value, key + ".")
            continue
        yield key, spec, value
        if isinstance(value, list):
            for position, item in enumerate(value):
                if is_dataclass(item):
                    yield from _walk(item, f"{key}[{position}].")


def _check_value(key: str, spec: Field[Any], value: Any) -> None:
    low, above, high, choices = (spec.metadata.get(k) for k in ("low", "above", "high", "choices"))
    for item in value if isinstance(value, list) else [value]:
        if choices and isinstance(item, str):
            choose(key, item, choices)
        if not isinstance(item, int | float):
            continue
        if not math.isfinite(item) and not (item == math.inf and spec.metadata.get("infinite")):
            raise UserError(key, item, "must be a finite number.")
        if low is not None and item < low:
            raise UserError(key, item, f"must be at least {low}.")
        if above is not None and item <= above:
            raise UserError(key, item, f"must be above {above}.")
        if high is not None and item > high:
            raise UserError(key, item, f"must be at most {high}.")


def _check_together(config: Config) -> None:
    clients, levels, cluster = config.clients, config.levels, config.cluster
    if clients.per_round > clients.count:
        raise UserError(
            "clients.per_round", clients.per_round, f"there are only {clients.count} clients (clients.count)."
        )
    if config.evaluate.clients is not None and config.evaluate.clients > clients.count:
        raise UserError(
            "evaluate.clients", config.evaluate.clients, f"there are only {clients.count} clients."
        )
    if isinstance(cluster.pools, str):
        choose("cluster.pools", cluster.pools, ("auto",))
    elif cluster.pools < 1:
        raise UserError("cluster.pools", cluster.pools, "must be auto or at least 1.")
    name = config.run.name
    if name is not None and (name in ("", ".", "..") or set(name) & {"/", "\\"} or not name.isprintable()):
        raise UserError("run.name", name, "must be a plain folder name; run.root says where it lies.")
    if cluster.gpus_per_pool > 1 and cluster.gpus_per_pool % 1:
        raise UserError("cluster.gpus_per_pool", cluster.gpus_per_pool, "above 1 it must be a whole number.")
    check_time(config.time, clients.count, clients.per_round)
    if config.train.correction.name == "scaffold" and config.train.momentum:
        right = "must be 0 with train.correction.name=scaffold, whose control variates assume plain SGD."
        raise UserError("train.momentum", config.train.momentum, right)
    if config.train.correction.name == "feddyn" and config.server.optimizer != "none":
        right = "must be none with train.correction.name=feddyn, which has a server step of its own."
        raise UserError("server.optimizer", config.server.optimizer, right)
    if config.train.correction.name == "feddyn" and config.server.lr != 1:
        right = "must be 1 with train.correction.name=feddyn, which has a server step of its own."
        raise UserError("server.lr", config.server.lr, right)
    if config.train.correction.name == "feddyn" and config.aggregation.weights != "uniform":
        right = "must be uniform with train.correction.name=feddyn."
        raise UserError("aggregation.weights", config.aggregation.weights, right)
    if levels.order == "speed" and config.time.devices.source == "levels":
        right = "needs devices that are not made from levels; set time.devices.source, e.g. phones."
        raise UserError("levels.order", "speed", right)
    _check_tracking(config.tracking)
    _check_levels(levels, clients.count)


def _check_tracking(tracking: TrackingConfig) -> None:
    """What W&B would refuse, or understand as something else, once the run goes on."""
    named = {"project": tracking.project, "entity": tracking.entity, "group": tracking.group}
    for key, name in named.items():
        if name is not None and not 0 < len(name.strip()) <= 128:
            raise UserError(f"tracking.{key}", name, "must have 1 to 128 characters.")
    for key in ("project", "entity"):
        name = named[key]
        if name is not None and any(letter in "/\\#?%:" for letter in name):
            raise UserError(f"tracking.{key}", name, "must be a plain name, without / \\ # ? % or :.")
    for tag in tracking.tags:
        if not 0 < len(tag) <= 64:
            raise UserError("tracking.tags", tag, "each must have 1 to 64 characters.")


def _check_levels(levels: LevelsConfig, clients: int) -> None:
    ratios = levels.ratios
    if ratios is not None and (not ratios or ratios[-1] != 1 or min(ratios) <= 0 or sorted(ratios) != ratios):
        raise UserError("levels.ratios", ratios, "must rise from above 0 to exactly 1, e.g. [0.25,0.5,1].")
    if levels.budgets is not None:
        if len(levels.budgets) != clients:
            raise UserError(
                "levels.budgets",
                f"{len(levels.budgets)} values",
                f"must have one value per client ({clients}).",
            )
        if min(levels.budgets) <= 0 or max(levels.budgets) < 1:
            raise UserError(
                "levels.budgets",
                max(levels.budgets),
                "must be positive, and one client must afford the full model (1).",
            )
        if levels.ratios is not None or levels.shares is not None:
            raise UserError(
                "levels.budgets", "given", "excludes levels.ratios and levels.shares: budgets decide both."
            )
    if levels.draw == "deadline" and levels.deadline_s is None:
        raise UserError("levels.deadline_s", None, "must be given for levels.draw=deadline, e.g. 600.")
    if levels.pairs is not None and not levels.pairs:
        raise UserError("levels.pairs", [], "must hold at least one pair, e.g. [{width: 1.0, depth: 9}].")
    count = level_count(levels)
    if levels.pairs is not None and ratios is not None and len(levels.pairs) != len(ratios):
        raise UserError(
            "levels.pairs", f"{len(levels.pairs)} pairs", f"must be as many as levels.ratios ({len(ratios)})."
        )
    shares = levels.shares
    if shares is not None and (len(shares) != count or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6):
        raise UserError("levels.shares", shares, f"must be {count} shares that sum to 1, one a level.")


def level_count(levels: LevelsConfig) -> int:
    if levels.pairs is not None:
        return len(levels.pairs)
    return len(levels.ratios) if levels.ratios is not None else levels.count

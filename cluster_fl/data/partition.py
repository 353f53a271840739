"""Who holds which samples.

A partition is made over the *pool*: training rows, then held-out rows, then test rows. Only afterwards are a
client's rows separated by where they came from, so that its three parts share one class mix (as in
ScaleFL's released code). The server's public rows are set aside before, and belong to no client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cluster_fl.config import DataConfig, PartitionConfig
from cluster_fl.data.by_class import by_class
from cluster_fl.data.datasets import Dataset
from cluster_fl.data.dirichlet import dirichlet
from cluster_fl.errors import UserError
from cluster_fl.seeding import Purpose, generator


@dataclass(frozen=True)
class Shares:
    """Per client the int64 rows of its training, held-out and test samples, in the partition's order."""

    train: tuple[np.ndarray, ...]
    held_out: tuple[np.ndarray, ...]
    test: tuple[np.ndarray, ...]
    # Rows of the server's samples, (public,); their labels are not to be read.
    public: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))


def partition(dataset: Dataset, config: DataConfig, clients: int, seed: int) -> Shares:
    """The rows of ``dataset`` spread over ``clients``; which rows are held out or public is random as well.

    Raises:
        UserError: there are too few samples for the clients, the held-out or public part or the skew asked
            for, or the data set does not have what the partition goes by.
    """
    own_public = config.public if config.public_name is None else 0
    train = dataset.train_count - config.held_out - own_public
    if config.held_out >= dataset.train_count:
        right = f"must be below the number of training samples, {dataset.train_count}."
        raise UserError("data.held_out", config.held_out, right)
    if train < 1:
        right = f"must be below the number of training samples that are not held out, {train + own_public}."
        raise UserError("data.public", config.public, right)
    if clients > train:
        raise UserError("clients.count", clients, f"there are only {train} training samples.")
    own_seed = config.partition.seed
    rng = generator(seed if own_seed is None else own_seed, Purpose.PARTITION)
    shuffled = rng.permutation(dataset.train_count)
    # The held-out rows come last: they stay the same ones whatever is made public.
    kept, public, held_out = np.split(shuffled, [train, train + own_public])
    test, foreign = np.split(np.arange(dataset.train_count, len(dataset.labels)), [dataset.test_count])
    pool = np.concatenate([np.sort(kept), np.sort(held_out), test])
    places = separate(_spread(dataset, pool, config.partition, clients, rng), (train, config.held_out))
    own, judged, tested = (
        tuple(pool[p] for p in part) for part in (places.train, places.held_out, places.test)
    )
    return Shares(own, judged, tested, np.concatenate([np.sort(public), foreign]))


def _spread(
    dataset: Dataset, pool: np.ndarray, config: PartitionConfig, clients: int, rng: np.random.Generator
) -> list[np.ndarray]:
    labels = dataset.labels[pool]
    ways: dict[str, Callable[[], list[np.ndarray]]] = {
        "iid": lambda: iid(labels, clients, rng),
        "dirichlet": lambda: dirichlet(labels, clients, config.alpha, rng),
        "shards": lambda: shards(labels, clients, config.shards_per_client, rng),
        "classes": lambda: by_class(labels, clients, config.classes, rng),
        "natural": lambda: natural(_groups(dataset)[pool], clients, rng),
    }
    return ways[config.name]()


def _groups(dataset: Dataset) -> np.ndarray:
    if dataset.groups is None:
        right = f"needs samples that come in groups, and those of {dataset.name} do not."
        raise UserError("data.partition.name", "natural", right)
    return dataset.groups


def separate(parts: Sequence[np.ndarray], sizes: tuple[int, int]) -> Shares:
    """``parts`` of the pool cut by position: below train, the next held_out, the rest; ``sizes`` is both.

    The result holds positions in the pool, in the order of ``parts``.
    """
    train, held_out = sizes
    bounds = np.array([train, train + held_out])
    origin = [np.searchsorted(bounds, part, side="right") for part in parts]
    first, second, third = (
        tuple(part[at == k] for part, at in zip(parts, origin, strict=True)) for k in range(3)
    )
    return Shares(first, second, third)


def iid(labels: np.ndarray, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Per client positions in ``labels`` (N,), uniform at random; sizes differ by at most one."""
    return np.array_split(rng.permutation(len(labels)), clients)


def shards(labels: np.ndarray, clients: int, per_client: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Per client ``per_client`` pieces of the samples sorted by class (McMahan et al. 2017, section 3).

    Raises:
        UserError: there are more pieces than samples.
    """
    pieces = clients * per_client
    if pieces > len(labels):
        right = f"{clients} clients need {pieces} samples, one a shard, and there are {len(labels)}."
        raise UserError("data.partition.shards_per_client", per_client, right)
    shuffled = rng.permutation(len(labels))
    pile = np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], pieces)
    hands = rng.permutation(pieces).reshape(clients, per_client)
    return [np.concatenate([pile[piece] for piece in hand]) for hand in hands]


def natural(groups: np.ndarray, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Per client positions in ``groups`` (N,): whole groups, dealt round-robin in random order.

    Numbers of groups differ by at most one between clients; with as many clients as groups, each is one group.

    Raises:
        UserError: there are more clients than groups.
    """
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    if clients > len(members):
        right = f"must be at most {len(members)}, the groups that data.partition.name=natural deals out."
        raise UserError("clients.count", clients, right)
    order = rng.permutation(len(members))
    return [np.concatenate([members[group] for group in order[client::clients]]) for client in range(clients)]

"""Who holds which samples.

A partition is made over the *pool*: training rows, then held-out rows, then test rows. Only afterwards are a
client's rows separated by where they came from, so that its three parts share one class mix (as in
ScaleFL's released code).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster_fl.config import DataConfig, PartitionConfig
from cluster_fl.data.datasets import Dataset
from cluster_fl.errors import UserError
from cluster_fl.seeding import Purpose, generator

Random = np.random.Generator | np.random.RandomState

GROUP = 10  # clients among whom one Dirichlet draw splits a class
SMALLEST = 0.5  # least share of the mean number of samples that every client of a group gets
TRIES = 5000  # draws of a group before the skew is called impossible; a few seconds


@dataclass(frozen=True)
class Shares:
    """Per client the int64 rows of its training, held-out and test samples, in the partition's order."""

    train: tuple[np.ndarray, ...]
    held_out: tuple[np.ndarray, ...]
    test: tuple[np.ndarray, ...]


def partition(dataset: Dataset, config: DataConfig, clients: int, seed: int) -> Shares:
    """The rows of ``dataset`` spread over ``clients``; which rows are held out is random as well.

    Raises:
        UserError: there are too few samples for the clients, the held-out part or the skew asked for.
    """
    train = dataset.train_count - config.held_out
    if train < 1:
        right = f"must be below the number of training samples, {dataset.train_count}."
        raise UserError("data.held_out", config.held_out, right)
    if clients > train:
        raise UserError("clients.count", clients, f"there are only {train} training samples.")
    own_seed = config.partition.seed
    rng = generator(seed if own_seed is None else own_seed, Purpose.PARTITION)
    shuffled = rng.permutation(dataset.train_count)
    test = np.arange(dataset.train_count, len(dataset.labels))
    pool = np.concatenate([np.sort(shuffled[:train]), np.sort(shuffled[train:]), test])
    places = separate(_spread(dataset.labels[pool], config.partition, clients, rng), (train, config.held_out))
    return Shares(*(tuple(pool[p] for p in own) for own in (places.train, places.held_out, places.test)))


def _spread(labels: np.ndarray, config: PartitionConfig, clients: int, rng: Random) -> list[np.ndarray]:
    if config.name == "dirichlet":
        return dirichlet(labels, clients, config.alpha, rng)
    if config.name == "shards":
        return shards(labels, clients, config.shards_per_client, rng)
    return iid(labels, clients, rng)


def separate(parts: Sequence[np.ndarray], sizes: tuple[int, int]) -> Shares:
    """``parts`` of the pool cut by position: below train, the next held_out, the rest; ``sizes`` is both.

    The result holds positions in the pool, in the order of ``parts``.
    """
    train, held_out = sizes
    bounds = np.array([train, train + held_out])
    origin = [np.searchsorted(bounds, part, side="right") for part in parts]
    cut = [tuple(part[at == k] for part, at in zip(parts, origin, strict=True)) for k in range(3)]
    return Shares(*cut)


def iid(labels: np.ndarray, clients: int, rng: Random) -> list[np.ndarray]:
    """Per client positions in ``labels`` (N,), uniform at random; sizes differ by at most one."""
    return np.array_split(rng.permutation(len(labels)), clients)


def shards(labels: np.ndarray, clients: int, per_client: int, rng: Random) -> list[np.ndarray]:
    """Per client ``per_client`` pieces of the samples sorted by class (McMahan et al. 2017, section 3).

    Raises:
        UserError: there are more pieces than samples.
    """
    pieces = clients * per_client
    if pieces > len(labels):
        right = f"{clients} clients need {pieces} samples, one a shard, and there are {len(labels)}."
        raise UserError("data.partition.shards_per_client", per_client, right)
    shuffled = rng.permutation(len(labels))
    by_class = np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], pieces)
    hands = rng.permutation(pieces).reshape(clients, per_client)
    return [np.concatenate([by_class[piece] for piece in hand]) for hand in hands]


def dirichlet(labels: np.ndarray, clients: int, alpha: float, rng: Random) -> list[np.ndarray]:
    """Per client positions in ``labels`` (N,), each class split by Dirichlet(alpha) shares.

    The shuffled samples are cut into groups of ten clients, the last group taking the clients and samples
    that remain; each group is split on its own (ScaleFL's released code).

    Raises:
        UserError: no draw gave each client of a group at least half of the group's mean.
    """
    if clients > len(labels):
        raise UserError("clients.count", clients, f"there are only {len(labels)} samples.")
    shuffled = rng.permutation(len(labels))
    groups = -(-clients // GROUP)
    size = int(GROUP / clients * len(labels))
    parts: list[np.ndarray] = []
    for group in range(groups):
        last = group == groups - 1
        members = shuffled[group * size : None if last else (group + 1) * size]
        workers = clients - group * GROUP if last else GROUP
        parts += _split_group(members, labels, workers, alpha, rng)
    return parts


def _split_group(
    members: np.ndarray, labels: np.ndarray, workers: int, alpha: float, rng: Random
) -> list[np.ndarray]:
    least = max(1, int(SMALLEST * len(members) / workers))
    own = labels[members]
    classes = [members[own == label] for label in range(int(labels.max()) + 1)]
    for _ in range(TRIES):
        parts = _draw(classes, workers, len(members) / workers, alpha, rng)
        if parts is not None and min(map(len, parts)) >= least:
            return parts
    right = (
        f"too small: in {TRIES} draws, some of {workers} clients always had under {least} of {len(members)} samples; "
        "raise it or lower clients.count."
    )
    raise UserError("data.partition.alpha", alpha, right)


def _draw(
    classes: Sequence[np.ndarray], workers: int, full: float, alpha: float, rng: Random
) -> list[np.ndarray] | None:
    """One draw of a group's shares; a worker with ``full`` samples gets no more.

    None if a class found no taker: with a tiny alpha, the shares of all with room can be zero or nan.
    """
    sizes = np.zeros(workers, dtype=np.int64)
    pieces: list[list[np.ndarray]] = []
    for members in classes:
        share = rng.dirichlet(np.full(workers, alpha)) * (sizes < full)
        total = share.sum()
        if not len(members):
            continue
        if not total > 0:
            return None
        cuts = (np.cumsum(share / total) * len(members)).astype(np.int64)[:-1]
        pieces.append(np.split(members, cuts))
        sizes += [len(piece) for piece in pieces[-1]]
    return [np.concatenate(own) for own in zip(*pieces, strict=True)]

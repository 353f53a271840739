"""Clients that hold a given number of classes each, next to clients with a share of everything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster_fl.errors import UserError

KEY = "data.partition.classes"


def by_class(
    labels: np.ndarray, clients: int, classes: Sequence[int], rng: np.random.Generator
) -> list[np.ndarray]:
    """Per client positions in ``labels`` (N,), from as many classes as ``classes`` says.

    Every client is meant to get N / clients samples. Clients that ask for 0 classes get theirs first, uniformly
    at random. What they leave is sorted by class; a client that asks for s gets s equal pieces, each of another
    class. The classes are asked for in proportion to what is left of them, and at random otherwise.

    A class of which more is asked than is left is shared out whole, in smaller pieces; of a class of which less
    is asked, the rest stays unused, so that no client grows beyond its share. Neither happens, but for rounding,
    where the classes are of equal size and all clients ask for s, with clients x s a multiple of the classes;
    both do where pieces are few, e.g. with one client of a single class next to nine IID ones.

    Args:
        classes: classes of a client, one value for all or one per client; 0 is an IID share.

    Raises:
        UserError: ``classes`` has another length, asks for more classes than there are, or for so many that a
            piece would be empty.
    """
    kinds, kind_of = np.unique(labels, return_inverse=True)
    counts = _counts(classes, clients, len(kinds))
    even = np.flatnonzero(counts == 0)
    shuffled = rng.permutation(len(labels))
    taken = len(labels) * len(even) // clients
    hands: list[list[np.ndarray]] = [[] for _ in range(clients)]
    if len(even):
        for client, hand in zip(even, np.array_split(shuffled[:taken], len(even)), strict=True):
            hands[client].append(hand)
    rest = shuffled[taken:]
    piles = [rest[kind_of[rest] == kind] for kind in range(len(kinds))]
    size = len(labels) / clients
    asked = _ask(counts, np.array([len(pile) for pile in piles]), size, rng)
    for kind in np.flatnonzero(asked.any(axis=0)):
        claimants = np.flatnonzero(asked[:, kind])
        for client, piece in zip(claimants, _cut(piles[kind], size / counts[claimants]), strict=True):
            if not len(piece):
                right = f"too many: class {kinds[kind]} has no sample left for one of {clients} clients."
                raise UserError(KEY, counts[client], right)
            hands[client].append(piece)
    return [np.concatenate(hand) for hand in hands]


def _counts(classes: Sequence[int], clients: int, kinds: int) -> np.ndarray:
    """Classes of each client, int64 (clients,)."""
    if len(classes) not in (1, clients):
        right = f"must be one value, or one per client ({clients})."
        raise UserError(KEY, f"{len(classes)} values", right)
    if max(classes) > kinds:
        raise UserError(KEY, max(classes), f"must be at most {kinds}, the number of classes.")
    return np.resize(np.array(classes, dtype=np.int64), clients)


def _ask(counts: np.ndarray, supply: np.ndarray, size: float, rng: np.random.Generator) -> np.ndarray:
    """Which classes each client asks for, bool (clients, K); ``counts`` (clients,) of them.

    Args:
        supply: samples of each class, (K,).
        size: samples of a client, in equal pieces of its classes.
    """
    asked = np.zeros((len(counts), len(supply)), dtype=bool)
    left = supply.astype(np.float64)
    # Large pieces first: the small ones fill what remains.
    for count in np.unique(counts[counts > 0]):
        members = rng.permutation(np.flatnonzero(counts == count))
        quota = _quotas(left, len(members), len(members) * int(count), size / count, rng)
        left -= quota * (size / count)
        for client in members:
            # Taking from the highest quotas never leaves a later member with too few classes to choose from.
            chosen = np.lexsort((rng.random(len(quota)), -quota))[:count]
            asked[client, chosen] = True
            quota[chosen] -= 1
    return asked


def _quotas(left: np.ndarray, most: int, pieces: int, size: float, rng: np.random.Generator) -> np.ndarray:
    """How many of ``pieces`` each class gives, (K,), at most ``most``: always the class with most left.

    Args:
        left: samples of each class that nobody has asked for, (K,); negative where more were asked for.
        size: samples of a piece.
    """
    quota = np.zeros(len(left), dtype=np.int64)
    for _ in range(pieces):
        room = np.where(quota < most, left - quota * size, -np.inf)
        quota[rng.choice(np.flatnonzero(room == room.max()))] += 1
    return quota


def _cut(pile: np.ndarray, wanted: np.ndarray) -> list[np.ndarray]:
    """``pile`` (n,) in pieces of the ``wanted`` sizes, or in that proportion where n is less than all of them."""
    scale = min(1.0, len(pile) / wanted.sum())
    ends = np.floor(np.cumsum(wanted) * scale + 0.5).astype(np.int64)
    return np.split(pile, ends)[:-1]

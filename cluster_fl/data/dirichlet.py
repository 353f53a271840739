"""Class mixes drawn from a Dirichlet distribution, as ScaleFL's released code draws them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster_fl.errors import UserError

Random = np.random.Generator | np.random.RandomState

GROUP = 10  # clients among whom one Dirichlet draw splits a class
SMALLEST = 0.5  # least share of the mean number of samples that every client of a group gets
TRIES = 5000  # draws of a group before the skew is called impossible; a few seconds


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

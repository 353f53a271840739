"""How attempts spent their time: downloading, computing, uploading, pausing, waiting for the round to end."""

from __future__ import annotations

import numpy as np

from cluster_fl.timing.attempts import Ended, Fate
from cluster_fl.timing.availability import Availability

PHASES = ("download", "compute", "upload")


def milestones(ended: Ended) -> np.ndarray:
    """When each attempt's phases begin and when the last one ends, simulated seconds, (4, attempts).

    An attempt that stopped in the middle of a phase has that moment from there on.
    """
    a = ended.attempts
    result: np.ndarray = np.minimum(np.stack([a.start, a.downloaded, a.computed, a.finish]), ended.stop)
    return result


def phases(ended: Ended) -> np.ndarray:
    """Seconds of each of ``PHASES``, pauses included, (3, attempts)."""
    return np.diff(milestones(ended), axis=0)


def pauses(ended: Ended, there: Availability) -> np.ndarray:
    """Seconds of each phase in which the device was not available, (3, attempts)."""
    return np.diff(there.absent(milestones(ended), ended.attempts.client), axis=0)


def waiting(ended: Ended, end: float) -> np.ndarray:
    """Seconds between an update's arrival and the end of its round at ``end``, (attempts,); 0 for lost ones."""
    done = (ended.fate == Fate.MERGED) | (ended.fate == Fate.ABANDONED)
    return np.where(done, end - ended.stop, 0.0)

"""UCI HAR: windows of a waist-worn phone's motion signals, 30 subjects and six activities (Anguita et al., 2013).

It is read from one of two places below ``data.root``; both hold the same windows, though not in the same order:

- ``UCI HAR Dataset``: the folder as the UCI repository gives it out, of which only the inertial signals, the
  subjects and the activities are read.
- ``har/uci_har_inertial.npz``: arrays that hold each half window once, since neighbouring windows share one:
  ``half_planes`` uint8 (4, halves x 9 x 64), the first, second, third and fourth bytes of all little-endian
  float32 values; ``half_shape`` = (halves, 9, 64); ``window_halves`` (N, 2), the halves of each window;
  ``label`` (N,) from 0; ``subject`` (N,) from 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster_fl.errors import UserError

ARRAYS = Path("har", "uci_har_inertial.npz")
FOLDER = "UCI HAR Dataset"
SIGNALS = tuple(f"{kind}_{axis}" for kind in ("body_acc", "body_gyro", "total_acc") for axis in "xyz")
LENGTH = 128  # values of one signal in a window: 2.56 s at 50 Hz
CLASSES = 6
PARTS = ("train", "test")  # the published split by subject, which is not used
FIFTH = 5


@dataclass(frozen=True)
class Windows:
    """All windows, in file order."""

    signals: np.ndarray  # float32 (N, 9, 128), in g and rad/s
    activity: np.ndarray  # int64 (N,), from 0
    subject: np.ndarray  # int64 (N,), from 1


def find(root: str) -> Path:
    """Where below ``root`` the data set lies: the array file, or else the published folder.

    Raises:
        UserError: neither is there, or the folder lacks a file.
    """
    base = Path(root).expanduser().resolve()
    arrays, folder = base / ARRAYS, base / FOLDER
    if arrays.is_file():
        return arrays
    get = (
        f"unpack it from UCI's Human Activity Recognition Using Smartphones (har has no automatic download), "
        f"or place the array file that cluster_fl/data/har.py describes at {arrays}."
    )
    if not folder.is_dir():
        raise UserError("data.root", root, f"the folder {folder} is missing; {get}")
    missing = next((file for part in PARTS for file in _files(folder, part) if not file.is_file()), None)
    if missing is not None:
        raise UserError("data.root", root, f"{missing} is missing; {get}")
    return folder


def read(place: Path) -> Windows:
    """The windows in ``place``, which :func:`find` found.

    Raises:
        Exception: of any kind, if the files are damaged.
    """
    if place.is_dir():
        parts = [_read_folder(place, part) for part in PARTS]
        signals, activity, subject = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    else:
        signals, activity, subject = _read_arrays(place)
    if signals.shape != (len(activity), len(SIGNALS), LENGTH) or len(subject) != len(activity):
        raise ValueError("windows, activities and subjects do not fit")
    if not 0 <= activity.min() <= activity.max() < CLASSES or not np.isfinite(signals).all():
        raise ValueError("values out of range")
    return Windows(signals, activity, subject)


def last_fifth(activity: np.ndarray, subject: np.ndarray) -> np.ndarray:
    """Which windows test, bool (N,): of each subject's windows of an activity, the last fifth in file order.

    Neighbouring windows share half of their values, so a random choice would test on what was trained on. Here
    at most the two windows where a training part meets its test part share a half.
    """
    cell = subject * CLASSES + activity
    is_test = np.zeros(len(cell), dtype=bool)
    for members in (np.flatnonzero(cell == value) for value in np.unique(cell)):
        is_test[members[len(members) - len(members) // FIFTH :]] = True
    return is_test


def _files(folder: Path, part: str) -> Iterator[Path]:
    """The files of one part: nine signals, then subjects, then activities."""
    inside = folder / part
    yield from (inside / "Inertial Signals" / f"{signal}_{part}.txt" for signal in SIGNALS)
    yield from (inside / f"{column}_{part}.txt" for column in ("subject", "y"))


def _read_folder(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    *signals, subjects, activities = _files(folder, part)
    values = np.stack([np.loadtxt(file, dtype=np.float32, ndmin=2) for file in signals], axis=1)
    subject, activity = (np.loadtxt(file, dtype=np.int64, ndmin=1) for file in (subjects, activities))
    return values, activity - 1, subject


def _read_arrays(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        planes, shape, halves = (arrays[name] for name in ("half_planes", "half_shape", "window_halves"))
        activity, subject = (arrays[name].astype(np.int64) for name in ("label", "subject"))
    values = np.ascontiguousarray(planes.T).view("<f4").reshape(shape)
    signals = np.concatenate([values[halves[:, 0]], values[halves[:, 1]]], axis=2)
    return signals.astype(np.float32, copy=False), activity, subject

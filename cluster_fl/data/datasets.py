"""The data sets: every sample of one in a single array, training rows first, then test rows.

Behind the test rows there may be *foreign* rows: public samples of another data set, without labels.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cluster_fl.config import DataConfig
from cluster_fl.data import har
from cluster_fl.errors import UserError
from cluster_fl.seeding import Purpose, generator

DIGITS_TEST = 360  # test rows of digits, a fifth
DIGITS_SPLIT = 1797  # seed of the digits split, the same in every run: a test set is not a matter of luck


@dataclass(frozen=True)
class Dataset:
    """All samples of a data set and how they are prepared; arrays are read-only."""

    name: str
    inputs: (
        np.ndarray
    )  # uint8 or float32 (N, H, W, C); training rows first, then test rows, then foreign rows
    labels: np.ndarray  # int64 (N,), from 0; foreign rows have -1
    train_count: int
    classes: int
    scale: float  # inputs are divided by it first: 255 for images of bytes, 1 for what has units of its own
    mean: tuple[float, ...]  # per channel, after scaling
    std: tuple[float, ...]
    crop_padding: int  # random crop after zero padding by this many pixels; 0 = none
    flip: bool  # random horizontal flip
    groups: np.ndarray | None = None  # int64 (N,), whom a sample comes from; foreign rows have -1
    foreign_count: int = 0

    @property
    def test_count(self) -> int:
        return len(self.labels) - self.train_count - self.foreign_count

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample."""
        height, width, channels = self.inputs.shape[1:]
        return channels, height, width


@dataclass(frozen=True)
class _Source:
    """One of torchvision's data sets, with the normalisation published for it."""

    maker: str  # class in torchvision.datasets
    classes: int
    shape: tuple[int, int, int]  # (C, H, W)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 0
    flip: bool = False


_CIFAR10 = _Source(
    "CIFAR10", 10, (3, 32, 32), (0.5,) * 3, (0.25,) * 3, crop_padding=4, flip=True
)  # as ScaleFL trains
_SOURCES = {
    "mnist": _Source("MNIST", 10, (1, 28, 28), (0.1307,), (0.3081,)),
    "fashion_mnist": _Source("FashionMNIST", 10, (1, 28, 28), (0.2860,), (0.3530,)),
    "cifar10": _CIFAR10,
    "cifar100": replace(_CIFAR10, maker="CIFAR100", classes=100),
}


def describe(config: DataConfig) -> tuple[tuple[int, int, int], int]:
    """Shape (C, H, W) of a sample and the number of classes, without reading any file."""
    entry = _ENTRIES[config.name]
    return entry.shape, entry.classes


def load(config: DataConfig, seed: int = 0) -> Dataset:
    """The data set ``config.name``, downloaded if files are missing and ``config.download`` allows it.

    With ``config.public_name``, ``config.public`` training samples of that data set follow as foreign rows.

    Args:
        seed: which samples these are follows from it, unless ``config.partition.seed`` is given.

    Raises:
        UserError: files are missing, cannot be downloaded, or are damaged (``data.root``), or the other data
            set does not fit.
    """
    dataset = _ENTRIES[config.name].load(config)
    if config.public and config.public_name is not None:
        dataset = _with_foreign(dataset, config, config.public_name, seed)
    for array in (dataset.inputs, dataset.labels, dataset.groups):
        if array is not None:
            array.flags.writeable = False
    return dataset if config.augment else replace(dataset, crop_padding=0, flip=False)


def _with_foreign(dataset: Dataset, config: DataConfig, name: str, seed: int) -> Dataset:
    """``dataset`` with random training samples of the data set ``name`` behind it, normalised as its own are."""
    entry = _ENTRIES[name]
    if name == dataset.name or entry.shape != dataset.input_shape:
        shape = "x".join(map(str, dataset.input_shape))
        fitting = [n for n, e in _ENTRIES.items() if e.shape == dataset.input_shape and n != dataset.name]
        right = f"must be {' or '.join(fitting)}: another data set whose samples are {shape}"
        if not fitting:
            right = f"must be left out: no other data set has samples of {shape}"
        raise UserError("data.public_name", name, f"{right}, like those of {dataset.name}.")
    other = entry.load(replace(config, name=name))
    if config.public > other.train_count:
        right = f"must be at most {other.train_count}, the training samples of {name}."
        raise UserError("data.public", config.public, right)
    own_seed = config.partition.seed
    # Round 1 of this purpose: round 0 is the partition's.
    rng = generator(seed if own_seed is None else own_seed, Purpose.PARTITION, 1)
    rows = np.sort(rng.choice(other.train_count, config.public, replace=False))
    nobody = np.full(config.public, -1, dtype=np.int64)
    return replace(
        dataset,
        inputs=np.concatenate([dataset.inputs, other.inputs[rows]]),
        labels=np.concatenate([dataset.labels, nobody]),
        groups=None if dataset.groups is None else np.concatenate([dataset.groups, nobody]),
        foreign_count=config.public,
    )


def _digits(_: DataConfig) -> Dataset:
    """scikit-learn's 1797 images of 8 x 8, values 0 to 16, which come with the package.

    They have no split of their own: the rows are put in order of class, at random inside a class, and test
    rows taken at equal distances, so that each class has a fifth (+-1) in the test part.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    shuffled = np.random.default_rng(np.random.SeedSequence(DIGITS_SPLIT)).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[by_class[np.arange(DIGITS_TEST) * len(labels) // DIGITS_TEST]] = True
    order = np.argsort(is_test, kind="stable")
    inputs = images[order].astype(np.uint8).reshape(-1, 8, 8, 1)
    train = len(labels) - DIGITS_TEST
    scaled = inputs[:train] / 16
    mean, std = (float(scaled.mean()),), (float(scaled.std()),)
    return Dataset("digits", inputs, labels[order].astype(np.int64), train, 10, 16.0, mean, std, 0, False)


def _har(config: DataConfig) -> Dataset:
    """UCI HAR's windows as samples of height 1; the groups are the subjects.

    Raises:
        UserError: the files are missing or damaged (``data.root``).
    """
    place = har.find(config.root)
    try:
        windows = har.read(place)
    except Exception as error:  # whatever the reading of a damaged file may raise
        right = f"{place} is damaged ({_line(error)}); replace it by a fresh copy."
        raise UserError("data.root", config.root, right) from error
    is_test = har.last_fifth(windows.activity, windows.subject)
    order = np.argsort(is_test, kind="stable")
    inputs = np.ascontiguousarray(windows.signals[order].transpose(0, 2, 1))[:, None]
    train = len(order) - int(is_test.sum())
    flat = inputs[:train].reshape(-1, inputs.shape[-1])
    mean, std = (tuple(map(float, of(axis=0, dtype=np.float64))) for of in (flat.mean, flat.std))
    groups = windows.subject[order]
    labels = windows.activity[order]
    return Dataset("har", inputs, labels, train, har.CLASSES, 1.0, mean, std, 0, False, groups)


def _torchvision(config: DataConfig, source: _Source) -> Dataset:
    from torchvision import datasets  # a second to import, which digits does without

    maker = getattr(datasets, source.maker)
    root = Path(config.root).expanduser().resolve()
    folder, names = _layout(maker, root)
    missing = next((folder / name for name in names if not os.path.isfile(folder / name)), None)
    if missing is not None:
        _download(maker, config, root, missing)
    try:
        inputs, labels, train = _read(maker, root)
        if len(inputs) != len(labels) or not 0 <= labels.min() <= labels.max() < source.classes:
            raise ValueError("images and labels do not fit")
    except Exception as error:  # whatever the reading of a damaged file may raise
        right = f"files in {folder} are damaged ({_line(error)}); delete them and set data.download=true."
        raise UserError("data.root", config.root, right) from error
    looks = (source.mean, source.std, source.crop_padding, source.flip)
    return Dataset(config.name, inputs, labels, train, source.classes, 255.0, *looks)


def _layout(maker: Any, root: Path) -> tuple[Path, list[str]]:
    """The folder in which torchvision's class ``maker`` keeps its files, and their names."""
    if hasattr(maker, "resources"):
        return root / maker.__name__ / "raw", [Path(name).stem for name, _ in maker.resources]
    names = [name for name, _ in (*maker.train_list, *maker.test_list)]
    return root / maker.base_folder, [*names, maker.meta["filename"]]


def _download(maker: Any, config: DataConfig, root: Path, missing: Path) -> None:
    if not config.download:
        right = f"{missing} is missing; place {config.name} there or set data.download=true."
        raise UserError("data.root", config.root, right)
    try:
        with _quiet():
            maker(root, download=True)
    except Exception as error:  # no network, no room, no permission, a wrong checksum
        right = f"{missing} is missing and the download failed ({_line(error)}); place {config.name} there."
        raise UserError("data.root", config.root, right) from error


def _read(maker: Any, root: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """Images uint8 (N, H, W, C), labels int64 (N,) and the number of training rows among them."""
    with _quiet():
        parts = [maker(root, train=train) for train in (True, False)]
    images = np.concatenate([np.asarray(part.data) for part in parts])
    inputs = np.ascontiguousarray(images.reshape(*images.shape[:3], -1))
    labels = np.concatenate([np.asarray(part.targets, dtype=np.int64) for part in parts])
    return inputs, labels, len(parts[0].targets)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torchvision's progress bars and its notices about old pickles off the terminal."""
    sink = io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _line(error: Exception) -> str:
    """The last line of the message, which names the cause."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


@dataclass(frozen=True)
class _Entry:
    """What is known of a data set before its files are read, and how they are read."""

    shape: tuple[int, int, int]  # (C, H, W)
    classes: int
    load: Callable[[DataConfig], Dataset]


_ENTRIES = {
    "digits": _Entry((1, 8, 8), 10, _digits),
    **{
        name: _Entry(source.shape, source.classes, partial(_torchvision, source=source))
        for name, source in _SOURCES.items()
    },
    "har": _Entry((len(har.SIGNALS), 1, har.LENGTH), har.CLASSES, _har),
}
NAMES = tuple(_ENTRIES)

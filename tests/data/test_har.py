"""UCI HAR: both layouts from small files, the split by hand, and one clear line when something is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from cluster_fl.config import DataConfig
from cluster_fl.data.datasets import Dataset, describe, load
from cluster_fl.data.har import ARRAYS, FOLDER, SIGNALS, last_fifth
from cluster_fl.errors import UserError
from tests.conftest import REPOSITORY

SUBJECTS = {"train": (1, 4), "test": (2,)}
REAL = REPOSITORY / "data"


class Made:
    """Recordings of 3 to 12 half-overlapping windows: two of each subject and activity, one after the other."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        halves, pairs, activity, subject = [], [], [], []
        for person in (*SUBJECTS["train"], *SUBJECTS["test"]):
            for kind in np.tile(np.arange(6), 2):
                count = int(rng.integers(3, 13))
                first = sum(map(len, halves))
                halves.append(rng.normal(size=(count + 1, 9, 64)).astype("<f4"))
                pairs += [(first + k, first + k + 1) for k in range(count)]
                activity += [int(kind)] * count
                subject += [person] * count
        self.halves, self.pairs = np.concatenate(halves), np.array(pairs, dtype=np.int32)
        self.activity, self.subject = np.array(activity), np.array(subject)
        self.windows = np.concatenate([self.halves[self.pairs[:, 0]], self.halves[self.pairs[:, 1]]], axis=2)

    def write_arrays(self, root: Path, **changed: object) -> Path:
        file = root / ARRAYS
        file.parent.mkdir(parents=True, exist_ok=True)
        content: dict[str, object] = {
            "half_planes": self.halves.reshape(-1).view(np.uint8).reshape(-1, 4).T,
            "half_shape": np.array(self.halves.shape, dtype=np.int32),
            "window_halves": self.pairs,
            "label": self.activity.astype(np.int8),
            "subject": self.subject.astype(np.int8),
        }
        np.savez_compressed(file, **{**content, **changed})  # type: ignore[arg-type]
        return file

    def write_folder(self, root: Path) -> Path:
        folder = root / FOLDER
        for part, people in SUBJECTS.items():
            own = np.isin(self.subject, people)
            (folder / part / "Inertial Signals").mkdir(parents=True)
            for channel, signal in enumerate(SIGNALS):
                lines = ["".join(f" {v:15.8e}" for v in row) for row in self.windows[own, channel]]
                file = folder / part / "Inertial Signals" / f"{signal}_{part}.txt"
                file.write_text("\n".join(lines) + "\n")
            for column, values in (("subject", self.subject[own]), ("y", self.activity[own] + 1)):
                (folder / part / f"{column}_{part}.txt").write_text("".join(f"{v} \n" for v in values))
        return folder


MADE = Made()


def config(root: Path, **options: object) -> DataConfig:
    return DataConfig(name="har", root=str(root), **options)  # type: ignore[arg-type]


def one_line(root: Path, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        load(config(root, **options))
    assert caught.value.key == "data.root"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def by_hand() -> tuple[list[int], list[int]]:
    """Training and test rows in file order: a plain loop over subjects and activities."""
    test: list[int] = []
    for person in (1, 2, 4):
        for kind in range(6):
            own = [
                k
                for k, pair in enumerate(zip(MADE.subject, MADE.activity, strict=True))
                if pair == (person, kind)
            ]
            test += own[len(own) - len(own) // 5 :]
    return [k for k in range(len(MADE.activity)) if k not in test], sorted(test)


@pytest.fixture(params=["arrays", "folder"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    {"arrays": MADE.write_arrays, "folder": MADE.write_folder}[request.param](tmp_path)
    return load(config(tmp_path))


def test_both_layouts_hold_the_windows(dataset):
    train, test = by_hand()
    rows = train + test
    assert dataset.inputs.shape == (len(rows), 1, 128, 9)
    assert (dataset.inputs.dtype, dataset.labels.dtype) == (np.float32, np.int64)
    assert dataset.inputs.flags.c_contiguous
    assert np.array_equal(dataset.inputs[:, 0].transpose(0, 2, 1), MADE.windows[rows])
    assert dataset.labels.tolist() == MADE.activity[rows].tolist()
    assert dataset.groups.tolist() == MADE.subject[rows].tolist()
    assert dataset.groups.dtype == np.int64
    assert (dataset.train_count, dataset.test_count) == (len(train), len(test))


def test_what_goes_with_the_windows(dataset):
    assert (dataset.input_shape, dataset.classes) == describe(DataConfig(name="har")) == ((9, 1, 128), 6)
    assert (dataset.scale, dataset.crop_padding, dataset.flip) == (1.0, 0, False)
    flat = dataset.inputs[: dataset.train_count].astype(np.float64).reshape(-1, 9)
    assert dataset.mean == pytest.approx(flat.mean(axis=0))
    assert dataset.std == pytest.approx(flat.std(axis=0))
    arrays = (dataset.inputs, dataset.labels, dataset.groups)
    assert not any(array.flags.writeable for array in arrays)


def test_only_at_a_border_do_training_and_test_share_values():
    is_test = last_fifth(MADE.activity, MADE.subject)
    shared = np.isin(MADE.pairs[is_test], MADE.pairs[~is_test]).any(axis=1)
    cell = MADE.subject[is_test] * 6 + MADE.activity[is_test]
    assert np.bincount(cell[shared]).max() == 1


def test_few_windows_give_no_test_window():
    activity, subject = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1]), np.ones(10, dtype=np.int64)
    assert np.flatnonzero(last_fifth(activity, subject)).tolist() == [9]


def test_the_array_file_goes_first(tmp_path):
    (MADE.write_folder(tmp_path) / "train" / "y_train.txt").write_text("not a number")
    MADE.write_arrays(tmp_path)
    assert len(load(config(tmp_path)).labels) == len(MADE.activity)


@pytest.mark.parametrize("download", [True, False])
def test_nothing_there_says_what_to_place_where(tmp_path, download):
    line = one_line(tmp_path, download=download)
    assert str(tmp_path / FOLDER) in line
    assert str(tmp_path / ARRAYS) in line
    assert "Human Activity Recognition Using Smartphones" in line
    assert "no automatic download" in line


@pytest.mark.parametrize("file", ["train/y_train.txt", "test/Inertial Signals/total_acc_z_test.txt"])
def test_a_missing_file_is_named(tmp_path, file):
    missing = MADE.write_folder(tmp_path) / file
    missing.unlink()
    assert f"{missing} is missing" in one_line(tmp_path)


def test_a_part_that_lacks_its_signals(tmp_path):
    shutil.rmtree(MADE.write_folder(tmp_path) / "test" / "Inertial Signals")
    assert "body_acc_x_test.txt is missing" in one_line(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("train/subject_train.txt", "1\n1\n"),
        ("train/y_train.txt", "one\n"),
        ("train/Inertial Signals/body_gyro_y_train.txt", "1.0 2.0\n3.0 4.0\n"),
        ("test/y_test.txt", ""),
    ],
)
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_a_damaged_folder_is_one_line(tmp_path, file, content):
    folder = MADE.write_folder(tmp_path)
    (folder / file).write_text(content)
    assert f"{folder} is damaged" in one_line(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"label": np.full(len(MADE.activity), 6)},
        {"subject": np.ones(3)},
        {"half_shape": np.array([2, 9, 64])},
        {"window_halves": MADE.pairs + len(MADE.halves)},
        {"half_planes": np.full_like(MADE.halves.reshape(-1).view(np.uint8).reshape(-1, 4).T, 255)},
        {"label": np.array([{}], dtype=object)},  # only pickle can read it back
    ],
    ids=["label", "subject", "shape", "halves", "nan", "pickle"],
)
def test_damaged_arrays_are_one_line(tmp_path, changed):
    file = MADE.write_arrays(tmp_path, **changed)
    assert f"{file} is damaged" in one_line(tmp_path)


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_a_truncated_array_file_is_damaged(tmp_path, keep):
    file = MADE.write_arrays(tmp_path)
    file.write_bytes(file.read_bytes()[:keep])
    assert f"{file} is damaged" in one_line(tmp_path)


@pytest.mark.slow
def test_the_real_windows():
    if not (REAL / ARRAYS).is_file() and not (REAL / FOLDER).is_dir():
        pytest.skip(f"needs UCI HAR as {REAL / FOLDER} or {REAL / ARRAYS}")
    har = load(config(REAL))
    assert np.bincount(har.labels).tolist() == [1722, 1544, 1406, 1777, 1906, 1944]
    assert (har.train_count, har.test_count) == (8314, 1985)
    assert np.unique(har.groups).tolist() == list(range(1, 31))
    # Gravity lies along the phone's x axis: 0.8 g in total_acc_x on average.
    assert har.mean[SIGNALS.index("total_acc_x")] == pytest.approx(0.808, abs=5e-3)
    first = har.inputs[(har.groups == 1) & (har.labels == 4)][0, 0, :3, 0]
    assert first == pytest.approx([1.8085150e-04, 1.0138560e-02, 9.2755740e-03])

"""Loading: the digits split, torchvision's layouts from tiny files, and one clear line when something is wrong."""

from __future__ import annotations

import hashlib
import pickle
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torchvision.datasets as tv

from cluster_fl.config import DataConfig
from cluster_fl.data.datasets import NAMES, Dataset, describe, load
from cluster_fl.errors import UserError

RNG = np.random.default_rng(0)
MAKERS = {"mnist": tv.MNIST, "fashion_mnist": tv.FashionMNIST, "cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}


def write_mnist(root: Path, maker: str) -> dict[str, np.ndarray]:
    folder = root / maker / "raw"
    folder.mkdir(parents=True)
    made = {}
    for part, count in (("train", 12), ("t10k", 5)):
        images = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = RNG.integers(0, 10, count, dtype=np.uint8)
        head = struct.pack(">4i", 0x803, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 0x801, count) + labels.tobytes()
        )
        made[part] = images
    return made


def write_cifar(root: Path, maker: type, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Every batch with 3 images (3, 32, 32); the class's checksums are set to those of the files."""
    folder = root / maker.base_folder
    folder.mkdir(parents=True)
    key = "labels" if maker is tv.CIFAR10 else "fine_labels"
    images = []

    def write(name: str, content: dict[str, object]) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    for attribute in ("train_list", "test_list"):
        written = []
        for name, _ in getattr(maker, attribute):
            images.append(RNG.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8))
            written.append([name, write(name, {"data": images[-1].reshape(3, -1), key: [0, 3, 9]})])
        monkeypatch.setattr(maker, attribute, written)
    meta = {**maker.meta, "md5": write(maker.meta["filename"], {maker.meta["key"]: ["a", "b"]})}
    monkeypatch.setattr(maker, "meta", meta)
    return images


def one_line(config: DataConfig) -> str:
    with pytest.raises(UserError) as caught:
        load(config)
    assert caught.value.key == "data.root"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_digits_split_is_disjoint_stratified_and_stable():
    digits = load(DataConfig(name="digits", root="/nowhere", download=False))
    assert digits.inputs.shape == (1797, 8, 8, 1)
    assert digits.inputs.dtype == np.uint8
    assert digits.labels.dtype == np.int64
    assert (digits.train_count, digits.input_shape, digits.inputs.max()) == (1437, (1, 8, 8), digits.scale)
    counts = np.bincount(digits.labels)
    tested = np.bincount(digits.labels[1437:])
    assert np.abs(tested - counts * 360 / 1797).max() <= 1
    digest = hashlib.sha256(digits.inputs.tobytes() + digits.labels.tobytes()).hexdigest()
    assert digest[:16] == "9aaad03e3fd45357"
    scaled = digits.inputs[:1437] / 16
    assert digits.mean == pytest.approx((scaled.mean(),))
    assert digits.std == pytest.approx((scaled.std(),))
    assert (digits.crop_padding, digits.flip) == (0, False)


def test_digits_holds_every_sample_once():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    ours = load(DataConfig(name="digits"))
    rows = np.column_stack([ours.inputs.reshape(-1, 64), ours.labels])
    theirs = np.column_stack([images, labels])
    assert np.array_equal(rows[np.lexsort(rows.T)], theirs[np.lexsort(theirs.T)])


def test_the_names_are_those_of_the_schema():
    for key in ("name", "public_name"):
        choices = DataConfig.__dataclass_fields__[key].metadata["choices"]
        assert set(NAMES) == set(choices)


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """MNIST and Fashion-MNIST in one folder, and the latter's images."""
    write_mnist(tmp_path, "MNIST")
    return tmp_path, write_mnist(tmp_path, "FashionMNIST")


def test_foreign_samples_follow_the_test_rows(both):
    root, made = both
    alone = load(DataConfig(name="mnist", root=str(root)))
    config = DataConfig(name="mnist", root=str(root), public=7, public_name="fashion_mnist")
    dataset = load(config, seed=3)
    assert (dataset.train_count, dataset.test_count, dataset.foreign_count) == (12, 5, 7)
    assert np.array_equal(dataset.inputs[:17], alone.inputs)
    assert np.array_equal(dataset.labels[:17], alone.labels)
    assert dataset.labels[17:].tolist() == [-1] * 7
    assert (dataset.name, dataset.mean, dataset.groups) == ("mnist", alone.mean, None)
    chosen = [int(np.flatnonzero((made["train"] == image).all(axis=(1, 2)))[0]) for image in foreign(dataset)]
    assert len(set(chosen)) == 7
    assert not dataset.inputs.flags.writeable
    assert not dataset.labels.flags.writeable


def test_which_samples_are_public_follows_from_the_seed(both):
    def chosen(seed: int, own: int | None = None) -> bytes:
        config = DataConfig(name="mnist", root=str(both[0]), public=4, public_name="fashion_mnist")
        config.partition.seed = own
        return foreign(load(config, seed)).tobytes()

    assert chosen(1) == chosen(1)
    assert chosen(1) != chosen(2)
    assert chosen(1, own=7) == chosen(2, own=7) == chosen(7)


def foreign(dataset: Dataset) -> np.ndarray:
    return dataset.inputs[dataset.train_count + dataset.test_count :, ..., 0]


def test_without_public_samples_no_other_data_set_is_read(tmp_path):
    write_mnist(tmp_path, "MNIST")
    config = DataConfig(name="mnist", root=str(tmp_path), download=False, public_name="fashion_mnist")
    assert load(config).foreign_count == 0


@pytest.mark.parametrize(
    ("name", "other", "line"),
    [
        ("mnist", "cifar10", "data.public_name=cifar10: must be fashion_mnist: another data set whose samples are "
                             "1x28x28, like those of mnist."),
        ("mnist", "mnist", "data.public_name=mnist: must be fashion_mnist: another data set whose samples are "
                           "1x28x28, like those of mnist."),
        ("digits", "har", "data.public_name=har: must be left out: no other data set has samples of 1x8x8, like "
                          "those of digits."),
        ("mnist", "fashion_mnist", "data.public=13: must be at most 12, the training samples of fashion_mnist."),
    ],
)  # fmt: skip
def test_public_samples_that_do_not_fit(both, name, other, line):
    with pytest.raises(UserError) as caught:
        load(DataConfig(name=name, root=str(both[0]), public=13, public_name=other))
    assert str(caught.value) == line


def test_every_name_is_described_without_a_file():
    shapes = {name: describe(DataConfig(name=name, root="/nowhere")) for name in NAMES}
    assert shapes["cifar100"] == ((3, 32, 32), 100)
    assert shapes["digits"] == ((1, 8, 8), 10)
    assert shapes["har"] == ((9, 1, 128), 6)


@pytest.mark.parametrize(
    ("name", "maker", "mean"), [("mnist", "MNIST", 0.1307), ("fashion_mnist", "FashionMNIST", 0.2860)]
)
def test_mnist_layout(tmp_path, name, maker, mean, monkeypatch):
    made = write_mnist(tmp_path, maker)
    monkeypatch.setattr(MAKERS[name], "download", lambda self: pytest.fail("nothing is missing"))
    dataset = load(DataConfig(name=name, root=str(tmp_path)))
    assert np.array_equal(dataset.inputs[..., 0], np.concatenate([made["train"], made["t10k"]]))
    assert (dataset.train_count, dataset.classes, dataset.input_shape) == (12, 10, (1, 28, 28))
    assert (dataset.mean, dataset.crop_padding, dataset.flip) == ((mean,), 0, False)
    assert dataset.labels.dtype == np.int64
    assert not dataset.inputs.flags.writeable
    assert not dataset.labels.flags.writeable


@pytest.mark.parametrize(("name", "classes", "train"), [("cifar10", 10, 15), ("cifar100", 100, 3)])
@pytest.mark.parametrize("augment", [True, False])
def test_cifar_layout(tmp_path, monkeypatch, capfd, name, classes, train, augment):
    images = np.concatenate(write_cifar(tmp_path, MAKERS[name], monkeypatch))
    dataset = load(DataConfig(name=name, root=str(tmp_path), augment=augment))
    assert np.array_equal(dataset.inputs, images.transpose(0, 2, 3, 1))
    assert dataset.inputs.flags.c_contiguous
    assert (dataset.train_count, dataset.classes, dataset.input_shape) == (train, classes, (3, 32, 32))
    assert (dataset.mean, dataset.std, dataset.scale) == ((0.5,) * 3, (0.25,) * 3, 255.0)
    assert (dataset.crop_padding, dataset.flip) == ((4, True) if augment else (0, False))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mnist", "MNIST/raw/train-images-idx3-ubyte"),
        ("fashion_mnist", "FashionMNIST/raw/train-images-idx3-ubyte"),
        ("cifar10", "cifar-10-batches-py/data_batch_1"),
        ("cifar100", "cifar-100-python/train"),
    ],
)
def test_missing_files_are_named_with_what_to_do(tmp_path, monkeypatch, name, file):
    monkeypatch.setattr(MAKERS[name], "download", lambda self: pytest.fail("download=false"))
    line = one_line(DataConfig(name=name, root=str(tmp_path / "none"), download=False))
    assert str(tmp_path / "none" / file) in line
    assert "data.download=true" in line


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_failed_download_is_one_quiet_line(tmp_path, monkeypatch, capfd, name):
    def fail(*args: object, **kwargs: object) -> None:
        print("Downloading http://example.org")
        raise URLError("[Errno -3] Temporary failure in name resolution")

    for module in (tv.mnist, tv.cifar):
        monkeypatch.setattr(module, "download_and_extract_archive", fail)
    line = one_line(DataConfig(name=name, root=str(tmp_path)))
    assert "download failed (<urlopen error [Errno -3] Temporary failure in name resolution>)" in line
    assert str(tmp_path) in line
    assert capfd.readouterr() == ("", "")


def test_a_root_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "data").write_text("not a folder")
    assert "download failed" in one_line(DataConfig(name="mnist", root=str(tmp_path / "data")))


def test_a_missing_file_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(tv.MNIST, "download", lambda self: write_mnist(tmp_path, "MNIST"))
    assert load(DataConfig(name="mnist", root=str(tmp_path))).train_count == 12


@pytest.mark.parametrize("keep", [0, 5, 900])
@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_truncated_mnist_file_is_damaged(tmp_path, file, keep):
    write_mnist(tmp_path, "MNIST")
    path = tmp_path / "MNIST" / "raw" / file
    path.write_bytes(path.read_bytes()[: min(keep, path.stat().st_size - 1)])
    line = one_line(DataConfig(name="mnist", root=str(tmp_path)))
    assert f"files in {path.parent} are damaged" in line


def test_labels_out_of_range_are_damage(tmp_path):
    write_mnist(tmp_path, "MNIST")
    path = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\xc8")
    assert "are damaged" in one_line(DataConfig(name="mnist", root=str(tmp_path)))


def test_a_changed_cifar_file_is_damaged_and_not_downloaded_again(tmp_path, monkeypatch):
    write_cifar(tmp_path, tv.CIFAR10, monkeypatch)
    monkeypatch.setattr(tv.CIFAR10, "download", lambda self: pytest.fail("nothing is missing"))
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-7])
    assert f"files in {path.parent} are damaged" in one_line(DataConfig(name="cifar10", root=str(tmp_path)))

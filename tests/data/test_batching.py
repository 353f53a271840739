"""Batches: sizes, normalisation, augmentation against a plain loop, and arrays that may not be written."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster_fl.data.batching import Resident, augment, batch_sizes
from cluster_fl.data.datasets import Dataset

CPU = torch.device("cpu")


def toy(channels: int = 3, padding: int = 0, flip: bool = False) -> Dataset:
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 256, (40, 6, 5, channels), dtype=np.uint8)
    labels = rng.integers(0, 7, 40)
    inputs.flags.writeable = labels.flags.writeable = False
    mean, std = (0.4, 0.5, 0.3)[:channels], (0.25, 0.2, 0.5)[:channels]
    return Dataset("toy", inputs, labels, 30, 7, 255.0, mean, std, padding, flip)


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 5))
def test_batch_sizes_sum_and_none_is_too_small(samples, batch_size, smallest):
    if batch_size < smallest:
        with pytest.raises(ValueError, match=f"batches of {batch_size} cannot hold {smallest}"):
            batch_sizes(samples, batch_size, smallest)
        return
    sizes = batch_sizes(samples, batch_size, smallest)
    if samples < smallest or samples == 0:
        assert sizes == []
        return
    assert sum(sizes) == samples
    assert min(sizes) >= smallest
    assert max(sizes) <= batch_size + smallest
    assert all(size == batch_size for size in sizes[:-1])


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ((33, 16, 2), [16, 17]),
        ((34, 16, 2), [16, 16, 2]),
        ((33, 16, 1), [16, 16, 1]),
        ((1, 16, 2), []),
        ((0, 16, 1), []),
        ((5, 16, 2), [5]),
        ((17, 16, 2), [17]),
    ],
)
def test_batch_sizes_of_a_leftover(arguments, sizes):
    assert batch_sizes(*arguments) == sizes


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_a_batch_is_normalised_and_channels_last(channels, kind):
    dataset = toy(channels, padding=2, flip=True)
    rows = np.array([7, 0, 39, 7])
    inputs, labels = Resident(dataset, CPU).batch(kind(rows))
    expected = (dataset.inputs[rows] / 255.0 - dataset.mean) / dataset.std
    assert inputs.dtype == torch.float32
    assert inputs.shape == (4, *dataset.input_shape)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(inputs.permute(0, 2, 3, 1).numpy(), expected, atol=2e-6)
    assert labels.tolist() == dataset.labels[rows].tolist()


def by_hand(images: np.ndarray, padding: int, flip: bool, generator: torch.Generator) -> np.ndarray:
    """The same draws, one image at a time."""
    count, height, width = images.shape[:3]
    down, right = torch.randint(0, 2 * padding + 1, (2, count), generator=generator).tolist()
    mirrored = torch.randint(0, 2, (count,), generator=generator).tolist()
    made = []
    for k in range(count):
        padded = np.pad(images[k], ((padding, padding), (padding, padding), (0, 0)))
        crop = padded[down[k] : down[k] + height, right[k] : right[k] + width]
        made.append(crop[:, ::-1] if flip and mirrored[k] else crop)
    return np.stack(made)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_is_the_plain_loop_bit_for_bit(channels, padding, flip):
    images = np.array(toy(channels).inputs)
    made = augment(torch.from_numpy(images), padding, flip, seeded())
    assert np.array_equal(made.numpy(), by_hand(images, padding, flip, seeded()))


def test_an_epoch_is_shuffled_augmented_then_normalised():
    dataset = toy(padding=2, flip=True)
    rows = np.arange(30)
    inputs, labels = Resident(dataset, CPU).epoch(rows, seeded())
    generator = seeded()
    order = rows[torch.randperm(30, generator=generator).numpy()]
    made = by_hand(dataset.inputs[order], 2, True, generator)
    assert labels.tolist() == dataset.labels[order].tolist()
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert inputs[3:9].is_contiguous(memory_format=torch.channels_last)
    expected = (made / 255.0 - dataset.mean) / dataset.std
    np.testing.assert_allclose(inputs.permute(0, 2, 3, 1).numpy(), expected, atol=2e-6)


def test_without_augmentation_an_epoch_is_a_shuffled_batch():
    resident, rows = Resident(toy(), CPU), np.array([4, 9, 2, 31])
    inputs, labels = resident.epoch(rows, seeded())
    order = rows[torch.randperm(4, generator=seeded()).numpy()]
    expected, classes = resident.batch(order)
    assert torch.equal(inputs, expected)
    assert torch.equal(labels, classes)


def test_only_the_given_generator_is_used():
    resident, rows = Resident(toy(padding=2, flip=True), CPU), np.arange(20)
    before = torch.get_rng_state()
    first, second = (resident.epoch(rows, seeded(1))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, resident.epoch(rows, seeded(2))[0])
    assert torch.equal(before, torch.get_rng_state())


def test_read_only_arrays_are_shared_without_warning_and_never_written():
    dataset = toy(padding=2, flip=True)
    rows = np.arange(30)
    rows.flags.writeable = False
    inputs, labels = dataset.inputs.copy(), dataset.labels.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resident = Resident(dataset, CPU)
        made, classes = resident.epoch(rows, seeded())
        made.zero_(), classes.zero_()  # what the caller does with its tensors stays with the caller
        made, classes = resident.batch(rows)
        made.zero_(), classes.zero_()
    assert resident._inputs.data_ptr() == dataset.inputs.ctypes.data
    assert np.array_equal(dataset.inputs, inputs)
    assert np.array_equal(dataset.labels, labels)
    assert rows.tolist() == list(range(30))


def test_float32_samples_are_normalised_and_never_written():
    rng = np.random.default_rng(1)
    inputs, labels = rng.normal(size=(40, 1, 16, 3)).astype(np.float32), rng.integers(0, 7, 40)
    before = inputs.copy()
    inputs.flags.writeable = labels.flags.writeable = False
    dataset = Dataset("toy", inputs, labels, 30, 7, 1.0, (0.4, -0.5, 0.3), (0.25, 2.0, 0.5), 0, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resident = Resident(dataset, CPU)
    rows = np.arange(40)
    made, classes = resident.batch(rows)
    assert made.shape == (40, 3, 1, 16)
    assert made.is_contiguous(memory_format=torch.channels_last)
    expected = (before.astype(np.float64) - dataset.mean) / dataset.std
    np.testing.assert_allclose(made.permute(0, 2, 3, 1).numpy(), expected, atol=2e-6)
    made.zero_(), classes.zero_()
    shuffled, classes = resident.epoch(rows, seeded())
    order = torch.randperm(40, generator=seeded()).numpy()
    np.testing.assert_allclose(shuffled.permute(0, 2, 3, 1).numpy(), expected[order], atol=2e-6)
    shuffled.zero_(), classes.zero_()
    assert resident._inputs.data_ptr() == inputs.ctypes.data
    assert inputs.tobytes() == before.tobytes()


def test_float32_samples_are_cropped_and_mirrored_as_bytes_are():
    images = np.array(toy().inputs)
    bytes_made = augment(torch.from_numpy(images), 2, True, seeded())
    float_made = augment(torch.from_numpy(images.astype(np.float32)), 2, True, seeded())
    assert torch.equal(bytes_made.float(), float_made)


def test_no_rows_give_an_empty_epoch():
    inputs, labels = Resident(toy(padding=2, flip=True), CPU).epoch(np.array([], dtype=np.int64), seeded())
    assert inputs.shape == (0, 3, 6, 5)
    assert labels.shape == (0,)

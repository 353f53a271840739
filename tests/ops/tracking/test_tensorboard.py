"""TensorBoard: the same numbers against rounds, accuracies against simulated seconds too."""

from __future__ import annotations

from pathlib import Path

import pytest

from ops.tracking.history import History
from tests.ops.tracking.following import follow
from tests.ops.tracking.readers import tensorboard_events
from tests.tiny import lines, tiny

# Rounds of some simulated seconds.
BOARD = ("tracking=tensorboard", "rounds=4", "checkpoint.every=2", "time.devices.latency_s=5")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its third round and went on from its second."""
    folder = tmp_path_factory.mktemp("tensorboard")
    follow(tiny(folder, *BOARD), folder / "run", rounds=3)
    follow(tiny(folder, *BOARD), folder / "run", resume=True)
    return folder / "run"


def shown(path: Path) -> dict[str, dict[int, object]]:
    """What TensorBoard shows: by name and step, after forgetting what a start told it to forget."""
    found: dict[str, dict[int, object]] = {}
    for event in tensorboard_events(path):
        if event.session_log.status == event.session_log.START:
            found = {name: {s: v for s, v in at.items() if s < event.step} for name, at in found.items()}
        for value in event.summary.value:
            assert event.step not in found.get(value.tag, {}), f"{value.tag} has step {event.step} twice"
            found.setdefault(value.tag, {})[event.step] = value
    return found


def test_rows(path: Path) -> None:
    found, history = shown(path), History()
    for record in lines(path):
        for name, right in history.row(record).items():
            value = found[name][record["round"]]
            assert value.simple_value == pytest.approx(right)  # type: ignore[attr-defined]
    assert found["test/global"].keys() == {4}


def test_accuracies_by_simulated_second(path: Path) -> None:
    evaluated = [record for record in lines(path) if "accuracy" in record]
    seconds = {round(record["sim_time_s"]) for record in evaluated}
    assert shown(path)["accuracy_by_simulated_second/global"].keys() == seconds


def test_pictures_and_the_plan(path: Path) -> None:
    found = shown(path)
    assert found["classes"].keys() == {0}
    assert found["timeline"].keys() == {0, 1, 2, 3}
    png = found["timeline"][3].image.encoded_image_string  # type: ignore[attr-defined]
    assert png.startswith(b"\x89PNG")
    text = found["plan/text_summary"][0].tensor.string_val[0].decode()  # type: ignore[attr-defined]
    assert text.splitlines()[0].startswith("| level | width | depth |")


def test_it_needs_no_id(path: Path) -> None:
    assert not (path / "tracking.json").exists()

"""FedScale's device file: what it holds is read, and nothing that it wants is done."""

from __future__ import annotations

import copyreg
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster_fl.errors import UserError
from cluster_fl.timing import fedscale

GOOD = {7: {"computation": 137.0, "communication": 5648.1}, 3: {"communication": 2000, "computation": 20.5}}


def write(folder: Path, content: object, protocol: int = 4) -> str:
    path = folder / "capacity"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return str(path)


def refusal(path: str) -> str:
    """The one line, which names the key, the path and what would be right."""
    with pytest.raises(UserError) as caught:
        fedscale.read(path)
    assert (caught.value.key, caught.value.value) == ("time.devices.file", path)
    line = str(caught.value)
    assert "\n" not in line
    assert "must be FedScale's pickled dict, client -> {computation: ms, communication: kbit/s}; it " in line
    return line


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_entries_are_read_in_order_whatever_the_protocol(tmp_path: Path, protocol: int) -> None:
    found = fedscale.read(write(tmp_path, GOOD, protocol))
    assert found.computation.tolist() == [137.0, 20.5]
    assert found.communication.tolist() == [5648.1, 2000.0]


def test_a_file_of_python_2_is_read(tmp_path: Path) -> None:
    """Its strings are bytes; and one of its longest forms."""
    text = b"(dp0\nI1\n(dp1\nS'computation'\np2\nF137.0\nsS'communication'\np3\nL5000L\nss."
    assert fedscale.read(write(tmp_path, text)) == (np.array([137.0]), np.array([5000.0]))
    short = (
        b"\x80\x02}q\x00K\x01}q\x01(U\x0bcomputationG"
        + struct.pack(">d", 2.5)
        + b"U\x0dcommunicationK\x09us."
    )
    assert fedscale.read(write(tmp_path, short)) == (np.array([2.5]), np.array([9.0]))


def test_many_entries(tmp_path: Path) -> None:
    """More than a batch of the pickle module (1,000)."""
    content = {str(k): {"computation": k + 1.0, "communication": 2.0 * k + 1} for k in range(2500)}
    found = fedscale.read(write(tmp_path, content))
    assert found.computation.tolist() == [k + 1.0 for k in range(2500)]
    assert found.communication.tolist() == [2.0 * k + 1 for k in range(2500)]


class Evil:
    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._target),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_call_is_not_made(tmp_path: Path, protocol: int) -> None:
    target = tmp_path / "made"
    path = write(tmp_path, {0: {"computation": Evil(target), "communication": 1.0}}, protocol)
    assert "asks for " in refusal(path)
    assert not target.exists()
    pickle.loads(Path(path).read_bytes())  # what it would have done
    assert target.exists()


def test_an_old_style_call_is_not_made(tmp_path: Path) -> None:
    target = tmp_path / "made"
    text = b"(S'" + str(target).encode() + b"'\nios\nmkdir\n."
    assert "asks for INST 'os mkdir'" in refusal(write(tmp_path, text))
    assert not target.exists()


def test_a_class_is_not_named(tmp_path: Path) -> None:
    assert "asks for GLOBAL 'collections OrderedDict'" in refusal(
        write(tmp_path, b"ccollections\nOrderedDict\n.")
    )
    scalar = {0: {"computation": np.float64(3.0), "communication": 1.0}}
    assert "asks for " in refusal(write(tmp_path, scalar))


def test_a_persistent_id_is_not_looked_up(tmp_path: Path) -> None:
    assert "asks for PERSID 'elsewhere'" in refusal(write(tmp_path, b"Pelsewhere\n."))
    assert "asks for BINPERSID" in refusal(write(tmp_path, b"\x80\x02K\x01Q."))


def test_the_extension_registry_is_not_asked(tmp_path: Path) -> None:
    copyreg.add_extension("os", "system", 240)
    try:
        pickle.loads(b"\x80\x02\x82\xf0.")  # it is in the registry's cache now
        assert "asks for EXT1 240" in refusal(write(tmp_path, b"\x80\x02\x82\xf0."))
    finally:
        copyreg.remove_extension("os", "system", 240)
        copyreg.clear_extension_cache()


@pytest.mark.parametrize("content", [[1, 2], (1, 2), {1, 2}, b"bytes", None, True, [GOOD], 5 + 3j])
def test_other_values_are_refused(tmp_path: Path, content: object) -> None:
    assert "it asks for " in refusal(write(tmp_path, content))


@pytest.mark.parametrize("content", [5, 2.5, "text"])
def test_a_value_is_no_dict(tmp_path: Path, content: object) -> None:
    assert refusal(write(tmp_path, content)).endswith("it holds no dict.")


def test_what_would_take_forever_or_all_memory_is_refused(tmp_path: Path) -> None:
    nested = b"\x80\x02)" + b"\x85" * 100_000 + b"."  # its hash would overflow the stack
    assert "asks for EMPTY_TUPLE" in refusal(write(tmp_path, nested))
    doubled = b"\x80\x02K\x01q\x00" + b"".join(b"h%ch%c\x86q%c" % (k, k, k + 1) for k in range(100)) + b"."
    assert "asks for TUPLE2" in refusal(write(tmp_path, doubled))
    huge = b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"."
    assert refusal(write(tmp_path, huge)).endswith("it is no whole pickle.")
    distant = b"\x80\x02}r\xff\xff\xff\xff."  # a list of so many values, in some unpicklers
    assert refusal(write(tmp_path, distant)).endswith("it holds an empty dict.")


def test_a_file_that_is_too_big_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, GOOD)
    monkeypatch.setattr(fedscale, "MOST_BYTES", 100)
    assert Path(path).stat().st_size <= 100
    assert len(fedscale.read(path).computation) == 2
    path = write(tmp_path, GOOD | dict.fromkeys(range(20), GOOD[7]))
    assert "it has more than 0 MB" in refusal(path)


@pytest.mark.parametrize(
    "content", [b"", b"gflops,down_mbps\n1,2\n", b"\x80\x04", b"}", b".", b"u.", b"(u.", b"h\x05."]
)
def test_no_pickle(tmp_path: Path, content: bytes) -> None:
    assert refusal(write(tmp_path, content)).endswith("it is no whole pickle.")


def test_no_file(tmp_path: Path) -> None:
    assert "it cannot be read: No such file" in refusal(str(tmp_path / "nothing"))
    assert "it cannot be read: " in refusal(str(tmp_path))


def test_an_empty_dict(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, {})).endswith("it holds an empty dict.")


@pytest.mark.parametrize("name", ["computation", "communication"])
def test_a_missing_column(tmp_path: Path, name: str) -> None:
    broken = {7: GOOD[7], "x": {key: value for key, value in GOOD[3].items() if key != name}}
    assert refusal(write(tmp_path, broken)).endswith(f"it has no {name} for client 'x'.")


def test_an_entry_is_no_dict(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, {1: 2.0})).endswith("it has no computation for client 1.")


@pytest.mark.parametrize("name", ["computation", "communication"])
@pytest.mark.parametrize("value", [0, 0.0, -1.5, float("nan"), float("inf"), 10**30, "137"])
def test_a_value_is_a_positive_number(tmp_path: Path, name: str, value: object) -> None:
    line = refusal(write(tmp_path, {7: GOOD[7], 3: GOOD[3] | {name: value}}))
    assert f"it has {name} {value!r} for client 3, where a positive number belongs." in line


def test_keys_are_plain(tmp_path: Path) -> None:
    assert "by keys that are no numbers or strings" in refusal(write(tmp_path, {1.5: GOOD[7]}))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_and_nothing_else(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(pickle.dumps(GOOD, data.draw(st.integers(0, 5))))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = write(tmp_path, bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        found = fedscale.read(path)
    except UserError:
        return
    assert all((column > 0).all() and np.isfinite(column).all() and len(column) for column in found)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary(max_size=60))
def test_any_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UserError, match=r"^time\.devices\.file="):
        fedscale.read(write(tmp_path, content))

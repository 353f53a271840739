"""A user's CSV of devices: what is read, and the one line about what cannot be."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import pytest

from cluster_fl.errors import UserError
from cluster_fl.timing import device_file

HEADER = "gflops,down_mbps,up_mbps\n"


def write(folder: Path, text: str, name: str = "devices.csv") -> str:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(path)


def refusal(path: str) -> str:
    with pytest.raises(UserError) as caught:
        device_file.read(path)
    assert (caught.value.key, caught.value.value) == ("time.devices.file", path)
    line = str(caught.value)
    assert "\n" not in line
    return line.removeprefix(f"time.devices.file={path}: ")


@pytest.mark.parametrize("name", ["devices.csv", "devices.csv.gz"])
def test_columns_in_any_order_and_others_between_them(tmp_path: Path, name: str) -> None:
    text = '\ufeffphone, UP_mbps ,memory_mb,gflops,down_mbps\na,5,inf,1.5,20\n\n"b,c",6,512,2e0,30\r\n'
    found = device_file.read(write(tmp_path, text, name))
    assert {key: column.tolist() for key, column in found.items()} == {
        "gflops": [1.5, 2.0],
        "down_mbps": [20.0, 30.0],
        "up_mbps": [5.0, 6.0],
        "memory_mb": [math.inf, 512.0],
    }
    assert all(column.dtype == np.float64 for column in found.values())


def test_all_columns(tmp_path: Path) -> None:
    text = "gflops,down_mbps,up_mbps,memory_mb,memory_gbps,latency_s\n1,2,3,4,5,0\n"
    found = device_file.read(write(tmp_path, text))
    assert [float(column[0]) for column in found.values()] == [1, 2, 3, 4, 5, 0]


@pytest.mark.parametrize("key", ["gflops", "down_mbps", "up_mbps"])
def test_a_missing_column(tmp_path: Path, key: str) -> None:
    names = [name for name in ("gflops", "down_mbps", "up_mbps") if name != key]
    line = refusal(write(tmp_path, ",".join(names) + "\n1,2\n"))
    assert line == f"must have one column {key}; its first line names {names[0]}, {names[1]}."


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    assert "must have one column latency_s" in refusal(
        write(tmp_path, "latency_s,gflops,down_mbps,up_mbps,Latency_s\n1,2,3,4,5\n")
    )


def test_an_empty_file(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, "")) == "must have one column gflops; its first line names nothing."


def test_a_header_alone(tmp_path: Path) -> None:
    line = refusal(write(tmp_path, HEADER + "\n\n"))
    assert line == "must have a row for each device below its header; it has none."


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "fast", "", "1,5"])
def test_a_value_is_a_positive_number(tmp_path: Path, text: str) -> None:
    cell = f'"{text}"' if "," in text else text
    line = refusal(write(tmp_path, f"{HEADER}1,2,3\n\n4,{cell},6\n"))
    assert line == f"must have a positive number in line 4, column down_mbps; it has {text!r}."


def test_a_row_that_is_too_short(tmp_path: Path) -> None:
    line = refusal(write(tmp_path, HEADER + "1,2\n"))
    assert line == "must have a positive number in line 2, column up_mbps; it has ''."


@pytest.mark.parametrize("text", ["-0.1", "nan", "inf"])
def test_a_latency_is_not_negative(tmp_path: Path, text: str) -> None:
    line = refusal(write(tmp_path, f"gflops,down_mbps,up_mbps,latency_s\n1,2,3,{text}\n"))
    assert line == f"must have a number of at least 0 in line 2, column latency_s; it has {text!r}."


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert refusal(str(tmp_path / "nothing.csv")) == "cannot be read: No such file or directory."
    assert refusal(str(tmp_path)).startswith("cannot be read: ")
    assert refusal(write(tmp_path, HEADER)[:-4] + ".gz").startswith("cannot be read: ")
    plain = tmp_path / "plain.csv.gz"
    plain.write_text(HEADER)
    assert refusal(str(plain)).startswith("cannot be read: Not a gzipped file")
    half = tmp_path / "half.csv.gz"
    half.write_bytes(gzip.compress((HEADER + "1,2,3\n" * 9).encode())[:-9])
    assert refusal(str(half)).startswith("must be a CSV in UTF-8")
    latin = tmp_path / "latin.csv"
    latin.write_bytes(HEADER.encode() + b"\xe9,1,2\n")
    assert refusal(str(latin)).startswith("must be a CSV in UTF-8")

"""Availability traces from files: what is read, and what is refused."""

from __future__ import annotations

import gzip
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster_fl.errors import UserError
from cluster_fl.timing import tables
from cluster_fl.timing.trace_files import read

HEAD = "user,start_s,end_s\n"
TRACED = "user,start_s,end_s,trace_start_s,trace_end_s\n"


def read_text(folder: Path, text: str) -> tables.Availability:
    file = folder / "traces.csv"
    file.write_text(text, encoding="utf-8")
    return read(str(file))


def lists(table: tables.Availability) -> list[list[float]]:
    return [column.tolist() for column in table]


def test_users_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    found = read_text(tmp_path, HEAD + "b,5,7.5\na,,\nb,1,2\n\n c d ,0,9\n")
    assert lists(found) == [[0, 2, 2, 3], [1, 5, 0], [2, 7.5, 9], [0, 0, 0], [9, 9, 9]]
    assert found.offsets.dtype == np.int64


def test_columns_in_any_order_and_others_between(tmp_path: Path) -> None:
    text = "\ufeffend_s, trace_end_s ,phone,start_s,user,trace_start_s\n40,200,x,30,7,20\n9.0,90,,3,8,3\n"
    assert lists(read_text(tmp_path, text)) == [[0, 1, 2], [30, 3], [40, 9], [20, 3], [200, 90]]


def test_times_count_to_a_1024th_of_a_second(tmp_path: Path) -> None:
    found = read_text(tmp_path, HEAD + "a,0.1,0.7\n")
    assert (found.starts * 1024).tolist() == [102]
    assert (found.ends * 1024).tolist() == [717]


@given(
    st.lists(
        st.tuples(st.integers(0, 500), st.lists(st.integers(0, 40), max_size=8).map(sorted)),
        min_size=1,
        max_size=5,
    ),
    st.randoms(use_true_random=False),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, users: list[tuple[int, list[int]]], shuffled: Random
) -> None:
    """Intervals from rising times, two and two, in any order of the rows of a user; also compressed."""
    rows: list[str] = []
    columns: list[list[int]] = [[0], [], [], [], []]
    for number, (begin, times) in enumerate(users):
        pairs = [(begin + a, begin + b) for a, b in zip(times[0::2], times[1::2], strict=False)]
        own = [f"user {number},{a},{b},{begin},{begin + 41}\n" for a, b in pairs]
        shuffled.shuffle(own)
        rows += own or [f"user {number},,,{begin},{begin + 41}\n"]
        for column, values in zip(columns[1:3], zip(*pairs, strict=True), strict=False):
            column.extend(values)
        columns[0].append(len(columns[1]))
        columns[3].append(begin)
        columns[4].append(begin + 41)
    folder = tmp_path_factory.mktemp("traces")
    if not any(a < b for a, b in zip(columns[1], columns[2], strict=True)):
        with pytest.raises(UserError, match="holds no interval"):
            read_text(folder, TRACED + "".join(rows))
        return
    assert lists(read_text(folder, TRACED + "".join(rows))) == columns
    packed = folder / "traces.csv.gz"
    packed.write_bytes(gzip.compress((TRACED + "".join(rows)).encode()))
    assert lists(read(str(packed))) == columns


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("", "has no column user; its first line must name user, start_s, end_s."),
        ("user,start_s\na,1\n", "has no column end_s; its first line must name user, start_s, end_s."),
        (
            "user,start_s,end_s,trace_end_s\na,1,2,3\n",
            "has no column trace_start_s; its first line must name ",
        ),
        (HEAD, "holds no interval: nobody could ever take part."),
        (HEAD + "a,,\nb,5,5\n", "holds no interval: nobody could ever take part."),
        (HEAD + "a,1,2\nb,1\n", "line 3 must hold user, start_s, end_s, times in seconds and not negative."),
        (HEAD + "a,1,2\nb,one,2\n", "line 3 must hold user"),
        (HEAD + "a,-1,2\n", "line 2 must hold user"),
        (HEAD + "a,nan,2\n", "line 2 must hold user"),
        (HEAD + "a,1,inf\n", "line 2 must hold user"),
        (HEAD + "a,1,1e300\n", "line 2 must hold user"),
        (HEAD + "a,1,2\n\nb,1,\n", "line 4: start_s and end_s must both be given, or neither."),
        (HEAD + "a,1,2\nb,3,2\n", "line 3: end_s must not be before start_s."),
        (HEAD + "a,1,5\nb,1,5\na,4,6\n", "line 4: the interval overlaps with another of its user."),
        (HEAD + "a,4,6\nb,1,5\na,1,5\n", "line 2: the interval overlaps with another of its user."),
        (HEAD + "a,1,9\na,4,4\n", "line 3: the interval overlaps with another of its user."),
        (TRACED + "a,1,2,0,9\nb,1,2,9,9\n", "line 3: trace_end_s must be after trace_start_s."),
        (TRACED + "a,1,2,0,9\nb,,,,\n", "line 3: trace_end_s must be after trace_start_s."),
        (
            TRACED + "a,1,2,0,9\nb,1,2,0,8\na,3,4,0,8\n",
            "line 4: trace_start_s and trace_end_s must be those of",
        ),
        (TRACED + "a,1,2,0,9\nb,1,2,2,9\n", "line 3: the interval must lie between trace_start_s and"),
        (TRACED + "a,8,10,0,9\n", "line 2: the interval must lie between trace_start_s and trace_end_s."),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, right: str) -> None:
    with pytest.raises(UserError) as caught:
        read_text(tmp_path, text)
    assert str(caught.value).startswith(f"time.availability.file={tmp_path / 'traces.csv'}: {right}")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    text, packed, cut = (tmp_path / name for name in ("latin.csv", "plain.csv.gz", "cut.csv.gz"))
    text.write_bytes(b"user,start_s,end_s\n\xff\xfe,1,2\n")
    packed.write_text(HEAD + "a,1,2\n")
    cut.write_bytes(gzip.compress((HEAD + "a,1,2\n" * 1000).encode())[:-20])
    for file in (tmp_path / "absent.csv", tmp_path, text, packed, cut):
        with pytest.raises(UserError, match=r"^time\.availability\.file=.*: cannot be read: ") as caught:
            read(str(file))
        assert caught.value.value == str(file)

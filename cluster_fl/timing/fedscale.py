"""Reads FedScale's device file: a pickled dict, client -> {"computation": ms a sample, "communication": kbit/s}.

A pickle is a program that may import and call whatever it names, so that unpickling a file is to trust it. Here none
is unpickled: ``pickletools`` takes the file apart, which runs nothing, and of the instructions found only those are
followed that put numbers and strings into dicts. All others are refused, whatever they would do: naming a class,
calling, persistent ids, the extension registry, objects' states, other containers. No value is made that is not a
dict, int, float or string, and dicts' keys are ints and strings, so that no code of the file's choice ever runs. What a
file can make of memory is limited by its own size, which is limited too.
"""

from __future__ import annotations

import pickletools
import reprlib
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from cluster_fl.errors import UserError

# A file of 500,000 clients, as FedScale has them, has 15 to 17 MB. A hostile one takes 70 times its size in memory.
MOST_BYTES = 50_000_000
LARGEST = 1e15

# Instructions that make a number or a string, and those that remember a value and fetch it again.
VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT"} | {
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
PUTS, GETS = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}


class Capacities(NamedTuple):
    """Arrays of shape (entries,), float64, in the order of the file.

    Attributes:
        computation: milliseconds that the inference of a sample takes.
        communication: kbit/s, in both directions.
    """

    computation: np.ndarray
    communication: np.ndarray


def read(path: str) -> Capacities:
    """Seconds for the published 500,000 clients.

    Raises:
        UserError: naming time.devices.file, and what is wrong with its content.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        _refuse(path, f"cannot be read: {error.strerror}")
    if len(data) > MOST_BYTES:
        _refuse(path, f"has more than {MOST_BYTES // 10**6} MB")
    try:
        table = _built(data)
    except _Refused as refused:
        _refuse(path, str(refused))
    except (ValueError, IndexError, KeyError):
        _refuse(path, "is no whole pickle")
    if type(table) is not dict or not table:
        _refuse(path, "holds no dict" if type(table) is not dict else "holds an empty dict")
    return Capacities(*(_column(path, table, name) for name in Capacities._fields))


def _refuse(path: str, wrong: str) -> NoReturn:
    right = "must be FedScale's pickled dict, client -> {computation: ms, communication: kbit/s}"
    raise UserError("time.devices.file", path, f"{right}; it {wrong}.")


def _column(path: str, table: dict[Any, Any], name: str) -> np.ndarray:
    result = np.empty(len(table))
    for row, (client, entry) in enumerate(table.items()):
        if type(entry) is not dict or name not in entry:
            _refuse(path, f"has no {name} for client {reprlib.repr(client)}")
        value = entry[name]
        if type(value) not in (int, float) or not 0 < value < LARGEST:
            shown = f"{name} {reprlib.repr(value)} for client {reprlib.repr(client)}"
            _refuse(path, f"has {shown}, where a positive number belongs")
        result[row] = value
    return result


class _Refused(Exception):
    """The file wants more than plain dicts; the message says what."""


def _built(data: bytes) -> object:
    """What a pickle of dicts, numbers and strings holds.

    Raises:
        _Refused: it wants anything else.
        ValueError, IndexError, KeyError: it is not a pickle, or not a whole one.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    argument: Any
    for instruction, argument, _ in pickletools.genops(data):
        name = instruction.name
        if name in VALUES:
            stack.append(argument)
        elif name in GETS:
            stack.append(memo[argument])
        elif name in PUTS:
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("SETITEM", "SETITEMS", "DICT"):
            start = len(stack) - 2 if name == "SETITEM" else marks.pop()
            items = stack[start:]
            del stack[start:]
            if name == "DICT":
                stack.append({})
            _set(stack[-1], items)
        elif name == "STOP":
            return stack[-1]
        elif name not in ("PROTO", "FRAME"):
            what = name if argument is None else f"{name} {reprlib.repr(argument)}"
            raise _Refused(f"asks for {what}, and only dicts, numbers and strings are read")
    raise ValueError("no STOP")


def _set(target: object, items: list[Any]) -> None:
    keys, values = items[0::2], items[1::2]
    if type(target) is not dict or not all(type(key) in (int, str) for key in keys):
        raise _Refused("sets items of what is no dict, or by keys that are no numbers or strings")
    target.update(zip(keys, values, strict=True))

"""Runs the command in a process tree of its own, and ends exactly that tree.

Every process that a command starts inherits a mark in its environment, so those that Ray has put into other
sessions, or that have lost their parent, are found as well.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from uuid import uuid4

from tests.conftest import REPOSITORY

MARK = "CLUSTER_FL_TEST_MARK"
DEADLINE_S = 120.0
POLL_S = 0.002


CLUSTER_FL = (sys.executable, "-m", "ops.cli")


class Command:
    """``python -m ops.cli WORDS``, or another program; as a context manager it leaves no process behind."""

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        program: Sequence[str] = CLUSTER_FL,
        where: Path = REPOSITORY,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._mark = uuid4().hex
        self._out, self._err = folder / f"{self._mark}.out", folder / f"{self._mark}.err"
        inherited = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {MARK: self._mark}
        # An installed command's PYTHONPATH is none of our business; the checkout comes from the folder.
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                [*program, *words], cwd=where, env=inherited | dict(environment or {}),
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Command:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def await_(self, event: Callable[[], bool], deadline: float = DEADLINE_S) -> None:
        """Until ``event`` holds; an error if the command ends before."""
        wait(lambda: event() or self.process.poll() is not None, deadline)
        assert event(), f"ended with {self.process.returncode} before the event: {self.err}"

    def wait(self, deadline: float = DEADLINE_S) -> int:
        return self.process.wait(deadline)

    def interrupt(self, sent: int = signal.SIGINT) -> None:
        """Ctrl-C, as a terminal sends it: to the whole group."""
        os.killpg(self.process.pid, sent)

    def kill(self) -> None:
        """SIGKILL to every process of the tree, until none is left."""
        wait(lambda: not self._kill_once())
        self.process.wait(DEADLINE_S)

    def _kill_once(self) -> list[int]:
        found = self.tree()
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.poll()
        return found

    def seconds(self) -> float:
        """Processor time of the tree so far."""
        ticks = 0
        for pid in self.tree():
            try:
                ticks += sum(
                    map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])
                )
            except OSError:  # gone meanwhile
                continue
        return ticks / os.sysconf("SC_CLK_TCK")

    def tree(self) -> list[int]:
        """All living processes that carry this command's mark."""
        wanted = f"{MARK}={self._mark}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    environment = (entry / "environ").read_bytes()
                except OSError:  # another user's, or gone meanwhile
                    continue
                if wanted in environment.split(b"\0"):
                    found.append(int(entry.name))
        return found


def wait(event: Callable[[], bool], deadline: float = DEADLINE_S) -> None:
    """Returns as soon as ``event`` holds; fails at the deadline."""
    end = time.monotonic() + deadline
    while not event():
        assert time.monotonic() < end, f"nothing happened within {deadline:g} s"
        time.sleep(POLL_S)


def line_count(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


def children(parent: int) -> list[int]:
    """All living descendants of a process."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                above = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # gone meanwhile
                continue
            if above == parent:
                found += [int(entry.name), *children(int(entry.name))]
    return found


def listeners(pids: Iterable[int]) -> set[str]:
    """The addresses, as the kernel writes them, at which these processes listen for TCP connections."""
    sockets = set()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets.add(os.readlink(file))
            except OSError:  # gone meanwhile
                continue
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()
    ]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}

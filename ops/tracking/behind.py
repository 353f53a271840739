"""A tracker that cannot hold up a run: its work is done in a thread, and a failure of it is one line."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Protocol

from actors.events import Event, Working

# Longer than a sink itself waits for anything.
CLOSE_S = 900.0
SECRETS = ("WANDB_API_KEY",)


class Inner(Protocol):
    """May block and may raise."""

    def show(self, event: Event) -> None: ...

    def close(self) -> None: ...


class _Closing:
    """Ends with its ``with``."""

    def __enter__(self) -> _Closing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def show(self, event: Event) -> None:
        """Nothing to tell."""

    def close(self) -> None:
        """Nothing to end."""


class Nowhere(_Closing):
    """Tells nobody."""


class Behind(_Closing):
    """Hands events to ``inner`` in a thread; of what it fails at, the first is told."""

    def __init__(self, inner: Inner) -> None:
        self._inner = inner
        self._events: SimpleQueue[Event | None] = SimpleQueue()
        # A daemon: what is stuck on the network must not keep the command from ending.
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._begun = self._failed = False

    def show(self, event: Event) -> None:
        if isinstance(event, Working):
            return
        if not self._begun:
            self._thread.start()
            self._begun = True
        self._events.put(event)

    def close(self) -> None:
        if self._begun:
            self._events.put(None)
            self._thread.join(CLOSE_S)

    def _work(self) -> None:
        while (event := self._events.get()) is not None:
            self._try(partial(self._inner.show, event))
        self._try(self._inner.close)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            if not self._failed:
                warn(f"{type(error).__name__}: {error} (the run goes on, and its folder has everything)")
            self._failed = True


def warn(text: str) -> None:
    """One line on stderr, without secrets."""
    print(f"cluster-fl: tracking: {one_line(text)}", file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    for name in SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    return " ".join(text.split())

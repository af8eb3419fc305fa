"""How a worker is stopped: by a word from its parent, by the parent's death, or by SIGTERM."""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from types import FrameType

POLITE = 10.0
"""Seconds that a trainer has to save its run in before it is interrupted."""


class Stop:
    """A request to stop: first a question that the trainer asks, then KeyboardInterrupt, and that only while it trains.

    Made in the main thread of a worker. Ctrl-C reaches all processes of a terminal; it is for the parent to say what
    it means, so workers ignore it.
    """

    def __init__(self, parent: Connection) -> None:
        self.requested = False
        self._armed = self._overdue = False
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._asked)
        threading.Thread(target=self._listen, args=(parent,), daemon=True, name="stop").start()

    def _listen(self, parent: Connection) -> None:
        # Its end means that the parent is gone, and that nobody would look after this process.
        with suppress(EOFError, OSError):
            parent.recv()
        _thread.interrupt_main(signal.SIGTERM)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested = True
            # SIGALRM comes to the main thread even when it does not ask.
            signal.signal(signal.SIGALRM, self._insist)
            signal.setitimer(signal.ITIMER_REAL, POLITE)

    def _insist(self, number: int, frame: FrameType | None) -> None:
        self._overdue = True
        self._raise_if_overdue()

    def _raise_if_overdue(self) -> None:
        if self._overdue and self._armed:
            self._armed = False
            raise KeyboardInterrupt

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within the block a request to stop that is not heeded in time raises KeyboardInterrupt."""
        self._armed = True
        try:
            self._raise_if_overdue()
            yield
        finally:
            self._armed = False

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Within the block, inside an interrupting one, a request waits until the end of the block."""
        armed, self._armed = self._armed, False
        yield
        self._armed = armed
        self._raise_if_overdue()

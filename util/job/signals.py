"""SIGTERM and SIGINT: a first signal asks the program to stop when its work is safe; a second one ends it at once."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_SIGNAL_SECONDS = 1.0  # Ctrl-C reaches a process from the terminal and again from its launcher


class StopSignals:
    """Takes note of the signals that ask for a stop, and acts on them in `wait`, which a thread has to call repeatedly.

    Python runs a handler in the main thread, and only between two bytecode instructions; a call into PyTorch can keep
    these minutes apart. So the handlers do nothing, and the interpreter writes each signal's number to a socket, where
    any thread can read it at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None  # the first signal's number
        self._since = 0.0
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._replaced = {}
        if threading.current_thread() is threading.main_thread():
            self._replaced = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
            signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def wait(self, seconds: float) -> None:
        """Sleep; shorter if a signal comes. Ends the process with 128 + its number if it is the second one."""
        if not select.select([self._reader], [], [], seconds)[0]:
            return
        for number in self._reader.recv(64):
            if number not in SIGNALS:
                continue
            if self.received is None:
                self.received, self._since = number, time.monotonic()
            elif time.monotonic() - self._since > SAME_SIGNAL_SECONDS:
                os._exit(128 + number)

    def wake(self) -> None:
        """Make a `wait` in another thread return."""
        self._writer.send(b"\0")

    def close(self) -> None:
        """Give the signals back to their earlier handlers."""
        if self._replaced:
            signal.set_wakeup_fd(-1)
        for number, handler in self._replaced.items():
            with contextlib.suppress(TypeError):  # None: a handler that Python did not set
                signal.signal(number, handler)
        self._reader.close()
        self._writer.close()

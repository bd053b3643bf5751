"""Writing in the background: files are written by a few threads while the next ones are being made."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Callable


class Writers:
    """A few threads that work in the background, with a bound on what waits for them; the block's end waits for all."""

    def __init__(self, num_threads: int = 4) -> None:
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads)
        self._running: deque[Future] = deque()

    def submit(self, function: Callable[..., object], *args: object) -> None:
        """Call the function in a thread; wait for one if all are busy. Raises what an earlier call has raised."""
        while self._running and (self._running[0].done() or len(self._running) >= self._num_threads):
            self._running.popleft().result()
        self._running.append(self._pool.submit(function, *args))

    def flush(self) -> None:
        """Wait until everything is done. Raises what a call has raised."""
        while self._running:
            self._running.popleft().result()

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

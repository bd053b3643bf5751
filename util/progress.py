"""How far a run is: a bar in a terminal, a line a minute elsewhere."""

from __future__ import annotations

import sys
import threading
import time

from tqdm import tqdm


class Progress:
    """Shows images done of all, images per second since the start of this session, and the time left.

    `update` may be called as often as one likes. Nothing is shown where `enabled` is False.
    """

    def __init__(self, total: int, done: int = 0, *, enabled: bool = True, line_seconds: float = 60.0) -> None:
        self._enabled, self._total, self._initial = enabled, total, done
        self._start = self._last_line = time.monotonic()
        self._line_seconds = line_seconds
        self._bar, self._lock = None, threading.Lock()
        if enabled and sys.stderr.isatty():
            # smoothing=0: the mean over the session, since batches of all ranks come in bursts.
            self._bar = tqdm(total=total, initial=done, unit="image", smoothing=0, dynamic_ncols=True)
        elif enabled:
            self._print_line(done)

    def update(self, done: int) -> None:
        """Show that `done` images are done, those of earlier sessions included. For another thread to call."""
        with self._lock:
            if self._bar is not None:
                self._bar.n = done
                self._bar.refresh()
            elif self._enabled and time.monotonic() - self._last_line >= self._line_seconds:
                self._last_line = time.monotonic()
                self._print_line(done)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.close()
            self._enabled, self._bar = False, None

    def _print_line(self, done: int) -> None:
        line = f"{done:,} of {self._total:,} images"
        if done > self._initial:
            rate = (done - self._initial) / (time.monotonic() - self._start)
            line += f", {rate:.2f} images/s, {tqdm.format_interval((self._total - done) / rate)} left"
        print(line, file=sys.stderr, flush=True)

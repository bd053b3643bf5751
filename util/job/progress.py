"""Progress of a run, a bar in a terminal and a line now and then elsewhere; within a batch it moves by steps."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from itertools import accumulate

import torch
from tqdm import tqdm

from models.lazymar.plan import Step

FIRST_LINE, MOST_BETWEEN_LINES = 5.0, 60.0  # seconds; the time between two lines doubles from one to the other
BAR = "{percentage:3.0f}%|{bar}| {n:,.1f} of {total:,} images [{elapsed}<{remaining}, {rate_fmt}]"


class StepProgress:
    """Progress within a batch. Call it with each step once the step has been handed to the device.

    A step counts by its share of the FLOPs. A GPU works behind the program: there a step counts once a CUDA event that
    was recorded after it has been reached, which is asked for and never waited for.

    Args:
        num_images:     number of images in the batch.
        flops_per_step: FLOPs of each step.
        device:         the device that samples the batch.
    """

    def __init__(self, num_images: int, flops_per_step: Sequence[int], device: torch.device) -> None:
        total = sum(flops_per_step)
        self._images = [num_images * flops / total for flops in accumulate(flops_per_step)]
        self._device = device
        self._handed: deque[tuple[torch.cuda.Event, int]] = deque()
        self._done = 0.0

    def __call__(self, step: Step) -> None:
        if self._device.type != "cuda":
            self._done = self._images[step.index]
            return
        event = torch.cuda.Event()
        event.record()
        self._handed.append((event, step.index))

    def images(self) -> float:
        """Return how many images the steps done so far amount to. Any thread may call it."""
        with contextlib.suppress(RuntimeError):  # an error on the device is reported where its results are used
            while self._handed and self._handed[0][0].query():
                self._done = self._images[self._handed.popleft()[1]]
        return self._done


class Progress:
    """Shows images done of all, images per second since the start of this session, and the time left.

    `update` may be called at any rate; lines appear at intervals of their own. If not `enabled`, nothing is shown.
    """

    def __init__(self, total: int, done: int = 0, *, enabled: bool = True, first_line: float = FIRST_LINE) -> None:
        self._enabled, self._total, self._initial = enabled, total, done
        self._done: float = done
        self._start = time.monotonic()
        self._next_line, self._line_seconds = self._start + first_line, first_line
        self._bar, self._lock = None, threading.Lock()
        if enabled and sys.stderr.isatty():
            # smoothing=0: the mean over the session, since batches of all ranks come in bursts.
            style = {"unit": "image", "smoothing": 0, "dynamic_ncols": True, "bar_format": BAR}
            self._bar = tqdm(total=total, initial=done, **style)

    def update(self, done: float) -> None:
        """Show that `done` images are done, those of earlier sessions included. Any thread may call it.

        What is shown never decreases, though `done` may: a batch is counted nowhere for a moment between its last step
        and its files.
        """
        with self._lock:
            self._done = min(max(self._done, done), self._total)
            if self._bar is not None:
                self._bar.n = self._done
                self._bar.refresh()
            elif self._enabled and time.monotonic() >= self._next_line:
                self._line_seconds = min(2 * self._line_seconds, MOST_BETWEEN_LINES)
                self._next_line = time.monotonic() + self._line_seconds
                self._print_line()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.close()
            self._enabled, self._bar = False, None

    def _print_line(self) -> None:
        elapsed, made = time.monotonic() - self._start, self._done - self._initial
        line = f"{self._done:,.1f}".removesuffix(".0") + f" of {self._total:,} images"
        if made > 0:
            rate = f"{made / elapsed:.2f} images/s" if made > elapsed else f"{elapsed / made:.2f} s per image"
            line += f", {rate}, about {tqdm.format_interval((self._total - self._done) / made * elapsed)} left"
        else:
            line += f", the first step is not finished after {tqdm.format_interval(elapsed)}"
        print(line, file=sys.stderr, flush=True)

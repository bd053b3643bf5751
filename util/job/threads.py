"""Work that goes to a few threads."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Callable, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

IMAGES_AT_ONCE = 16  # in a convolutional network on a GPU, which bounds its activations


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


def map_images(network: Callable[[Tensor], T], images: Tensor) -> list[T]:
    """`network` of a batch [B, ...] in parts, in order.

    On a CPU each image has a thread to itself. A convolution that several threads share rounds differently with their
    number, and an image must not depend on how many processes divide a machine.
    """
    if images.device.type != "cpu":
        return [network(part) for part in images.split(IMAGES_AT_ONCE)]
    num_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(network, images.split(1)))
    finally:
        torch.set_num_threads(num_threads)  # part of the setting is shared by all threads

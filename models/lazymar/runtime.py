"""Execution of a batch's steps: eager, or captured as CUDA graphs, which make one launch of thousands.

Only `Sampler` uses this, and offers `warm_up` and `is_warm` for it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

# Captures a call of a function without arguments: returns what runs it again, and what it returns each time, in place.
Capture = Callable[[Callable[[], Tensor]], "tuple[Callable[[], None], Tensor]"]


class CaptureError(RuntimeError):
    """Reports that a function could not be captured."""


class CudaCapture:
    """Captures CUDA graphs on a device, which share the memory of what lives only within or between them.

    They must be replayed in the order in which they were captured; in any order if nothing outlives a graph but its
    result, and that is read before another one is replayed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool, self.stream = device, torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        # Other threads may go on to allocate memory of their own meanwhile.
        capture = torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local")
        # A capture that fails does not go back to the stream that was current.
        with torch.cuda.device(self.device), torch.cuda.stream(current), capture:
            result = function()
        return graph.replay, result


class CapturedFunction:
    """A function of tensors, captured with the inputs it is made with, and replayed for others of the same shapes.

    The result is overwritten by the next call. Raises CaptureError if capturing fails.
    """

    def __init__(self, function: Callable[..., Tensor], capture: Capture, inputs: Sequence[Tensor]) -> None:
        try:
            self.inputs = [given.clone() for given in inputs]
            self.replay, self.result = capture(lambda: function(*self.inputs))
            self.replay()  # the first time, the graph still has to find room on the device
        except RuntimeError as error:
            raise CaptureError(str(error)) from error

    def __call__(self, *inputs: Tensor) -> Tensor:
        for held, given in zip(self.inputs, inputs):
            held.copy_(given)
        self.replay()
        return self.result


class Executor:
    """Executes functions of tensors: eagerly during the first batch, captured from the second one on.

    By the second batch the first one has made what libraries make at first use, which no capture may contain.

    Args:
        capture: makes what captures functions that are always called in the same order; None: all run eagerly.
    """

    def __init__(self, capture: Callable[[], Capture] | None) -> None:
        self._make_capture = capture
        self._capture: Capture | None = None  # from the second batch on
        self._captured: dict[Hashable, CapturedFunction] = {}
        self.is_warm = False  # whether all one-time work is done

    def __call__(self, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return `function(*inputs)`; the function of a key is always the same, and so are its inputs' shapes."""
        if self._capture is None:
            self.is_warm = self.is_warm or self._make_capture is None  # libraries and packed weights are ready
            return function(*inputs)
        if key not in self._captured:
            self._captured[key] = CapturedFunction(function, self._capture, inputs)
            return self._captured[key].result
        return self._captured[key](*inputs)

    def end_batch(self) -> None:
        """Note that a batch is complete."""
        self.is_warm = self._make_capture is None or self._capture is not None
        if self._make_capture is not None and self._capture is None:
            self._capture = self._make_capture()

"""Recording what a function launches on a GPU once, and replaying it: thousands of small launches become one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Records a call of a function without arguments: what runs it again, and what it returns each time, in place.
Recorder = Callable[[Callable[[], Tensor]], "tuple[Callable[[], None], Tensor]"]


class RecordingError(RuntimeError):
    """A function could not be recorded."""


class CudaRecorder:
    """Records CUDA graphs on a device, which share the memory of what lives only within or between them.

    They must be replayed in the order in which they were recorded; in any order if nothing outlives a graph but its
    result, and that is read before another one is replayed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool, self.stream = device, torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        # Other threads may go on to allocate memory of their own meanwhile.
        capture = torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local")
        # A recording that fails does not go back to the stream that was current.
        with torch.cuda.device(self.device), torch.cuda.stream(current), capture:
            result = function()
        return graph.replay, result


class Recorded:
    """A function of tensors, recorded at its first call and replayed at each, for inputs of the same shapes.

    The result is overwritten by the next call. Raises RecordingError at the first call if recording fails.
    """

    def __init__(self, function: Callable[..., Tensor], record: Recorder) -> None:
        self.function, self.record = function, record
        self.inputs: tuple[Tensor, ...] = ()
        self.replay: Callable[[], None] | None = None
        self.result: Tensor | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.replay is None:
            try:
                self.inputs = tuple(given.clone() for given in inputs)
                self.replay, self.result = self.record(lambda: self.function(*self.inputs))
                self.replay()  # the first time, the graph still has to find room on the device
            except RuntimeError as error:
                raise RecordingError(str(error)) from error
        else:
            for recorded, given in zip(self.inputs, inputs):
                recorded.copy_(given)
            self.replay()
        return self.result

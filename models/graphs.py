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
    """Records CUDA graphs, which share the memory of what lives only within or between them.

    They must be replayed in the order in which they were recorded.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on to allocate memory of their own meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
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
            except RuntimeError as error:
                raise RecordingError(str(error)) from error
        else:
            for recorded, given in zip(self.inputs, inputs):
                recorded.copy_(given)
        self.replay()
        return self.result

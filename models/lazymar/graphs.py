"""CUDA graphs: a step is captured once and replayed for later batches, as one launch in place of thousands."""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

# Captures a function without arguments: returns (replay_fn, static_output).
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


class CaptureError(RuntimeError):
    """A function could not be captured. The message is the first cause, not what followed from it."""


class CudaCapture:
    """Captures CUDA graphs on a device. They share one memory pool.

    A replay may overwrite what another graph left in the pool. Graphs that read each other's results must be replayed
    in the order of their capture; the output of others must be read before the next replay.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool, self.stream = device, torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        # Other threads may go on to allocate memory of their own.
        capture = torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local")
        # A capture that fails does not switch back to the stream that was current.
        with torch.cuda.device(self.device), torch.cuda.stream(current), capture:
            result = function()
        return graph.replay, result


class CapturedFunction:
    """A function of tensors, captured once and replayed for inputs of the same shapes, which are copied into static
    buffers. The next call overwrites the output. Raises CaptureError if capturing fails.
    """

    def __init__(self, function: Callable[..., Tensor], capture: Capture, inputs: Sequence[Tensor]) -> None:
        try:
            self.inputs = [given.clone() for given in inputs]
            self.replay, self.output = capture(lambda: function(*self.inputs))
            self.replay()  # computes the output, which capturing does not; may still run out of memory
        except RuntimeError as error:
            raise CaptureError(str(first_cause(error))) from error

    def __call__(self, *inputs: Tensor) -> Tensor:
        for buffer, given in zip(self.inputs, inputs):
            buffer.copy_(given)
        self.replay()
        return self.output


class Executor:
    """Runs functions of tensors: eagerly in the first batch, captured from the second batch on.

    The first batch finishes lazy library initialization, which cannot be captured.

    Args:
        make_capture: makes the `Capture`; see `CudaCapture` for the order of calls. None: run eagerly.
    """

    def __init__(self, make_capture: Callable[[], Capture] | None) -> None:
        self.make_capture = make_capture
        self.capture: Capture | None = None
        self.captured: dict[Hashable, CapturedFunction] = {}
        self.is_warm = False  # True when all one-time work is done

    def __call__(self, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return `function(*inputs)`. A key stands for one function and one set of input shapes."""
        if self.capture is None:
            self.is_warm = self.is_warm or self.make_capture is None
            return function(*inputs)
        if key not in self.captured:
            self.captured[key] = CapturedFunction(function, self.capture, inputs)
            return self.captured[key].output
        return self.captured[key](*inputs)

    def end_batch(self) -> None:
        """Record the end of a batch."""
        self.is_warm = self.make_capture is None or self.capture is not None
        if self.make_capture is not None and self.capture is None:
            self.capture = self.make_capture()


def first_cause(error: BaseException) -> BaseException:
    """Return the innermost exception that led to this one."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error

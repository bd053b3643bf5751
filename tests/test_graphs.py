"""Captured steps, replayed on other batches, compute what the sampler computes eagerly.

A stand-in captures on the CPU what CUDA graphs capture on a GPU: the operations, and the memory that they read and
write. What a capture leaves out, such as a value that was on the host, is then wrong in the same way.
"""

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from tools import SMALL, batch_of, make_sampler, short_settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import Sampler, SolverSteps
from models.lazymar.graphs import CapturedFunction, CaptureError
from models.lazymar.transformer import Transformer


class Operations(TorchDispatchMode):
    """Runs and lists operations; `replay` runs them again on the same memory.

    CUDA lists operations without running them: `undo` restores the memory that existed before and was written to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.overwritten: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for argument, value in zip(func._schema.arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.overwritten.append((value, value.clone()))
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def undo(self) -> None:
        for tensor, before in reversed(self.overwritten):
            tensor.copy_(before)
        self.overwritten.clear()

    def replay(self) -> None:
        for func, args, kwargs, captured in self.calls:
            for old, new in zip(tree_leaves(captured), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # else it has written in place
                    old.copy_(new)


class OperationCapture:
    made = 0

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        OperationCapture.made += 1
        with Operations() as operations:
            result = function()
        operations.undo()
        return operations.replay, result


def capturing_sampler(name: str = "lazymar", capture: type = OperationCapture, **changes) -> Sampler:
    sampler = make_sampler(SMALL, name, **short_settings(name, **changes))
    assert sampler.make_capture is None  # on a CPU
    sampler.make_capture = capture
    return sampler


def eager(sampler: Sampler, labels: Tensor, noise) -> Tensor:
    return Sampler(sampler.model, sampler.plan)(labels, noise)


# Chains that grow shorter, some of them shared by several steps; tokens with a chain of their own; a mix of branches.
RUNS = [
    *(("mar", {"cfg": cfg}) for cfg in (1.0, 2.5)),
    *(("lazymar", {"cfg": cfg, "num_sampling_steps": 21}) for cfg in (1.0, 2.5)),
    ("lazymar", {"selection": "random"}),
    ("lazymar", {"prune_layer": 0, "condition_cache": False}),
    ("lazymar", {"token_cache": False}),
    ("lazymar", {"condition_interval": 2}),
    ("lazymar+gtr+lateguidance", {"num_sampling_steps": SolverSteps(5)}),
    ("gtr", {}),
    ("lazymar+gtr+lateguidance", {"condition_cache": False}),
    ("disa+recap+lateguidance", {}),
    ("fast", {}),
]


@pytest.mark.parametrize(("name", "changes"), RUNS, ids=str)
def test_replayed_batches_are_those_of_the_eager_sampler(name: str, changes: dict) -> None:
    sampler = capturing_sampler(name, **changes)
    for seed, size in enumerate([2, 2, 1, 2, 2, 2]):  # eager, captured; then anew, and replayed too
        labels, noise = batch_of(SMALL, size, seed)
        torch.testing.assert_close(sampler(labels, noise), eager(sampler, labels, noise), rtol=0, atol=0)
    assert sampler.make_capture is OperationCapture, "it has given up, and shows nothing"
    heads = {(count, head) for step in sampler.plan for head, count in step.head_plans}
    assert sampler.state._execute_head.captured.keys() == heads


def test_a_warm_sampler_has_captured_everything() -> None:
    sampler = capturing_sampler()
    assert not sampler.is_warm(2)
    sampler.warm_up(2)
    assert sampler.is_warm(2) and not sampler.is_warm(1)
    before = OperationCapture.made
    sampler(*batch_of(SMALL, 2))
    assert before == OperationCapture.made > len(sampler.plan)


def test_on_a_cpu_one_step_warms_up() -> None:
    sampler, steps = make_sampler(SMALL, num_iter=4, num_sampling_steps=5), []
    assert not sampler.is_warm(2)
    sampler.warm_up(2)
    assert sampler.is_warm(2) and not sampler.is_warm(1)
    sampler(*batch_of(SMALL, 2), steps.append)
    assert [sampled.step for sampled in steps] == [*sampler.plan]


@pytest.fixture
def no_garbage_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def test_where_capturing_fails_memory_is_freed_and_the_images_are_made_all_the_same(no_garbage_collector) -> None:
    class OutOfMemory(OperationCapture):
        def __call__(self, function):
            if OperationCapture.made == made + 5:  # steps and heads have been captured by then
                raise RuntimeError("CUDA out of memory")
            return super().__call__(function)

    made, sampler = OperationCapture.made, capturing_sampler(capture=OutOfMemory)
    sampler(*batch_of(SMALL, 2, seed=0))
    before = weakref.ref(sampler.state.transformer)
    labels, noise = batch_of(SMALL, 2, seed=1)
    with pytest.warns(UserWarning, match="out of memory"):
        latents = sampler(labels, noise)
    assert before() is None and sampler.make_capture is None
    torch.testing.assert_close(latents, eager(sampler, labels, noise), rtol=0, atol=0)


def test_what_captured_steps_hold_is_free_before_another_batch_size_takes_its_memory(
    no_garbage_collector, monkeypatch
) -> None:
    sampler = capturing_sampler()
    sampler.warm_up(2)
    before, alive, make = weakref.ref(sampler.state.transformer), [], Transformer.__init__

    def noting(transformer: Transformer, *arguments) -> None:
        alive.append(before() is not None)
        make(transformer, *arguments)

    monkeypatch.setattr(Transformer, "__init__", noting)
    sampler(*batch_of(SMALL, 1))
    assert alive == [False]


def test_a_failed_capture_names_its_first_cause() -> None:
    def capture(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        try:
            return (lambda: None), function()
        except RuntimeError as error:  # like PyTorch's, which ends with another error
            raise RuntimeError("operation failed due to a previous error during capture") from error

    def fail() -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(CaptureError, match=r"^operation not permitted when stream is capturing$"):
        CapturedFunction(fail, capture, [])

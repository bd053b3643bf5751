"""Captured steps, replayed on other batches, compute what the sampler computes eagerly.

A stand-in captures on the CPU what CUDA graphs capture on a GPU: the operations, and the memory that they read and
write. What a capture leaves out, such as a value that was on the host, is then wrong in the same way.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from test_methods import short_settings
from tools import GUIDANCE, LABELS, MODEL, SETTINGS, SMALL, make_sampler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import MAR, CachePolicy, ImageNoise, Sampler, create_model, sample_tokens
from models.lazymar import graphs
from models.lazymar.caches import KeyValueCache
from models.lazymar.graphs import CapturedFunction, CaptureError, CudaCapture
from models.lazymar.transformer import Transformer

POLICIES = {
    "baseline": None,
    "lazy": CachePolicy(),
    "random rows": CachePolicy(selection="random"),
    "pruned in the first block, no condition cache": CachePolicy(prune_layer=0, condition_cache=False),
    "no token cache": CachePolicy(token_cache=False),
}


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

    def __init__(self) -> None:
        type(self).made += 1

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        with Operations() as operations:
            result = function()
        operations.undo()
        return operations.replay, result


def capturing_sampler(capture: type[OperationCapture], model: MAR = MODEL, **settings) -> Sampler:
    sampler = make_sampler(model, **settings)
    assert sampler.make_capture is None  # on a CPU
    sampler.make_capture = capture
    return sampler


def batch(seed: int, size: int, model: MAR = MODEL) -> tuple[Tensor, ImageNoise]:
    noise = ImageNoise(model, seed, range(size), SETTINGS["num_sampling_steps"])
    return LABELS.roll(seed)[:size], noise


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_replayed_batches_are_those_of_the_eager_sampler(cfg: float, policy: CachePolicy | None) -> None:
    settings = {**SETTINGS, "cfg": cfg, "cache": policy}
    sampler = capturing_sampler(OperationCapture, **settings)
    sizes = [2, 2, 2, 1, 2, 2, 2]  # eager, captured, replayed; then all anew
    for seed, size in enumerate(sizes):
        labels, noise = batch(seed, size)
        expected = sample_tokens(MODEL, labels, **settings, noise=noise)
        torch.testing.assert_close(sampler(labels, noise), expected, rtol=0, atol=0)
    assert sampler.make_capture is OperationCapture, "it has given up, and shows nothing"


# Chains that grow shorter, some of them shared by several steps; tokens with a chain of their own; a mix of branches.
METHODS = {
    "disa": {},
    "gtr": {"num_iter": (3, 2, 2)},
    "lazymar+gtr+lateguidance": {"num_iter": (4, 2, 2), "cache": CachePolicy(start_step=1, condition_cache=False)},
    "disa+recap+lateguidance": {},
    "fast": {"num_iter": (3, 2, 2)},
}


@pytest.mark.parametrize("name", METHODS)
def test_replayed_batches_of_other_methods(name: str) -> None:
    settings = {"method": name, **GUIDANCE, **short_settings(name), **METHODS[name]}
    sampler = capturing_sampler(OperationCapture, SMALL, **settings)
    for seed, size in enumerate([1, 2, 2, 2]):
        labels, noise = batch(seed, size, SMALL)
        expected = sample_tokens(SMALL, labels, **settings, noise=noise)
        torch.testing.assert_close(sampler(labels, noise), expected, rtol=0, atol=0)
    assert sampler.make_capture is OperationCapture
    heads = {(count, head) for step in sampler.plan for head, count in step.chains}
    assert sampler.state._execute_head.captured.keys() == heads


def test_only_the_second_batch_of_a_size_is_captured() -> None:
    sampler = capturing_sampler(OperationCapture, **SETTINGS)
    counts = []
    for seed in range(4):
        OperationCapture.made = 0
        sampler(*batch(seed, 2))
        counts.append(OperationCapture.made)
    assert counts[2:] == [0, 0] and counts[0] + counts[1] > 1


def test_a_warm_sampler_has_captured_everything() -> None:
    sampler = capturing_sampler(OperationCapture, **SETTINGS, cache=CachePolicy())
    assert not sampler.is_warm(2)
    sampler.warm_up(2)
    assert sampler.is_warm(2) and not sampler.is_warm(1)
    OperationCapture.made = 0
    graphs = len(sampler.state._execute_step.captured), len(sampler.state._execute_head.captured)
    sampler(*batch(0, 2))
    assert graphs[0] == SETTINGS["num_iter"] and OperationCapture.made == 0
    assert graphs == (len(sampler.state._execute_step.captured), len(sampler.state._execute_head.captured))


def test_on_a_cpu_one_step_warms_up() -> None:
    sampler, steps = make_sampler(MODEL, **SETTINGS), []
    assert not sampler.is_warm(2)
    sampler.warm_up(2)
    assert sampler.is_warm(2) and not sampler.is_warm(1)
    labels, noise = batch(0, 2)
    latents = sampler(labels, noise, steps.append)
    assert len(steps) == SETTINGS["num_iter"]
    torch.testing.assert_close(latents, sample_tokens(MODEL, labels, **SETTINGS, noise=noise), rtol=0, atol=0)


def test_where_capturing_fails_the_images_are_made_all_the_same() -> None:
    class Broken(OperationCapture):
        def __call__(self, function):
            if len(function().shape) == 3:  # conditions: their first step has been run by then
                return super().__call__(function)
            raise RuntimeError("operation not permitted when stream is capturing")

    sampler = capturing_sampler(Broken, **SETTINGS, cache=CachePolicy())
    sampler(*batch(0, 2))
    labels, noise = batch(1, 2)
    with pytest.warns(UserWarning, match="stream is capturing"):
        latents = sampler(labels, noise)
    expected = sample_tokens(MODEL, labels, **SETTINGS, cache=CachePolicy(), noise=noise)
    torch.testing.assert_close(latents, expected, rtol=0, atol=0)
    assert sampler.make_capture is None


@pytest.fixture
def no_garbage_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def test_what_captured_steps_hold_is_free_before_another_batch_size_takes_its_memory(
    no_garbage_collector, monkeypatch
) -> None:
    sampler = capturing_sampler(OperationCapture, **SETTINGS, cache=CachePolicy())
    for seed in range(2):
        sampler(*batch(seed, 2))
    before, alive = weakref.ref(sampler.state.transformer), []
    make = Transformer.__init__
    monkeypatch.setattr(
        Transformer, "__init__", lambda self, *args: (alive.append(before() is not None), make(self, *args))[1]
    )
    sampler(*batch(2, 1))
    assert alive == [False]


def test_what_was_captured_is_free_when_capturing_fails(no_garbage_collector) -> None:
    class OutOfMemory(OperationCapture):
        calls = 0

        def __call__(self, function):
            type(self).calls += 1
            if self.calls == 5:
                raise RuntimeError("CUDA out of memory")
            return super().__call__(function)

    sampler = capturing_sampler(OutOfMemory, **SETTINGS, cache=CachePolicy())
    sampler(*batch(0, 2))
    before = weakref.ref(sampler.state.transformer)
    with pytest.warns(UserWarning, match="out of memory"):
        sampler(*batch(1, 2))
    assert before() is None


class NoNoise:
    """Noise without values."""

    def __init__(self, model) -> None:
        self.orders = torch.empty(2, model.seq_len, dtype=torch.long, device="meta")
        self.shape = (SETTINGS["num_sampling_steps"] + 1, 2), model.token_dim

    def draw(self, step: int, num_tokens: int) -> Tensor:
        (draws, images), token_dim = self.shape
        return torch.empty(draws, images, num_tokens, token_dim, device="meta")


@pytest.mark.parametrize("name", ["lazymar", "disa+recap"])
def test_the_loop_never_waits_for_a_value(name: str) -> None:
    with torch.device("meta"):  # where there are none: asking for one is an error
        model = create_model("mar_tiny")
        latents = torch.empty(2, model.vae_embed_dim, 16, 16)
    sampler = make_sampler(model, name, **short_settings(name))
    steps = list(sampler.steps(LABELS[:2], NoNoise(model), latents))
    assert len(steps) == len(sampler.plan)


# What CUDA could not capture, asked of tensors on the meta device, which have no values

ILLEGAL = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)


class LegalCapture(OperationCapture):
    """Records operations that draw random numbers, depend on values, or touch tensors on the host."""

    illegal: set[str]
    captured = 0

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        class Legal(TorchDispatchMode):
            def __torch_dispatch__(mode, func, types, args=(), kwargs=None):
                if func._can_decompose():
                    with mode:
                        return func.decompose(*args, **(kwargs or {}))
                result = func(*args, **(kwargs or {}))
                tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
                by_numbers = func.__name__ == "index.Tensor" and not any(x.dtype == torch.bool for x in tensors)
                tags = [tag for tag in func.tags if tag in ILLEGAL and not by_numbers]
                if tags or any(not tensor.is_meta for tensor in tensors):
                    LegalCapture.illegal.add(func.__name__)
                LegalCapture.captured += 1
                return result

        with Legal():
            result = function()
        return (lambda: None), result


@pytest.mark.parametrize("name", ["lazymar", "lazymar+gtr+lateguidance"])
def test_captured_functions_hold_nothing_that_cuda_cannot_capture(name: str) -> None:
    LegalCapture.illegal, LegalCapture.captured = set(), 0
    with torch.device("meta"):
        model = create_model("mar_tiny")
        latents = torch.empty(2, model.vae_embed_dim, 16, 16)
    sampler = make_sampler(model, name, **short_settings(name))
    sampler.make_capture = LegalCapture
    for _ in range(2):  # the second batch is captured
        list(sampler.steps(LABELS[:2], NoNoise(model), latents))
    assert LegalCapture.captured > 1000 and not LegalCapture.illegal


class StreamContext:
    """Stands in for `torch.cuda.stream`: notes which stream is current."""

    current = "default"

    def __init__(self, stream: object) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        self.before, StreamContext.current = StreamContext.current, self.stream

    def __exit__(self, *_: object) -> None:
        StreamContext.current = self.before


class GraphContext(StreamContext):
    """Stands in for `torch.cuda.graph`: ends the capture before it restores the stream, as PyTorch does."""

    pools: list[object]

    def __init__(self, graph, pool: object, stream: object, capture_error_mode: str) -> None:
        super().__init__(stream)
        self.graph = graph
        GraphContext.pools.append(pool)

    def __exit__(self, *error: object) -> None:
        self.graph.capture_end(failed=error[0] is not None)
        super().__exit__()


class Graph:
    """Stands in for `torch.cuda.CUDAGraph`."""

    def capture_end(self, failed: bool) -> None:
        if failed:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        pass


@pytest.fixture
def mocked_cuda(monkeypatch) -> None:
    GraphContext.pools, StreamContext.current = [], "default"
    cuda = graphs.torch.cuda
    monkeypatch.setattr(cuda, "graph_pool_handle", object)
    monkeypatch.setattr(cuda, "Stream", lambda device: "side stream")
    monkeypatch.setattr(cuda, "current_stream", lambda device: StreamContext.current)
    monkeypatch.setattr(cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(cuda, "graph", GraphContext)
    monkeypatch.setattr(cuda, "stream", StreamContext)
    monkeypatch.setattr(cuda, "device", lambda device: contextlib.nullcontext())


def test_graphs_of_one_capture_share_a_memory_pool(mocked_cuda) -> None:
    capture = CudaCapture(torch.device("cuda", 0))
    streams = []
    for _ in range(2):
        CapturedFunction(lambda x: (streams.append(StreamContext.current), x + 1)[1], capture, [torch.zeros(2)])
    assert streams == ["side stream"] * 2 and StreamContext.current == "default"
    assert len(GraphContext.pools) == 2 and GraphContext.pools[0] is GraphContext.pools[1]


def test_a_failed_capture_names_its_first_cause_and_restores_the_stream(mocked_cuda) -> None:
    def fail() -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(CaptureError, match=r"^operation not permitted when stream is capturing$"):
        CapturedFunction(fail, CudaCapture(torch.device("cuda", 0)), [])
    assert StreamContext.current == "default"


def test_a_lazy_step_moves_only_the_new_rows() -> None:
    """Counts the bytes that writing an encoder block's keys and values moves: those of the new rows, and no index."""
    plan = make_sampler(MODEL, "lazymar", **SETTINGS).plan
    step = next(step for step in plan if not step.refresh)
    cache = KeyValueCache(2, 72, 8, torch.empty(1, 32))
    new = torch.randn(2, 8 + step.new.stop - step.new.start, 64)
    with Operations() as operations:
        known = cache.write_known(step, new)
    copied = [args[1].nbytes for func, args, *_ in operations.calls if func.__name__.startswith("copy_")]
    assert len(copied) == 2 and sum(copied) == new.nbytes
    assert not any("index" in func.__name__ for func, *_ in operations.calls)
    assert torch.equal(known[:, -(step.new.stop - step.new.start) :], new[:, 8:])

"""Elementwise work fused by the compiler is what it was, and where there is none it runs as it stands."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from test_sampling import LABELS, MODEL, SETTINGS, noise_for, relative_error
from torch import Tensor
from torch._dynamo.utils import counters

from models import CachePolicy, Sampler, sample_tokens
from models.diffloss import modulate
from models.fusion import Fused

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)
every_policy = pytest.mark.parametrize("policy", [None, CachePolicy()], ids=["baseline", "lazy"])


@needs_compiler
@every_policy
@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_latents_change_no_more_than_rounding(policy: CachePolicy | None, cfg: float, recwarn) -> None:
    settings = {**SETTINGS, "cfg": cfg, "cache": policy, "noise": noise_for(MODEL, 2, SETTINGS["num_sampling_steps"])}
    plain, compiled = (sample_tokens(MODEL, LABELS[:2], **settings, compile=on) for on in (False, True))
    assert relative_error(compiled, plain) < 1e-9
    assert not [warning for warning in recwarn if "not compiled" in str(warning.message)]


@needs_compiler
@every_policy
def test_when_the_second_batch_is_recorded_everything_has_been_compiled(policy: CachePolicy | None) -> None:
    """On a GPU nothing can be compiled during a recording."""
    compiled_before_recording = []

    class Recorder:
        def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
            compiled_before_recording.append(counters["stats"]["unique_graphs"])
            return lambda: None, function()

    sampler = Sampler(MODEL, **SETTINGS, cache=policy, compile=True)
    sampler.record = Recorder
    for _ in range(2):
        sampler(LABELS[:2])
    assert compiled_before_recording[0] > 0
    assert counters["stats"]["unique_graphs"] == compiled_before_recording[0]


def test_what_cannot_be_compiled_runs_as_it_stands() -> None:
    fused = Fused(modulate)

    def fail(*args):
        raise RuntimeError("no compiler\nand a long explanation")

    fused.compiled = fail
    x, shift, scale = torch.rand(3, 2, 4).unbind()
    with pytest.warns(UserWarning, match="modulate is not compiled, because that failed: no compiler$"):
        result = fused(x, shift, scale)
    assert torch.equal(result, modulate(x, shift, scale))
    assert torch.equal(fused(x, shift, scale), result)  # and says it once
